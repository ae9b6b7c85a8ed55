"""Images that are not square: every network takes them where its factor divides, and says what that is."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ornstein.errors import OrnsteinError
from ornstein.networks.checks import side_factor

from .conftest import batch, perturb


@pytest.mark.parametrize("shape", [(8, 16), (16, 8), (8, 24)])
def test_any_shape_that_divides(named_network: tuple[Callable[..., nn.Module], int], shape: tuple[int, int]) -> None:
    """A network made for a square takes rectangles, alone as in a batch."""
    make, size = named_network
    network = perturb(make(2, num_classes=10, image_size=size))
    (x, noise_cond), cond = batch(2, *shape)
    with torch.no_grad():
        whole = network(x, noise_cond, **cond)
        first = network(x[:1], noise_cond[:1], label=cond["label"][:1])
    assert whole.shape == x.shape
    # Float32 over another batch size; activations of perturbed networks reach some hundreds.
    torch.testing.assert_close(first, whole[:1], rtol=1e-3, atol=1e-3)


def test_it_says_what_must_divide(named_network: tuple[Callable[..., nn.Module], int]) -> None:
    """Sides that are multiples of `side_factor` pass, others are refused."""
    make, size = named_network
    network = make(2, num_classes=10, image_size=size).eval()
    factor = side_factor(network)
    assert factor is not None and size % factor == 0
    (x, noise_cond), cond = batch(2, size, size + factor)
    assert network(x, noise_cond, **cond).shape == x.shape
    (x, noise_cond), cond = batch(2, size, size + factor // 2)
    if factor > 1:
        with pytest.raises(OrnsteinError, match=f"do not divide by {factor}"):
            network(x, noise_cond, **cond)
