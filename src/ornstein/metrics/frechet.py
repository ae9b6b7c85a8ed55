"""The Fréchet distance between two Gaussians, in closed form."""

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError


def symmetric_sqrt(matrix: Tensor) -> Tensor:
    """The symmetric square root ``(D, D)`` of a symmetric positive semi-definite matrix, in float64.

    Eigenvalues that rounding made negative count as 0, so that rank-deficient covariances (fewer samples than
    dimensions) are no special case.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(mean1: Tensor, cov1: Tensor, *, mean2: Tensor, cov2: Tensor) -> float:
    r"""Squared Fréchet (2-Wasserstein) distance between ``N(mean1, cov1)`` and ``N(mean2, cov2)``, in float64.

    .. math::
        d^2 = \|\mu_1 - \mu_2\|^2
            + \operatorname{tr}\bigl(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2}\bigr)

    The product under the root is symmetric here, so its eigenvalues are real and the result cannot be complex; it
    has the same eigenvalues as :math:`\Sigma_1 \Sigma_2`, which FID implementations take. Source: Dowson and Landau
    1982; Heusel et al. 2017 (arXiv 1706.08500), eq. 6.

    Args:
        mean1, mean2: ``(D,)``.
        cov1, cov2: ``(D, D)``, symmetric positive semi-definite.

    Returns: the distance, in squared units of the features; 0 for equal Gaussians, up to rounding.

    Raises: ValueError if the shapes do not fit or a value is not finite.
    """
    mean1, mean2, cov1, cov2 = (value.detach().double().cpu() for value in (mean1, mean2, cov1, cov2))
    width = mean1.shape[-1]
    shapes = [tuple(value.shape) for value in (mean1, cov1, mean2, cov2)]
    if shapes != [(width,), (width, width)] * 2:
        raise OrnsteinError(f"means (D,) and covariances (D, D) of one D are needed, got {shapes}.")
    if not all(value.isfinite().all() for value in (mean1, mean2, cov1, cov2)):
        raise OrnsteinError("a mean or covariance holds NaN or infinity; look for them in the images' features.")
    root = symmetric_sqrt(cov1)
    product = root @ cov2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)
