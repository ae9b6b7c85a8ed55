"""Grids that are a curve in t or in noise level."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ornstein.diffusion.grids.base import ramp
from ornstein.diffusion.schedules import NoiseSchedule


def _check_ends(t_max: float, t_min: float) -> None:
    for key, value in (("t_max", t_max), ("t_min", t_min)):
        if not 0 <= value <= 1:
            raise ValueError(f"sampler.grid.{key}={value} leaves [0, 1]: 0 is data and 1 is noise.")
    if t_min >= t_max:
        raise ValueError(
            f"sampler.grid.t_max={t_max} must be above sampler.grid.t_min={t_min}: sampling runs from noise to data."
        )


@dataclass(frozen=True)
class Uniform:
    r"""Equal steps of t, from ``t_max`` to ``t_min``.

    .. math:: t_i = t_{max} + \frac{i}{N} (t_{min} - t_{max})

    On edm it is the paper's grid, since edm's t is its rho ramp: with ``to_zero`` its N levels and then sigma = 0,
    without it N + 1 levels down to sigma_min.
    Source: Song et al. 2021 (arXiv 2011.13456); Karras et al. 2022 (arXiv 2206.00364), eq. 5.
    When: a first choice on any schedule, and the only one that needs no thought.

    Raises:
        ValueError: unless 0 <= t_min < t_max <= 1.
    """

    t_max: float = 1.0
    t_min: float = 0.0
    to_zero: bool = False

    def __post_init__(self) -> None:
        _check_ends(self.t_max, self.t_min)

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        return ramp(self.t_max, self.t_min, steps + 1)


@dataclass(frozen=True)
class Quadratic:
    r"""Steps of t that shrink towards data, evenly spaced in a root of t.

    .. math:: t_i = \left(t_{max}^{1/p} + \tfrac{i}{N} (t_{min}^{1/p} - t_{max}^{1/p})\right)^p

    with p = ``power``. Source: Song et al. 2021 (arXiv 2010.02502), appendix D.2, at p = 2.
    When: DDIM of few steps on small images.

    Raises:
        ValueError: power is not positive, or unless 0 <= t_min < t_max <= 1.
    """

    power: float = 2.0
    t_max: float = 1.0
    t_min: float = 0.0
    to_zero: bool = False

    def __post_init__(self) -> None:
        _check_ends(self.t_max, self.t_min)
        if not 0 < self.power < math.inf:
            raise ValueError(f"sampler.grid.power={self.power} must be positive: 1 is uniform, 2 quadratic.")

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        root = 1 / self.power
        times = ramp(self.t_max**root, self.t_min**root, steps + 1) ** self.power
        times[0], times[-1] = self.t_max, self.t_min
        return times


@dataclass(frozen=True)
class Shifted:
    r"""Equal steps of t, shifted towards noise as for high resolutions.

    .. math:: t_i = \frac{s u_i}{1 + (s - 1) u_i}, \qquad u_i = 1 - i/N

    with s = ``shift``. On flow this moves log-SNR by -2 ln s; elsewhere it is the same curve in t.
    Source: Esser et al. 2024 (arXiv 2403.03206), eq. 23; diffusers' FlowMatchEulerDiscreteScheduler(shift=s).
    When: flow models of large images or latents, with the shift that they were trained with.

    Raises:
        ValueError: shift is not positive.
    """

    shift: float = 3.0
    to_zero: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"sampler.grid.shift={self.shift} must be positive: 1 is uniform, 3 is SD3's.")

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        u = ramp(1.0, 0.0, steps + 1)
        return self.shift * u / (1 + (self.shift - 1) * u)


@dataclass(frozen=True)
class Beta:
    r"""Times at equal quantiles of a beta distribution: dense at both ends, sparse between.

    .. math:: t_i = F^{-1}_{\mathrm{Beta}(a, b)}(1 - i/N)

    Source: Lee et al. 2024 (arXiv 2407.12173), section 3, which finds a = b = 0.6.
    When: few steps, where both the layout at the start and the details at the end suffer.

    Args:
        a: first shape parameter; below 1 it crowds steps at data.
        b: second shape parameter; below 1 it crowds steps at noise.

    Raises:
        ValueError: a or b is not positive.
    """

    a: float = 0.6
    b: float = 0.6
    to_zero: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.a < math.inf and 0 < self.b < math.inf):
            raise ValueError(
                f"sampler.grid.a={self.a} and sampler.grid.b={self.b} must be positive: 1 and 1 is uniform."
            )

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        from scipy.special import betaincinv

        quantiles = betaincinv(self.a, self.b, ramp(1.0, 0.0, steps + 1).numpy())
        return torch.as_tensor(quantiles, dtype=torch.float64)


@dataclass(frozen=True)
class LogSNR:
    r"""Equal steps of log-SNR between the schedule's levels at ``t_max`` and ``t_min``, then one step to t = 0.

    .. math:: \lambda_i = \lambda(t_{max}) + \frac{i}{N - 1} (\lambda(t_{min}) - \lambda(t_{max}))

    The ends are pulled in because log-SNR is infinite at sigma = 0 and at alpha = 0; the first time is 1 all the same.
    Without ``from_noise`` it is t_max, and without ``to_data`` all N steps are equal and the last time is t_min.
    Source: Lu et al. 2022 (arXiv 2206.00927), section 3.4.
    When: DPM-Solver and other methods that are exponential in log-SNR.

    Args:
        t_max: its log-SNR is the first.
        t_min: its log-SNR is the last before data.
        from_noise: start at t = 1, where sampling's noise belongs, rather than at ``t_max``.
        to_data: end with a step to t = 0 rather than at ``t_min``; without it ``to_zero`` has nothing to go on from.

    Raises:
        ValueError: both ``to_zero`` and no ``to_data``, or unless 0 <= t_min < t_max <= 1; or, when laid, if an end's
            log-SNR is infinite.
    """

    t_max: float = 0.999
    t_min: float = 1e-3
    from_noise: bool = True
    to_data: bool = True
    to_zero: bool = False

    def __post_init__(self) -> None:
        _check_ends(self.t_max, self.t_min)
        if self.to_zero and not self.to_data:
            raise ValueError(
                "sampler.grid.to_zero=true goes beyond t = 0, where sampler.grid.to_data=false does not arrive: "
                "switch one of them."
            )

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        first, last = (float(schedule.log_snr(t)) for t in (self.t_max, self.t_min))
        for key, value, end, inner in (("t_max", self.t_max, first, 0.999), ("t_min", self.t_min, last, 1e-3)):
            if math.isinf(end):
                raise ValueError(
                    f"sampler.grid.{key}={value} has infinite log-SNR on this schedule, which no equal steps reach: "
                    f"choose sampler.grid.{key}={inner}."
                )
        times = schedule.time(ramp(first, last, steps + (not self.to_data)))
        if self.to_data:
            times = torch.cat([times, torch.zeros(1, dtype=torch.float64)])
        else:
            times[-1] = self.t_min
        times[0] = 1.0 if self.from_noise else self.t_max
        return times


def _by_ratio(
    schedule: NoiseSchedule, steps: int, u_min: float, u_max: float, curve: Callable[[float, float, int], Tensor]
) -> Tensor:
    """Times of a falling curve of ln u from u_max to u_min, both cut to the schedule's range, then t = 0."""
    noisiest, cleanest = schedule.log_snr_range()
    reaches_data = math.isinf(cleanest)
    u_min = max(u_min, math.exp(-cleanest / 2))
    u_max = min(u_max, math.exp(-noisiest / 2))
    times = schedule.time(-2 * curve(u_max, u_min, steps if reaches_data else steps + 1))
    times[0] = 1.0
    if reaches_data:
        return torch.cat([times, torch.zeros(1, dtype=torch.float64)])
    times[-1] = 0.0
    return times


