"""EDM2's network: published sizes, and that everything in it keeps its magnitude."""

import copy
import math

import pytest
import torch
from torch import nn

from ornstein.errors import OrnsteinError
from ornstein.networks import EDM2UNet, count_flops, count_parameters
from ornstein.networks.attention import attend
from ornstein.networks.edm2_blocks import (
    EDM2Block,
    MPAttention,
    MPConv,
    MPLinear,
    MPNoiseEmbedding,
    mp_cat,
    mp_silu,
    mp_sum,
    unit_magnitude,
)

from .conftest import SMALL_EDM2, batch, perturb

# Million parameters and Gflops (that is, multiply-accumulates) at ImageNet-512's 4x64x64 latents, Karras et al. 2024,
# table 2.
PUBLISHED = {
    "xs": (128, 125, 46),
    "s": (192, 280, 102),
    "m": (256, 498, 181),
    "l": (320, 777, 282),
    "xl": (384, 1119, 406),
    "xxl": (448, 1523, 552),
}


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def layers(network: nn.Module) -> list[MPLinear | MPConv]:
    return [module for module in network.modules() if isinstance(module, MPLinear | MPConv)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_are_the_published(name):
    channels, millions, gmacs = PUBLISHED[name]
    with torch.device("meta"):
        network = EDM2UNet(4, base_channels=channels, num_classes=1000)
        (x, noise_cond), cond = batch(4, 64, size=1, classes=1000)
        flops = count_flops(network, x, noise_cond, **cond)
    assert count_parameters(network) == pytest.approx(1e6 * millions, rel=5e-3)
    # Published as whole numbers (1.1 % at XS) with element-wise operations, which ours leaves out (1 to 2 %).
    assert flops == pytest.approx(2e9 * gmacs, rel=0.025)


def test_silu_has_unit_magnitude_on_unit_normals():
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    # The published constant has three digits.
    assert torch.trapezoid(mp_silu(x).square() * density, x).sqrt().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_sums_and_joins_keep_unit_magnitude_and_share_as_told(t):
    a, b = torch.randn(64, 8, 8, 8), torch.randn(64, 24, 8, 8)
    # 64 * 8 * 64 draws of unit variance: the rms is off by 1 / sqrt(2 * 32768) = 0.4 %.
    assert rms(mp_sum(a, b[:, :8], t)) == pytest.approx(1, abs=0.02)
    joined = mp_cat(a, b, t)
    assert joined.shape == (64, 32, 8, 8) and rms(joined) == pytest.approx(1, abs=0.02)
    # What each says in a layer behind it: its summed squares are as (1 - t)^2 to t^2, however many channels it has.
    of_a, of_b = (part.square().sum().item() for part in joined.split([8, 24], dim=1))
    assert of_b * (1 - t) ** 2 == pytest.approx(of_a * t**2, rel=0.05, abs=1e-6)


@pytest.mark.parametrize("dims", [[1], [1, 2, 3]])
def test_unit_magnitude_holds_whatever_the_scale(dims):
    x = torch.randn(5, 16, 4, 4) * torch.tensor([0.1, 1.0, 30.0, 1e3, 0.0]).reshape(5, 1, 1, 1)
    size = unit_magnitude(x, dims).square().mean(dims, keepdim=True).sqrt()
    # The 1e-4 beside the magnitude takes that part of it, 0.1 % at the least of these.
    torch.testing.assert_close(size[:4], torch.ones_like(size[:4]), rtol=5e-3, atol=0)
    assert (size[4] == 0).all()  # and zeros stay zeros
    half = unit_magnitude(x.half(), dims)
    assert half.dtype == torch.float16 and half.isfinite().all()  # 1e3 squared overflows where it is not measured wider


@pytest.mark.parametrize("kind", ["fourier", "sinusoidal"])
@pytest.mark.parametrize("level", [-1.3, 0.0, 0.7])
def test_noise_features_have_unit_magnitude(kind, level):
    features = MPNoiseEmbedding(4096, kind=kind)(torch.tensor([level]))
    # Cosines at random phases: variance of cos^2 is 1/8, so the rms of 4096 is off by 0.6 %.
    assert rms(features) == pytest.approx(1, abs=0.03)


def test_an_attention_is_its_formula():
    module = MPAttention(8, head_dim=4, balance=0.3).double()
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    q, k, v = (unit_magnitude(part, [-1]) for part in module.qkv(x).reshape(2, 3, 2, 4, 6).transpose(-1, -2).unbind(1))
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / 2
    assert scores.abs().max() <= 2  # a cosine times the root of the head's size
    expected = torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v)
    torch.testing.assert_close(attend(q, k, v), expected)
    expected = module.out(expected.transpose(-1, -2).reshape(2, 8, 3, 2))
    torch.testing.assert_close(module(x), mp_sum(x, expected, 0.3))


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("resample", ["keep", "down", "up"])
@pytest.mark.parametrize("channels", [(96, 96), (96, 160)])
def test_a_block_gives_unit_magnitude_for_unit_magnitude(encoder, resample, channels):
    block = EDM2Block(*channels, embedding_channels=64, encoder=encoder, resample=resample, head_dim=32)
    x, embedding = torch.randn(8, channels[0], 16, 16), mp_silu(torch.randn(8, 64))
    if not encoder and resample == "down":
        x = 2 * x  # a mean of four halves independent values; no decoder has one
    # What is random is the weights' and the sum's correlations, 1 / sqrt(channels) each; zeros at the border take some.
    assert rms(block(x, embedding)) == pytest.approx(1, abs=0.15)


