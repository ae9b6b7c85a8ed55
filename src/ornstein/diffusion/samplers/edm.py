"""Euler and Heun steps of the probability-flow ODE, with EDM's churn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.schedules import Level, Scalar

_COORDINATES = ("path", "sigma")


class Euler(Sampler):
    r"""Euler steps of :math:`dx = \hat x_0\, d\alpha + \hat\epsilon\, d\sigma`, with optional churn.

    On flow this is FlowMatchEuler, on edm it is algorithm 2 of Karras et al. 2022 (arXiv 2206.00364) without its
    correction. Because x_t = alpha x0 + sigma eps, an Euler step ends at alpha_s x0 + sigma_s eps in whichever
    coordinate it is taken, which is DDIM's step at eta = 0. Order 1 without churn, one evaluation a step. A grid with
    ``to_zero`` takes edm's last step to sigma = 0, as the paper's algorithm does.
    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 2; Esser et al. 2024 (arXiv 2403.03206) on flow.
    When: flow models, or EDM's churn at one evaluation a step.

    Args:
        steps: number of steps.
        s_churn: how much fresh noise is added over the whole trajectory; 0 is deterministic.
        s_tmin: churn only where sigma/alpha is at least this.
        s_tmax: churn only where sigma/alpha is at most this.
        s_noise: scale of the fresh noise.
        grid: the rule that places the steps.

    Raises:
        ValueError: s_churn or s_noise is negative.
    """

    order: int | None = 1
    renoises = True

    def __init__(
        self,
        *,
        steps: int = 50,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, grid=grid)
        if s_churn < 0 or s_noise < 0:
            raise ValueError(f"s_churn={s_churn} and s_noise={s_noise} must not be negative: 0 switches churn off.")
        self.s_churn, self.s_tmin, self.s_tmax, self.s_noise = s_churn, s_tmin, s_tmax, s_noise
        if s_churn > 0:
            self.order = None

    def churn(self, denoise: Denoise, state: State, i: int) -> tuple[Tensor, Level]:
        """Raises the noise level by EDM's factor gamma (algorithm 2, lines 4-6), in sigma/alpha."""
        t = state.grid[i]
        if self.s_churn == 0 or t.alpha == 0 or not self.s_tmin <= t.sigma / t.alpha <= self.s_tmax:
            return state.x, t
        gamma = min(self.s_churn / state.grid.steps, math.sqrt(2) - 1)
        ratio = t.sigma / t.alpha
        limit = math.exp(-0.5 * denoise.schedule.log_snr_range()[0])
        raised_ratio = min(ratio * (1 + gamma), limit)
        # Schedules bound by SNR know one alpha for each ratio: come back to it through time.
        raised = denoise.schedule.level(float(denoise.schedule.time(_log_snr(float(raised_ratio)))))
        fresh = max((raised.sigma / raised.alpha) ** 2 - ratio**2, 0.0) ** 0.5 if raised.alpha > 0 else 0.0
        if fresh == 0.0:
            return state.x, t
        noisy = state.x / t.alpha + self.s_noise * fresh * state.noise(i + 1)
        return noisy * raised.alpha, raised

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        x, t = self.churn(denoise, state, i)
        s = state.grid[i + 1]
        p = denoise(x, t)
        return state.advance(p.blend(x0=s.alpha, eps=s.sigma), nfe=denoise.cost, prediction=p)


class Heun(Euler):
    r"""Heun's method: an Euler step, then the trapezoid of both ends.

    .. math::
        x_s = x_t + (\alpha_s - \alpha_t) \tfrac12(\hat x_0 + \hat x_0')
              + (\sigma_s - \sigma_t) \tfrac12(\hat\epsilon + \hat\epsilon')

    ``coordinate="path"`` is this line, finite at alpha = 0; it is algorithm 1 of Karras et al. 2022 (arXiv 2206.00364)
    where alpha = 1 and Heun in t on flow. ``coordinate="sigma"`` takes it in x/alpha against sigma/alpha on every
    schedule, as k-diffusion and diffusers do; where alpha comes close to 0 (cosine) it overshoots on a grid uniform in
    t, whose first step spans most of that ratio, and wants the karras grid. Order 2 without churn, two evaluations a
    step except where the step ends at sigma = 0, which stays Euler.
    Source: Karras et al. 2022 (arXiv 2206.00364), algorithms 1 and 2.
    When: EDM models, and accuracy at 20 to 50 evaluations.

    Args:
        steps: number of steps.
        s_churn: how much fresh noise is added over the whole trajectory; 0 is deterministic.
        s_tmin: churn only where sigma/alpha is at least this.
        s_tmax: churn only where sigma/alpha is at most this.
        s_noise: scale of the fresh noise.
        coordinate: path or sigma.
        grid: the rule that places the steps.

    Raises:
        ValueError: s_churn or s_noise is negative, or an unknown coordinate.
    """

    order: int | None = 2
    renoises = False

    def __init__(
        self,
        *,
        steps: int = 18,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        coordinate: str = "path",
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise, grid=grid)
        if coordinate not in _COORDINATES:
            raise ValueError(f"coordinate={coordinate!r} is unknown: choose one of {', '.join(_COORDINATES)}.")
        self.coordinate = coordinate

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        x, t = self.churn(denoise, state, i)
        s = state.grid[i + 1]
        first = denoise(x, t)
        euler = first.blend(x0=s.alpha, eps=s.sigma)
        if s.sigma == 0.0:
            return state.advance(euler, nfe=denoise.cost, prediction=first)
        nfe = denoise.cost
        second = denoise(euler, s, again=True)
        corrected = self._trapezoid(t, s, first, second)
        return state.advance(corrected, nfe=nfe + denoise.cost, prediction=second)

    def _trapezoid(self, t: Level, s: Level, first: Prediction, second: Prediction) -> Tensor:
        carry: Scalar
        x0: Scalar
        # At alpha = 0 the ratio sigma/alpha is infinite, and only the path form has a value.
        if self.coordinate == "sigma" and t.alpha > 0:
            carry, x0, eps = s.alpha / t.alpha, 0.0, 0.5 * (s.sigma - s.alpha * t.sigma / t.alpha)
        else:
            carry, x0, eps = 1.0, 0.5 * (s.alpha - t.alpha), 0.5 * (s.sigma - t.sigma)
        return first.blend(x_t=carry, x0=x0, eps=eps) + second.blend(x0=x0, eps=eps)


def _log_snr(ratio: float) -> Tensor:
    return torch.tensor(-2 * math.log(ratio), dtype=torch.float64)
