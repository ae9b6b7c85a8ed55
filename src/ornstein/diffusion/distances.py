"""Distances between a network's output and its target, element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F


class Distance(Protocol):
    """(B, *shape), (B, *shape) -> (B, *shape), non-negative."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class L2:
    """Squared error."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square()


@dataclass(frozen=True)
class L1:
    """Absolute error."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs()


@dataclass(frozen=True)
class Huber:
    r"""Huber loss: half the squared error up to ``delta``, then linear; at delta = 1 also called smooth L1.

    Source: Huber 1964, "Robust estimation of a location parameter", eq. 2.

    Raises:
        ValueError: delta is not positive.
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        if self.delta <= 0:
            raise ValueError(f"huber needs delta > 0, got {self.delta}.")

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(output, target, reduction="none", delta=self.delta)
