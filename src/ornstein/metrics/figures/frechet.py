"""Fréchet distances of statistics: FID, sFID, resampled ones, and FID without the bias of few samples."""

from collections.abc import Callable

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.frechet import frechet_distance, symmetric_sqrt
from ornstein.metrics.statistics import Moments, Statistics

INFINITY_POINTS, INFINITY_LEAST = 15, 20


def distance(generated: Moments, reference: Moments) -> float:
    """Fréchet distance between two Gaussians of these moments; see :func:`ornstein.metrics.frechet_distance`."""
    return frechet_distance(generated.mean, generated.cov, mean2=reference.mean, cov2=reference.cov)


def fid(generated: Statistics, reference: Statistics) -> dict[str, float]:
    """``fid``: the Fréchet distance of the features' moments. Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6."""
    return {"fid": distance(generated.moments, reference.moments)}


def sfid(generated: Statistics, reference: Statistics) -> dict[str, float]:
    """``sfid``: the Fréchet distance of spatial features, which sees where things are; empty where there are none.

    Source: Nash et al. 2021 (arXiv 2103.03841); which features, Dhariwal and Nichol 2021's evaluator.
    """
    if generated.spatial is None or reference.spatial is None:
        return {}
    return {"sfid": distance(generated.spatial, reference.spatial)}


class Resampler:
    """Fréchet distances of weighted rows to one Gaussian, quickly: what does not change is computed once.

    With :math:`Z = X \\Sigma_r^{1/2}` the matrix under the root is Z's weighted covariance; its eigenvalues are those
    of the smaller of that covariance and the Gram matrix of the distinct rows.

    Args:
        rows: ``(M, D)``, M >= 2.
        reference: the other side.
    """

    def __init__(self, rows: Tensor, reference: Moments) -> None:
        device = torch.device("cpu") if rows.device.type == "mps" else rows.device
        self.rows = rows.to(device, torch.float64)
        self.mean, cov = reference.mean.to(device), reference.cov.to(device)
        self.trace = cov.trace()
        self.turned = self.rows @ symmetric_sqrt(cov)

    def __call__(self, weights: Tensor) -> float:
        """The distance where row i counts ``weights[i]`` >= 0 times, ``(M,)``; two at least in all."""
        chosen = weights.nonzero()[:, 0].to(self.rows.device)
        counts = weights.to(self.rows)[chosen]
        total = counts.sum()
        rows, turned = self.rows[chosen], self.turned[chosen]
        mean = counts @ rows / total
        spread = (counts @ (rows - mean).square()).sum() / (total - 1)
        scaled = (turned - counts @ turned / total) * (counts / (total - 1)).sqrt()[:, None]
        product = scaled @ scaled.T if len(scaled) < scaled.shape[1] else scaled.T @ scaled
        cross = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum()
        return float((mean - self.mean).square().sum() + spread + self.trace - 2 * cross)


def resampled(
    rows: Tensor, reference: Moments, weights: Tensor, *, advance: Callable[[], None] | None = None
) -> Tensor:
    """Fréchet distances ``(R,)`` of R resamples of ``rows (M, D)``, row i ``weights[r, i]`` times, to ``reference``.

    ``advance`` is called after each.
    """
    measure = Resampler(rows, reference)
    found = []
    for each in weights:
        found.append(measure(each))
        if advance is not None:
            advance()
    return torch.tensor(found, dtype=torch.float64)


def fid_infinity(
    generated: Statistics,
    reference: Statistics,
    *,
    points: int = INFINITY_POINTS,
    seed: int = 0,
    advance: Callable[[], None] | None = None,
) -> dict[str, float]:
    r"""``fid_infinity``: FID extrapolated to infinitely many samples.

    FID of N samples is biased by a term linear in 1/N that differs from model to model: distances of random subsets
    of the kept features, of sizes spaced evenly from a tenth of them to all, are fitted by a straight line in 1/N, and
    its value at 0 is the figure. The bias of a finite reference stays. It can come out below 0 for a generator that
    is as good as the reference's own images.

    Source: Chong and Forsyth 2020 (arXiv 1911.07023).

    Raises: OrnsteinError for fewer than ``INFINITY_LEAST`` kept features.
    """
    total = len(generated.features)
    if total < INFINITY_LEAST:
        raise OrnsteinError(
            f"metrics.fid_infinity needs {INFINITY_LEAST} samples at least, got {total}: raise num_samples (and "
            "metrics.keep_features)."
        )
    measure = Resampler(generated.features, reference.moments)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(total / 10, total, points, dtype=torch.float64).round()
    found = []
    for size in sizes.long().tolist():
        weights = torch.zeros(total)
        weights[torch.randperm(total, generator=generator)[:size]] = 1
        found.append(measure(weights))
        if advance is not None:
            advance()
    design = torch.stack([1 / sizes, torch.ones_like(sizes)], dim=1)
    solution = torch.linalg.lstsq(design, torch.tensor(found, dtype=torch.float64)[:, None]).solution
    return {"fid_infinity": float(solution[1, 0])}
