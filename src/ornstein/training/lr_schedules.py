"""Learning-rate schedules (config group ``lr_schedule``): warm-up, then a curve over the optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ornstein.errors import OrnsteinError


def constant(optimizer: Optimizer, *, warmup_steps: int = 0) -> LambdaLR:
    """Linear warm-up over ``warmup_steps``, then the optimizer's own rate."""
    _check(1, warmup_steps, 0.0)
    return _with_warmup(optimizer, warmup_steps, lambda step: 1.0)


def cosine(optimizer: Optimizer, *, max_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> LambdaLR:
    """Linear warm-up, then half a cosine down to ``min_ratio`` at ``max_steps``.

    Source: Loshchilov & Hutter 2017 (arXiv 1608.03983), eq. 5 without restarts.
    """
    _check(max_steps, warmup_steps, min_ratio)

    def factor(step: int) -> float:
        done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    return _with_warmup(optimizer, warmup_steps, factor)


def linear(optimizer: Optimizer, *, max_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> LambdaLR:
    """Linear warm-up, then a straight line down to ``min_ratio`` at ``max_steps``."""
    _check(max_steps, warmup_steps, min_ratio)

    def factor(step: int) -> float:
        done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return 1 - (1 - min_ratio) * done

    return _with_warmup(optimizer, warmup_steps, factor)


def inverse_sqrt(optimizer: Optimizer, *, reference_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Constant up to ``reference_steps``, then falling as 1/sqrt(step). Source: EDM2 (arXiv 2312.02696)."""
    _check(reference_steps, warmup_steps, 0.0)
    return _with_warmup(optimizer, warmup_steps, lambda step: 1 / math.sqrt(max(step / reference_steps, 1.0)))


def _check(steps: int, warmup_steps: int, min_ratio: float) -> None:
    if steps < 1 or warmup_steps < 0 or not 0 <= min_ratio <= 1:
        raise OrnsteinError(
            f"lr_schedule: steps={steps} must be at least 1, warmup_steps={warmup_steps} not negative and "
            f"min_ratio={min_ratio} in [0, 1]."
        )


def _with_warmup(optimizer: Optimizer, warmup_steps: int, factor: Callable[[int], float]) -> LambdaLR:
    def rate(step: int) -> float:
        return (step + 1) / (warmup_steps + 1) if step < warmup_steps else factor(step)

    return LambdaLR(optimizer, rate)
