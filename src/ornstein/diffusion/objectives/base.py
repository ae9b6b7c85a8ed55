r"""Training objectives: parameterization + time density + weighting + distance + coupling.

All weightings meet in one reference, the effective weight on :math:`\|x_0 - \hat x_0\|^2` per unit of log-SNR, density
included (Kingma & Gao 2023, arXiv 2303.00848, section 3): :meth:`Objective.effective_weight` gives it, and
objectives that agree in it have the same gradients under L2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ornstein.diffusion.couplings import Coupling, Independent
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.densities import AdaptiveTimeDensity, TimeDensity, UniformTime
from ornstein.diffusion.distances import L2, Distance
from ornstein.diffusion.parameterizations import Parameterization
from ornstein.diffusion.schedules import Level, NoiseSchedule, Scalar
from ornstein.diffusion.schedules.base import log_snr_of
from ornstein.diffusion.weightings import Simple, Weighting


@dataclass(frozen=True)
class LossOutput:
    """A batch's loss.

    Attributes:
        loss: scalar, the mean of ``per_sample``.
        per_sample: (B,) detached weighted losses.
        level: where the examples were, at the times drawn; a learned schedule's with its gradient.
        terms: named scalars that add up to the loss, detached; empty where it has only one.
    """

    loss: Tensor
    per_sample: Tensor
    level: Level
    terms: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def t(self) -> Tensor:
        """(B,) times drawn."""
        return torch.as_tensor(self.level.t).reshape(-1)

    @property
    def log_snr(self) -> Tensor:
        """(B,) log-SNR at those times, detached; reckoned when asked for, which few steps do."""
        alpha, sigma = (torch.as_tensor(scale).detach().reshape(-1) for scale in (self.level.alpha, self.level.sigma))
        return log_snr_of(alpha, sigma).expand(len(self.per_sample))


@dataclass(frozen=True)
class TrainingNoise:
    """The randomness of one training step: one generator, and the rank that low-discrepancy draws are offset by."""

    generator: torch.Generator
    rank: int = 0
    world_size: int = 1

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal values shaped like a float32 tensor."""
        return torch.randn(like.shape, generator=self.generator, device=like.device, dtype=like.dtype)

    def uniform(self, size: int, device: torch.device) -> Tensor:
        """(size,) float32 values uniform in [0, 1)."""
        return torch.rand(size, generator=self.generator, device=device)


@dataclass(frozen=True)
class Drawn:
    """What a training step drew for a batch: (B,) times, as the density gave them, and what follows from them."""

    time: Tensor
    level: Level
    eps: Tensor
    x_t: Tensor


