"""Weights of DiT, SiT, LightningDiT and diffusers' DiT: each computes here what it computes there.

The first three are written out below from their papers, on state dicts of their layout, in float64.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ornstein.errors import OrnsteinError
from ornstein.networks import DiT
from ornstein.networks.layouts import convert, diffusers_dit, dit, find_layout, shift_noise
from ornstein.networks.layouts.diffusers_dit import to_diffusers

from .conftest import perturb

HIDDEN, HEADS, DEPTH, CHANNELS, CLASSES, SIDE = 48, 4, 2, 3, 5, 4


def axis(places: Tensor, width: int) -> Tensor:
    angles = places[:, None] * 10_000.0 ** (-torch.arange(width // 2).double() / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def foreign_state(
    *, patch: int = 2, out: int = 2 * CHANNELS, modern: bool = False, qk_norm: bool = False
) -> dict[str, Tensor]:
    """Random weights in the layout of DiT's code; `modern` has LightningDiT's parts."""
    shapes = {"x_embedder.proj": (HIDDEN, CHANNELS, patch, patch)}
    shapes |= {"t_embedder.mlp.0": (HIDDEN, 256), "t_embedder.mlp.2": (HIDDEN, HIDDEN)}
    shapes |= {"final_layer.linear": (patch**2 * out, HIDDEN), "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN)}
    for i in range(DEPTH):
        width = int(2 / 3 * 4 * HIDDEN) if modern else 4 * HIDDEN
        shapes |= {f"blocks.{i}.attn.qkv": (3 * HIDDEN, HIDDEN), f"blocks.{i}.attn.proj": (HIDDEN, HIDDEN)}
        first, second = ("w12", "w3") if modern else ("fc1", "fc2")
        shapes |= {f"blocks.{i}.mlp.{first}": ((2 if modern else 1) * width, HIDDEN)}
        shapes |= {f"blocks.{i}.mlp.{second}": (HIDDEN, width)}
        shapes |= {f"blocks.{i}.adaLN_modulation.1": (6 * HIDDEN, HIDDEN)}
    state = {f"{name}.weight": torch.randn(shape).double() * shape[1] ** -0.5 for name, shape in shapes.items()}
    state |= {f"{name}.bias": 0.1 * torch.randn(shape[0]).double() for name, shape in shapes.items()}
    state["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, HIDDEN).double()
    rows, columns = (each.flatten().double() for each in torch.meshgrid(*2 * [torch.arange(SIDE)], indexing="ij"))
    state["pos_embed"] = torch.cat([axis(columns, HIDDEN // 2), axis(rows, HIDDEN // 2)], dim=1)[None]
    if modern:
        norms = [f"blocks.{i}.norm{j}" for i in range(DEPTH) for j in (1, 2)] + ["final_layer.norm_final"]
        state |= {f"{norm}.weight": 1 + 0.1 * torch.randn(HIDDEN).double() for norm in norms}
        theta = 10_000.0 ** (-torch.arange(3).double() / 3)  # 12 channels a head: 3 frequencies for each axis
        angles = torch.cat([rows[:, None] * theta, columns[:, None] * theta], dim=1).repeat_interleave(2, dim=1)
        state |= {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}
    if qk_norm:
        names = [f"blocks.{i}.attn.{c}_norm.weight" for i in range(DEPTH) for c in "qk"]
        state |= {name: 1 + 0.1 * torch.randn(HIDDEN // HEADS).double() for name in names}
    return state


def foreign_forward(state: dict[str, Tensor], x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """What DiT's paper and, where the state dict has its parts, LightningDiT's compute."""
    linear = lambda h, name: h @ state[f"{name}.weight"].T + state[f"{name}.bias"]  # noqa: E731

    def norm(h: Tensor, name: str) -> Tensor:
        if f"{name}.weight" in state:
            return h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * state[f"{name}.weight"]
        return (h - h.mean(-1, keepdim=True)) * (h.var(-1, keepdim=True, correction=0) + 1e-6).rsqrt()

    def turned(h: Tensor) -> Tensor:
        if "feat_rope.freqs_cos" not in state:
            return h
        cosines, sines = state["feat_rope.freqs_cos"][:, ::2], state["feat_rope.freqs_sin"][:, ::2]
        first, second = h[..., ::2], h[..., 1::2]
        return torch.stack([first * cosines - second * sines, second * cosines + first * sines], dim=-1).flatten(-2)

    patch = state["x_embedder.proj.weight"].shape[-1]
    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    h = h.flatten(2).mT + state["pos_embed"]
    angles = t[:, None] * torch.exp(-9.210340371976184 * torch.arange(128).double() / 128)
    vector = linear(torch.cat([angles.cos(), angles.sin()], dim=1), "t_embedder.mlp.0")
    vector = linear(F.silu(vector), "t_embedder.mlp.2") + state["y_embedder.embedding_table.weight"][label]
    for i in range(DEPTH):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(F.silu(vector), f"{block}.adaLN_modulation.1")[
            :, None
        ].chunk(6, -1)
        qkv = linear(norm(h, f"{block}.norm1") * (1 + scale1) + shift1, f"{block}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, HEADS, HIDDEN // HEADS)).permute(2, 0, 3, 1, 4)
        if f"{block}.attn.q_norm.weight" in state:
            q, k = norm(q, f"{block}.attn.q_norm"), norm(k, f"{block}.attn.k_norm")
        weights = (turned(q) @ turned(k).mT * (HIDDEN // HEADS) ** -0.5).softmax(-1)
        h = h + gate1 * linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        inner = norm(h, f"{block}.norm2") * (1 + scale2) + shift2
        if f"{block}.mlp.w12.weight" in state:
            gate, value = linear(inner, f"{block}.mlp.w12").chunk(2, -1)
            h = h + gate2 * linear(F.silu(gate) * value, f"{block}.mlp.w3")
        else:
            h = h + gate2 * linear(F.gelu(linear(inner, f"{block}.mlp.fc1"), approximate="tanh"), f"{block}.mlp.fc2")
    shift, scale = linear(F.silu(vector), "final_layer.adaLN_modulation.1")[:, None].chunk(2, -1)
    h = linear(norm(h, "final_layer.norm_final") * (1 + scale) + shift, "final_layer.linear")
    h = h.view(len(x), SIDE, SIDE, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), -1, SIDE * patch, SIDE * patch)


def ours(state: dict[str, Tensor], **facts) -> DiT:
    converted = convert(state, **facts)
    assert converted.target == "ornstein.networks.DiT" and not converted.unmapped
    network = DiT(**converted.arguments).double().eval()
    network.load_state_dict(converted.state)
    return network


def inputs(patch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(3, CHANNELS, SIDE * patch, SIDE * patch).double(), torch.tensor([0, 3, CLASSES])


def test_dit_computes_the_same_one_step_later():
    state = foreign_state()
    assert find_layout(state) == "dit" and dit.recognise(state)
    network = ours(state, heads=HEADS)
    x, label = inputs(2)
    i = torch.tensor([0.0, 17.0, 999.0]).double()
    # Positions and the layer of the folded shift are kept as they come, in float64; tables are made in float32.
    torch.testing.assert_close(network(x, i + 1, label=label), foreign_forward(state, x, i, label), rtol=0, atol=1e-6)
    assert (network.image_size, network.out_channels, network.num_classes) == ((8, 8), 6, CLASSES)


@pytest.mark.parametrize(("out", "modern", "qk_norm"), [(3, True, False), (6, True, True), (6, False, False)])
def test_velocity_models_compute_the_same_against_their_clock(out, modern, qk_norm):
    """Time 1 - t, velocity data minus noise; the channels of a variance that their samplers ignore are left out."""
    patch = 1 if modern else 2
    state = foreign_state(patch=patch, out=out, modern=modern, qk_norm=qk_norm)
    network = ours(state, **({} if modern else {"family": "sit", "heads": HEADS}))
    x, label = inputs(patch)
    t = torch.tensor([0.0, 0.3, 1.0]).double()
    expected = -foreign_forward(state, x, 1 - t, label)[:, :CHANNELS]
    torch.testing.assert_close(network(x, 1000 * t, label=label), expected, rtol=0, atol=1e-6)


def test_what_shapes_tell_is_read_from_them():
    arguments = convert(foreign_state(patch=1, out=3, modern=True, qk_norm=True)).arguments
    assert arguments["heads"] == HEADS and arguments["mlp"] == "swiglu" and arguments["mlp_ratio"] == pytest.approx(4)
    assert arguments["norm"] == "rms" and arguments["qk_norm"] == "rms" and arguments["positions"] == "sincos_rope"
    assert convert(foreign_state(), heads=HEADS).arguments["mlp_ratio"] == 4
    told = convert(foreign_state(), heads=HEADS)
    assert told.dropped == ("pos_embed",) and "family=sit" in told.note and "objective=hybrid" in told.suggest
    assert convert(foreign_state(), heads=HEADS, family="sit").suggest == ("scheduler=flow", "objective=flow")


@pytest.mark.parametrize(
    ("change", "facts", "sentence"),
    [
        ({}, {}, "heads of a DiT 48 wide cannot be read"),
        ({"final_layer.linear.weight": None}, {"heads": 4}, "missing: out.weight"),
        ({"blocks.1.attn.proj.bias": None}, {"heads": 4}, "missing: blocks.1.out.bias"),
        (
            {"blocks.0.adaLN_modulation.1.weight": torch.zeros(4 * HIDDEN, HIDDEN)},
            {"heads": 4},
            "blocks.0.modulation.weight",
        ),
        ({"pos_embed": torch.zeros(1, 16, HIDDEN)}, {"heads": 4}, "pos_embed differs"),
        ({"pos_embed": torch.zeros(1, 15, HIDDEN)}, {"heads": 4}, "no square image"),
        ({}, {"heads": 4, "family": "pixart"}, "family is one of auto, dit, sit"),
    ],
)
def test_what_does_not_fit_is_named(change, facts, sentence):
    state = {**foreign_state(), **change}
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(OrnsteinError, match=sentence):
        convert(state, layout="dit", **facts)


def test_keys_without_a_place_are_listed():
    state = {**foreign_state(), "blocks.0.attn.bias_table": torch.zeros(1), "head.weight": torch.zeros(1)}
    assert convert(state, heads=HEADS).unmapped == ("blocks.0.attn.bias_table", "head.weight")
    assert find_layout({"conv.weight": torch.zeros(1)}) != "dit"


def theirs(**config):
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": CLASSES}
    sizes |= {"in_channels": 4, "out_channels": 8, "sample_size": 8, "norm_eps": 1e-6}
    return perturb(DiTTransformer2DModel(**{**sizes, **config}), scale=0.05)


def one_embedder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in which every block embeds time and class as the first does, as those of a trained DiT are stored."""
    first = {
        key.split(".emb.")[1]: value
        for key, value in state.items()
        if key.startswith("transformer_blocks.0.norm1.emb.")
    }
    return {key: first[key.split(".emb.")[1]] if ".norm1.emb." in key else value for key, value in state.items()}


