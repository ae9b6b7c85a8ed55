"""Denoising diffusion implicit models."""

from __future__ import annotations

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.prediction import combine
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.schedules import transition_between


class DDIM(Sampler):
    r"""DDIM, deterministic at eta = 0 and DDPM's posterior variance at eta = 1.

    .. math::
        x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - \eta^2 \tilde\sigma^2}\, \hat\epsilon + \eta \tilde\sigma z,
        \qquad \tilde\sigma^2 = \mathrm{Var}\, q(x_s | x_t, x_0)

    Order 1 at eta = 0, one evaluation a step.
    Source: Song et al. 2021 (arXiv 2010.02502), eqs. 12 and 16.
    When: a first choice, deterministic and robust; few steps with eta = 0, many with eta = 1.

    Args:
        steps: number of steps.
        eta: share of fresh noise, in [0, 1].
        grid: the rule that places the steps.

    Raises:
        ValueError: eta is negative or exceeds 1 (the square root would then turn imaginary).
    """

    renoises = True

    def __init__(self, *, steps: int = 50, eta: float = 0.0, grid: GridRule | None = None) -> None:
        super().__init__(steps=steps, grid=grid)
        if not 0 <= eta <= 1:
            raise ValueError(f"sampler.eta={eta} must lie in [0, 1]: 0 is deterministic, 1 is DDPM's posterior.")
        self.eta = eta
        self.order = 1 if eta == 0 else None

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        p = denoise(state.x, t)
        if self.eta == 0.0:
            return state.advance(p.blend(x0=s.alpha, eps=s.sigma), nfe=denoise.cost, prediction=p)
        fresh = self.eta**2 * transition_between(t, s).variance
        x = p.blend(x0=s.alpha, eps=max(s.sigma**2 - fresh, 0.0) ** 0.5)
        if fresh > 0:
            x = combine(1.0, x, fresh**0.5, state.noise(i + 1))
        return state.advance(x, nfe=denoise.cost, prediction=p)
