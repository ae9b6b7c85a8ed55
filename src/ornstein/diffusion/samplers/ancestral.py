"""Euler steps that overshoot in noise level and draw back up: k-diffusion's ancestral sampler."""

from __future__ import annotations

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.prediction import combine
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.schedules import transition_between


class EulerAncestral(Sampler):
    r"""An Euler step down to less noise than asked for, then fresh noise up to the grid's level.

    With :math:`\rho = \sigma/\alpha`, in which Euler's step is straight on every schedule:

    .. math::
        \rho_{up} = \min\left(\rho_s, \eta \rho_s \sqrt{1 - \rho_s^2/\rho_t^2}\right), \qquad
        \frac{x_s}{\alpha_s} = \hat x_0 + \sqrt{\rho_s^2 - \rho_{up}^2}\, \hat\epsilon + \zeta \rho_{up} z

    with zeta = ``s_noise``. The noise added is what the Euler step left out, so the marginals are right on VP, VE and
    flow alike, alpha_t = 0 included; at s_noise = 1 and eta <= 1 it is DDIM of the same eta. Stochastic unless eta = 0
    (then Euler, order 1), one evaluation a step.
    Source: Crowson's k-diffusion, ``sample_euler_ancestral``; Song et al. 2021 (arXiv 2010.02502), eq. 16.
    When: recipes written for the "Euler a" of image tools.

    Args:
        steps: number of steps.
        eta: share of fresh noise; 0 is Euler, 1 DDPM's posterior, more is cut where it would exceed the level.
        s_noise: scale of the fresh noise.
        grid: the rule that places the steps.

    Raises:
        ValueError: eta or s_noise is negative.
    """

    renoises = True

    def __init__(
        self, *, steps: int = 30, eta: float = 1.0, s_noise: float = 1.0, grid: GridRule | None = None
    ) -> None:
        super().__init__(steps=steps, grid=grid)
        if eta < 0 or s_noise < 0:
            raise ValueError(f"sampler.eta={eta} and sampler.s_noise={s_noise} must not be negative: 0 adds no noise.")
        self.eta, self.s_noise = eta, s_noise
        self.order = 1 if eta == 0 or s_noise == 0 else None

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        p = denoise(state.x, t)
        fresh = min(s.sigma**2, self.eta**2 * transition_between(t, s).variance)
        x = p.blend(x0=s.alpha, eps=(s.sigma**2 - fresh) ** 0.5)
        if fresh > 0 and self.s_noise > 0:
            x = combine(1.0, x, self.s_noise * fresh**0.5, state.noise(i + 1))
        return state.advance(x, nfe=denoise.cost, prediction=p)