def test_every_block_of_an_untrained_network_has_unit_magnitude():
    network = EDM2UNet(4, base_channels=64, channel_mults=(1, 2, 3), num_blocks=1, attention=(False, True, True))
    seen = {}
    for name, module in network.named_modules():
        if isinstance(module, EDM2Block) or name == "stem":
            module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: rms(output)}))
    network.eval()(torch.randn(4, 4, 32, 32), torch.linspace(-1, 1, 4))
    assert len(seen) == 1 + 3 + 2 + 2 + 6 + 2
    # Attention over many positions averages values and so shrinks its share, 0.3 of the sum: at least 0.7 / 0.76.
    assert all(0.8 < size < 1.2 for size in seen.values()), seen


def test_weights_are_normalised_at_the_start_and_after_optimizer_steps():
    network = perturb_gains(EDM2UNet(2, num_classes=3, dropout=0.1, **SMALL_EDM2)).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    (x, noise_cond), _ = batch(2, 8, size=4)
    for step in range(4):
        y = network(x, noise_cond, label=torch.tensor([0, 1, 2, 3]))
        for layer in layers(network):
            size = layer.weight.flatten(1).square().mean(1).sqrt()
            # 1e-4 stands beside the magnitude in what is divided by; weights themselves are exact to float32 rounding.
            torch.testing.assert_close(size, torch.ones_like(size), rtol=0, atol=3e-4, msg=f"step {step}")
        optimizer.zero_grad()
        (y - x).square().mean().backward()
        for layer in layers(network):
            along = (layer.weight.grad * layer.weight).flatten(1).sum(1).abs()
            # Rows are normalised in the forward pass too: no gradient along them but for the 1e-4.
            assert along.max() < 1e-3 * layer.weight.grad.norm() + 1e-7
        optimizer.step()
        assert (
            max((layer.weight.flatten(1).square().mean(1).sqrt() - 1).abs().max() for layer in layers(network)) > 1e-3
        )


def perturb_gains(network: EDM2UNet) -> EDM2UNet:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.5)
    return network


def test_evaluation_touches_no_weight_and_sees_them_normalised():
    network = perturb(EDM2UNet(2, **SMALL_EDM2))
    before = copy.deepcopy(network.state_dict())
    (x, noise_cond), _ = batch(2, 8, classes=None)
    y = network(x, noise_cond)
    assert all((value == before[name]).all() for name, value in network.state_dict().items())
    with torch.no_grad():
        for layer in layers(network):
            layer.weight.mul_(7.0)
    # But for the 1e-4 beside the magnitude in each of some twenty layers.
    torch.testing.assert_close(network(x, noise_cond), y, rtol=0, atol=5e-3 * y.abs().max().item())


def test_frozen_weights_stay_as_they_are_in_training():
    network = perturb(EDM2UNet(2, **SMALL_EDM2)).requires_grad_(False)
    network.out.requires_grad_(True)
    before = copy.deepcopy(network.state_dict())
    (x, noise_cond), _ = batch(2, 8, classes=None)
    network.train()(x, noise_cond)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"out.weight"}


def test_two_forward_passes_before_one_backward_give_the_gradients_of_both():
    network = perturb_gains(EDM2UNet(1, **SMALL_EDM2)).train()
    (x, noise_cond), _ = batch(1, 8, classes=None)
    (network(x, noise_cond).sum() + network(2 * x, noise_cond).sum()).backward()
    together = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    network(x, noise_cond).sum().backward()
    network(2 * x, noise_cond).sum().backward()
    for one, p in zip(together, network.parameters(), strict=True):
        # Weights that are normalised twice differ by float32 rounding.
        torch.testing.assert_close(one, p.grad, rtol=1e-3, atol=1e-4 * one.abs().max().item())


