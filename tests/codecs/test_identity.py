"""The codec that changes nothing."""

import pytest
import torch

from ornstein.codecs import Identity


@pytest.mark.parametrize("size", [8, (8, 12)])
def test_identity_returns_its_input(size: int | tuple[int, int]) -> None:
    codec = Identity(3, size, sigma_data=0.5)
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, 3, height, width)
    assert codec.encode(x) is x and codec.decode(x) is x
    assert (codec.channels, codec.size, codec.sigma_data) == (3, size, 0.5)
    assert codec.stochastic is False and codec.decode_range == (-1.0, 1.0)
    assert not list(codec.parameters())


def test_a_list_of_equal_sides_is_a_square() -> None:
    assert Identity(1, [8, 8], sigma_data=0.5).size == 8


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 8, 16), (3, 8, 8)])
def test_identity_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    codec = Identity(3, 8, sigma_data=0.5)
    with pytest.raises(ValueError, match=r"\(B, 3, 8, 8\) but got"):
        codec.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\(B, 3, 8, 8\) but got"):
        codec.decode(torch.zeros(shape))


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, float("nan")])
def test_identity_refuses_a_sigma_data_that_is_not_positive(sigma_data: float) -> None:
    with pytest.raises(ValueError, match="sigma_data"):
        Identity(1, 8, sigma_data=sigma_data)


@pytest.mark.parametrize("size", [0, (8, 8, 8), (8, 0)])
def test_identity_refuses_sizes_that_are_none(size: int | tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="image size"):
        Identity(1, size, sigma_data=0.5)
