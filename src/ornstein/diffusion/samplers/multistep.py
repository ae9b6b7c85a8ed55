r"""What multistep solvers share: half-log-SNR, and integrals of the polynomial through what was seen.

A multistep solver puts a polynomial through its last predictions and integrates it exactly over the next step. In
:math:`v = (u - u_t)/(u_s - u_t)`, 0 at the step's start and 1 at its end, that is one list of moments
:math:`\int v^k d\mu(v)` and one list of nodes, whatever the coordinate u and the measure. All of it is arithmetic of
Python floats: a grid's levels are numbers, and so are the weights that multiply tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ornstein.diffusion.brownian import BrownianPath
from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import Grid
from ornstein.diffusion.prediction import Prediction, combine
from ornstein.diffusion.samplers.base import State
from ornstein.diffusion.schedules import Level, NoiseSchedule

BLOCK = 64  # steps for which a sampler asks the schedule at once: a long grid is never laid a second time as a whole
_SERIES_BELOW = 0.25
_SERIES_TERMS = 13  # 0.25**13 / 13! is 2e-18


def half_log_snr(level: Level) -> float:
    r""":math:`\ell = \ln(\alpha/\sigma)`; -inf at alpha = 0 and inf at sigma = 0."""
    alpha, sigma = float(level.alpha), float(level.sigma)
    if alpha == 0.0:
        return -math.inf
    return math.inf if sigma == 0.0 else math.log(alpha / sigma)


def exponential_moments(h: float, count: int) -> list[float]:
    r""":math:`h \int_0^1 e^{h(v - 1)} v^k dv` for k < count; h of either sign, or infinite where count is 1.

    By parts, :math:`m_k = 1 - k m_{k-1}/h` with :math:`m_0 = 1 - e^{-h}`. That cancels at small h, where the series of
    the last moment and the recursion downwards do not.
    """
    if abs(h) >= _SERIES_BELOW or count == 1:
        moments = [-math.expm1(-h)]
        for k in range(1, count):
            moments.append(1 - k * moments[-1] / h)
        return moments
    term, total = h * math.exp(-h), 0.0
    for n in range(_SERIES_TERMS):
        total += term / (n + count)
        term *= h / (n + 1)
    moments = [total]
    for k in range(count - 1, 0, -1):
        moments.append(h * (1 - moments[-1]) / k)
    return moments[::-1]


def lagrange_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    r""":math:`w_j = \int \prod_{k \ne j} \frac{v - v_k}{v_j - v_k} d\mu(v)`: what each node's value counts for.

    Args:
        nodes: n different numbers.
        moments: the measure's first n moments.
    """
    weights = []
    for j, node in enumerate(nodes):
        polynomial, scale = [1.0], 1.0
        for k, other in enumerate(nodes):
            if k != j:
                scale *= node - other
                shifted = [0.0, *polynomial]
                polynomial = [high - other * low for high, low in zip(shifted, [*polynomial, 0.0], strict=True)]
        weights.append(sum(c * m for c, m in zip(polynomial, moments, strict=True)) / scale)
    return weights


def usable_order(grid: Grid, i: int, most: int, kept: int, *, lower_order_final: bool) -> int:
    """How many predictions step i may interpolate: at most ``most``, of which ``kept`` are of earlier steps.

    A prediction made at alpha = 0 stands infinitely far away in log-SNR and is left out. ``lower_order_final`` ends on
    orders 2 and 1, as diffusers does in short runs.
    """
    order = min(most, kept + 1)
    if lower_order_final:
        order = min(order, grid.steps - i)
    if order > 1 and grid[i - order + 1].alpha == 0.0:
        order -= 1
    return order


class Kernel(NamedTuple):
    """One step as ``x_s = carry x_t + gain data + noise z``, exact where the predicted data stand still."""

    carry: float
    gain: float
    noise: float


def data_kernel(t: Level, s: Level, eta: float = 0.0) -> Kernel:
    r"""The exact step of the reverse SDE between two levels with its noise scaled by eta; the ODE's at eta = 0.

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} e^{-\eta h} x_t + \alpha_s (1 - e^{-(1 + \eta) h}) \hat x_0
              + \sigma_s \sqrt{1 - e^{-2 \eta h}}\, z

    Finite at both ends: alpha_t = 0 and sigma_s = 0 are allowed.
    """
    ratio = float(s.sigma / t.sigma)
    if eta == 0.0:
        return Kernel(ratio, float(s.alpha - t.alpha * ratio), 0.0)
    kept = float(t.alpha * ratio / s.alpha)  # e^-h
    carry = ratio * kept**eta
    variance = -math.expm1(2 * eta * math.log(kept)) if kept > 0 else 1.0
    return Kernel(carry, float(s.alpha - t.alpha * carry), float(s.sigma) * math.sqrt(variance))


def fresh_noise(kind: str, state: State, i: int, t: Level, s: Level, draw: int = 0) -> Tensor:
    """Standard normals (B, *shape) for the way from t to s in step i: ``"independent"`` draws, or a path's increment.

    The path runs over the whole of [0, 1] in t, so that any two grids read the same one.
    """
    if kind == "independent":
        return state.noise(i + 1, draw)
    return BrownianPath(state.noise, 1.0, 0.0).increment(float(t.t), float(s.t))


def step_in_eps(p: Prediction, t: Level, s: Level, weights: Sequence[float], history: Sequence[Tensor]) -> Tensor:
    r"""DDIM's step with the noise replaced by a weighted mean of noises.

    .. math::
        x_s = \frac{\alpha_s}{\alpha_t} x_t
              + \left(\sigma_s - \alpha_s \frac{\sigma_t}{\alpha_t}\right) \sum_j w_j \hat\epsilon_j

    written around :math:`\alpha_s \hat x_0 + \sigma_s \hat\epsilon`, which has nothing large to cancel.

    Args:
        p: the prediction at t.
        t: where the step starts; alpha > 0 unless there is one weight.
        s: where it ends.
        weights: they sum to 1, the first is that of ``p.eps``.
        history: earlier noises, newest first, one for each further weight at least.
    """
    if len(weights) == 1:
        return p.blend(x0=s.alpha, eps=s.sigma)
    change = s.sigma - s.alpha * t.sigma / t.alpha
    x = p.blend(x0=s.alpha, eps=s.sigma + change * (weights[0] - 1))
    for weight, eps in zip(weights[1:], history, strict=False):
        x = combine(1.0, x, change * weight, eps)
    return x


class InnerLevels:
    """Levels inside the steps of a grid, laid by half-log-SNR or by time, computed once and in blocks of steps.

    Args:
        fraction: where in (0, 1) of each step they stand.
        by: ``"log_snr"`` or ``"time"``.
    """

    def __init__(self, fraction: float, by: str = "log_snr") -> None:
        self.fraction, self.by = fraction, by
        self._laid: tuple[Grid, NoiseSchedule, int, tuple[Level, ...]] | None = None

    def __call__(self, schedule: NoiseSchedule, grid: Grid, i: int) -> Level:
        """The level inside step i; of no meaning by log-SNR where an end of the step has none."""
        laid = self._laid
        stale = laid is None or laid[0] is not grid or laid[1] is not schedule
        if laid is None or stale or not 0 <= i - laid[2] < len(laid[3]):
            times = self._times(schedule, grid.levels[i : i + BLOCK + 1])
            laid = self._laid = (grid, schedule, i, schedule.levels(times))
        return laid[3][i - laid[2]]

    def _times(self, schedule: NoiseSchedule, levels: Sequence[Level]) -> Tensor:
        by_time = self.by == "time"
        rows = [level.t if by_time else 2 * half_log_snr(level) for level in levels]
        ends = torch.tensor(rows, dtype=torch.float64)
        inner = ends[:-1] + self.fraction * ends.diff()
        return inner if by_time else schedule.time(inner.nan_to_num(0.0))


def second_order_start(
    denoise: Denoise, x: Tensor, x0: Tensor, t: Level, middle: Level, s: Level
) -> tuple[Tensor, Prediction]:
    """One step of second order that needs no history, for one evaluation more: DPM-Solver++(2S) through ``middle``."""
    carry, gain, _ = data_kernel(t, middle)
    second = denoise(combine(carry, x, gain, x0), middle, again=True)
    r = (half_log_snr(middle) - half_log_snr(t)) / (half_log_snr(s) - half_log_snr(t))
    carry, gain, _ = data_kernel(t, s)
    return carry * x + gain * (x0 + (second.x0 - x0) * (0.5 / r)), second
