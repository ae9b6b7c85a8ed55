"""DPM-Solver++: exponential integrators in the data prediction, multistep and first order."""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.prediction import combine
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.samplers.multistep import (
    InnerLevels,
    data_kernel,
    exponential_moments,
    fresh_noise,
    half_log_snr,
    lagrange_weights,
    second_order_start,
    usable_order,
)

SOLVER_TYPES = ("midpoint", "heun")
FORMS = ("exact", "published")
NOISES = ("independent", "brownian")


def check_noise(eta: float, s_noise: float, noise: str) -> None:
    """Refuses noise that cannot be added.

    Raises:
        ValueError: eta or s_noise is negative or not finite, or an unknown noise.
    """
    check_choice("noise", noise, NOISES)
    if not (0 <= eta < math.inf and 0 <= s_noise < math.inf):
        raise ValueError(
            f"sampler.eta={eta} and sampler.s_noise={s_noise} must be finite and not negative: 0 adds no noise."
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses an unknown choice.

    Raises:
        ValueError: ``value`` is none of ``choices``.
    """
    if value not in choices:
        raise ValueError(f"sampler.{name}={value!r} is unknown: choose one of {', '.join(choices)}.")


def second_order_weights(r: float, rate: float, solver_type: str) -> list[float]:
    """Weights of the newest and the one earlier prediction, a ratio of steps r apart; ``rate`` is (1 + eta) h."""
    if solver_type == "midpoint":
        slope = 0.5 / r
    else:
        mass, first = exponential_moments(rate, 2)
        slope = first / (mass * r)
    return [1 + slope, -slope]


def third_order_weights(nodes: list[float], rate: float, form: str) -> list[float]:
    """Weights of three predictions at ``nodes``; ``form`` as :class:`DPMpp3M` has it."""
    mass, first, second = exponential_moments(rate, 3)
    moments = [1.0, first / mass, second / mass * (0.5 if form == "published" else 1.0)]
    return lagrange_weights(nodes, moments)


class DPMpp1S(Sampler):
    r"""DPM-Solver++(1S): first order, the predicted data held still over the step; with eta the reverse SDE's step.

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} e^{-\eta h} x_t + \alpha_s (1 - e^{-(1 + \eta) h}) \hat x_0
              + \sigma_s \sqrt{1 - e^{-2 \eta h}}\, z, \qquad h = \ell_s - \ell_t

    where :math:`\ell = \ln(\alpha/\sigma)`. At eta = 0 it is DDIM, at eta = 1 SDE-DPM-Solver++(1), which is DDPM's
    posterior with its fixed small variance. Between and beyond, eta scales the Langevin part of the reverse SDE (its
    noise by the root of eta), which is not DDIM's eta. Order 1 at eta = 0, one evaluation a step. Finite at alpha = 0
    and at sigma = 0, where no noise is added.

    When: a plain baseline for the rest of the family, or a dial from the ODE to the SDE and past it.
    Source: Lu et al. 2022 (arXiv 2211.01095), DPM-Solver++ of first order.

    Args:
        steps: number of steps.
        eta: noise against that of the reverse SDE, at least 0.
        s_noise: scale of the fresh noise.
        noise: ``"independent"`` draws, or a ``"brownian"`` path that every number of steps reads off alike.
        grid: the rule that places the steps.

    Raises:
        ValueError: eta or s_noise is negative or not finite, or an unknown noise.
    """

    def __init__(
        self,
        *,
        steps: int = 50,
        eta: float = 0.0,
        s_noise: float = 1.0,
        noise: str = "independent",
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, grid=grid)
        check_noise(eta, s_noise, noise)
        self.eta, self.s_noise, self.noise = eta, s_noise, noise
        self.order = 1 if eta == 0 else None

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        p = denoise(state.x, t)
        carry, gain, noise = data_kernel(t, s, self.eta)
        x = combine(carry, state.x, gain, p.x0)
        if noise > 0:
            x = combine(1.0, x, noise * self.s_noise, fresh_noise(self.noise, state, i, t, s))
        return state.advance(x, nfe=denoise.cost, prediction=p)


class DataMultistep(Sampler):
    """Multistep solvers in the data prediction: a subclass says how it weighs the predictions it keeps.

    Attributes:
        most: predictions that a step interpolates at most.
        eta: 0 for the ODE; the share of the reverse SDE's noise otherwise.
        s_noise: scale of that noise.
        noise: where it comes from, as :func:`fresh_noise` has it.
    """

    most: int = 2
    eta: float = 0.0
    s_noise: float = 1.0
    noise: str = "independent"

    def __init__(self, *, steps: int, lower_order_final: bool, grid: GridRule | None) -> None:
        super().__init__(steps=steps, grid=grid)
        self.lower_order_final = lower_order_final

    @abstractmethod
    def weights(self, nodes: list[float], rate: float) -> list[float]:
        """Weights, of sum 1, of two or three predictions at ``nodes`` of v, newest first; ``rate`` is (1 + eta) h."""

    def mean(self, x0: Tensor, state: State, i: int) -> Tensor:
        """The data that the step's kernel is applied to: a weighted mean of predictions."""
        grid, t, s = state.grid, state.grid[i], state.grid[i + 1]
        order = usable_order(grid, i, self.most, len(state.history), lower_order_final=self.lower_order_final)
        if order == 1 or s.sigma == 0.0:
            return x0
        here = half_log_snr(t)
        h = half_log_snr(s) - here
        nodes = [0.0, *((half_log_snr(grid[i - j]) - here) / h for j in range(1, order))]
        weights = self.weights(nodes, (1 + self.eta) * h)
        data = combine(weights[0], x0, weights[1], state.history[0])
        for weight, earlier in zip(weights[2:], state.history[1:], strict=False):
            data = combine(1.0, data, weight, earlier)
        return data

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        p = denoise(state.x, t)
        data = self.mean(p.x0, state, i)
        carry, gain, noise = data_kernel(t, s, self.eta)
        x = combine(carry, state.x, gain, data)
        if noise > 0:
            x = combine(1.0, x, noise * self.s_noise, fresh_noise(self.noise, state, i, t, s))
        return state.advance(x, nfe=denoise.cost, prediction=p, history=(p.x0, *state.history[: self.most - 2]))


