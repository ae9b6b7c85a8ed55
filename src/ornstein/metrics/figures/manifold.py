"""Improved precision and recall, density and coverage: what balls around the nearest neighbours hold."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.statistics import Statistics

_BLOCK = 1 << 21  # distances at a time: 16 MB of float64, and a few times that meanwhile


@dataclass(frozen=True)
class Membership:
    """What one image at a time says; the figures are means of these.

    Attributes:
        values: name of the figure to float64 ``(N,)`` of the images that it is a mean over: the samples for
            ``precision`` and ``density``, the real images for ``recall`` and ``coverage``.
    """

    values: dict[str, Tensor]

    def means(self) -> dict[str, float]:
        """The figures."""
        return {name: float(value.mean()) for name, value in self.values.items()}


def neighbour_radius(rows: Tensor, k: int) -> Tensor:
    """Distance of each of ``rows (N, D)`` to its k-th nearest other row: ``(N,)``. N must be above k."""
    return torch.cat([torch.cdist(part, rows).kthvalue(k + 1, dim=1).values for part in rows.split(_size(rows))])


def precision_recall(generated: Statistics, reference: Statistics, *, k: int = 3) -> Membership:
    """``precision``: share of samples inside a real image's ball; ``recall``: of real images inside a sample's ball.

    A ball reaches from an image to its k-th nearest neighbour among its own kind. Of the kept features. Source:
    Kynkäänniemi et al. 2019 (arXiv 1904.06991; k = 3).

    Raises: OrnsteinError for k or fewer images on a side.
    """
    samples, real = _sides(generated, reference, k, option="neighbours")
    values = {}
    for name, points, others in (("precision", samples, real), ("recall", real, samples)):
        radius = neighbour_radius(others, k)
        values[name] = torch.cat([(near <= radius).any(1).double() for near in _distances(points, others)])
    return Membership(values)


def density_coverage(generated: Statistics, reference: Statistics, *, k: int = 5) -> Membership:
    """``density``: real balls that a sample lies in, over k; ``coverage``: share of real balls that hold a sample.

    Density has no upper bound; it is 1 in expectation where the distributions are equal. Of the kept features.
    Source: Naeem et al. 2020 (arXiv 2002.09797; k = 5).

    Raises: OrnsteinError for k or fewer real images.
    """
    samples, real = _sides(generated, reference, k, option="density_neighbours")
    radius = neighbour_radius(real, k)
    within, covered = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for near in _distances(samples, real):
        inside = near < radius
        within.append(inside.double().sum(1) / k)
        covered |= inside.any(0)
    return Membership({"density": torch.cat(within), "coverage": covered.double()})


def _sides(generated: Statistics, reference: Statistics, k: int, *, option: str) -> tuple[Tensor, Tensor]:
    samples, real = generated.features.double(), reference.features.to(generated.features.device).double()
    if min(len(samples), len(real)) <= k:
        raise OrnsteinError(
            f"metrics.{option}={k} needs more than {k} images on each side, got {len(samples)} samples and {len(real)} "
            "real ones: lower it, or raise metrics.num_samples."
        )
    return samples, real


def _distances(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    for part in points.split(_size(others)):
        yield torch.cdist(part, others)


def _size(others: Tensor) -> int:
    return max(1, _BLOCK // len(others))
