"""DDPM's ancestral sampler."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.prediction import Prediction, combine
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.schedules import Transition, transition_between

_VARIANCES = ("fixed_small", "fixed_large", "learned")


class DDPM(Sampler):
    r"""Ancestral sampling from :math:`q(x_s | x_t, \hat x_0)`, on any grid of any schedule.

    .. math:: x_s = E\, q(x_s | x_t, \hat x_0) + \sqrt{v}\, z

    ``variance="fixed_small"`` takes the posterior's variance :math:`\tilde\beta`, ``"fixed_large"`` the forward
    kernel's :math:`\beta`, both of the step at hand, however far it reaches. ``"learned"`` lies between them,
    :math:`v = \exp(f \ln\beta + (1 - f) \ln\tilde\beta)` with the network's own fraction f for every element. The last
    step adds no noise. Stochastic, one evaluation a step.
    Source: Ho et al. 2020 (arXiv 2006.11239), eqs. 6-7 and algorithm 2; learned variance and respaced steps as Nichol &
    Dhariwal 2021 (arXiv 2102.09672), sections 3.1 and 4.
    When: many steps are affordable, or the model learned its variance.

    Args:
        steps: number of steps.
        variance: fixed_small, fixed_large or learned.
        grid: the rule that places the steps.

    Raises:
        ValueError: an unknown variance; or, at the first step, ``learned`` with a network that predicts none.
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
        x = p.blend(x_t=kernel.on_x_t, x0=kernel.on_x0)
        if i + 1 < state.grid.steps and kernel.variance > 0:
            x = combine(1.0, x, self._deviation(kernel, p), state.noise(i + 1))
        return state.advance(x, nfe=denoise.cost, prediction=p)

    def _deviation(self, kernel: Transition, prediction: Prediction) -> float | Tensor:
        if self.variance == "fixed_small":
            return kernel.variance**0.5
        if self.variance == "fixed_large":
            return kernel.forward_variance**0.5
        fraction = prediction.variance_fraction
        if fraction is None:
            raise ValueError(
                "sampler.variance=learned needs a network that predicts its variance, and this one does not: choose "
                "sampler.variance=fixed_small, or train with objective=hybrid."
            )
        low, high = 0.5 * math.log(kernel.variance), 0.5 * math.log(kernel.forward_variance)
        return torch.exp(low + (high - low) * fraction)
