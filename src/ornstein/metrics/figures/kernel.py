"""Maximum mean discrepancies: KID with its standard error, and CMMD."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ornstein.metrics.statistics import Statistics

Kernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_BLOCK = 1 << 21  # pairs at a time: 16 MB of float64, and a few times that meanwhile


def polynomial(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """KID's kernel ``(x . y / D + 1)**3`` of rows ``(N, D)`` and ``(M, D)``: ``(N, M)``, into ``out`` where given."""
    return torch.mm(x, y.T, out=out).div_(x.shape[1]).add_(1).pow_(3)


def gaussian(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """CMMD's kernel ``exp(-|x - y|**2 / (2 sigma**2))``, sigma 10, of rows ``(N, D)`` and ``(M, D)``: ``(N, M)``."""
    square = torch.mm(x, y.T, out=out).mul_(-2).add_(x.square().sum(1, keepdim=True)).add_(y.square().sum(1))
    return square.clamp_min_(0).div_(-2 * CMMD_SIGMA**2).exp_()


@dataclass(frozen=True)
class PairSums:
    """Sums of a kernel over pairs, all float64.

    Attributes:
        own: ``(N,)``, over the other samples, for each sample (a sample's pair with itself left out).
        cross: ``(N,)``, over the real ones, for each sample.
        real: ``(M,)``, over the other real ones, for each real one.
        real_cross: ``(M,)``, over the samples, for each real one.
        diagonal, real_diagonal: sums of the pairs of each with itself.
        weighted: ``(R,)``, the resampled sums over pairs of different samples, ``sum_{i != j} w_i w_j k_ij``.
    """

    own: Tensor
    cross: Tensor
    real: Tensor
    real_cross: Tensor
    diagonal: Tensor
    real_diagonal: Tensor
    weighted: Tensor


def pair_sums(samples: Tensor, real: Tensor, kernel: Kernel, *, weights: Tensor | None = None) -> PairSums:
    """Sums over all pairs of ``samples (N, D)`` and ``real (M, D)``, a bounded block of the kernel at a time.

    Args:
        weights: ``(R, N)``, how often each of R resamples takes each sample.
    """
    # In float64: the sums nearly cancel, and float32 products may be rounded further by the user's own settings.
    samples, real = samples.double(), real.double()
    own, cross, diagonal = [], [], []
    real_cross = torch.zeros(len(real), dtype=torch.float64, device=real.device)
    counts = None if weights is None else weights.to(samples).T
    weighted = torch.zeros(0 if weights is None else len(weights), dtype=torch.float64, device=samples.device)
    # One place for all products: a fresh one for each leaves a torn heap behind, several times its size.
    scratch = samples.new_empty(max(_BLOCK, len(samples), len(real)))

    def pairs(rows: Tensor, others: Tensor) -> Tensor:
        return kernel(rows, others, scratch[: len(rows) * len(others)].view(len(rows), len(others)))

    for start, rows in _chunks(samples, max(len(samples), len(real))):
        block = pairs(rows, samples)
        diagonal.append(block.diagonal(start).clone())
        own.append(block.sum(1) - diagonal[-1])
        if counts is not None:
            block.diagonal(start).zero_()
            weighted += (counts[start : start + len(rows)] * (block @ counts)).sum(0)
        block = pairs(rows, real)
        cross.append(block.sum(1))
        real_cross += block.sum(0)
    mine, real_diagonal = [], []
    for start, rows in _chunks(real, len(real)):
        block = pairs(rows, real)
        real_diagonal.append(block.diagonal(start).clone())
        mine.append(block.sum(1) - real_diagonal[-1])
    return PairSums(
        own=torch.cat(own), cross=torch.cat(cross), real=torch.cat(mine), real_cross=real_cross,
        diagonal=torch.cat(diagonal).sum(), real_diagonal=torch.cat(real_diagonal).sum(), weighted=weighted,
    )  # fmt: skip


def unbiased(sums: PairSums) -> float:
    """The U-statistic of the squared discrepancy: all pairs, none of an image with itself."""
    n, m = len(sums.own), len(sums.real)
    within = sums.own.sum() / (n * (n - 1)) + sums.real.sum() / (m * (m - 1))
    return float(within - 2 * sums.cross.sum() / (n * m))


def jackknife_error(sums: PairSums) -> float:
    r"""Standard error of :func:`unbiased`: the delete-one jackknife over samples and real images, which are apart.

    .. math:: \mathrm{se}^2 = \frac{n-1}{n} \sum_i (\hat\theta_{-i} - \bar\theta)^2 + \text{the same over real images}

    Leaving one out changes the sums by its own row, so all values come from one pass. Source: Efron and Stein 1981;
    of U-statistics, Arvesen 1969. NaN for fewer than three images on a side.
    """
    n, m = len(sums.own), len(sums.real)
    if min(n, m) < 3:
        return math.nan
    square = 0.0
    for own, cross, size, other in ((sums.own, sums.cross, n, m), (sums.real, sums.real_cross, m, n)):
        within = (own.sum() - 2 * own) / ((size - 1) * (size - 2))
        between = (cross.sum() - cross) / ((size - 1) * other)
        left_out = within - 2 * between
        square += float((left_out - left_out.mean()).square().sum() * (size - 1) / size)
    return math.sqrt(square)


def resampled_unbiased(sums: PairSums, weights: Tensor) -> Tensor:
    """The U-statistic ``(R,)`` of each resample of the samples; the real images stay.

    An image drawn twice is no pair with itself: only pairs of different images count, so resampling adds no bias.
    """
    m = len(sums.real)
    weights = weights.to(sums.own)
    pairs = weights.sum(1).square() - weights.square().sum(1)
    cross = weights @ sums.cross / (weights.sum(1) * m)
    return sums.weighted / pairs + sums.real.sum() / (m * (m - 1)) - 2 * cross


def subset_kid(samples: Tensor, real: Tensor, *, subsets: int, size: int, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the U-statistic over random subsets of ``size`` images on each side.

    The draws are torchmetrics', from a generator of their own. Source: Binkowski et al. 2018 (arXiv 1801.01401);
    100 subsets of 1,000 are the custom.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(samples), len(real))
    # Room for all subsets alike, in float64 for them alone: a copy of everything takes what the features take, twice.
    block = samples.new_empty(size, size, dtype=torch.float64)
    ours, theirs = (side.new_empty(size, side.shape[1], dtype=torch.float64) for side in (samples, real))

    def pairs(x: Tensor, y: Tensor) -> Tensor:
        return polynomial(x, y, block)

    found = []
    for _ in range(subsets):
        theirs.copy_(real[torch.randperm(len(real), generator=generator)[:size].to(real.device)])
        ours.copy_(samples[torch.randperm(len(samples), generator=generator)[:size].to(samples.device)])
        within = torch.zeros((), dtype=torch.float64, device=samples.device)
        for side in (ours, theirs):
            within += pairs(side, side).sum() - block.diagonal().sum()
        found.append(within / (size * (size - 1)) - 2 * pairs(ours, theirs).mean())
    values = torch.stack(found)
    return float(values.mean()), float(values.std(unbiased=False))


def kid(
    generated: Statistics,
    reference: Statistics,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    all_pairs: bool = False,
    seed: int = 0,
    sums: PairSums | None = None,
) -> dict[str, float]:
    r"""Kernel Inception Distance of the kept features, an unbiased estimate of the squared discrepancy.

    Returns:
        ``kid``: the mean over random subsets, as published, or with ``all_pairs`` the U-statistic of all pairs, which
        is its expectation and has the smaller variance. ``kid_std``: over the subsets; it tells of their size, not of
        the figure's error. ``kid_se``: the figure's standard error, both sides taken as samples: the jackknife's of
        all pairs, and for the mean over S subsets the error of their drawing besides,
        :math:`\sqrt{\mathrm{se}^2 + \mathrm{std}^2 / S}` (law of total variance). Empty without kept real features.

    Source: Binkowski et al. 2018 (arXiv 1801.01401).
    """
    samples, real = generated.features, reference.features.to(generated.features.device)
    if min(len(samples), len(real)) < 2:
        return {}
    sums = pair_sums(samples, real, polynomial) if sums is None else sums
    error = jackknife_error(sums)
    if all_pairs:
        figures = {"kid": unbiased(sums)}
    else:
        mean, deviation = subset_kid(samples, real, subsets=subsets, size=subset_size, seed=seed)
        error = math.sqrt(error**2 + deviation**2 / subsets)
        figures = {"kid": mean, "kid_std": deviation}
    return figures if math.isnan(error) else figures | {"kid_se": error}


def cmmd_sums(generated: Statistics, reference: Statistics, *, weights: Tensor | None = None) -> PairSums:
    """The Gaussian kernel's sums over embeddings of unit length."""
    samples, real = (torch.nn.functional.normalize(side.features.double(), dim=1) for side in (generated, reference))
    return pair_sums(samples, real.to(samples.device), gaussian, weights=weights)


def cmmd(generated: Statistics, reference: Statistics, *, sums: PairSums | None = None) -> dict[str, float]:
    """CLIP Maximum Mean Discrepancy: 1,000 times the squared discrepancy under a Gaussian kernel of width 10.

    As published it is the V-statistic (an image is a pair with itself), of embeddings scaled to length 1; in other
    spaces than CLIP's it is the same recipe. Empty without kept real features.

    Source: Jayasumana et al. 2024 (arXiv 2401.09603).
    """
    if not min(len(generated.features), len(reference.features)):
        return {}
    sums = cmmd_sums(generated, reference) if sums is None else sums
    n, m = len(sums.own), len(sums.real)
    within = (sums.own.sum() + sums.diagonal) / n**2 + (sums.real.sum() + sums.real_diagonal) / m**2
    return {"cmmd": float(CMMD_SCALE * (within - 2 * sums.cross.sum() / (n * m)))}


def _chunks(rows: Tensor, others: int) -> Iterator[tuple[int, Tensor]]:
    size = max(1, _BLOCK // others)
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]