def test_the_null_class_is_the_zero_embedding_and_has_no_weights():
    network = EDM2UNet(1, num_classes=5, **SMALL_EDM2)
    assert network.embed.label.weight.shape[1] == 5
    noise_cond, null = torch.tensor([100.0, 100.0]), torch.tensor([5, 2])
    embedding = network.embed(noise_cond, null, None)
    noise = network.embed.noise(network.embed.features(noise_cond))
    torch.testing.assert_close(embedding[0], mp_silu(noise[0] * 0.5**0.5))
    assert (embedding[0] - embedding[1]).abs().max() > 0.1


def test_conditions_of_all_kinds_reach_the_output():
    network = perturb(EDM2UNet(1, num_classes=3, pooled_dim=6, concat_channels=2, **SMALL_EDM2))
    given = {"label": torch.tensor([0, 3]), "pooled": torch.randn(2, 6), "concat": torch.randn(2, 2, 8, 8)}
    x, noise_cond = torch.randn(2, 1, 8, 8), torch.tensor([10.0, 500.0])
    y = network(x, noise_cond, **given)
    assert y.shape == x.shape
    others = {"label": torch.tensor([1, 3]), "pooled": torch.randn(2, 6), "concat": torch.zeros(2, 2, 8, 8)}
    for name, other in others.items():
        assert (network(x, noise_cond, **{**given, name: other}) - y)[0].abs().max() > 1e-3, name
    with pytest.raises(OrnsteinError, match="pooled"):
        network(x, noise_cond, **{**given, "pooled": None})
    with pytest.raises(OrnsteinError, match="conditioning image"):
        network(x, noise_cond, **{**given, "concat": None})


def test_layout_changes_speed_and_nothing_else():
    network = perturb(EDM2UNet(1, **SMALL_EDM2))
    inputs, _ = batch(1, 8, classes=None)
    last = network(*inputs)
    network.memory_format = torch.contiguous_format
    # Other kernels, other order of summation: float32 rounding.
    torch.testing.assert_close(network(*inputs), last, rtol=1e-4, atol=1e-4 * last.abs().max().item())


def test_checkpointing_gives_the_same_gradients():
    plain = perturb_gains(EDM2UNet(1, dropout=0.2, **SMALL_EDM2)).train()
    saving = EDM2UNet(1, dropout=0.2, checkpointing=True, **SMALL_EDM2).train()
    saving.load_state_dict(plain.state_dict())
    inputs, _ = batch(1, 8, classes=None)
    for network in (plain, saving):
        torch.manual_seed(3)
        network(*inputs).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"attention": (True,)}, "attention has 1 entries but channel_mults has 2"),
        ({"channel_mults": (), "attention": ()}, "at least one level"),
        ({"noise_embedding": "cosine"}, "'sinusoidal' or 'fourier', got 'cosine'"),
        ({"concat_balance": 1.5}, r"shares in \[0, 1\], got 0.5, 1.5, 0.3, 0.3"),
        ({"num_classes": 0}, "at least 1, got 0"),
        ({"image_size": 9}, "9 x 9 do not divide by 2"),
        ({"base_channels": 20, "head_dim": 12}, "40 does not split into 3"),
    ],
)
def test_wrong_options_are_named(kwargs, sentence):
    with pytest.raises(OrnsteinError, match=sentence):
        EDM2UNet(1, **{**SMALL_EDM2, **kwargs})


@pytest.mark.slow
def test_compiled_sums_of_matrix_products_keep_their_shares():
    a, x, weight = torch.randn(3, 4), torch.randn(3, 5), torch.randn(5, 4)

    def sums(a, x, weight):
        return mp_sum(a, x @ weight, 0.3), mp_sum(x @ weight, a, 0.3), mp_sum(x @ weight, (2 * x) @ weight, 0.3)

    for y, expected in zip(torch.compile(sums, fullgraph=True)(a, x, weight), sums(a, x, weight), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)  # float32 rounding


@pytest.mark.slow
def test_compiled_in_place_it_gives_the_same_output_and_normalises_the_same():
    eager = perturb(EDM2UNet(1, base_channels=16, channel_mults=(1,), num_blocks=1, attention=(False,), num_classes=3))
    network = copy.deepcopy(eager)
    (x, _), cond = batch(1, 8, classes=3)
    noise_cond = torch.rand(3)  # of order one: at 1000 the cosines' angles are rounded by whole milliradians
    network.compile(fullgraph=True)
    for one in (eager, network):
        one.train()
    expected, y = eager(x, noise_cond, **cond), network(x, noise_cond, **cond)
    # Fused kernels sum in another order: float32 rounding.
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    expected.square().sum().backward()
    y.square().sum().backward()
    for (name, one), other in zip(eager.named_parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-3 * one.grad.abs().max().item(), msg=name)
    network.eval().compile(fullgraph=True, backend="aot_eager")  # another graph, of which the writes alone are judged
    before = copy.deepcopy(network.state_dict())
    network(x, noise_cond, **cond)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
