import math

import numpy as np
import pytest
import scipy.linalg
import torch

from ornstein.metrics.frechet import frechet_distance, symmetric_sqrt


def _random_cov(width: int, rank: int, seed: int) -> torch.Tensor:
    factor = torch.randn(width, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.T / rank


@pytest.mark.parametrize("std1, std2, shift", [(1.0, 1.0, 0.0), (2.0, 0.5, 3.0), (0.0, 1.0, 1.0)])
def test_isotropic_gaussians_have_the_textbook_distance(std1, std2, shift):
    width = 5
    mean = torch.zeros(width)
    expected = shift**2 * width + width * (std1 - std2) ** 2
    found = frechet_distance(mean, std1**2 * torch.eye(width), mean2=mean + shift, cov2=std2**2 * torch.eye(width))
    assert found == pytest.approx(expected, abs=1e-12)  # float64 rounding of numbers near 1


def test_two_dimensions_by_hand():
    # For 2x2 matrices tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), with M = cov1 @ cov2.
    cov1 = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    cov2 = torch.tensor([[1.0, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    product = cov1 @ cov2
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = float(cov1.trace() + cov2.trace()) - 2 * root + 25
    mean = torch.zeros(2, dtype=torch.float64)
    shifted = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert frechet_distance(mean, cov1, mean2=shifted, cov2=cov2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [16, 5])
def test_it_meets_scipy_matrix_square_root(rank):
    width = 16
    cov1, cov2 = _random_cov(width, rank, 0), _random_cov(width, width, 1)
    mean1, mean2 = torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
    cross = np.trace(scipy.linalg.sqrtm((cov1 @ cov2).numpy()).real)
    expected = width + float(cov1.trace() + cov2.trace()) - 2 * cross
    # scipy's root of a singular matrix is good to about the square root of float64's rounding.
    tolerance = 1e-10 if rank == width else 1e-5
    assert frechet_distance(mean1, cov1, mean2=mean2, cov2=cov2) == pytest.approx(expected, rel=tolerance)


def test_equal_gaussians_have_distance_zero_even_without_full_rank():
    cov = _random_cov(32, 4, 2)
    mean = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    # Eigenvalues that are 0 come out near 1e-16; the root of 28 of them adds up to a few 1e-7.
    assert frechet_distance(mean, cov, mean2=mean, cov2=cov) == pytest.approx(0, abs=1e-5)


def test_the_root_squares_to_the_matrix():
    cov = _random_cov(8, 8, 4)
    root = symmetric_sqrt(cov)
    torch.testing.assert_close(root @ root, cov, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(root, root.T, rtol=0, atol=1e-14)


def test_shapes_and_values_are_checked():
    eye, zero = torch.eye(3), torch.zeros(3)
    with pytest.raises(ValueError, match="of one D"):
        frechet_distance(zero, eye, mean2=zero, cov2=torch.eye(2))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(zero, eye, mean2=zero * float("nan"), cov2=eye)
