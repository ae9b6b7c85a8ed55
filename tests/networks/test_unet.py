from itertools import pairwise

import pytest
import torch
from torch import nn

from ornstein.errors import OrnsteinError
from ornstein.networks import AnnotatedUNet, UNet, count_parameters
from ornstein.networks.annotated import WeightStandardizedConv2d
from ornstein.networks.attention import LinearAttention2d, SelfAttention2d, linear_attention, resolve_heads
from ornstein.networks.blocks import ConvNeXtBlock, Downsample, ResNetBlock, Upsample

from .conftest import batch, perturb


def test_ddpm_has_the_published_parameters():
    """35.7 M (Ho et al. 2020, app. B); 35,746,307 is what diffusers' google/ddpm-cifar10-32 counts."""
    with torch.device("meta"):
        network = UNet(
            3,
            image_size=32,
            base_channels=128,
            channel_mults=(1, 2, 2, 2),
            num_blocks=2,
            scale_shift=False,
            attention=("none", "full", "none", "none"),
            heads=1,
        )
    assert count_parameters(network) == 35_746_307


def test_annotated_widths_are_the_tutorials():
    """28, 28, 56, 112 channels; the parameter count is that of the published code at dim 28, 1 channel."""
    with torch.device("meta"):
        network = AnnotatedUNet(1, image_size=28)
    assert [level.resample.conv.out_channels for level in list(network.down)[:2]] == [28, 56]
    assert network.down[2].resample.out_channels == 112
    # Counted by hand, from the tutorial's class: two blocks and attention a level, 4 heads of 32.
    assert count_parameters(network) == expected_annotated(28, (1, 2, 4))


def expected_annotated(dim: int, mults: tuple[int, ...]) -> int:
    def conv(i: int, o: int, k: int, bias: bool = True) -> int:
        return i * o * k * k + bias * o

    def block(i: int, o: int) -> int:  # time projection, two conv + norm, 1x1 shortcut
        return conv(4 * dim, 2 * o, 1) + conv(i, o, 3) + conv(o, o, 3) + 4 * o + (conv(i, o, 1) if i != o else 0)

    def linear(c: int) -> int:  # pre-norm, qkv, out, norm
        return 2 * c + conv(c, 384, 1, bias=False) + conv(128, c, 1) + 2 * c

    widths = [dim, *(dim * m for m in mults)]
    pairs = list(pairwise(widths))
    total = conv(1, dim, 1) + conv(dim, 4 * dim, 1) + conv(4 * dim, 4 * dim, 1)
    for n, (i, o) in enumerate(pairs):
        last = n == len(pairs) - 1
        total += 2 * block(i, i) + linear(i) + (conv(i, o, 3) if last else conv(4 * i, o, 1))
        total += 2 * block(o + i, o) + linear(o) + conv(o, i, 3)  # the way up resamples with 3x3 at every level
    mid = widths[-1]
    total += 2 * block(mid, mid) + 2 * mid + conv(mid, 384, 1, bias=False) + conv(128, mid, 1)
    return total + block(2 * dim, dim) + conv(dim, 1, 1)


def test_standardised_filters_ignore_scale_and_offset_of_the_weight():
    conv = WeightStandardizedConv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 5, 5)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(7).add_(1)
    # Equal up to the epsilon of 1e-5 in the variance: weights of variance about 1/81 shift by 4e-4 of 1.
    torch.testing.assert_close(conv(x), before, rtol=2e-3, atol=2e-3)


def test_attention_stands_where_it_is_asked_for():
    network = UNet(
        1,
        base_channels=16,
        channel_mults=(1, 2, 2),
        num_blocks=(1, 2, 1),
        attention=("none", "linear", "full"),
        mid_attention="none",
        groups=4,
    )

    def kinds(modules):
        return [type(getattr(module, "attention", None)).__name__ for module in modules]

    down = ["Identity", "LinearAttention2d", "LinearAttention2d", "SelfAttention2d"]
    assert [k for k in kinds(network.encoder) if k != "NoneType"] == down
    up = ["SelfAttention2d"] * 2 + ["LinearAttention2d"] * 3 + ["Identity"] * 2
    assert [k for k in kinds(network.decoder) if k != "NoneType"] == up
    assert kinds(network.middle) == ["Identity", "Identity"]


def test_state_dict_keys_stay_what_checkpoints_hold():
    network = UNet(1, base_channels=8, channel_mults=(1, 2), num_blocks=1, groups=4, num_classes=2)
    keys = set(network.state_dict())
    block = {"norm1", "conv1", "condition", "norm2", "conv2"}
    expected = {
        f"{n}.{p}" for n in ("stem", "out_norm", "out", "embed.mlp.0", "embed.mlp.2") for p in ("weight", "bias")
    }
    expected |= {"embed.label.weight"}
    plain, widening = ["encoder.0", "middle.0", "middle.1"], ["encoder.2", *(f"decoder.{i}" for i in (0, 1, 3, 4))]
    for stage in plain + widening:
        names = block | ({"shortcut"} if stage in widening else set())
        expected |= {f"{stage}.block.{n}.{p}" for n in names for p in ("weight", "bias")}
    expected |= {f"{n}.conv.{p}" for n in ("encoder.1", "decoder.2") for p in ("weight", "bias")}
    expected |= {f"middle.0.attention.{n}.{p}" for n in ("norm", "qkv", "out") for p in ("weight", "bias")}
    assert keys == expected