# Steps in theirs; angles are in float32 there, and so in error by 6e-5 at 1000.
STEPS = ((0.0, 1.0, 7.0), 2e-5), ((0.0, 500.0, 999.0), 5e-4)


@pytest.mark.parametrize(("steps", "tolerance"), STEPS)
def test_diffusers_dit_computes_the_same_one_step_later(steps, tolerance):
    model = theirs().double()
    state = one_embedder(model.state_dict())
    model.load_state_dict(state)
    assert find_layout(state) == "diffusers_dit" and diffusers_dit.recognise(state) and not dit.recognise(state)
    converted = convert(state, config={"num_attention_heads": 4, "sample_size": 8})
    network = DiT(**converted.arguments).double().eval()
    network.load_state_dict(converted.state)
    x, label, i = torch.randn(3, 4, 8, 8).double(), torch.tensor([0, 3, CLASSES]), torch.tensor(steps).double()
    with torch.no_grad():
        expected = model(x, timestep=i, class_labels=label).sample
        y = network(x, i + 1, label=label)
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize(("noise_embedding", "classes"), [("sinusoidal", CLASSES), ("ddpm", CLASSES), ("ddpm", None)])
@pytest.mark.parametrize(("steps", "tolerance"), STEPS)
def test_ours_goes_out_to_diffusers(noise_embedding, classes, steps, tolerance):
    from diffusers import DiTTransformer2DModel

    arguments = {"in_channels": 4, "out_channels": 8, "image_size": 8, "hidden_size": 32, "depth": 2, "heads": 4}
    arguments |= {"num_classes": classes, "noise_embedding": noise_embedding, "noise_offset": 2.0}
    network = perturb(DiT(**arguments), scale=0.05).double()
    config, state = to_diffusers({**arguments, "_target_": "ornstein.networks.DiT"}, network.state_dict(), shift=1.0)
    model = DiTTransformer2DModel(**config).double().eval()
    model.load_state_dict(state)
    if noise_embedding == "sinusoidal":
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, i = torch.randn(3, 4, 8, 8).double(), torch.tensor(steps).double()
    label = torch.zeros(3, dtype=torch.long) if classes is None else torch.tensor([0, 3, classes])
    with torch.no_grad():
        y = network(x, i + 1, label=None if classes is None else label)
        expected = model(x, timestep=i, class_labels=label).sample
    torch.testing.assert_close(expected, y, rtol=0, atol=tolerance * y.abs().max().item())


