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


@pytest.mark.parametrize(("name", "shape", "millions", "gmacs"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_parameters_and_flops_are_the_published(name, shape, millions, gmacs):
    depth, hidden, heads, patch = shape
    with torch.device("meta"):
        network = DiT(4, 8, patch_size=patch, hidden_size=hidden, depth=depth, heads=heads, num_classes=1000)
        (x, noise_cond), cond = batch(4, 32, size=2, classes=1000)
        flops = count_flops(network, x, noise_cond, **cond)
    assert count_parameters(network) == pytest.approx(1e6 * millions, rel=5e-3)
    # 2 operations a multiply-accumulate; rounding of the published figure to two decimals, and what their
    # counter leaves out (at 0.36 the rounding alone is 1.4 %).
    assert flops == pytest.approx(2e9 * gmacs, rel=0.015)


def test_any_size_that_divides_works_after_construction_for_another():
    network = perturb(DiT(1, image_size=8, num_classes=2, **SMALL_DIT))
    for height, width in ((8, 8), (4, 10), (16, 2)):
        (x, noise_cond), cond = batch(1, height, width, classes=2)
        assert network(x, noise_cond, **cond).shape == (3, 1, height, width)
    assert not any("position" in key for key in network.state_dict())


def test_patches_return_to_where_they_came_from():
    """Through blocks that do nothing, an output projection that picks pixel (i, j) of a patch is found there."""
    network = DiT(1, patch_size=2, hidden_size=8, depth=1, heads=1)
    with torch.no_grad():
        network.out.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))  # row-major within a patch
    y = network(torch.randn(1, 1, 4, 4), torch.zeros(1))[0, 0]
    assert (y == torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(2, 2)).all()


def test_position_reaches_the_output():
    network = perturb(DiT(1, **SMALL_DIT))
    y = network(torch.ones(1, 1, 8, 8), torch.zeros(1))[0, 0]
    patches = y.unfold(0, 2, 2).unfold(1, 2, 2).reshape(16, 4)
    assert torch.cdist(patches, patches).fill_diagonal_(1).min() > 1e-4


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"hidden_size": 30, "heads": 2}, "divisible by 4"),
        ({"hidden_size": 32, "heads": 5}, "32 does not split into 5"),
        ({"image_size": (8, 10), "patch_size": 4}, "8 x 10 do not divide by 4.* resize them to 8 x 12"),
        ({"patch_size": None}, "give image_size"),
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