class DPMpp2M(DataMultistep):
    r"""DPM-Solver++(2M): second-order multistep in the data prediction, exponential in half-log-SNR.

    With :math:`\ell = \ln(\alpha/\sigma)`, :math:`h = \ell_s - \ell_t` and r = h_previous / h:

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} x_t + \left(\alpha_s - \alpha_t \frac{\sigma_s}{\sigma_t}\right)
              \left[\left(1 + \tfrac{1}{2r}\right) \hat x_0(t) - \tfrac{1}{2r} \hat x_0(t_{prev})\right]

    The first step is first order, and so is a step that ends at sigma = 0, where h is infinite (diffusers'
    ``final_sigmas_type="zero"``), and one that would look back to alpha = 0. Order 2, one evaluation a step.

    When: the first choice for 10 to 30 steps, guided or not, in pixels or latents.
    Source: Lu et al. 2022 (arXiv 2211.01095), DPM-Solver++(2M).

    Args:
        steps: number of steps.
        lower_order_final: the last step is first order whatever its end, which steadies runs of fewer than 15 steps;
            diffusers' option of that name in such runs, and its ``euler_at_final`` in all.
        solver_type: ``"midpoint"``, the line above, or ``"heun"``, which integrates the straight line through both
            predictions exactly instead of taking its value at the step's middle.
        grid: the rule that places the steps.

    Raises:
        ValueError: an unknown solver_type.
    """

    order: int | None = 2

    def __init__(
        self,
        *,
        steps: int = 20,
        lower_order_final: bool = False,
        solver_type: str = "midpoint",
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, lower_order_final=lower_order_final, grid=grid)
        check_choice("solver_type", solver_type, SOLVER_TYPES)
        self.solver_type = solver_type

    def weights(self, nodes: list[float], rate: float) -> list[float]:
        return second_order_weights(-nodes[1], rate, self.solver_type)


class DPMpp3M(DataMultistep):
    r"""DPM-Solver++(3M): a parabola through the last three data predictions, integrated over half-log-SNR.

    With v = 0 at the step's start and 1 at its end, and
    :math:`\hat x_0(v) \approx \hat x_0 + D_1 v + D_2 v^2` through v = 0 and the two levels before:

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s \sum_{k=0}^{2} D_k\, h \int_0^1 e^{h(v - 1)} v^k dv

    Order 3, one evaluation a step and one more in the first, where it is bootstrapped; else its first step is first
    order and so order 2 is what is measured. ``form="published"`` takes half of the last term, as the authors' code,
    diffusers and k-diffusion do (they give the divided difference D_2 the weight of a second derivative); that costs
    the third order (2 is measured) and extrapolates less, which is the better of the two below some 40 steps. A step
    that ends at sigma = 0 is first order.

    When: smooth, unguided denoisers at 15 steps and more; with strong guidance prefer dpmpp_2m.
    Source: Lu et al. 2022 (arXiv 2211.01095), at third order; the parabola's exact weights are those of
    Zhao et al. 2023 (arXiv 2302.04867), UniP-3.

    Args:
        steps: number of steps.
        form: ``"exact"`` or ``"published"``.
        bootstrap: the first step is taken to second order, through one more evaluation inside it; not where it starts
            at alpha = 0 or ends at sigma = 0.
        lower_order_final: the last two steps are of orders 2 and 1.
        solver_type: how steps of second order are taken; see :class:`DPMpp2M`.
        grid: the rule that places the steps.

    Raises:
        ValueError: an unknown form or solver_type.
    """

    most = 3

    def __init__(
        self,
        *,
        steps: int = 20,
        form: str = "exact",
        bootstrap: bool = True,
        lower_order_final: bool = False,
        solver_type: str = "midpoint",
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, lower_order_final=lower_order_final, grid=grid)
        check_choice("form", form, FORMS)
        check_choice("solver_type", solver_type, SOLVER_TYPES)
        self.form, self.bootstrap, self.solver_type = form, bootstrap, solver_type
        self.order = 3 if bootstrap and form == "exact" and not lower_order_final else 2
        self._middle = InnerLevels(0.5)

    def weights(self, nodes: list[float], rate: float) -> list[float]:
        if len(nodes) == 2:
            return second_order_weights(-nodes[1], rate, self.solver_type)
        return third_order_weights(nodes, rate, self.form)

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        if i > 0 or not self.bootstrap or t.alpha == 0.0 or s.sigma == 0.0:
            return super().step(denoise, state, i)
        p = denoise(state.x, t)
        middle = self._middle(denoise.schedule, state.grid, i)
        nfe = denoise.cost
        x, _ = second_order_start(denoise, state.x, p.x0, t, middle, s)
        return state.advance(x, nfe=nfe + denoise.cost, prediction=p, history=(p.x0,))