@pytest.mark.parametrize(("size", "patch"), [(8, 1), (16, 1), (28, 2), (32, 2), ((16, 64), 4)])
def test_patch_size_is_chosen_from_the_image(size, patch):
    network = UNet(1, image_size=size, patch_size=None, base_channels=8, channel_mults=(1, 2), groups=4)
    assert network.patch_size == patch


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"block": "vit"}, "block is one of resnet, convnext, got 'vit'"),
        ({"attention": "cross"}, "attention is one of none, full, linear"),
        ({"mid_attention": "flash"}, "got 'flash'"),
        ({"attention": ("none", "full", "full")}, "attention has 3 entries but channel_mults has 2"),
        ({"num_blocks": (1, 1, 1)}, "num_blocks has 3 entries"),
        ({"channel_mults": ()}, "at least one level"),
        ({"patch_size": None}, "give image_size"),
        ({"attention": "full", "heads": 3}, "does not split into 3 attention heads"),
        ({"image_size": 30, "patch_size": 4}, r"30 x 30 do not divide by 8, .* patch_size 4 .* resize them to 32"),
    ],
)
def test_wrong_options_are_refused_by_name(kwargs, sentence):
    with pytest.raises(OrnsteinError, match=sentence):
        UNet(1, **{"base_channels": 16, "channel_mults": (1, 2), "groups": 4, **kwargs})


@pytest.mark.parametrize("network", ["annotated_groups", "annotated_block"])
def test_annotated_refuses_what_it_cannot_build(network):
    kwargs, sentence = {
        "annotated_groups": ({"base_channels": 30}, "divide into 4 groups"),
        "annotated_block": ({"block": "vit"}, "resnet, convnext"),
    }[network]
    with pytest.raises(OrnsteinError, match=sentence):
        AnnotatedUNet(1, **kwargs)


def test_layout_changes_speed_and_nothing_else():
    network = perturb(UNet(1, base_channels=16, channel_mults=(1, 2), num_blocks=1, attention="full", groups=4))
    inputs, _ = batch(1, 8, classes=None)
    last = network(*inputs)
    network.memory_format = torch.contiguous_format
    # Other kernels, other order of summation: float32 rounding.
    torch.testing.assert_close(network(*inputs), last, rtol=1e-4, atol=1e-4 * last.abs().max().item())


def test_linear_attention_is_its_formula():
    heads, d, height, width = 2, 3, 2, 5
    qkv = torch.randn(2, 3 * heads * d, height, width, dtype=torch.float64)
    result = linear_attention(qkv, heads).reshape(2, heads, d, height * width)
    q, k, v = qkv.reshape(2, 3, heads, d, height * width).unbind(1)
    for b in range(2):
        for h in range(heads):
            weights = k[b, h].softmax(-1) @ v[b, h].T  # (d, d)
            expected = weights.T @ (q[b, h].softmax(0) / d**0.5)
            torch.testing.assert_close(result[b, h], expected)


def test_full_attention_is_its_formula():
    module = SelfAttention2d(8, groups=2, heads=2).double()
    with torch.no_grad():
        module.out.weight.copy_(torch.eye(8)[:, :, None, None])
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    q, k, v = module.qkv(module.norm(x)).reshape(2, 3, 2, 4, 6).unbind(1)
    scores = torch.einsum("bhdn,bhdm->bhnm", q, k) / 2
    expected = torch.einsum("bhnm,bhdm->bhdn", scores.softmax(-1), v).reshape(2, 8, 3, 2)
    torch.testing.assert_close(module(x) - x, expected)


@pytest.mark.parametrize("attention", [SelfAttention2d, LinearAttention2d])
def test_attention_follows_a_permutation_of_positions(attention):
    module = perturb(attention(8, groups=1, heads=2, head_dim=5)).double()
    x = torch.randn(1, 8, 2, 6, dtype=torch.float64)
    order = torch.randperm(12)
    shuffled = module(x.flatten(2)[..., order].view(1, 8, 2, 6))
    torch.testing.assert_close(shuffled.flatten(2), module(x).flatten(2)[..., order])


@pytest.mark.parametrize(
    ("heads", "head_dim", "expected"), [(None, None, (1, 64)), (4, None, (4, 16)), (None, 32, (2, 32)), (3, 5, (3, 5))]
)
def test_heads_follow_from_what_is_given(heads, head_dim, expected):
    assert resolve_heads(64, heads=heads, head_dim=head_dim) == expected


@pytest.mark.parametrize("shuffle", [False, True])
def test_resampling_halves_and_doubles(shuffle):
    x = torch.randn(2, 4, 6, 8)
    assert Downsample(4, 6, shuffle=shuffle)(x).shape == (2, 6, 3, 4)
    assert Upsample(4, 6, shuffle=shuffle)(x).shape == (2, 6, 12, 16)


@pytest.mark.parametrize("block", [ResNetBlock, ConvNeXtBlock])
@pytest.mark.parametrize("scale_shift", [True, False])
def test_blocks_start_as_the_identity_and_dropout_acts_only_in_training(block, scale_shift):
    module = block(8, 8, embedding_channels=4, groups=4, dropout=0.5, scale_shift=scale_shift)
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    assert (module(x, embedding) == x).all()
    perturb(module)
    assert (module(x, embedding) == module(x, embedding)).all()
    module.train()
    assert (module(x, embedding) != module(x, embedding)).any()


@pytest.mark.slow
def test_compiled_network_gives_the_same_output():
    network = perturb(UNet(1, base_channels=8, channel_mults=(1, 2), num_blocks=1, groups=4, num_classes=3))
    (x, noise_cond), cond = batch(1, 8, classes=3)
    compiled: nn.Module = torch.compile(network, fullgraph=True)
    with torch.no_grad():  # the way back takes as long again, and tests/end_to_end/test_models.py trains compiled ones
        expected, y = network(x, noise_cond, **cond), compiled(x, noise_cond, **cond)
    # Fused kernels sum in another order: float32 rounding.
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