def _check_ratios(u_min: float, u_max: float) -> None:
    if not 0 < u_min < u_max:
        raise ValueError(f"sampler.grid.u_min={u_min} and sampler.grid.u_max={u_max} must satisfy 0 < u_min < u_max.")


@dataclass(frozen=True)
class Karras:
    r"""Noise-to-signal ratios on the rho ramp, then one step to t = 0.

    .. math::
        u_i = \left(u_{max}^{1/\rho} + \tfrac{i}{N-1} (u_{min}^{1/\rho} - u_{max}^{1/\rho})\right)^\rho,
        \qquad u = \sigma/\alpha

    The ratio is cut at ``u_max`` where the schedule goes further. A schedule that ends with noise left (edm) ends
    there, or goes on to sigma = 0 in one step with ``to_zero``, as EDM's algorithm does.
    Source: Karras et al. 2022 (arXiv 2206.00364), eq. 5.
    When: ODE samplers in sigma/alpha (Euler, Heun, 2M) on any schedule.

    Raises:
        ValueError: unless 0 < u_min < u_max and rho > 0.
    """

    rho: float = 7.0
    u_min: float = 0.002
    u_max: float = 80.0
    to_zero: bool = False

    def __post_init__(self) -> None:
        _check_ratios(self.u_min, self.u_max)
        if not 0 < self.rho < math.inf:
            raise ValueError(f"sampler.grid.rho={self.rho} must be positive: 7 is EDM's.")

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        def curve(first: float, last: float, count: int) -> Tensor:
            return self.rho * torch.log(ramp(first ** (1 / self.rho), last ** (1 / self.rho), count))

        return _by_ratio(schedule, steps, self.u_min, self.u_max, curve)


@dataclass(frozen=True)
class Exponential:
    r"""Noise-to-signal ratios in geometric steps, then one step to t = 0.

    .. math:: u_i = u_{max}^{1 - i/(N-1)}\, u_{min}^{i/(N-1)}, \qquad u = \sigma/\alpha

    Equal steps of log-SNR, as :class:`LogSNR`, between ratios rather than times; cut to the schedule's range.
    Source: Song & Ermon 2020 (arXiv 2006.09011), section 3.2; diffusers' ``use_exponential_sigmas``.
    When: annealed Langevin dynamics and 3M SDE solvers.

    Raises:
        ValueError: unless 0 < u_min < u_max.
    """

    u_min: float = 0.002
    u_max: float = 80.0
    to_zero: bool = False

    def __post_init__(self) -> None:
        _check_ratios(self.u_min, self.u_max)

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        def curve(first: float, last: float, count: int) -> Tensor:
            return ramp(math.log(first), math.log(last), count)

        return _by_ratio(schedule, steps, self.u_min, self.u_max, curve)
