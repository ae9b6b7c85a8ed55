"""DEIS: Adams-Bashforth for the noise prediction, exact in what the schedule alone decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import Grid, GridRule
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.samplers.dpmpp import check_choice
from ornstein.diffusion.samplers.lms import rho_weights
from ornstein.diffusion.samplers.multistep import (
    BLOCK,
    exponential_moments,
    half_log_snr,
    lagrange_weights,
    step_in_eps,
    usable_order,
)
from ornstein.diffusion.samplers.unipc import check_solver_order
from ornstein.diffusion.schedules import Level, NoiseSchedule

_COORDINATES = ("log_rho", "rho", "t")
_QUADRATURE_POINTS = 16


class DEIS(Sampler):
    r"""DEIS-AB: the noise prediction extrapolated by a polynomial, integrated over :math:`\rho = \sigma/\alpha`.

    .. math::
        x_s = \frac{\alpha_s}{\alpha_t} x_t + \alpha_s \sum_j \hat\epsilon_j \int_{\rho_t}^{\rho_s} L_j\, d\rho

    ``coordinate`` says in what the L_j are polynomials: ``"log_rho"`` (diffusers' DEISMultistep, which calls it
    log-rho), ``"rho"`` (the paper's rho-AB, also LMS) or ``"t"`` (the paper's t-AB, by 16-point Gauss quadrature once a
    grid). Order 1 with ``solver_order=1``, which is DDIM; 2 as measured with 2 and 3, since the first step is first
    order. One evaluation a step. A step that ends at sigma = 0 is first order, except in rho, and so is one that would
    look back to alpha = 0.

    When: 10 to 20 steps of an unguided eps-network, in ``"t"`` on the uniform grid as in the paper.
    Source: Zhang & Chen 2022 (arXiv 2204.13902), section 3.

    Args:
        steps: number of steps.
        solver_order: predictions that a step interpolates at most, 1 to 3.
        coordinate: ``"log_rho"``, ``"rho"`` or ``"t"``.
        lower_order_final: the last steps are of orders 3, 2, 1, as diffusers has it in runs of fewer than 15 steps.
        grid: the rule that places the steps.

    Raises:
        ValueError: a solver_order that is not 1, 2 or 3, or an unknown coordinate.
    """

    def __init__(
        self,
        *,
        steps: int = 20,
        solver_order: int = 3,
        coordinate: str = "log_rho",
        lower_order_final: bool = False,
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, grid=grid)
        check_solver_order(solver_order, 3)
        check_choice("coordinate", coordinate, _COORDINATES)
        self.solver_order, self.coordinate, self.lower_order_final = solver_order, coordinate, lower_order_final
        self.order = min(solver_order, 2)
        self._laid: tuple[Grid, int, list[list[float]]] | None = None

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        grid, t, s = state.grid, state.grid[i], state.grid[i + 1]
        p = denoise(state.x, t)
        kept = len(state.history)
        order = usable_order(grid, i, self.solver_order, kept, lower_order_final=self.lower_order_final)
        # A grid that goes on to clean data from a schedule's end takes no time for it.
        if s.sigma == 0.0 and (self.coordinate == "log_rho" or t.t == s.t):
            order = 1
        weights = self._weights(denoise.schedule, grid, i, order)
        x = step_in_eps(p, t, s, weights, state.history)
        return state.advance(
            x, nfe=denoise.cost, prediction=p, history=(p.eps, *state.history[: max(0, self.solver_order - 2)])
        )

    def _weights(self, schedule: NoiseSchedule, grid: Grid, i: int, order: int) -> list[float]:
        """Means over rho of the ``order`` Lagrange polynomials, in the step from ``grid[i]``."""
        if order == 1:
            return [1.0]
        if self.coordinate == "rho":
            return rho_weights([grid[i - j] for j in range(order)], grid[i + 1])
        if self.coordinate == "t":
            start, span = float(grid[i].t), float(grid[i + 1].t - grid[i].t)
            nodes = [(float(grid[i - j].t) - start) / span for j in range(order)]
            return lagrange_weights(nodes, self._moments_in_time(schedule, grid, i)[:order])
        here = half_log_snr(grid[i])
        h = half_log_snr(grid[i + 1]) - here
        moments = exponential_moments(-h, order)
        nodes = [0.0, *((half_log_snr(grid[i - j]) - here) / h for j in range(1, order))]
        return lagrange_weights(nodes, [m / moments[0] for m in moments])

    def _moments_in_time(self, schedule: NoiseSchedule, grid: Grid, i: int) -> list[float]:
        laid = self._laid
        if laid is None or laid[0] is not grid or not 0 <= i - laid[1] < len(laid[2]):
            rows = moments_in_time(schedule, grid.levels[i : i + BLOCK + 1], self.solver_order)
            laid = self._laid = (grid, i, rows.tolist())
        return laid[2][i - laid[1]]


def moments_in_time(schedule: NoiseSchedule, levels: Sequence[Level], count: int) -> Tensor:
    r"""Moments of v = (tau - t)/(s - t) under rho's share of each step, (steps, count) float64; nan at alpha_t = 0.

    With R rising from 0 to 1 as rho goes from its value at t to that at s, by parts:
    :math:`\int v^k dR = 1 - k \int_0^1 v^{k-1} R\, dv`, which asks the schedule for no derivative.
    """
    nodes, weights = _gauss_legendre(_QUADRATURE_POINTS)
    ends = torch.tensor([[level.t, level.alpha, level.sigma] for level in levels], dtype=torch.float64)
    times = ends[:-1, :1] + ends[:, 0].diff()[:, None] * nodes
    alpha, sigma, _, _ = schedule.coefficients(times)
    rho = (ends[:, 2] / ends[:, 1])[:, None]
    share = (sigma / alpha - rho[:-1]) / rho.diff(dim=0)
    columns = [torch.ones(len(levels) - 1, dtype=torch.float64)]
    for k in range(1, count):
        columns.append(1 - k * (weights * nodes ** (k - 1) * share).sum(1))
    return torch.stack(columns, dim=1)


def _gauss_legendre(points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], from the eigenvectors of the Jacobi matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, points, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (values + 1) / 2, vectors[0] ** 2
