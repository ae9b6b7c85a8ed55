"""The times at which a sampler calls its denoiser: N + 1 of them, falling from noise to data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ornstein.diffusion.schedules import Level, NoiseSchedule


@dataclass(frozen=True)
class Grid:
    """A falling sequence of levels; ``grid[i]`` to ``grid[i + 1]`` is step i."""

    levels: tuple[Level, ...]

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def __getitem__(self, i: int) -> Level:
        return self.levels[i]


class GridRule(Protocol):
    """Chooses ``steps + 1`` falling times in [0, 1], (steps + 1,) float64, for a schedule."""

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor: ...


def make_grid(rule: GridRule, schedule: NoiseSchedule, steps: int) -> Grid:
    """The grid of a rule on a schedule.

    Raises:
        ValueError: steps < 1, or a rule that gives times that do not fall or leave [0, 1].
    """
    if steps < 1:
        raise ValueError(f"sampler.steps={steps}: a sampler needs at least 1 step.")
    times = rule.times(schedule, steps)
    if times.shape != (steps + 1,) or bool((times.diff() >= 0).any()):
        raise ValueError(f"the time grid needs {steps + 1} strictly falling times: choose fewer steps or another grid.")
    if float(times[0]) > 1 or float(times[-1]) < 0:
        raise ValueError("the time grid leaves [0, 1]: 0 is data and 1 is noise.")
    return Grid(schedule.levels(times))


@dataclass(frozen=True)
class Uniform:
    """Equal steps of t, from ``t_max`` to ``t_min``."""

    t_max: float = 1.0
    t_min: float = 0.0

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        return torch.linspace(self.t_max, self.t_min, steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class LogSNR:
    """Equal steps of log-SNR between the schedule's levels at ``t_max`` and ``t_min``, then one step to t = 0.

    Source: Lu et al. 2022 (arXiv 2206.00927), section 3.4. The ends are pulled in because log-SNR is infinite at
    sigma = 0 and at alpha = 0.
    """

    t_max: float = 0.999
    t_min: float = 1e-3

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        first, last = (float(schedule.log_snr(t)) for t in (self.t_max, self.t_min))
        inner = schedule.time(torch.linspace(first, last, steps, dtype=torch.float64))
        times = torch.cat([inner, torch.zeros(1, dtype=torch.float64)])
        times[0] = 1.0
        return times


@dataclass(frozen=True)
class Karras:
    r"""Noise-to-signal ratios on the rho ramp, then one step to t = 0.

    :math:`u_i = (u_{max}^{1/\rho} + \frac{i}{N-1} (u_{min}^{1/\rho} - u_{max}^{1/\rho}))^\rho` with u = sigma/alpha.
    Source: Karras et al. 2022 (arXiv 2206.00364), eq. 5. The ratio is cut at ``u_max`` where the schedule goes further.
    """

    rho: float = 7.0
    u_min: float = 0.002
    u_max: float = 80.0

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        noisiest, cleanest = schedule.log_snr_range()
        reaches_data = math.isinf(cleanest)
        u_min = max(self.u_min, math.exp(-cleanest / 2))
        u_max = min(self.u_max, math.exp(-noisiest / 2))
        ramp = torch.linspace(0, 1, steps if reaches_data else steps + 1, dtype=torch.float64)
        first, last = u_max ** (1 / self.rho), u_min ** (1 / self.rho)
        times = schedule.time(-2 * self.rho * torch.log(first + ramp * (last - first)))
        times[0] = 1.0
        if reaches_data:
            return torch.cat([times, torch.zeros(1, dtype=torch.float64)])
        times[-1] = 0.0
        return times


_SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class Discrete:
    """A subset of a discrete schedule's T time steps, then t = 0; diffusers' ``timestep_spacing``.

    ``leading``: multiples of T // steps, plus ``offset``; ``trailing``: back from T; ``linspace``: evenly from 1 to T.
    Index i of the table stands at t = (i + 1)/T. ``leading`` stops short of pure noise (at t = 1/T with 1 step), though
    sampling starts from it: meant for parity, not for few steps. Source: Lin et al. 2023 (arXiv 2305.08891), table 2.

    Raises:
        ValueError: an unknown spacing, or more steps than T.
    """

    spacing: str = "leading"
    num_timesteps: int = 1000
    offset: int = 0

    def __post_init__(self) -> None:
        if self.spacing not in _SPACINGS:
            raise ValueError(f"spacing {self.spacing!r} is unknown: choose one of {', '.join(_SPACINGS)}.")

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        total = self.num_timesteps
        if steps > total:
            raise ValueError(f"sampler.steps={steps} exceeds the grid's num_timesteps={total}: use at most that many.")
        if self.spacing == "leading":
            index = torch.arange(steps, dtype=torch.float64).mul(total // steps).flip(0) + self.offset
        elif self.spacing == "trailing":
            index = torch.arange(steps, 0, -1, dtype=torch.float64).mul(total / steps).round() - 1
        else:
            index = torch.linspace(total - 1, 0, steps, dtype=torch.float64).round()
        return torch.cat([(index + 1) / total, torch.zeros(1, dtype=torch.float64)])
