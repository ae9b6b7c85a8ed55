"""UniPC: a predictor, and a corrector that costs no evaluation of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import Grid, GridRule
from ornstein.diffusion.prediction import combine
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.samplers.dpmpp import check_choice
from ornstein.diffusion.samplers.multistep import (
    data_kernel,
    exponential_moments,
    half_log_snr,
    lagrange_weights,
    usable_order,
)

_SOLVER_TYPES = ("bh1", "bh2")


class UniPC(Sampler):
    r"""UniPC-p in the data prediction: UniP-p predicts, UniC-p corrects with the evaluation that the next step needs.

    With h the step in half-log-SNR, :math:`r_k = (\ell_{t_k} - \ell_t)/h` and
    :math:`D_k = (\hat x_0(t_k) - \hat x_0(t)) / r_k`:

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s (1 - e^{-h}) \hat x_0(t) - \alpha_s B(h) \sum_k \rho_k D_k

    The predictor's nodes are p - 1 earlier levels; the corrector adds s itself (r = 1) and takes the step from t to s
    once more, from the corrected x_t. The rho solve the paper's Vandermonde system, which makes the polynomial through
    the nodes integrate exactly; B(h) then drops out, except where one node is left and rho = 1/2 is put for it, as
    the paper has it: there ``"bh1"`` is B = -h and ``"bh2"`` is B = e^{-h} - 1.

    One evaluation a step. Order p + 1 as measured, and 3 at p = 3, whose first steps are of lower order; without the
    corrector p, and 2 at p = 3. A step that ends at sigma = 0 is first order and uncorrected; one that starts at
    alpha = 0 too.

    When: 5 to 20 steps, guided or not, in pixels or latents; solver_order=3 from about 20 steps on.
    Source: Zhao et al. 2023 (arXiv 2302.04867), section 3 (UniP and UniC).

    Args:
        steps: number of steps.
        solver_order: p, 1 to 3.
        solver_type: ``"bh1"`` or ``"bh2"``.
        corrector: False leaves UniP.
        lower_order_final: the last steps are of orders 3, 2, 1, as diffusers has it by default; the uncorrected step
            of first order at the end leaves order 2 at most.
        grid: the rule that places the steps.

    Raises:
        ValueError: a solver_order that is not 1, 2 or 3, or an unknown solver_type.
    """

    def __init__(
        self,
        *,
        steps: int = 20,
        solver_order: int = 2,
        solver_type: str = "bh2",
        corrector: bool = True,
        lower_order_final: bool = False,
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, grid=grid)
        check_solver_order(solver_order, 3)
        check_choice("solver_type", solver_type, _SOLVER_TYPES)
        self.solver_order, self.solver_type, self.corrector = solver_order, solver_type, corrector
        self.lower_order_final = lower_order_final
        reached = min(solver_order + 1, 3) if corrector else min(solver_order, 2)
        self.order = min(reached, 2) if lower_order_final else reached

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        p = denoise(state.x, state.grid[i])
        x, seen = state.x, (p.x0, *state.history[1:])
        if i > 0 and self.corrector and state.grid[i - 1].alpha > 0:
            x = self._advance(state.history[0], seen[1:], state.grid, i - 1, newest=p.x0)
        following = self._advance(x, seen, state.grid, i)
        return state.advance(following, nfe=denoise.cost, prediction=p, history=(x, *seen[: max(1, self.solver_order)]))

    def _advance(self, x: Tensor, seen: Sequence[Tensor], grid: Grid, i: int, newest: Tensor | None = None) -> Tensor:
        """Step i from x, with the predictions seen at its start and before, and ``newest`` at its end if corrected."""
        t, s = grid[i], grid[i + 1]
        carry, gain, _ = data_kernel(t, s)
        kept = min(len(seen), self.solver_order) - 1
        order = usable_order(grid, i, self.solver_order, kept, lower_order_final=self.lower_order_final)
        if s.sigma == 0.0 or (order == 1 and newest is None):
            return combine(carry, x, gain, seen[0])
        here = half_log_snr(t)
        h = half_log_snr(s) - here
        nodes = [(half_log_snr(grid[i - k]) - here) / h for k in range(1, order)]
        values = list(seen[1:order])
        if newest is not None:
            nodes.append(1.0)
            values.append(newest)
        weights = [float(s.alpha) * w / r for w, r in zip(self._integrals(nodes, h), nodes, strict=True)]
        x = combine(carry, x, gain - sum(weights), seen[0])
        for weight, value in zip(weights, values, strict=True):
            x = combine(1.0, x, weight, value)
        return x

    def _integrals(self, nodes: list[float], h: float) -> list[float]:
        """-B(h) rho_k of each node: integrals of v times the polynomial that is 1 there and 0 at the others."""
        if len(nodes) == 1:
            return [0.5 * (h if self.solver_type == "bh1" else -math.expm1(-h))]
        return lagrange_weights(nodes, exponential_moments(h, len(nodes) + 1)[1:])


def check_solver_order(solver_order: int, most: int) -> None:
    """Refuses orders that do not exist.

    Raises:
        ValueError: ``solver_order`` is not one of 1 to ``most``.
    """
    if solver_order not in range(1, most + 1):
        raise ValueError(f"sampler.solver_order={solver_order} does not exist: choose 1 to {most}.")
