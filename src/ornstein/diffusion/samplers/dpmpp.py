"""DPM-Solver++."""

from __future__ import annotations

import math

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.schedules import Level


class DPMpp2M(Sampler):
    r"""DPM-Solver++(2M): second-order multistep in the data prediction, exponential in half-log-SNR.

    With :math:`\ell = \ln(\alpha/\sigma)`, :math:`h = \ell_s - \ell_t` and r = h_previous / h:

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} x_t + \left(\alpha_s - \alpha_t \frac{\sigma_s}{\sigma_t}\right)
              \left[\left(1 + \tfrac{1}{2r}\right) \hat x_0(t) - \tfrac{1}{2r} \hat x_0(t_{prev})\right]

    The first step is first order, and so is a step that ends at sigma = 0, where h is infinite (diffusers'
    ``final_sigmas_type="zero"``). Order 2, one evaluation a step. With ``lower_order_final`` the last step is first
    order whatever its end, which steadies runs of fewer than 15 steps.
    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
    """

    order: int | None = 2

    def __init__(self, *, steps: int = 20, lower_order_final: bool = False, grid: GridRule | None = None) -> None:
        super().__init__(steps=steps, grid=grid)
        self.lower_order_final = lower_order_final

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        p = denoise(state.x, t)
        x0 = p.x0
        data = x0
        last = i + 1 == state.grid.steps
        if state.history and s.sigma > 0 and not (last and self.lower_order_final):
            r = (_half_log_snr(t) - _half_log_snr(state.grid[i - 1])) / (_half_log_snr(s) - _half_log_snr(t))
            data = (1 + 0.5 / r) * x0 - (0.5 / r) * state.history[0]
        carry = s.sigma / t.sigma
        x = carry * state.x + (s.alpha - t.alpha * carry) * data
        return state.advance(x, nfe=denoise.cost, prediction=p, history=(x0,))


def _half_log_snr(level: Level) -> float:
    if level.alpha == 0:
        return -math.inf
    return math.log(level.alpha / level.sigma)
