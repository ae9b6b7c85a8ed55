"""Improved DDPM's hybrid loss."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ornstein.diffusion.densities import DiscreteUniformTime, TimeDensity
from ornstein.diffusion.distances import Distance
from ornstein.diffusion.objectives.base import Drawn, Losses, Objective, TrainingNoise
from ornstein.diffusion.objectives.vlb import check_grid, check_last, grid_times, step_bits
from ornstein.diffusion.parameterizations import LearnedVariance
from ornstein.diffusion.schedules import NoiseSchedule
from ornstein.diffusion.weightings import Weighting


class Hybrid(Objective):
    r"""The simple loss for the mean, and a little of the variational bound for the learned variance alone.

    .. math:: L = L_{simple} + \lambda L_{vlb}, \quad \lambda = 0.001

    with the gradient of the bound stopped at the mean. The bound is in bits/dim, without its constant term at t = 1,
    and estimated from the same draw as the simple loss (see :class:`~ornstein.diffusion.objectives.VLB`), times T/p(t).

    Args:
        parameterization: a mean with a learned variance.
        time: density of the draws; discrete uniform unless given.
        distance: of the simple loss.
        weighting: of the simple loss.
        num_timesteps: T of the bound; times are rounded up to its grid.
        vlb_weight: lambda.
        last: the bound's decoder, ``discrete`` for 8-bit data in [-1, 1] or ``gaussian``.

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.1.
    When: good samples in few ancestral steps (sampler=ddpm with sampler.variance=learned), and better likelihood.

    Raises:
        ValueError: a parameterization without a learned variance, a negative vlb_weight, or a density that leaves out
            steps.
    """

    learns_variance = True

    def __init__(
        self,
        parameterization: LearnedVariance,
        time: TimeDensity | None = None,
        *,
        distance: Distance | None = None,
        weighting: Weighting | None = None,
        num_timesteps: int = 1000,
        vlb_weight: float = 0.001,
        last: Literal["discrete", "gaussian"] = "discrete",
    ) -> None:
        time = time if time is not None else DiscreteUniformTime(num_timesteps=num_timesteps)
        super().__init__(parameterization, time, distance=distance, weighting=weighting)
        check_grid(time, num_timesteps)
        check_last(last)
        if not isinstance(parameterization, LearnedVariance):
            raise ValueError(
                "objective=hybrid learns a variance: choose objective/parameterization=learned_variance, or another "
                "objective."
            )
        if vlb_weight < 0:
            raise ValueError(f"objective.vlb_weight={vlb_weight} must not be negative, 0.001 in the paper.")
        self.learned = parameterization
        self.num_timesteps, self.vlb_weight, self.last = num_timesteps, vlb_weight, last

    def level_times(self, time: Tensor) -> Tensor:
        return grid_times(time, self.num_timesteps)

    def losses(self, schedule: NoiseSchedule, output: Tensor, x0: Tensor, drawn: Drawn, noise: TrainingNoise) -> Losses:
        mean, _ = self.learned.halves(output, x0)
        simple = self.weighted_distance(schedule, mean, x0, drawn)
        prediction = self.learned.predict(output, drawn.x_t, drawn.level).with_x0(Tensor.detach)
        bits = step_bits(prediction, x0, schedule, num_timesteps=self.num_timesteps, variance="learned", last=self.last)
        folds = self.vlb_weight * self.num_timesteps / self.density(drawn.time, schedule)
        return Losses({"simple": simple, "vlb": bits * folds})
