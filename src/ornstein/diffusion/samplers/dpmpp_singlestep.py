"""DPM-Solver++ in single steps, which keep no history from one pair of evaluations to the next."""

from __future__ import annotations

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.prediction import combine
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.samplers.dpmpp import SOLVER_TYPES, check_choice, check_noise, second_order_weights
from ornstein.diffusion.samplers.multistep import InnerLevels, data_kernel, fresh_noise, half_log_snr

_NODES = ("log_snr", "grid")


def check_r(r: float) -> None:
    """Refuses a middle that is not inside the step.

    Raises:
        ValueError: r outside (0, 1).
    """
    if not 0 < r < 1:
        raise ValueError(f"sampler.r={r} must lie in (0, 1): the second evaluation stands inside the step.")


class DPMpp2S(Sampler):
    r"""DPM-Solver++(2S): second order in a single step, through a level inside it.

    With h the step in half-log-SNR and m the level at :math:`\ell_t + r h`:

    .. math::
        x_m = \frac{\sigma_m}{\sigma_t} x_t + \alpha_m (1 - e^{-rh}) \hat x_0(x_t), \qquad
        x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s (1 - e^{-h})
              \left[\left(1 - \tfrac{1}{2r}\right) \hat x_0(x_t) + \tfrac{1}{2r} \hat x_0(x_m)\right]

    Order 2, two evaluations a step, one where the step starts at alpha = 0 or ends at sigma = 0 and stays first order.
    ``nodes="grid"`` takes the inner level from the grid itself, so that two of its steps make one of second order, one
    evaluation each: diffusers' DPMSolverSinglestep with ``solver_order=2``.

    When: stiff or strongly guided denoisers whose multistep solutions ring, where twice the cost a step is no matter.
    Source: Lu et al. 2022 (arXiv 2211.01095), DPM-Solver++(2S).

    Args:
        steps: number of steps.
        r: where the inner level stands, in (0, 1); of no effect with ``nodes="grid"``.
        nodes: ``"log_snr"`` or ``"grid"``.
        solver_type: ``"midpoint"``, the line above, or ``"heun"``, which integrates the line through both predictions.
        lower_order_final: the last step is first order; with ``nodes="grid"`` and an even number of steps it would
            otherwise complete a pair.
        grid: the rule that places the steps.

    Raises:
        ValueError: r outside (0, 1), or unknown nodes or solver_type.
    """

    order: int | None = 2

    def __init__(
        self,
        *,
        steps: int = 10,
        r: float = 0.5,
        nodes: str = "log_snr",
        solver_type: str = "midpoint",
        lower_order_final: bool = False,
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, grid=grid)
        check_r(r)
        check_choice("nodes", nodes, _NODES)
        check_choice("solver_type", solver_type, SOLVER_TYPES)
        self.r, self.nodes, self.solver_type, self.lower_order_final = r, nodes, solver_type, lower_order_final
        self._middle = InnerLevels(r)

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        plain = float(s.sigma) == 0.0 or (self.lower_order_final and i + 1 == state.grid.steps)
        if self.nodes == "grid":
            return self._half_of_a_pair(denoise, state, i, plain)
        p = denoise(state.x, t)
        x0 = p.x0
        if plain or t.alpha == 0.0:
            carry, gain, _ = data_kernel(t, s)
            return state.advance(combine(carry, state.x, gain, x0), nfe=denoise.cost, prediction=p)
        middle = self._middle(denoise.schedule, state.grid, i)
        carry, gain, _ = data_kernel(t, middle)
        nfe = denoise.cost
        second = denoise(combine(carry, state.x, gain, x0), middle, again=True)
        # The inner level stands ahead, at v = r, where a multistep solver's stands behind, at v = -r.
        on_first, on_second = second_order_weights(-self.r, half_log_snr(s) - half_log_snr(t), self.solver_type)
        carry, gain, _ = data_kernel(t, s)
        x = combine(1.0, combine(carry, state.x, gain * on_first, x0), gain * on_second, second.x0)
        return state.advance(x, nfe=nfe + denoise.cost, prediction=second)

    def _half_of_a_pair(self, denoise: Denoise, state: State, i: int, plain: bool) -> State:
        """Even steps are first order and keep where they started; odd ones go from there, with both predictions."""
        t, s = state.grid[i], state.grid[i + 1]
        p = denoise(state.x, t)
        start = state.grid[i - 1] if i % 2 == 1 else t
        if i % 2 == 0 or plain or start.alpha == 0.0:
            carry, gain, _ = data_kernel(t, s)
            x = combine(carry, state.x, gain, p.x0)
            return state.advance(x, nfe=denoise.cost, prediction=p, history=(state.x, p.x0))
        began, first = state.history
        h = half_log_snr(s) - half_log_snr(start)
        r = (half_log_snr(t) - half_log_snr(start)) / h
        on_first, on_second = second_order_weights(-r, h, self.solver_type)
        carry, gain, _ = data_kernel(start, s)
        x = combine(1.0, combine(carry, began, gain * on_first, first), gain * on_second, p.x0)
        return state.advance(x, nfe=denoise.cost, prediction=p)