@dataclass(frozen=True)
class Losses:
    """Named (B,) losses: ``timed`` ones belong to the time drawn, ``steady`` ones do not depend on it."""

    timed: Mapping[str, Tensor]
    steady: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    r"""The training loss: distance between the network's output and its target, weighted by noise level.

    .. math:: L = E_{t \sim p(t),\, \epsilon}\; w(t)\, d(f_\theta(x_t, t), f^*(x_0, \epsilon, t))

    Args:
        parameterization: what the network predicts.
        time: the density p that times are drawn from; uniform unless given.
        distance: d between output and target, per element; squared error unless given.
        weighting: w; 1 in the space of the network's output unless given, as each paper's simple loss has it.
        coupling: which noise goes with which sample; independent unless given.

    The distance and the mean over elements run in float32.

    Attributes:
        learns_variance: takes a parameterization that learns the variance (and its network's second half).
        bounds: its loss is a variational bound, the only kind that may train a schedule.

    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 14; Kingma & Gao 2023 (arXiv 2303.00848), section 2.
    When: always, but for likelihood and learned variances (vlb, hybrid, vdm).

    Raises:
        ValueError: a parameterization with a learned variance, which this loss would leave untrained.
    """

    learns_variance: bool = False
    bounds: bool = False

    def __init__(
        self,
        parameterization: Parameterization,
        time: TimeDensity | None = None,
        *,
        distance: Distance | None = None,
        weighting: Weighting | None = None,
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__()
        if parameterization.outputs != 1 and not self.learns_variance:
            raise ValueError(
                f"{type(self).__name__} does not train a learned variance: choose objective=hybrid or vlb, or an "
                "objective.parameterization without one."
            )
        self.parameterization = parameterization
        self.time_density = time if time is not None else UniformTime()
        # Asked once: to compare an object with a protocol takes as long as ten small operations.
        self._adapts = isinstance(self.time_density, AdaptiveTimeDensity)
        self.distance = distance if distance is not None else L2()
        self.weighting = weighting if weighting is not None else Simple()
        self.coupling = coupling if coupling is not None else Independent()

    def check(self, schedule: NoiseSchedule) -> None:
        """Refuses a schedule that this objective cannot train on, before anything is drawn.

        Raises:
            ValueError: eps or the score on a schedule that reaches zero SNR, or a learned schedule under a loss that
                is no bound.
        """
        if self.parameterization.needs_signal and schedule.zero_terminal_snr:
            raise ValueError(
                f"{self.parameterization.name} does not determine x0 where this schedule's signal ends: choose "
                "objective=v, x0, flow or edm, or a schedule that keeps some signal."
            )
        if not self.bounds and any(p.requires_grad for p in schedule.parameters()):
            raise ValueError(
                "a learned schedule under a loss that is no likelihood bound learns whatever noise is easiest: choose "
                "objective=vdm or vlb with scheduler=vdm_learned, or a fixed schedule."
            )

    def forward(self, denoiser: Denoiser, x0: Tensor, cond: Mapping[str, Tensor], noise: TrainingNoise) -> LossOutput:
        """The loss on clean data x0 (B, *shape) with the conditioning ``cond``."""
        drawn = self.draw(denoiser.schedule, x0, noise)
        output = denoiser.bind(cond).output(drawn.x_t, drawn.level)
        losses = self.losses(denoiser.schedule, output, x0, drawn, noise)
        timed, steady = dict(losses.timed), dict(losses.steady)
        if self._adapts:
            density = cast(AdaptiveTimeDensity, self.time_density)
            importance = density.importance(drawn.time)
            density.update(drawn.time, _total(timed).detach())
            timed = {name: value * importance for name, value in timed.items()}
        parts = timed | steady
        per_sample = _total(parts)
        terms = {name: value.detach().mean() for name, value in parts.items()} if len(parts) > 1 else {}
        return LossOutput(per_sample.mean(), per_sample.detach(), drawn.level, terms)

    def draw(self, schedule: NoiseSchedule, x0: Tensor, noise: TrainingNoise) -> Drawn:
        """Times, noise paired with its data, and x_t."""
        time = self.time_density.draw(x0.shape[0], schedule, noise, x0.device)
        level = schedule.level(self.level_times(time), x0.ndim)
        eps = self.coupling(x0, noise.normal(x0))
        return Drawn(time, level, eps, level.alpha * x0 + level.sigma * eps)

    def level_times(self, time: Tensor) -> Tensor:
        """(B,) times at which the network is trained for the (B,) times drawn: the same, unless a grid rounds them."""
        return time

    def losses(self, schedule: NoiseSchedule, output: Tensor, x0: Tensor, drawn: Drawn, noise: TrainingNoise) -> Losses:
        """The losses for a network's ``output`` on what was drawn; ``noise`` for terms that need more of it."""
        return Losses({"simple": self.weighted_distance(schedule, output, x0, drawn)})

    def weighted_distance(self, schedule: NoiseSchedule, output: Tensor, x0: Tensor, drawn: Drawn) -> Tensor:
        """(B,) mean distance over the elements of output (B, *shape) and its target, times the weighting."""
        target = self.parameterization.target(x0, drawn.eps, drawn.level)
        per_sample = self.distance(output.float(), target.float()).flatten(1).mean(1)
        density: Scalar = 1.0
        if self.weighting.needs_density:
            density = self.density(drawn.time, schedule).reshape(-1, *([1] * (x0.ndim - 1)))
        weight = self.weighting.on_output(drawn.level, self.parameterization, density)
        if isinstance(weight, Tensor):
            return per_sample * weight.flatten().float()
        return per_sample if weight == 1.0 else per_sample * weight

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Density in t that the expectation is over, same shape; no gradient, also where a learned schedule sets it."""
        return self.time_density.density(t, schedule).detach()

    def weight_on_x0(self, level: Level, density: Tensor, schedule: NoiseSchedule) -> Scalar:
        """Weight on ||x0 - x0_hat||^2 of one draw at ``level``, whose time has ``density``; same shape."""
        return self.weighting.on_x0(level, self.parameterization, density)

    def effective_weight(self, schedule: NoiseSchedule, log_snr: Tensor) -> Tensor:
        """Weight on ||x0 - x0_hat||^2 per unit of log-SNR under L2, density included, same shape as ``log_snr``.

        0 outside the schedule's range of log-SNR, at its ends, and where no times are drawn.
        """
        least, most = schedule.log_snr_range()
        t = schedule.time(log_snr.double())
        level: Level = schedule.level(t)
        density = self.density(t, schedule)
        weight = torch.as_tensor(self.weight_on_x0(level, density, schedule))
        weight = weight * (density / schedule.d_log_snr(t).abs())
        drawn = (log_snr > least) & (log_snr < most) & (density > 0) & density.isfinite()
        return torch.where(drawn, weight, 0.0)


def _total(parts: Mapping[str, Tensor]) -> Tensor:
    first, *others = parts.values()
    for other in others:
        first = first + other
    return first
