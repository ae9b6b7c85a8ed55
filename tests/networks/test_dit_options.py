"""What each option of DiT computes, against torch's own layers, other libraries and closed forms."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ornstein.errors import OrnsteinError
from ornstein.networks import DiT, count_parameters
from ornstein.networks.dit_blocks import DiTBlock, Surroundings, perceptron_width
from ornstein.networks.dit_condition import key_mask
from ornstein.networks.dit_positions import Positions, rotary_table, rotate
from ornstein.training.estimate import activation_bytes

from .conftest import SMALL_DIT, batch, perturb

# One row an option; each is compiled, masked, checkpointed and rebuilt below.
OPTIONS = {
    "default": {},
    "adaln_single": {"conditioning": "adaln_single"},
    "in_context": {"conditioning": "in_context"},
    "cross_attention": {"conditioning": "cross_attention"},
    "rope": {"positions": "rope", "registers": 2},
    "sincos_rope": {"positions": "sincos_rope", "norm": "rms", "mlp": "swiglu"},
    "learned": {"positions": "learned", "image_size": 8, "conditioning": "in_context", "long_skips": True},
    "qk_norm": {"qk_norm": "layer", "dropout": 0.1, "qkv_bias": False},
    "qk_norm_rms": {"qk_norm": "rms", "conditioning": "cross_attention", "norm": "rms"},
    "clock": {"noise_scale": -0.001, "noise_offset": 1.0},
}
CAPTIONS = {"text_dim": 6, "pooled_dim": 5, "concat_channels": 2}


def captions(size: int, height: int, width: int) -> dict[str, torch.Tensor]:
    return {
        "text": torch.randn(size, 4, 6),
        "text_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])[:size].bool(),
        "pooled": torch.randn(size, 5),
        "concat": torch.randn(size, 2, height, width),
    }


def make(name: str, **kwargs) -> DiT:
    return perturb(DiT(1, num_classes=10, **{**SMALL_DIT, **OPTIONS[name], **kwargs}))


@pytest.mark.parametrize("name", OPTIONS)
def test_captions_count_and_padding_does_not(name):
    network = make(name, **CAPTIONS)
    (x, noise_cond), cond = batch(1, 8)
    cond |= captions(3, 8, 8)
    y = network(x, noise_cond, **cond)
    for key in ("text", "pooled", "concat"):
        other = network(x, noise_cond, **{**cond, key: cond[key] + 1})
        assert ((other - y).flatten(1).abs().max(dim=1).values > 1e-4).all(), key
    garbage = torch.where(cond["text_mask"][..., None], cond["text"], torch.tensor(100.0))
    assert torch.equal(network(x, noise_cond, **{**cond, "text": garbage}), y)
    short = {**cond, "text": cond["text"][2:, :1], "text_mask": None}
    short |= {key: cond[key][2:] for key in ("label", "pooled", "concat")}
    # Another order of summation for another length: float32 rounding, relative to the largest output.
    torch.testing.assert_close(network(x[2:], noise_cond[2:], **short), y[2:], rtol=0, atol=1e-5 * y.abs().max().item())


@pytest.mark.parametrize("name", OPTIONS)
def test_a_caption_without_tokens_gives_finite_gradients(name):
    network = make(name, text_dim=6)
    (x, noise_cond), cond = batch(1, 8)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    network(x, noise_cond, text=torch.randn(3, 4, 6), text_mask=mask, **cond).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_whole_it_computes_the_same_at_every_size(name):
    torch._dynamo.reset()
    network = make(name, **CAPTIONS, depth=2 if OPTIONS[name].get("long_skips") else 1)
    compiled = torch.compile(network, fullgraph=True, backend="eager")  # the graph is what is judged, not the kernels
    for height, width in ((8, 8), (4, 6)) if name in ("default", "rope", "learned") else ((8, 8),):
        (x, noise_cond), cond = batch(1, height, width)
        cond |= captions(3, height, width)
        expected = network(x, noise_cond, **cond)
        torch.testing.assert_close(compiled(x, noise_cond, **cond), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpointing_changes_memory_and_nothing_else(name):
    network = make(name, text_dim=6, depth=4).train()
    (x, noise_cond), cond = batch(1, 16)
    text = torch.randn(3, 4, 6)
    kept, losses, gradients = [], [], []
    for network.checkpointing in (False, True):
        network.zero_grad()
        torch.manual_seed(3)  # dropout's
        kept.append(
            activation_bytes(
                network, lambda: losses.append(network(x, noise_cond, text=text, **cond).square().mean()) or losses[-1]
            )
        )
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert losses[0] == losses[1]
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_what_a_validation_has_made_training_can_use(name):
    """Tensors made in inference mode cannot enter autograd: tables are kept from the first call on."""
    network = make(name)
    (x, noise_cond), cond = batch(1, 8)
    with torch.inference_mode():
        expected = network(x, noise_cond, **cond)
    y = network.eval()(x, noise_cond, **cond)
    y.sum().backward()
    assert torch.equal(y, expected)


def test_unmodulated_blocks_are_those_of_torch():
    gelu = partial(F.gelu, approximate="tanh")
    common = {"dim_feedforward": 64, "dropout": 0.0, "activation": gelu, "layer_norm_eps": 1e-6}
    common |= {"batch_first": True, "norm_first": True}
    x, context = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    encoder = perturb(nn.TransformerEncoderLayer(16, 2, **common))
    decoder = perturb(nn.TransformerDecoderLayer(16, 2, **common))
    for theirs, seen in ((encoder, False), (decoder, True)):
        ours = DiTBlock(16, heads=2, conditioning="cross_attention" if seen else "in_context", context=seen).eval()
        state = theirs.state_dict()
        names = {"qkv": "self_attn.in_proj_", "out": "self_attn.out_proj.", "norm1": "norm1."}
        names |= {"mlp_in": "linear1.", "mlp_out": "linear2.", "norm2": "norm3." if seen else "norm2."}
        names |= {"cross_norm": "norm2.", "cross.out": "multihead_attn.out_proj."} if seen else {}
        mapped = {
            f"{ours_}.{part}": state[f"{name}{part}"] for ours_, name in names.items() for part in ("weight", "bias")
        }
        for part in ("weight", "bias") if seen else ():
            mapped[f"cross.q.{part}"], mapped[f"cross.kv.{part}"] = state[f"multihead_attn.in_proj_{part}"].split(
                [16, 32]
            )
        ours.load_state_dict(mapped)
        around = Surroundings(context=context, context_mask=key_mask(mask)) if seen else Surroundings()
        expected = theirs(x, context, memory_key_padding_mask=~mask) if seen else theirs(x)
        torch.testing.assert_close(ours(x, None, around), expected, rtol=1e-5, atol=1e-5)


def test_adaln_single_with_captions_is_pixart():
    from diffusers import PixArtTransformer2DModel

    theirs = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=6,
        use_additional_conditions=False,
    )
    theirs = perturb(theirs)
    ours = DiT(4, 8, conditioning="adaln_single", text_dim=6, **SMALL_DIT).eval()
    assert count_parameters(ours) == count_parameters(theirs)
    state = theirs.state_dict()
    names = {"patches": "pos_embed.proj", "modulation": "adaln_single.linear", "out": "proj_out"}
    names |= {f"embed.mlp.{2 * i}": f"adaln_single.emb.timestep_embedder.linear_{i + 1}" for i in (0, 1)}
    names |= {f"text.{2 * i}": f"caption_projection.linear_{i + 1}" for i in (0, 1)}
    tables = {"out_table": state["scale_shift_table"]}
    for i in (0, 1):
        block = f"transformer_blocks.{i}"
        names |= {f"blocks.{i}.out": f"{block}.attn1.to_out.0", f"blocks.{i}.cross.out": f"{block}.attn2.to_out.0"}
        names |= {f"blocks.{i}.mlp_in": f"{block}.ff.net.0.proj", f"blocks.{i}.mlp_out": f"{block}.ff.net.2"}
        names |= {f"blocks.{i}.cross.q": f"{block}.attn2.to_q"}
        tables[f"blocks.{i}.table"] = state[f"{block}.scale_shift_table"]
        for part in ("weight", "bias"):
            tables[f"blocks.{i}.qkv.{part}"] = torch.cat([state[f"{block}.attn1.to_{c}.{part}"] for c in "qkv"])
            tables[f"blocks.{i}.cross.kv.{part}"] = torch.cat([state[f"{block}.attn2.to_{c}.{part}"] for c in "kv"])
    layers = {
        f"{name}.{part}": state[f"{other}.{part}"] for name, other in names.items() for part in ("weight", "bias")
    }
    ours.load_state_dict({**layers, **tables})
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    noise_cond = torch.tensor([3.0, 40.0])
    with torch.no_grad():
        expected = theirs(x, text, noise_cond, encoder_attention_mask=mask).sample
        y = ours(x, noise_cond, text=text, text_mask=mask)
    # Angles in float32, and theirs masks with -10,000 instead of minus infinity.
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_rotations_are_those_of_complex_numbers():
    """Channel pairs as complex numbers, the first half of them turned by the row, the second by the column."""
    q = torch.randn(1, 1, 2 + 12, 16, dtype=torch.float64)
    turned = rotate(q, tuple(table.double() for table in rotary_table(3, 4, 16, prefix=2)))
    theta = 10_000.0 ** (-torch.arange(4) / 4).double()
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    angles = torch.cat([rows.flatten()[:, None] * theta, columns.flatten()[:, None] * theta], dim=1)
    pairs = torch.view_as_complex(q[0, 0, 2:].unflatten(-1, (8, 2)).contiguous())
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)
    assert torch.equal(turned[0, 0, :2], q[0, 0, :2])
    # The table is kept in float32.
    torch.testing.assert_close(turned[0, 0, 2:], expected, rtol=0, atol=1e-6)


def test_rotated_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 8).double()
    table = tuple(each.double() for each in rotary_table(6, 6, 8))
    every = torch.ones(36, 1).double()
    scores = (rotate(q * every, table) @ rotate(k * every, table).T).view(6, 6, 6, 6)
    torch.testing.assert_close(scores[1, 2, 3, 1], scores[3, 4, 5, 3], rtol=0, atol=1e-6)
    torch.testing.assert_close(scores[0, 0, 0, 5], scores[5, 0, 5, 5], rtol=0, atol=1e-6)
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3


def test_learned_positions_are_interpolated():
    positions = Positions("learned", 8, head_dim=4, grid=(3, 3))
    cpu = torch.device("cpu")
    assert positions.added(3, 3, cpu) is positions.table
    with torch.no_grad():
        positions.table.copy_(torch.arange(3.0).repeat(3)[:, None].expand(9, 8))  # the column's number
    wide = positions.added(3, 9, cpu).detach().view(3, 9, 8)
    assert (wide - wide[:1]).abs().max() < 1e-5 and (wide - wide[..., :1]).abs().max() < 1e-5
    assert wide[0, 4, 0].item() == pytest.approx(1.0, abs=1e-5) and (wide[0, :, 0].diff() > -0.1).all()


@pytest.mark.parametrize("qk_norm", ["layer", "rms"])
def test_normed_heads_do_not_see_the_size_of_queries_and_keys(qk_norm):
    block = perturb(DiTBlock(16, heads=2, conditioning="in_context", qk_norm=qk_norm))
    x = torch.randn(1, 6, 16)
    before = block(x, None)
    with torch.no_grad():
        block.qkv.weight[:32] *= 1000
        block.qkv.bias[:32] *= 1000
    # But for the epsilon (1e-5 of a variance of about 1), which no longer counts.
    torch.testing.assert_close(block(x, None), before, rtol=0, atol=1e-3)
    x, bare = 5 * x, perturb(DiTBlock(16, heads=2, conditioning="in_context"))
    before = bare(x, None)
    with torch.no_grad():
        bare.qkv.weight[:32] *= 1000
    assert (bare(x, None) - before).abs().max() > 1e-2


def test_swiglu_has_the_parameters_of_gelu():
    assert perceptron_width(1152, 4.0, "swiglu") == 3072 and perceptron_width(1152, 4.0, "gelu") == 4608
    sizes = [count_parameters(DiTBlock(384, heads=6, mlp=mlp)) for mlp in ("gelu", "swiglu")]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)
    block = DiTBlock(16, heads=2, conditioning="in_context", mlp="swiglu")
    x = torch.randn(1, 3, 16)
    with torch.no_grad():
        block.mlp_in.bias.zero_()
    width = perceptron_width(16, 4.0, "swiglu")
    gate, value = x @ block.mlp_in.weight[:width].T, x @ block.mlp_in.weight[width:].T
    torch.testing.assert_close(block._perceptron(x), block.mlp_out(F.silu(gate) * value))


@pytest.mark.parametrize("depth", [4, 5])
def test_long_skips_join_the_last_to_the_first(depth):
    network = make("default", depth=depth, long_skips=True)
    condition, h, kept = torch.randn(1, 32), torch.randn(1, 4, 32), []
    expected = h
    for index, block in enumerate(network.blocks):
        if index >= depth - depth // 2:
            expected = block.long_skip(torch.cat([expected, kept.pop()], dim=-1))
            block.long_skip, joint = None, block.long_skip
            expected = block(expected, F.silu(condition))
            block.long_skip = joint
        else:
            expected = block(expected, F.silu(condition))
            kept = [*kept, expected][: depth // 2]
    torch.testing.assert_close(network._run(h, F.silu(condition), Surroundings()), expected)


def test_registers_are_attended_to_in_any_order_and_dropped():
    network = make("rope")
    (x, noise_cond), cond = batch(1, 8)
    y = network(x, noise_cond, **cond)
    assert y.shape == x.shape
    with torch.no_grad():
        network.registers.copy_(network.registers.flip(0))
        torch.testing.assert_close(network(x, noise_cond, **cond), y, rtol=1e-4, atol=1e-4)
        network.registers.mul_(-3)
    assert (network(x, noise_cond, **cond) - y).abs().max() > 1e-3


def test_another_clock_is_another_condition():
    plain, turned = DiT(1, **SMALL_DIT), DiT(1, noise_scale=-2.0, noise_offset=7.0, **SMALL_DIT)
    perturb(plain)
    turned.load_state_dict({**plain.state_dict(), "noise.values": torch.tensor([-2.0, 7.0, 0.0])})
    x, noise_cond = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 30.0])
    torch.testing.assert_close(turned.eval()(x, noise_cond), plain(x, 7 - 2 * noise_cond))
    half = turned.to(torch.bfloat16)  # the condition is not rounded with the weights
    assert half.noise(torch.tensor([1000.5]).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("other", [{"noise_scale": -0.001}, {"noise_offset": 1.0}, {"noise_embedding": "ddpm"}])
def test_weights_of_another_clock_are_refused(other):
    plain, turned = DiT(1, **SMALL_DIT), DiT(1, **SMALL_DIT, **other)
    turned.load_state_dict(turned.state_dict())
    turned.to(torch.bfloat16).load_state_dict(turned.state_dict())
    for network, state in ((plain, turned.state_dict()), (turned, plain.state_dict())):
        with pytest.raises(OrnsteinError, match=r"noise_embedding=.*noise_scale=.*noise_offset=.*model.network"):
            network.load_state_dict(state)
    nested = nn.ModuleDict({"inner": plain})
    with pytest.raises(OrnsteinError, match="another way"):
        nested.load_state_dict({f"inner.{key}": value for key, value in turned.state_dict().items()})
    turned.load_state_dict({"out.bias": turned.out.bias}, strict=False)  # a few weights alone, as adapters have


@pytest.mark.parametrize(
    ("kwargs", "cond", "sentence"),
    [
        ({}, {"text": torch.zeros(2, 3, 6)}, "text_dim is null"),
        ({"text_dim": 6}, {}, "text_dim=6"),
        ({"text_dim": 6}, {"text": torch.zeros(2, 3, 5)}, "text_dim=6"),
        ({"text_dim": 6}, {"text": torch.zeros(2, 3, 6), "text_mask": torch.ones(2, 2).bool()}, "text_mask"),
        ({}, {"pooled": torch.zeros(2, 5)}, "pooled_dim is null"),
        ({"pooled_dim": 5, "conditioning": "in_context"}, {}, "pooled_dim=5"),
        ({}, {"concat": torch.zeros(2, 1, 8, 8)}, "concat_channels is 0"),
        ({"concat_channels": 2}, {"concat": torch.zeros(2, 2, 4, 8)}, r"\(2, 2, 8, 8\)"),
        ({"conditioning": "cross_attention", "num_classes": 3}, {}, "needs a label"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(kwargs, cond, sentence):
    with pytest.raises(OrnsteinError, match=sentence):
        DiT(1, **SMALL_DIT, **kwargs)(torch.zeros(2, 1, 8, 8), torch.zeros(2), **cond)
