"""Grids that are a list: a subset of a discrete schedule's steps, or levels given one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ornstein.diffusion.grids.base import ramp
from ornstein.diffusion.schedules import NoiseSchedule

_SPACINGS = ("leading", "trailing", "linspace")
_UNITS = ("index", "time", "sigma", "log_snr")
_SLACK = 1e-2  # by which a published table, given to three digits, may exceed the schedule's log-SNR


@dataclass(frozen=True)
class Discrete:
    r"""A subset of a discrete schedule's T time steps, then t = 0; diffusers' ``timestep_spacing``.

    .. math::
        t_k = \frac{i_k + 1}{T}, \qquad
        i_k = (N - 1 - k) \lfloor T/N \rfloor + \text{offset} \;\text{(leading)}, \quad
        \left[\tfrac{N - k}{N} T\right] - 1 \;\text{(trailing)}, \quad
        \left[\tfrac{N - 1 - k}{N - 1} (T - 1)\right] \;\text{(linspace)}

    for k from 0 to N - 1, rounded where brackets are square, and t_N = 0. ``leading`` stops short of pure noise, though
    sampling starts from it: at t = 1/T with 1 step, at 0.9 with 10. ``from_noise`` moves its first time to t = 1, which
    diffusers does not; left off, the grid is diffusers' own, flaw included.
    Source: Lin et al. 2023 (arXiv 2305.08891), table 2 and section 3.3.
    When: figures that must agree with a paper or with diffusers.

    Raises:
        ValueError: an unknown spacing; or, when laid, more steps than T.
    """

    spacing: str = "leading"
    num_timesteps: int = 1000
    offset: int = 0
    from_noise: bool = False
    to_zero: bool = False

    def __post_init__(self) -> None:
        if self.spacing not in _SPACINGS:
            raise ValueError(f"sampler.grid.spacing={self.spacing!r} is unknown: choose one of {', '.join(_SPACINGS)}.")

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        total = self.num_timesteps
        if steps > total:
            raise ValueError(f"sampler.steps={steps} exceeds sampler.grid.num_timesteps={total}: take at most those.")
        if self.spacing == "leading":
            index = torch.arange(steps, dtype=torch.float64).mul(total // steps).flip(0) + self.offset
        elif self.spacing == "trailing":
            index = torch.arange(steps, 0, -1, dtype=torch.float64).mul(total / steps).round() - 1
        else:
            index = ramp(total - 1, 0, steps).round()
        times = torch.cat([(index + 1) / total, torch.zeros(1, dtype=torch.float64)])
        if self.from_noise:
            times[0] = 1.0
        return times


@dataclass(frozen=True)
class Listed:
    r"""Levels given one by one, such as the published results of "Align Your Steps".

    N + 1 values are a grid of N steps, used as they are; for another number of steps their ln(sigma/alpha) is
    interpolated linearly over the list:

    .. math::
        \ln u_i = (1 - p + \lfloor p \rfloor) \ln v_{\lfloor p \rfloor}
        + (p - \lfloor p \rfloor) \ln v_{\lfloor p \rfloor + 1}, \qquad p = \frac{i}{N} M, \quad u = \sigma/\alpha

    where v_0 to v_M are the listed ratios. Where ``to_data`` is on, the last level is then t = 0 itself, as users of
    these lists replace its last sigma by 0. An end without signal or without noise stays, and the rest is interpolated.
    Source: Sabour et al. 2024 (arXiv 2404.14507), section 3 and its project page for the lists.
    When: few steps of a model for which someone optimised the steps.

    Args:
        values: falling noise: at least two indices of a table, times, sigma/alpha ratios, or (rising) log-SNRs.
        unit: index (i stands at t = (i + 1)/``num_timesteps``), time, sigma or log_snr.
        num_timesteps: T of the table that indices count in.
        to_data: end at t = 0 rather than at the last value.

    Raises:
        ValueError: an unknown unit, fewer than two values, values out of order; or, when laid, beyond the schedule.
    """

    values: Sequence[float]
    unit: str = "index"
    num_timesteps: int = 1000
    to_data: bool = True
    to_zero: bool = False

    def __post_init__(self) -> None:
        if self.unit not in _UNITS:
            raise ValueError(f"sampler.grid.unit={self.unit!r} is unknown: choose one of {', '.join(_UNITS)}.")
        values = [float(value) for value in self.values]
        sign = -1.0 if self.unit == "log_snr" else 1.0
        if len(values) < 2 or not all(sign * a > sign * b for a, b in pairwise(values)):
            order = "rising" if self.unit == "log_snr" else "falling"
            raise ValueError(f"sampler.grid.values needs at least two strictly {order} numbers, from noise to data.")
        if self.unit != "log_snr" and values[-1] < (-1 if self.unit == "index" else 0):
            raise ValueError(f"sampler.grid.values ends at {values[-1]}, below data: the least is 0 (-1 for an index).")
        if self.unit == "index" and values[0] > self.num_timesteps - 1:
            raise ValueError(
                f"sampler.grid.values starts at index {values[0]:g}, beyond the last of "
                f"sampler.grid.num_timesteps={self.num_timesteps}."
            )

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        values = torch.tensor([float(value) for value in self.values], dtype=torch.float64)
        if self.unit in ("index", "time"):
            times = (values + 1) / self.num_timesteps if self.unit == "index" else values
            if float(times[0]) > 1:
                raise ValueError(f"sampler.grid.values starts at t = {float(times[0]):g}: it leaves [0, 1].")
            log_snr = schedule.log_snr(times)
        else:
            log_snr = values if self.unit == "log_snr" else -2 * torch.log(values)
            _check_range(log_snr, schedule)
            times = schedule.time(log_snr)
        if len(times) != steps + 1:
            ends = times[[0, -1]]
            times = schedule.time(_resample(log_snr, steps + 1))
            times[[0, -1]] = ends
        if self.to_data:
            times[-1] = 0.0
        return times


def _check_range(log_snr: Tensor, schedule: NoiseSchedule) -> None:
    noisiest, cleanest = schedule.log_snr_range()
    first, last = float(log_snr[0]), float(log_snr[-1])
    if first < noisiest - _SLACK or (last > cleanest + _SLACK and not math.isinf(last)):
        raise ValueError(
            f"sampler.grid.values runs from log-SNR {first:.2f} to {last:.2f}, beyond the schedule's {noisiest:.2f} to "
            f"{cleanest:.2f}: leave such levels out, or choose the schedule that the list was made for."
        )


def _resample(log_snr: Tensor, count: int) -> Tensor:
    """The list at ``count`` equal fractions of itself; infinite ends are kept, what lies between is resampled."""
    inner = log_snr[log_snr.isfinite()]
    head, tail = log_snr[:1][log_snr[:1].isinf()], log_snr[-1:][log_snr[-1:].isinf()]
    wanted = count - len(head) - len(tail)
    if wanted < 1:
        return torch.cat([head, tail])
    place = ramp(0, len(inner) - 1, wanted)
    left = place.floor().long().clamp(max=max(len(inner) - 2, 0))
    right = (left + 1).clamp(max=len(inner) - 1)
    return torch.cat([head, inner[left] + (place - left) * (inner[right] - inner[left]), tail])
