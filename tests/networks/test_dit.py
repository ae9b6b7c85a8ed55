import inspect

import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.networks import DiT, count_flops, count_parameters

from .conftest import SMALL_DIT, batch, perturb

# Published: million parameters and Gflops (that is, multiply-accumulates), Peebles & Xie 2023, table 4 (app. A).
PUBLISHED = [
    ("S/2", (12, 384, 6, 2), 33, 6.06),
    ("S/8", (12, 384, 6, 8), 33, 0.36),
    ("B/2", (12, 768, 12, 2), 130, 23.01),
    ("L/2", (24, 1024, 16, 2), 458, 80.71),
    ("XL/2", (28, 1152, 16, 2), 675, 118.64),
    ("XL/4", (28, 1152, 16, 4), 676, 29.05),
]
LARGEST = {"hidden_size": 1152, "depth": 28, "heads": 16}


def published(shape: tuple[int, int, int, int]) -> DiT:
    """The paper's setting: 4 latent channels, 1000 classes and the null class, noise and variance predicted."""
    depth, hidden, heads, patch = shape
    with torch.device("meta"):
        return DiT(4, 8, patch_size=patch, hidden_size=hidden, depth=depth, heads=heads, num_classes=1000)


@pytest.mark.parametrize(("name", "shape", "millions", "gmacs"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_parameters_and_flops_are_the_published(name, shape, millions, gmacs):
    network = published(shape)
    with torch.device("meta"):
        (x, noise_cond), cond = batch(4, 32, size=2, classes=1000)
        flops = count_flops(network, x, noise_cond, **cond)
    assert count_parameters(network) == pytest.approx(1e6 * millions, rel=5e-3)
    # 2 operations a multiply-accumulate; rounding of the published figure to two decimals, and what their
    # counter leaves out (at 0.36 the rounding alone is 1.4 %).
    assert flops == pytest.approx(2e9 * gmacs, rel=0.015)


def test_the_largest_is_the_published_to_the_parameter():
    """The paper's code prints 675,129,632 for XL/2: it counts its frozen table of 256 positions, ours makes them."""
    network = published((28, 1152, 16, 2))
    assert count_parameters(network) + 256 * 1152 == 675_129_632
    with torch.device("meta"):
        (x, noise_cond), cond = batch(4, 32, size=1, classes=1000)
        assert count_flops(network, x, noise_cond, **cond) / 2 == pytest.approx(118.64e9, rel=0.01)


def test_relatives_have_the_published_parameters():
    with torch.device("meta"):
        lightning = DiT(
            32, patch_size=1, num_classes=1000, positions="sincos_rope", norm="rms", mlp="swiglu", **LARGEST
        )
        pixart = DiT(4, 8, conditioning="adaln_single", text_dim=4096, **LARGEST)
        uvit = DiT(
            3,
            image_size=32,
            hidden_size=512,
            depth=13,
            heads=8,
            conditioning="in_context",
            positions="learned",
            qkv_bias=False,
            long_skips=True,
        )
    assert count_parameters(lightning) == pytest.approx(675e6, rel=5e-3)
    assert count_parameters(pixart) == pytest.approx(0.611e9, rel=5e-3)  # 0.6 B in the paper's rounding
    # U-ViT's time token goes through no perceptron and has a position; its output goes through a 3x3 convolution.
    assert count_parameters(uvit) - count_parameters(uvit.embed) + 512 + 84 == 44_255_328


def test_any_size_that_divides_works_after_construction_for_another():
    for positions in ("sincos", "rope", "sincos_rope", "learned"):
        network = perturb(DiT(1, image_size=8, num_classes=2, positions=positions, **SMALL_DIT))
        for height, width in ((8, 8), (4, 10), (16, 2)):
            (x, noise_cond), cond = batch(1, height, width, classes=2)
            assert network(x, noise_cond, **cond).shape == (3, 1, height, width)
        assert any("position" in key for key in network.state_dict()) == (positions == "learned")


def test_patches_return_to_where_they_came_from():
    """Through blocks that do nothing, an output projection that picks pixel (i, j) of a patch is found there."""
    network = DiT(1, patch_size=2, hidden_size=8, depth=1, heads=1)
    with torch.no_grad():
        network.out.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))  # row-major within a patch
    y = network(torch.randn(1, 1, 4, 4), torch.zeros(1))[0, 0]
    assert (y == torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(2, 2)).all()


