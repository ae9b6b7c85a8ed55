"""Pseudo-numerical methods for diffusion models."""

from __future__ import annotations

from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.samplers.dpmpp import check_choice
from ornstein.diffusion.samplers.multistep import InnerLevels, step_in_eps
from ornstein.diffusion.schedules import Level

_WARMUPS = ("runge_kutta", "heun")
_STEEP = 1e3
# Adams-Bashforth on equal steps; row n - 1 takes n noises, newest first.
_ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class PNDM(Sampler):
    r"""PNDM: DDIM's transfer, given Adams-Bashforth's mean of the last four noises.

    .. math::
        x_s &= \frac{\alpha_s}{\alpha_t} x_t + \left(\sigma_s - \alpha_s \frac{\sigma_t}{\alpha_t}\right) \epsilon',
        \\ \epsilon' &= \tfrac{1}{24} (55 \hat\epsilon_0 - 59 \hat\epsilon_1 + 37 \hat\epsilon_2 - 9 \hat\epsilon_3)

    ``warmup="runge_kutta"`` takes the first three steps by the pseudo Runge-Kutta method, four evaluations each, the
    inner ones halfway in t (F-PNDM): steps + 9 evaluations. ``warmup="heun"`` takes the first step twice, with the mean
    of both ends' noises, and grows the order from there (PLMS; diffusers' ``skip_prk_steps``): steps + 1 evaluations.
    The weights are those of equal steps on every grid, and means are taken of eps (of a v-network diffusers averages
    v). Order 2, since the transfer is DDIM's whatever the weights. A warm-up step that ends at sigma = 0 is DDIM's, and
    so is any step that starts at sigma/alpha > 1000 (cosine's first on the uniform grid): there eps says next to
    nothing of x0, and a mean of eps would be far off.

    When: to repeat results of early latent models on the leading grid; newer solvers need fewer evaluations.
    Source: Liu et al. 2022 (arXiv 2202.09778), eqs. 9, 12 and 13 and algorithm 2; PLMS as in latent diffusion's code.

    Args:
        steps: number of steps.
        warmup: ``"runge_kutta"`` or ``"heun"``.
        grid: the rule that places the steps.

    Raises:
        ValueError: an unknown warmup.
    """

    order: int | None = 2

    def __init__(self, *, steps: int = 50, warmup: str = "runge_kutta", grid: GridRule | None = None) -> None:
        super().__init__(steps=steps, grid=grid)
        check_choice("warmup", warmup, _WARMUPS)
        self.warmup = warmup
        self._middle = InnerLevels(0.5, by="time")

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        p = denoise(state.x, t)
        nfe, weights, seen = denoise.cost, _ADAMS[min(len(state.history), 3)], state.history
        warming = i < 3 if self.warmup == "runge_kutta" else i == 0
        if t.sigma > _STEEP * t.alpha or (warming and s.sigma == 0.0):
            weights = (1.0,)
        elif warming and self.warmup == "runge_kutta":
            weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
            seen, more = self._runge_kutta(denoise, state, i, p)
            nfe += more
        elif warming:
            weights, seen = (1 / 2, 1 / 2), self._heun(denoise, p, t, s)
            nfe += denoise.cost
        x = step_in_eps(p, t, s, weights, seen)
        return state.advance(x, nfe=nfe, prediction=p, history=(p.eps, *state.history[:2]))

    def _runge_kutta(self, denoise: Denoise, state: State, i: int, p: Prediction) -> tuple[tuple[Tensor, ...], int]:
        """The noises of the second, third and fourth stage, and the evaluations that they took."""
        t, s = state.grid[i], state.grid[i + 1]
        middle = self._middle(denoise.schedule, state.grid, i)
        second = denoise(step_in_eps(p, t, middle, (1.0,), ()), middle, again=True).eps
        third = denoise(step_in_eps(p, t, middle, (0.0, 1.0), (second,)), middle, again=True).eps
        nfe = 2 * denoise.cost
        fourth = denoise(step_in_eps(p, t, s, (0.0, 1.0), (third,)), s, again=True).eps
        return (second, third, fourth), nfe + denoise.cost

    def _heun(self, denoise: Denoise, p: Prediction, t: Level, s: Level) -> tuple[Tensor, ...]:
        """The noise at the step's end, where DDIM would arrive."""
        return (denoise(step_in_eps(p, t, s, (1.0,), ()), s, again=True).eps,)
