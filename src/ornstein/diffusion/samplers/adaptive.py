"""Adaptive Runge-Kutta on the probability-flow ODE, with error control sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.schedules import Level, NoiseSchedule

# Dormand & Prince's pair: stage i at C[i] from the slopes so far; the last row is the fifth-order solution itself.
_C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_SHORTEST = 1e-12  # of the whole stretch
_SAFETY, _LEAST, _MOST = 0.9, 0.2, 5.0  # of the controller's change of step: Hairer, Norsett & Wanner, II.4
NO_MOMENTUM = (
    "sampler=rk45 tries steps and discards some of them, over which guidance.momentum has no meaning: choose "
    "guidance.momentum=0, or a fixed-step sampler such as sampler=heun."
)

Slope = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """What an adaptive solver found.

    Attributes:
        y: (B, *shape) at the end.
        evaluations: (B,) int64 calls of the slope that each sample needed itself.
        calls: of the slope for the batch: what it cost.
        step: (B,) float64 length of the step that each sample would try next.
        slope: (B, *shape) at the end.
    """

    y: Tensor
    evaluations: Tensor
    calls: int
    step: Tensor
    slope: Tensor


def dormand_prince(
    slope: Slope,
    y: Tensor,
    u0: float,
    u1: float,
    *,
    rtol: float,
    atol: float,
    max_steps: int,
    step: Tensor | None = None,
    first: Tensor | None = None,
) -> Solution:
    r"""Solves dy/du = slope(y, u) from u0 to u1 with the 5(4) pair, each sample at its own u and its own step.

    A step is kept where the root mean square over the sample of error / (atol + rtol max(|y|, |y_new|)) is at most 1;
    where it is not, that sample alone tries again with a smaller one. Samples that have arrived stay where they are.
    Source: Dormand & Prince 1980, RK5(4)7M; step control as Hairer, Norsett & Wanner, "Solving ODEs I", II.4.

    Args:
        slope: takes y (B, *shape) and u (B,) float64.
        y: (B, *shape) at u0, float32 or float64.
        u0: start.
        u1: end, above or below.
        rtol: relative tolerance.
        atol: absolute tolerance.
        max_steps: attempts at most, for any sample.
        step: (B,) lengths to try first; guessed from the slope unless given.
        first: the slope at u0, if known already.

    Raises:
        ValueError: a sample did not arrive within ``max_steps`` attempts.
    """
    count, span = len(y), u1 - u0
    u = torch.full((count,), u0, dtype=torch.float64, device=y.device)
    evaluations = torch.zeros(count, dtype=torch.int64, device=y.device)
    calls = 0
    if first is None:
        first, calls = slope(y, u), 1
        evaluations += 1
    h = _first_step(y, first, abs(span), rtol, atol).detach() if step is None else step
    left = torch.full_like(u, abs(span))
    sign = math.copysign(1.0, span)
    for _ in range(max_steps):
        active = left > 0
        if not bool(active.any()):
            break
        length = torch.where(active, torch.minimum(h, left), 0.0)
        if bool((active & (h < _SHORTEST * abs(span))).any()):
            raise ValueError(
                "the adaptive solver's step fell to nothing: predictions are not finite there, or finer than rounding "
                "allows; loosen sampler.rtol and sampler.atol, or choose a fixed-step sampler such as sampler=heun."
            )
        signed = sign * length
        slopes = [first]
        for c, row in zip(_C[1:], _A[1:], strict=True):
            # The ends are met exactly, so that no stage asks for a level beyond them.
            at = u + c * signed if c < 1 else torch.where(length >= left, u1, u + signed)
            slopes.append(slope(_combine(y, slopes, row, signed), at))
        new = _combine(y, slopes[:-1], _A[-1], signed)
        error = _combine(torch.zeros_like(y), slopes, _ERROR, signed)
        # The steps are the solver's own affair: gradients go through the solution, not through their choice.
        size = _rms(error / (atol + rtol * torch.maximum(y.abs(), new.abs()))).detach()
        calls += len(_C) - 1
        evaluations += active * (len(_C) - 1)
        accepted = active & (size <= 1)
        finished = accepted & (length >= left)
        keep = _spread(accepted, y)
        y, first = torch.where(keep, new, y), torch.where(keep, slopes[-1], first)
        u = torch.where(finished, u1, torch.where(accepted, u + signed, u))
        left = torch.where(finished, 0.0, torch.where(accepted, left - length, left))
        # An error that is not finite is as bad as can be; a step cut short by the end says nothing about the next.
        factor = (_SAFETY * size.clamp(min=1e-10) ** -0.2).nan_to_num(_LEAST).clamp(_LEAST, _MOST)
        factor = torch.where(accepted, factor, factor.clamp(max=1.0))
        h = torch.where(active & ~(finished & (length < h)), length * factor, h)
    if bool((left > 0).any()):
        raise ValueError(
            f"{int((left > 0).sum())} of {count} samples did not arrive within sampler.max_steps={max_steps} attempts: "
            "raise it, loosen sampler.rtol and sampler.atol, or choose a fixed-step sampler such as sampler=heun."
        )
    return Solution(y, evaluations, calls, h, first)


def _combine(y: Tensor, slopes: list[Tensor], row: tuple[float, ...], length: Tensor) -> Tensor:
    total = sum(weight * k for weight, k in zip(row, slopes, strict=True) if weight)
    assert isinstance(total, Tensor)
    return y + _spread(length, y).to(y.dtype) * total


def _spread(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1, *([1] * (like.ndim - 1)))


def _rms(value: Tensor) -> Tensor:
    square = value.double().square()
    return (square.flatten(1).mean(1) if value.ndim > 1 else square).sqrt()


def _first_step(y: Tensor, slope: Tensor, span: float, rtol: float, atol: float) -> Tensor:
    scale = atol + rtol * y.abs()
    return (0.01 * _rms(y / scale) / (_rms(slope / scale) + 1e-6)).nan_to_num(0.0).clamp(min=1e-6 * span)


def flow_slope(denoise: Denoise) -> Slope:
    r"""The probability flow on a circle, where it is finite on every schedule.

    With :math:`\alpha = c \cos\varphi`, :math:`\sigma = c \sin\varphi` and :math:`z = x/c`:
    :math:`dz/d\varphi = \cos\varphi\, \hat\epsilon - \sin\varphi\, \hat x_0`, which is v. Neither end is infinite, and
    kinks of a beta table, which are kinks of t, are none of phi.
    Source: Salimans & Ho 2022 (arXiv 2202.00512), appendix D.
    """

    def slope(z: Tensor, phi: Tensor) -> Tensor:
        level = level_at(denoise.schedule, phi, z)
        p = denoise(z * (level.alpha**2 + level.sigma**2) ** 0.5, level)
        return _turn(p)

    return slope


def _turn(p: Prediction) -> Tensor:
    size = (p.level.alpha**2 + p.level.sigma**2) ** 0.5
    return (p.level.alpha / size) * p.eps - (p.level.sigma / size) * p.x0


def angle(level: Level) -> float:
    """The angle phi = atan(sigma / alpha) of one level, in [0, pi/2]."""
    return math.atan2(float(level.sigma), float(level.alpha))


def level_at(schedule: NoiseSchedule, phi: Tensor, like: Tensor) -> Level:
    """The levels at angles (B,), broadcast against ``like`` and in its dtype."""
    log_snr = 2 * (torch.log(torch.cos(phi)) - torch.log(torch.sin(phi)))
    # cos(pi/2) is 6e-17 in float64; no schedule that ends above zero SNR comes near.
    log_snr = torch.where(torch.cos(phi) < 1e-15, -torch.inf, log_snr)
    level = schedule.level(schedule.time(log_snr), like.ndim)
    return Level(*(torch.as_tensor(v, device=like.device).to(like.dtype) for v in level))


class RK45(Sampler):
    r"""Adaptive Dormand-Prince on the probability-flow ODE, to a tolerance rather than in a number of steps.

    .. math::
        \frac{dz}{d\varphi} = \cos\varphi\, \hat\epsilon - \sin\varphi\, \hat x_0, \qquad
        z = \frac{x}{\sqrt{\alpha^2 + \sigma^2}}, \quad \tan\varphi = \frac{\sigma}{\alpha}

    Fifth order with an embedded fourth-order estimate of the error. Every sample has its own step and its own
    evaluations (``State.nfe_each``); a batch costs as many as its slowest sample (``State.nfe``). phi is finite at both
    ends and smooth under kinked schedules. eps is not defined by x0 at sigma = 0, so a trajectory that ends there is
    integrated to ``t_min`` and closed by one first-order step, as the paper's code does (the slope at ``t_min`` gives
    it, without another evaluation). ``steps`` and the grid only
    say where the trajectory is shown in between. Six evaluations an attempt. ``order`` is None: the error follows the
    tolerance, not the grid.
    Source: Dormand & Prince 1980; Song et al. 2021 (arXiv 2011.13456), section 4.3.
    When: a reference solution, likelihoods, or encoding data to noise and back.

    Args:
        steps: number of stretches that the trajectory is shown in.
        rtol: relative tolerance, per sample.
        atol: absolute tolerance, in units of the data.
        t_min: where integration ends before data, in (0, 1).
        max_steps: attempts at most in one stretch.
        grid: the rule that places the stretches.

    Raises:
        ValueError: a tolerance that is not positive or finer than the samples' rounding, t_min outside (0, 1),
            max_steps < 1; when called, guidance with momentum (a slope that depends on the path, rejected attempts
            included, is no differential equation's), or samples that do not arrive.
    """

    def __init__(
        self,
        *,
        steps: int = 10,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        t_min: float = 1e-3,
        max_steps: int = 1000,
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, grid=grid)
        if not (rtol > 0 and atol > 0):
            raise ValueError(f"sampler.rtol={rtol} and sampler.atol={atol} must be positive, such as 1e-5.")
        if not 0 < t_min < 1:
            raise ValueError(f"sampler.t_min={t_min} must lie in (0, 1), such as 1e-3.")
        if max_steps < 1:
            raise ValueError(f"sampler.max_steps={max_steps} must be at least 1.")
        self.rtol, self.atol, self.t_min, self.max_steps = rtol, atol, t_min, max_steps

    @property
    def stochastic(self) -> bool:
        """It draws nothing but the noise that it starts from."""
        return False

    def begin(self, denoise: Denoise) -> Denoise:
        _without_memory(denoise)
        return super().begin(denoise)

    def solve(
        self,
        denoise: Denoise,
        x: Tensor,
        t0: float | Level,
        t1: float | Level,
        *,
        step: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Solution:
        """Carries x (B, *shape) at t0 along the flow to t1, towards data or towards noise.

        Args:
            denoise: the (guided) denoiser.
            x: (B, *shape) at t0.
            t0: start, a time in [0, 1] or a level.
            t1: end; neither end may have sigma = 0.
            step: (B,) lengths in phi to try first, from an earlier solution.
            first: the slope in phi at t0, from an earlier solution.

        Returns:
            The solution with ``y`` = x at t1.

        Raises:
            ValueError: guidance with momentum, sigma = 0 at an end, a tolerance finer than x's rounding, or samples
                that do not arrive.
        """
        _without_memory(denoise)
        start, end = (t if isinstance(t, Level) else denoise.schedule.level(t) for t in (t0, t1))
        if start.sigma == 0 or end.sigma == 0:
            raise ValueError("the flow's noise direction is undefined at sigma = 0: solve to or from t = 1e-3 or so.")
        finest = 10 * torch.finfo(x.dtype).eps
        if self.rtol < finest:
            raise ValueError(
                f"sampler.rtol={self.rtol} is finer than {x.dtype} resolves: choose at least {finest:.1e}."
            )
        calls = 0
        if first is None:
            # One level for the batch: what a parameterization cannot give there is said in its own words.
            first, calls = _turn(denoise(x, start)), 1
        solution = dormand_prince(
            flow_slope(denoise),
            x / _size(start),
            angle(start),
            angle(end),
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
            step=step,
            first=first,
        )
        return replace(
            solution,
            y=solution.y * _size(end),
            evaluations=solution.evaluations + calls,
            calls=solution.calls + calls,
        )

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        end = s if s.sigma > 0 else denoise.schedule.level(min(self.t_min, float(t.t)))
        history: tuple[Tensor, ...] = ()
        if angle(end) < angle(t):
            known = dict(zip(("step", "first"), state.history, strict=False))
            solution = self.solve(denoise, state.x, t, end, **known)
            x, calls, each, history = solution.y, solution.calls, solution.evaluations, (solution.step, solution.slope)
            # The slope at the end is v there, which is a prediction that costs no further call.
            c, v, size = math.cos(angle(end)), solution.slope, _size(end)
            p = Prediction(x, end, x0=(c / size) * x - math.sin(angle(end)) * v, eps=(end.sigma / size**2) * x + c * v)
        else:
            calls, each = 1, torch.ones(len(state.x), dtype=torch.int64, device=state.x.device)
            p, x = denoise(state.x, t), state.x
        if end is not s:
            x = s.alpha * p.x0 + s.sigma * p.eps
        before = 0 if state.nfe_each is None else state.nfe_each
        return replace(
            state,
            x=x,
            nfe=state.nfe + denoise.cost * calls,
            nfe_each=before + denoise.cost * each,
            prediction=p,
            history=history,
        )


def _without_memory(denoise: Denoise) -> None:
    if denoise.remembers:
        raise ValueError(NO_MOMENTUM)


def _size(level: Level) -> float:
    return math.hypot(float(level.alpha), float(level.sigma))