class DPMppSDE(Sampler):
    r"""DPM-Solver++(SDE): a single step of second order of the reverse SDE, through a level inside it.

    As :class:`DPMpp2S` with the decay and the noise of the SDE in both of its parts, m the level at
    :math:`\ell_t + r h`:

    .. math::
        x_m = \frac{\sigma_m}{\sigma_t} e^{-\eta r h} x_t + \alpha_m (1 - e^{-(1+\eta) r h}) \hat x_0(x_t)
              + \sigma_m \sqrt{1 - e^{-2 \eta r h}}\, z_1

    The noise of the whole step is the one that z_1 and a fresh z_2 make together, so that x_m and x_s lie on one path
    of the SDE, as k-diffusion's Brownian tree has it. Stochastic for eta > 0; at eta = 0 it is DPM-Solver++(2S),
    order 2. Two evaluations a step, one where the step starts at alpha = 0 or ends at sigma = 0.

    When: the most detail for a given number of steps where an evaluation is cheap and variety matters.
    Source: Lu et al. 2022 (arXiv 2211.01095), its SDE with the step of DPM-Solver++(2S);
    k-diffusion's ``dpmpp_sde`` at eta = 1.

    Args:
        steps: number of steps.
        eta: noise against that of the reverse SDE, at least 0.
        s_noise: scale of the fresh noise.
        noise: ``"independent"`` draws, or a ``"brownian"`` path that every number of steps reads off alike.
        r: where the inner level stands, in (0, 1).
        grid: the rule that places the steps.

    Raises:
        ValueError: r outside (0, 1), eta or s_noise negative or not finite, or an unknown noise.
    """

    def __init__(
        self,
        *,
        steps: int = 10,
        eta: float = 1.0,
        s_noise: float = 1.0,
        noise: str = "independent",
        r: float = 0.5,
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, grid=grid)
        check_noise(eta, s_noise, noise)
        check_r(r)
        self.eta, self.s_noise, self.noise, self.r = eta, s_noise, noise, r
        self.order = 2 if eta == 0 else None
        self._middle = InnerLevels(r)

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        p = denoise(state.x, t)
        x0 = p.x0
        whole = data_kernel(t, s, self.eta)
        if t.alpha == 0.0 or s.sigma == 0.0:
            x = combine(whole.carry, state.x, whole.gain, x0)
            if whole.noise > 0:
                x = x + (whole.noise * self.s_noise) * fresh_noise(self.noise, state, i, t, s)
            return state.advance(x, nfe=denoise.cost, prediction=p)
        middle = self._middle(denoise.schedule, state.grid, i)
        to_middle, to_end = data_kernel(t, middle, self.eta), data_kernel(middle, s, self.eta)
        inner = combine(to_middle.carry, state.x, to_middle.gain, x0)
        if whole.noise > 0:
            first = (self.s_noise * to_middle.noise) * fresh_noise(self.noise, state, i, t, middle)
            inner = inner + first
        nfe = denoise.cost
        second = denoise(inner, middle, again=True)
        mean = combine(1 - 0.5 / self.r, x0, 0.5 / self.r, second.x0)
        x = combine(whole.carry, state.x, whole.gain, mean)
        if whole.noise > 0:
            second_draw = fresh_noise(self.noise, state, i, middle, s, 1)
            x = combine(1.0, combine(1.0, x, to_end.carry, first), self.s_noise * to_end.noise, second_draw)
        return state.advance(x, nfe=nfe + denoise.cost, prediction=second)
