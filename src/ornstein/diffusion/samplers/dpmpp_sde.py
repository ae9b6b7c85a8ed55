"""DPM-Solver++'s multistep solvers of the reverse SDE."""

from __future__ import annotations

from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.samplers.dpmpp import (
    FORMS,
    SOLVER_TYPES,
    DataMultistep,
    check_choice,
    check_noise,
    second_order_weights,
    third_order_weights,
)


class DPMpp2MSDE(DataMultistep):
    r"""SDE-DPM-Solver++(2M): DPM-Solver++(2M) on the reverse SDE.

    With h the step in half-log-SNR and r = h_previous / h:

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} e^{-\eta h} x_t + \alpha_s (1 - e^{-(1 + \eta) h})
              \left[\hat x_0(t) + \tfrac{1}{2r} (\hat x_0(t) - \hat x_0(t_{prev}))\right]
              + \sigma_s \sqrt{1 - e^{-2 \eta h}}\, z

    eta = 1 is the reverse SDE, diffusers' ``algorithm_type="sde-dpmsolver++"``; at eta = 0 it is DPM-Solver++(2M),
    order 2. One evaluation a step. First order where it has no history, at sigma = 0, and after alpha = 0.

    When: 20 to 50 steps where the ODE's samples look flat: the noise corrects errors that were made before.
    Source: Lu et al. 2022 (arXiv 2211.01095), SDE-DPM-Solver++(2M); eta as in k-diffusion's ``dpmpp_2m_sde``.

    Args:
        steps: number of steps.
        eta: noise against that of the reverse SDE, at least 0.
        s_noise: scale of the fresh noise.
        noise: ``"independent"`` draws, or a ``"brownian"`` path that every number of steps reads off alike.
        solver_type: ``"midpoint"``, the line above, or ``"heun"``, which integrates the line through both predictions.
        lower_order_final: the last step is first order whatever its end.
        grid: the rule that places the steps.

    Raises:
        ValueError: eta or s_noise is negative or not finite, or an unknown noise or solver_type.
    """

    def __init__(
        self,
        *,
        steps: int = 25,
        eta: float = 1.0,
        s_noise: float = 1.0,
        noise: str = "independent",
        solver_type: str = "midpoint",
        lower_order_final: bool = False,
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, lower_order_final=lower_order_final, grid=grid)
        check_noise(eta, s_noise, noise)
        check_choice("solver_type", solver_type, SOLVER_TYPES)
        self.eta, self.s_noise, self.noise, self.solver_type = eta, s_noise, noise, solver_type
        self.order = 2 if eta == 0 else None

    def weights(self, nodes: list[float], rate: float) -> list[float]:
        return second_order_weights(-nodes[1], rate, self.solver_type)


class DPMpp3MSDE(DataMultistep):
    r"""SDE-DPM-Solver++(3M): the parabola of DPM-Solver++(3M), integrated along the reverse SDE.

    With v = 0 at the step's start and 1 at its end, :math:`H = (1 + \eta) h` and
    :math:`\hat x_0(v) \approx \hat x_0 + D_1 v + D_2 v^2` through the last three predictions:

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} e^{-\eta h} x_t + \alpha_s \sum_{k=0}^{2} D_k\, H \int_0^1 e^{H(v - 1)} v^k dv
              + \sigma_s \sqrt{1 - e^{-2 \eta h}}\, z

    ``form="published"`` takes half of the last term, as k-diffusion's ``dpmpp_3m_sde``; diffusers' third order of
    ``sde-dpmsolver++`` has a term :math:`-\alpha_s D_2` besides (a sign), which is not offered. At eta = 0 it is
    DPM-Solver++(3M) without its bootstrap, order 2. One evaluation a step.

    When: more than 25 steps of a smooth denoiser; below that dpmpp_2m_sde extrapolates less.
    Source: Lu et al. 2022 (arXiv 2211.01095), for the SDE; k-diffusion's ``dpmpp_3m_sde``.

    Args:
        steps: number of steps.
        eta: noise against that of the reverse SDE, at least 0.
        s_noise: scale of the fresh noise.
        noise: ``"independent"`` draws, or a ``"brownian"`` path that every number of steps reads off alike.
        form: ``"exact"`` or ``"published"``.
        solver_type: how steps of second order are taken; see :class:`DPMpp2MSDE`.
        lower_order_final: the last two steps are of orders 2 and 1.
        grid: the rule that places the steps.

    Raises:
        ValueError: eta or s_noise is negative or not finite, or an unknown noise, form or solver_type.
    """

    most = 3

    def __init__(
        self,
        *,
        steps: int = 25,
        eta: float = 1.0,
        s_noise: float = 1.0,
        noise: str = "independent",
        form: str = "exact",
        solver_type: str = "heun",
        lower_order_final: bool = False,
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, lower_order_final=lower_order_final, grid=grid)
        check_noise(eta, s_noise, noise)
        check_choice("form", form, FORMS)
        check_choice("solver_type", solver_type, SOLVER_TYPES)
        self.eta, self.s_noise, self.noise = eta, s_noise, noise
        self.form, self.solver_type = form, solver_type
        self.order = 2 if eta == 0 else None

    def weights(self, nodes: list[float], rate: float) -> list[float]:
        if len(nodes) == 2:
            return second_order_weights(-nodes[1], rate, self.solver_type)
        return third_order_weights(nodes, rate, self.form)
