r"""95 % intervals by the bootstrap: how far another draw of as many samples would move a figure.

Samples are drawn again with replacement from the kept ones; the real images stay as they are. Resampling repeats
images, and that alone moves a Fréchet distance or an Inception Score (the bias of few distinct images); so only the
deviations of the resampled figures from their own mean are used, laid about the figure itself. Where a figure rests on
all N samples and M are kept, deviations shrink by :math:`\sqrt{M/N}`. The interval says nothing of the bias that few
samples have of their own: FID-infinity does. Source: Efron and Tibshirani 1993, chapters 10 and 13.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

LEVEL = 0.95
RANGES: Mapping[str, tuple[float, float]] = {
    "fid": (0.0, math.inf),
    "sfid": (0.0, math.inf),
    "inception_score": (1.0, math.inf),
    "precision": (0.0, 1.0),
    "recall": (0.0, 1.0),
    "density": (0.0, math.inf),
    "coverage": (0.0, 1.0),
    "label_accuracy": (0.0, 1.0),
}
"""What figures can be at all; intervals end there."""


def resample_weights(count: int, resamples: int, *, seed: int = 0) -> Tensor:
    """How often each of ``resamples`` draws with replacement takes each of ``count`` images: float32 ``(R, count)``."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(resamples, count)
    for row in weights:
        row += torch.randint(count, (count,), generator=generator).bincount(minlength=count)
    return weights


def interval(figure: float, resampled: Tensor, *, share: float = 1.0, base: str = "") -> tuple[float, float]:
    """Ends of the interval about ``figure`` from its values ``(R,)`` on resamples.

    Args:
        share: kept samples over all that the figure rests on.
        base: the figure's name, for its :data:`RANGES`.
    """
    resampled = resampled.double().cpu()
    deviations = (resampled - resampled.mean()) * math.sqrt(share)
    ends = torch.quantile(deviations, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    least, most = RANGES.get(base, (-math.inf, math.inf))
    return max(least, figure + float(ends[0])), min(most, figure + float(ends[1]))


def resampled_means(values: Tensor, weights: Tensor | None = None, *, resamples: int = 0, seed: int = 0) -> Tensor:
    """Means ``(R,)`` of resamples of ``values (N,)``: by ``weights (R, N)``, or by ``resamples`` draws of their own."""
    weights = resample_weights(len(values), resamples, seed=seed) if weights is None else weights
    return weights.double() @ values.double().cpu() / weights.double().sum(1)


def share_interval(hits: int, count: int, *, resamples: int, seed: int = 0) -> tuple[float, float]:
    """Ends of the interval of a share ``hits / count``: resampling 0s and 1s is drawing from a binomial."""
    import numpy as np

    drawn = np.random.default_rng(seed).binomial(count, hits / count, size=resamples) / count
    return interval(hits / count, torch.from_numpy(drawn), base="label_accuracy")
