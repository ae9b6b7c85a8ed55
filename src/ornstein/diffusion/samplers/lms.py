"""Linear multistep in the noise-to-signal ratio."""

from __future__ import annotations

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.samplers.multistep import lagrange_weights, step_in_eps, usable_order
from ornstein.diffusion.samplers.unipc import check_solver_order
from ornstein.diffusion.schedules import Level


class LMS(Sampler):
    r"""Linear multistep (Adams-Bashforth on any grid) in :math:`\rho = \sigma/\alpha`, up to order 4.

    :math:`d(x/\alpha)/d\rho = \hat\epsilon`, so with :math:`L_j` the Lagrange polynomials of the last levels' rho:

    .. math::
        \frac{x_s}{\alpha_s} = \frac{x_t}{\alpha_t} + \sum_j \hat\epsilon_j \int_{\rho_t}^{\rho_s} L_j(\rho)\, d\rho

    The integrals are exact. The order grows by one a step from 1, and that first step (Euler's) leaves order 2 as what
    is measured over a whole trajectory, order 1 with ``solver_order=1``. One evaluation a step. It goes on to sigma = 0
    in full order, where rho is 0; a prediction at alpha = 0, where rho is infinite, is left out. The same method is
    DEIS's rho-AB.

    When: grids that are smooth in sigma/alpha (karras) at 20 steps and more; log-SNR methods need fewer.
    Source: k-diffusion's ``sample_lms`` (Katherine Crowson, 2022); Zhang & Chen 2022 (arXiv 2204.13902), section 3.

    Args:
        steps: number of steps.
        solver_order: predictions that a step interpolates at most, 1 to 4.
        grid: the rule that places the steps.

    Raises:
        ValueError: a solver_order that is not 1 to 4.
    """

    def __init__(self, *, steps: int = 30, solver_order: int = 4, grid: GridRule | None = None) -> None:
        super().__init__(steps=steps, grid=grid)
        check_solver_order(solver_order, 4)
        self.solver_order = solver_order
        self.order = min(solver_order, 2)

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        grid, t, s = state.grid, state.grid[i], state.grid[i + 1]
        p = denoise(state.x, t)
        order = usable_order(grid, i, self.solver_order, len(state.history), lower_order_final=False)
        weights = rho_weights([grid[i - j] for j in range(order)], s)
        x = step_in_eps(p, t, s, weights, state.history)
        return state.advance(
            x, nfe=denoise.cost, prediction=p, history=(p.eps, *state.history[: max(0, self.solver_order - 2)])
        )


def rho_weights(seen: list[Level], s: Level) -> list[float]:
    """Means over rho, from the first of ``seen`` to s, of the Lagrange polynomials through ``seen``."""
    if len(seen) == 1:
        return [1.0]
    rho = [float(level.sigma / level.alpha) for level in seen]
    span = float(s.sigma / s.alpha) - rho[0]
    return lagrange_weights([(r - rho[0]) / span for r in rho], [1 / (k + 1) for k in range(len(seen))])
