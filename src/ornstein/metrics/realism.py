"""How real does each sample look? Its realism among real images' features, and the best and worst of many samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.figures.manifold import neighbour_radius
from ornstein.metrics.statistics import Statistics, from_all

NEIGHBOURS = 3  # as the paper has it
MOST = 1e6  # what a copy of a real image, at distance 0, scores
_BLOCK = 1 << 21  # distances at a time


class Realism:
    """Realism scores of samples among real images.

    .. math:: R(g) = \\max_r \\frac{\\lVert r - NN_k(r) \\rVert}{\\lVert g - r \\rVert}

    over the half of the real images whose distance to their k-th neighbour is not above the median, so that outliers'
    wide balls count for nothing. A sample is inside some real image's ball where R >= 1. Source: Kynkäänniemi et al.
    2019 (arXiv 1904.06991), section 5 (eq. 3; k = 3, half of the balls pruned).

    Args:
        real: the real images, of whose kept features more than ``k`` are needed.
        k: neighbours that make a ball.

    Raises:
        OrnsteinError: too few real images.
    """

    def __init__(self, real: Statistics, *, k: int = NEIGHBOURS) -> None:
        if len(real.features) <= k:
            raise OrnsteinError(
                f"realism needs more than {k} real images, there are {len(real.features)}: take metrics.best_worst=0, "
                "or more data."
            )
        self.index = real.index.cpu()
        self._bank = real.features.double()
        radius = neighbour_radius(self._bank, k)
        self._radius = torch.where(radius <= radius.median(), radius, 0.0)

    @torch.no_grad()
    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of features ``(B, D)``: realism in [0, 10^6], distance to the nearest real image (both float64 ``(B,)``), and
        which one that is, as its number in the data set, int64 ``(B,)``. All on the CPU.
        """
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        features = features.cpu() if features.device.type == "mps" else features  # which has no float64
        bank, radius = self._bank.to(features.device), self._radius.to(features.device)
        for rows in features.double().split(max(1, _BLOCK // len(bank))):
            near = torch.cdist(rows, bank)
            place = near.argmin(1)
            # Distances of many come from products, which lose digits near 0: a copy's is to be 0.
            distance = (rows - bank[place]).norm(dim=1)
            near.scatter_(1, place[:, None], distance[:, None])
            found.append(((radius / near).nan_to_num(0.0).amax(1).clamp(max=MOST), distance, place))
        score, distance, place = (torch.cat(part).cpu() for part in zip(*found, strict=True))
        return score, distance, self.index[place]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A sample and what is thought of it.

    Attributes:
        realism: the higher, the more real; from 1 on it lies among real images.
        distance: to the nearest real image, in feature space.
        sample: its number.
        nearest: the number of that real image in its data set.
        label: the class that it should show, or None.
        image: uint8 (C, H, W), on the CPU.
    """

    realism: float
    distance: float
    sample: int
    nearest: int
    label: int | None
    image: Tensor = field(repr=False)


@dataclass(frozen=True)
class Extremes:
    """The most realistic samples, the best first, and the least realistic ones, the worst first."""

    best: Sequence[Judged]
    worst: Sequence[Judged]


class BestWorst:
    """Judges samples batch by batch and keeps the ``count`` best and worst: memory does not grow with their number.

    Args:
        realism: judges.
        count: of either kind, at least 1.
    """

    def __init__(self, realism: Realism, *, count: int) -> None:
        self.realism, self.count = realism, count
        self._best: list[Judged] = []
        self._worst: list[Judged] = []
        self._seen = 0

    def add(self, features: Tensor, images: Tensor, *, index: Tensor, labels: Tensor | None = None) -> None:
        """Takes in a batch.

        Args:
            features: (B, D), in the real images' space.
            images: uint8 (B, C, H, W).
            index: int64 (B,), the samples' numbers.
            labels: int64 (B,), or None.
        """
        score, distance, nearest = self.realism(features)
        self._seen += len(score)
        # Of a batch only its own extremes can be among all samples': the others' pixels stay where they are.
        order = score.argsort().tolist()
        judged = [
            Judged(
                realism=float(score[row]),
                distance=float(distance[row]),
                sample=int(index[row]),
                nearest=int(nearest[row]),
                label=None if labels is None else int(labels[row]),
                image=images[row].cpu().clone(),
            )
            for row in sorted({*order[: self.count], *order[-self.count :]})
        ]
        self._best = _first([*self._best, *judged], self.count, best=True)
        self._worst = _first([*self._worst, *judged], self.count, best=False)

    def extremes(self) -> Extremes:
        """Those of all processes (collective); of fewer than twice ``count`` samples, half of them on either side."""
        parts = from_all((self._best, self._worst, self._seen))
        count = min(self.count, sum(seen for _, _, seen in parts) // 2)
        return Extremes(
            _first((each for best, _, _ in parts for each in best), count, best=True),
            _first((each for _, worst, _ in parts for each in worst), count, best=False),
        )


def _first(judged: Iterable[Judged], count: int, *, best: bool) -> list[Judged]:
    sign = -1 if best else 1
    return sorted(judged, key=lambda each: (sign * each.realism, each.sample))[:count]
