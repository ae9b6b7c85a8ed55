"""DDPM's ancestral sampler."""

from __future__ import annotations

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.schedules import transition_between

_VARIANCES = ("fixed_small", "fixed_large")


class DDPM(Sampler):
    r"""Ancestral sampling from :math:`q(x_s | x_t, \hat x_0)`, on any grid of any schedule.

    ``variance="fixed_small"`` takes the posterior's variance, ``"fixed_large"`` the forward kernel's (beta on the full
    grid). The last step adds no noise. Stochastic, one evaluation a step.
    Source: Ho et al. 2020 (arXiv 2006.11239), eqs. 6-7 and algorithm 2; respaced steps as Nichol & Dhariwal 2021
    (arXiv 2102.09672), section 4.

    Raises:
        ValueError: an unknown variance.
    """

    def __init__(self, *, steps: int = 1000, variance: str = "fixed_small", grid: GridRule | None = None) -> None:
        super().__init__(steps=steps, grid=grid)
        if variance not in _VARIANCES:
            raise ValueError(f"sampler.variance={variance!r} is unknown: choose one of {', '.join(_VARIANCES)}.")
        self.variance = variance

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        p = denoise(state.x, t)
        kernel = transition_between(t, s)
        x = kernel.on_x_t * state.x + kernel.on_x0 * p.x0
        variance = kernel.variance if self.variance == "fixed_small" else kernel.forward_variance
        if i + 1 < state.grid.steps and variance > 0:
            x = x + variance**0.5 * state.noise(i + 1)
        return state.advance(x, nfe=denoise.cost, prediction=p)