@pytest.mark.parametrize("positions", ["sincos", "rope", "sincos_rope", "learned"])
def test_position_reaches_the_output(positions):
    """Where only rotations tell patches apart, some patch must differ in content for attention to see where it is."""
    network = perturb(DiT(1, image_size=8, positions=positions, **SMALL_DIT))
    x = torch.ones(1, 1, 8, 8)
    x[..., :2, :2] = -1.0
    y = network(x, torch.zeros(1))[0, 0]
    patches = y.unfold(0, 2, 2).unfold(1, 2, 2).reshape(16, 4)
    assert torch.cdist(patches, patches).fill_diagonal_(1).min() > 1e-5


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln_single"])
def test_modulated_blocks_start_as_the_identity(conditioning):
    network = DiT(1, conditioning=conditioning, text_dim=6, long_skips=True, **SMALL_DIT)
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    network(torch.randn(2, 1, 8, 8), 1000 * torch.rand(2), text=torch.randn(2, 3, 6))
    assert len(seen) == 2 and all(before.std() > 0.1 and torch.equal(before, after) for before, after in seen)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"hidden_size": 30, "heads": 2}, "divisible by 4"),
        ({"hidden_size": 32, "heads": 5}, "32 does not split into 5"),
        ({"image_size": (8, 10), "patch_size": 4}, "8 x 10 do not divide by 4.* resize them to 8 x 12"),
        ({"patch_size": None}, "give image_size"),
        ({"conditioning": "film"}, "conditioning is one of adaln_zero, adaln_single, in_context, cross_attention, got"),
        ({"positions": "alibi"}, "positions is one of sincos, rope, sincos_rope, learned, got 'alibi'"),
        ({"positions": "learned"}, "positions=learned is a table for one size: give image_size"),
        ({"positions": "rope", "hidden_size": 36, "heads": 2}, "divisible by 4, got 18"),
        ({"norm": "batch"}, "norm is one of layer, rms, got 'batch'"),
        ({"qk_norm": "l2"}, "qk_norm is one of layer, rms, null, got 'l2'"),
        ({"mlp": "relu"}, "mlp is one of gelu, swiglu, got 'relu'"),
        ({"long_skips": True, "depth": 1}, "long_skips=true .* depth of at least 2, got 1"),
        ({"registers": -1}, "registers is a number of tokens, 0 or more, got -1"),
    ],
)
def test_wrong_shapes_are_refused_in_one_sentence(kwargs, sentence):
    with pytest.raises(OrnsteinError, match=sentence):
        DiT(1, **{**SMALL_DIT, **kwargs})


@pytest.mark.parametrize(("size", "patch"), [(8, 1), (28, 4), (32, 4), ((8, 16), 2)])
def test_patch_size_is_chosen_from_the_image(size, patch):
    assert DiT(1, image_size=size, **{**SMALL_DIT, "patch_size": None}).patch_size == patch


def test_state_dict_keys_stay_what_checkpoints_hold():
    network = DiT(1, hidden_size=8, depth=1, heads=2, num_classes=2)
    linear = {"embed.mlp.0", "embed.mlp.2", "patches", "out_modulation", "out"}
    linear |= {f"blocks.0.{name}" for name in ("qkv", "out", "mlp_in", "mlp_out", "modulation")}
    expected = {f"{name}.{part}" for name in linear for part in ("weight", "bias")} | {"embed.label.weight"}
    assert set(network.state_dict()) == expected


def test_what_stored_runs_leave_out_is_the_network_that_they_were():
    """Configs of before an option hold no word of it: its default changes nothing."""
    old = {"in_channels", "out_channels", "image_size", "patch_size", "hidden_size", "depth", "heads", "mlp_ratio"}
    old |= {"dropout", "num_classes", "noise_embedding", "label_std"}
    defaults = {name: each.default for name, each in inspect.signature(DiT).parameters.items() if name not in old}
    assert defaults == {
        "text_dim": None,
        "pooled_dim": None,
        "concat_channels": 0,
        "conditioning": "adaln_zero",
        "positions": "sincos",
        "norm": "layer",
        "qk_norm": None,
        "qkv_bias": True,
        "mlp": "gelu",
        "long_skips": False,
        "registers": 0,
        "noise_scale": 1.0,
        "noise_offset": 0.0,
        "checkpointing": False,
    }
