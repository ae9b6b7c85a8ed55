"""The continuous-time variational bound as a training loss."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ornstein.diffusion.densities import TimeDensity, UniformTime
from ornstein.diffusion.objectives.base import Drawn, Losses, Objective, TrainingNoise
from ornstein.diffusion.objectives.vlb import check_last, end_bits, ends_noisy
from ornstein.diffusion.parameterizations import Parameterization
from ornstein.diffusion.schedules import Level, NoiseSchedule, Scalar
from ornstein.diffusion.weightings import ELBO


class VDM(Objective):
    r"""The variational bound in continuous time, in bits/dim; trains a learned schedule too.

    .. math:: L = \mathrm{KL}(q(x_1|x_0)\,\|\,p(x_1)) - E \ln p(x_0|x_{t_{min}})
              - \tfrac12 \int_{t_{min}}^1 \mathrm{SNR}'(t)\, E \|x_0 - \hat x_0(x_t, t)\|^2\, dt

    The integrand is :math:`\tfrac12 \gamma'(t) \|\epsilon - \hat\epsilon\|^2` with gamma = -log-SNR. A learned
    schedule's two ends are trained by the bound itself; its shape between them does not change the bound's value, so
    the bound gives it no more than zero-mean noise, and the paper's way to train it for the estimate's variance
    (appendix I.2) is not taken. The reconstruction integrates a Gaussian over the bins of 8-bit data.

    Args:
        parameterization: of the mean; the bound is the same for all.
        time: density of the draws, importance sampling alone; uniform from ``t_min`` unless given.
        t_min: lower end of the integral, where the reconstruction takes over. 0 needs a schedule with sigma(0) > 0
            (edm, ve, vdm_learned).
        last: ``discrete`` for 8-bit data in [-1, 1], ``gaussian`` for anything else (latents).

    Source: Kingma et al. 2021 (arXiv 2107.00630), eqs. 11, 17 and 18.
    When: likelihood, and scheduler=vdm_learned.

    Raises:
        ValueError: t_min outside [0, 1), times drawn only above it, or a learned variance.
    """

    bounds = True

    def __init__(
        self,
        parameterization: Parameterization,
        time: TimeDensity | None = None,
        *,
        t_min: float = 1e-3,
        last: Literal["discrete", "gaussian"] = "discrete",
    ) -> None:
        if not 0 <= t_min < 1:
            raise ValueError(f"objective.t_min={t_min} must lie in [0, 1).")
        time = time if time is not None else UniformTime(t_min=t_min)
        super().__init__(parameterization, time, weighting=ELBO())
        check_last(last)
        if getattr(time, "t_min", 0.0) > t_min:
            raise ValueError(
                f"objective.time.t_min={getattr(time, 't_min', None)} leaves out part of the bound from "
                f"objective.t_min={t_min}: make them equal."
            )
        self.t_min, self.last = t_min, last

    def check(self, schedule: NoiseSchedule) -> None:
        """As every objective's, and refuses an infinite bound.

        Raises:
            ValueError: t_min is 0 where the schedule's noise ends at 0.
        """
        super().check(schedule)
        if self.t_min == 0 and not ends_noisy(schedule):
            raise ValueError(
                "objective.t_min=0 makes the bound infinite on a schedule whose noise ends at 0: choose t_min=1e-3, or "
                "scheduler=vdm_learned, edm or ve."
            )

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        # Below t_min there is no integral: an infinite density makes those draws weigh 0.
        return torch.where(t >= self.t_min, super().density(t, schedule), torch.inf)

    def losses(self, schedule: NoiseSchedule, output: Tensor, x0: Tensor, drawn: Drawn, noise: TrainingNoise) -> Losses:
        bits = self.weighted_distance(schedule, output, x0, drawn) / math.log(2)
        return Losses({"diffusion": bits}, end_bits(schedule, x0, noise, t_min=self.t_min, last=self.last))

    def weight_on_x0(self, level: Level, density: Tensor, schedule: NoiseSchedule) -> Scalar:
        """In bits/dim, on the mean squared error of the elements."""
        return super().weight_on_x0(level, density, schedule) / math.log(2)