def test_there_and_back_gives_the_same_weights():
    arguments = {"in_channels": 3, "image_size": 8, "hidden_size": 32, "depth": 2, "heads": 4, "num_classes": 2}
    network = perturb(DiT(**arguments, noise_embedding="ddpm"))
    config, state = to_diffusers({**arguments, "noise_embedding": "ddpm"}, network.state_dict(), shift=1.0)
    back = convert(state, config=config)
    assert {key: back.arguments[key] for key in arguments} == arguments and not back.unmapped
    for key, value in network.state_dict().items():
        # Two turns in float64, each rounded to float32.
        torch.testing.assert_close(back.state[key], value, rtol=0, atol=1e-6)


def test_a_null_class_of_a_fixed_number():
    network = perturb(DiT(1, image_size=8, hidden_size=32, depth=1, heads=4, num_classes=3))
    arguments = {"image_size": 8, "heads": 4}
    config, state = to_diffusers(arguments, network.state_dict(), classes=1000)
    table = state["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"]
    assert config["num_embeds_ada_norm"] == 1000 and table.shape == (1001, 32)
    assert torch.equal(table[:4], network.embed.label.weight) and (table[3:] == table[1000]).all()
    with pytest.raises(OrnsteinError, match="classes=2 leaves no row for each of the network's 3 classes"):
        to_diffusers(arguments, network.state_dict(), classes=2)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"positions": "rope"}, "no counterpart of positions=rope"),
        ({"mlp": "swiglu", "registers": 2}, "no counterpart of mlp=swiglu, registers=2"),
        ({"noise_embedding": "fourier"}, "no counterpart of noise_embedding=fourier"),
        ({"image_size": (8, 16)}, r"one square size, got image_size=\(8, 16\)"),
        ({"image_size": None}, "one square size, got image_size=None"),
    ],
)
def test_what_diffusers_lacks_is_refused(other, sentence):
    arguments = {"in_channels": 1, "image_size": 8, "hidden_size": 32, "depth": 1, "heads": 4, **other}
    with pytest.raises(OrnsteinError, match=sentence):
        to_diffusers(arguments, DiT(**arguments).state_dict())


def test_blocks_with_embedders_of_their_own_are_refused():
    with pytest.raises(OrnsteinError, match=r"embedded once here.*blocks\.1\.embed"):
        convert(theirs().state_dict(), config={"num_attention_heads": 4})


@pytest.mark.parametrize("by", [-1.0, 1.0, 12.5])
def test_a_shifted_condition_is_turned_weights(by):
    weight, noise_cond = torch.randn(7, 256).double(), torch.tensor([0.0, 3.3, 999.0]).double()
    f = 10_000.0 ** (-torch.arange(128).double() / 128)
    features = lambda c: torch.cat([(c[:, None] * f).cos(), (c[:, None] * f).sin()], dim=1)  # noqa: E731
    turned = shift_noise(weight, by=by)
    torch.testing.assert_close(features(noise_cond) @ turned.T, features(noise_cond + by) @ weight.T, rtol=0, atol=1e-9)
    torch.testing.assert_close(shift_noise(turned, by=-by), weight, rtol=0, atol=1e-12)
