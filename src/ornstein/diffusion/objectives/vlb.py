"""The discrete variational bound as a training loss."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ornstein.diffusion.densities import DiscreteUniformTime, TimeDensity
from ornstein.diffusion.objectives.base import Drawn, Losses, Objective, TrainingNoise
from ornstein.diffusion.parameterizations import Parameterization
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import Level, NoiseSchedule, Scalar, transition_between
from ornstein.diffusion.vlb import bits_per_dim, prior_terms, reconstruction_terms, vlb_terms


def grid_times(time: Tensor, num_timesteps: int) -> Tensor:
    """The grid point i/T at or above each time, same shape and dtype; what rounding pushed past a point falls on it."""
    slack = 4 * torch.finfo(time.dtype).eps * num_timesteps
    index = (time * num_timesteps - slack).ceil().clamp(1, num_timesteps)
    return index / num_timesteps


def check_grid(time: TimeDensity, num_timesteps: int) -> None:
    """Refuses densities that would leave out steps of a bound of ``num_timesteps``.

    Raises:
        ValueError: other discrete times than the bound's, or none close to t = 0.
    """
    if num_timesteps < 1:
        raise ValueError(f"objective.num_timesteps={num_timesteps} must be at least 1.")
    if isinstance(time, DiscreteUniformTime) and time.num_timesteps != num_timesteps:
        raise ValueError(
            f"objective.time.num_timesteps={time.num_timesteps} would leave out steps of a bound with "
            f"objective.num_timesteps={num_timesteps}: make them equal."
        )
    if getattr(time, "t_min", 0) > 0:
        raise ValueError(
            "the bound needs its first step too: set objective.time.t_min=0, or objective/time=discrete_uniform."
        )


def step_bits(
    prediction: Prediction,
    x0: Tensor,
    schedule: NoiseSchedule,
    *,
    num_timesteps: int,
    variance: Literal["posterior", "forward", "learned"],
    last: Literal["discrete", "gaussian"],
) -> Tensor:
    """(B,) bits/dim of the bound's term at the grid points that the prediction's levels are."""
    index = (torch.as_tensor(prediction.level.t).double() * num_timesteps).round()
    t, s = (schedule.level(i / num_timesteps, x0.ndim) for i in (index, index - 1))
    floor = second_step_variance(schedule, num_timesteps)
    return bits_per_dim(vlb_terms(prediction, x0, t, s, variance=variance, last=last, floor=floor), x0)


@torch.no_grad()
def second_step_variance(schedule: NoiseSchedule, num_timesteps: int) -> Scalar | None:
    """The posterior's variance from t = 2/T to 1/T, which stands in for the first step's 0; None if T is 1."""
    return schedule.transition(2 / num_timesteps, 1 / num_timesteps).variance if num_timesteps > 1 else None


def end_bits(
    schedule: NoiseSchedule, x0: Tensor, noise: TrainingNoise, *, t_min: float, last: Literal["discrete", "gaussian"]
) -> dict[str, Tensor]:
    """(B,) bits/dim of the bound's two ends: the prior's KL at t = 1, and the reconstruction from t_min.

    The second is left out where sigma(t_min) = 0: a discrete bound then has a decoder step instead.
    """
    top = schedule.level(torch.ones(1, dtype=torch.float64, device=x0.device), x0.ndim)
    bits = {"prior": bits_per_dim(prior_terms(x0, top), x0)}
    level = schedule.level(torch.full((1,), t_min, dtype=torch.float64, device=x0.device), x0.ndim)
    if t_min > 0 or ends_noisy(schedule):
        level = Level(*(torch.as_tensor(value).to(x0) for value in level))
        z = level.alpha * x0 + level.sigma * noise.normal(x0)
        bits["reconstruction"] = bits_per_dim(reconstruction_terms(x0, z, level, last=last), x0)
    return bits


@torch.no_grad()
def ends_noisy(schedule: NoiseSchedule) -> bool:
    """Some noise is left at t = 0, as edm, ve and learned schedules have it."""
    return bool(schedule.sigma(0.0) > 0)


class VLB(Objective):
    r"""The variational bound of a T-step model, in bits/dim; one step per sample, T-fold.

    .. math:: L = L_T + \sum_{t>1} \mathrm{KL}(q(x_{t-1}|x_t, x_0)\,\|\,p_\theta(x_{t-1}|x_t)) - \ln p_\theta(x_0|x_1)

    The sum is estimated without bias by T/p(t) times the term of the grid step that the drawn time falls in, so any
    time density is importance sampling. Works on every schedule; where sigma(0) > 0 all T steps have their KL and
    a reconstruction from x at t = 0 follows.

    Args:
        parameterization: of the mean, or a ``LearnedVariance`` around it.
        time: density of the draws; discrete uniform unless given.
        num_timesteps: T.
        variance: ``learned``, or fixed to the ``posterior``'s or the ``forward`` kernel's.
        last: ``discrete`` for 8-bit data in [-1, 1], ``gaussian`` for anything else (latents).

    Source: Ho et al. 2020 (arXiv 2006.11239), eqs. 5-13; Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.
    When: the best likelihood of a discrete-time model; add objective/time=loss_adaptive against its gradient noise.

    Raises:
        ValueError: a variance that does not fit the parameterization, or a density that leaves out steps.
    """

    learns_variance = True
    bounds = True

    def __init__(
        self,
        parameterization: Parameterization,
        time: TimeDensity | None = None,
        *,
        num_timesteps: int = 1000,
        variance: Literal["posterior", "forward", "learned"] = "learned",
        last: Literal["discrete", "gaussian"] = "discrete",
    ) -> None:
        time = time if time is not None else DiscreteUniformTime(num_timesteps=num_timesteps)
        super().__init__(parameterization, time)
        check_grid(time, num_timesteps)
        check_last(last)
        if variance not in ("posterior", "forward", "learned"):
            raise ValueError(f"objective.variance={variance!r} is unknown: choose posterior, forward or learned.")
        if (variance == "learned") != (parameterization.outputs == 2):
            raise ValueError(
                f"objective.variance={variance} does not fit the parameterization {parameterization.name}: learned "
                "goes with objective/parameterization=learned_variance, posterior and forward with any other."
            )
        self.num_timesteps, self.variance, self.last = num_timesteps, variance, last

    def level_times(self, time: Tensor) -> Tensor:
        return grid_times(time, self.num_timesteps)

    def losses(self, schedule: NoiseSchedule, output: Tensor, x0: Tensor, drawn: Drawn, noise: TrainingNoise) -> Losses:
        prediction = self.parameterization.predict(output, drawn.x_t, drawn.level)
        bits = step_bits(
            prediction, x0, schedule, num_timesteps=self.num_timesteps, variance=self.variance, last=self.last
        )
        folds = self.num_timesteps / self.density(drawn.time, schedule)
        return Losses({"diffusion": bits * folds}, end_bits(schedule, x0, noise, t_min=0.0, last=self.last))

    def weight_on_x0(self, level: Level, density: Tensor, schedule: NoiseSchedule) -> Scalar:
        """Each step's weight, spread over its cell of the grid; a learned variance counts as the posterior's.

        In bits/dim, on the mean squared error of the elements, with a Gaussian decoder.
        """
        t = grid_times(torch.as_tensor(level.t), self.num_timesteps)
        upper, lower = schedule.level(t), schedule.level((t - 1 / self.num_timesteps).clamp(min=0))
        kernel = transition_between(upper, lower)
        floor = second_step_variance(schedule, self.num_timesteps)
        if self.variance == "forward":
            variance = kernel.forward_variance
        else:
            first = torch.as_tensor(lower.sigma) == 0
            variance = torch.where(
                first, torch.as_tensor(upper.sigma) ** 2 if floor is None else floor, kernel.variance
            )
        return kernel.on_x0**2 / variance * (0.5 * self.num_timesteps / math.log(2)) / density


def check_last(last: str) -> None:
    """Refuses an unknown decoder.

    Raises:
        ValueError: it is neither discrete nor gaussian.
    """
    if last not in ("discrete", "gaussian"):
        raise ValueError(f"objective.last={last!r} is unknown: choose discrete (8-bit data) or gaussian (latents).")
