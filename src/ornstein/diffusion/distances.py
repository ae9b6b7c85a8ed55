"""Distances between a network's output and its target, element by element."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Distance(Protocol):
    """(B, *shape), (B, *shape) -> (B, *shape), non-negative."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class L2:
    r"""Squared error, :math:`(a - b)^2`.

    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 14.
    When: always, unless outliers spoil training: only under L2 is the minimum the posterior mean that samplers need.
    """

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target, reduction="none")


@dataclass(frozen=True)
class L1:
    r"""Absolute error, :math:`|a - b|`.

    Source: Chen et al. 2020 (arXiv 2009.00713), section 3; Saharia et al. 2021 (arXiv 2111.05826), section 4.
    When: image-to-image and audio, where less diverse but cleaner samples are wanted.
    """

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs()


@dataclass(frozen=True)
class Huber:
    r"""Huber loss: half the squared error up to ``delta``, then linear; at delta = 1 also called smooth L1.

    .. math:: \tfrac12 (a-b)^2 \text{ if } |a-b| \le \delta, \text{ else } \delta (|a-b| - \tfrac12 \delta)

    Source: Huber 1964, "Robust estimation of a location parameter".
    When: data with outliers, or a start that plain L2 finds unstable.

    Raises:
        ValueError: delta is not positive.
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        if self.delta <= 0:
            raise ValueError(f"huber needs delta > 0, got {self.delta}.")

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(output, target, reduction="none", delta=self.delta)


@dataclass(frozen=True)
class SmoothL1:
    r"""Smooth L1: squared over 2 beta up to ``beta``, then absolute; the Huber loss divided by its delta.

    .. math:: \tfrac{1}{2\beta} (a-b)^2 \text{ if } |a-b| < \beta, \text{ else } |a-b| - \tfrac12 \beta

    Source: Girshick 2015 (arXiv 1504.08083), section 2.3, with torch's beta.
    When: as huber, with a slope of 1 far out whatever beta is.

    Raises:
        ValueError: beta is not positive.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"smooth_l1 needs beta > 0, got {self.beta}; beta = 0 is objective/distance=l1.")

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(output, target, reduction="none", beta=self.beta)


@dataclass(frozen=True)
class PseudoHuber:
    r"""Pseudo-Huber metric of whole samples, shared out over their d elements.

    .. math:: \sqrt{\|a - b\|_2^2 + c^2} - c

    A sample's mean over elements is this over d. ``c`` is 0.00054 sqrt(d) unless given, with which the loss is close to
    the Euclidean distance, not its square; large c tends to L2 over 2c.

    Source: Song & Dhariwal 2023 (arXiv 2310.14189), section 3.3.
    When: consistency training, and heavy-tailed errors in general.

    Raises:
        ValueError: c is not positive.
    """

    c: float | None = None

    def __post_init__(self) -> None:
        if self.c is not None and self.c <= 0:
            raise ValueError(f"pseudo_huber needs c > 0, got {self.c}; null is the paper's 0.00054 sqrt(d).")

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        squared = (output - target).square()
        size = output.shape[1:].numel()
        c = 0.00054 * math.sqrt(size) if self.c is None else self.c
        total = squared.flatten(1).sum(1).reshape(-1, *([1] * (output.ndim - 1)))
        # sqrt(n + c^2) - c without its cancellation, n/(sqrt(n + c^2) + c); n's shares are the elements' squares.
        return squared / (torch.sqrt(total + c * c) + c)
