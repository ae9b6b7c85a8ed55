"""Annealed Langevin dynamics."""

from __future__ import annotations

from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.schedules import Level


def langevin_move(x: Tensor, p: Prediction, level: Level, noise: Tensor, *, size: float | Tensor) -> Tensor:
    r"""One Langevin step at a level, :math:`x - \delta \sigma \hat\epsilon + \sqrt{2\delta}\, \sigma z`.

    The score is -eps/sigma and the step length ``size`` sigma**2, so that ``size`` has no unit; it is a number, or
    (B, 1, ...). alpha does not enter: x and x/alpha move alike.
    """
    root = (2 * size) ** 0.5
    return x - (size * level.sigma) * p.eps + (root * level.sigma) * noise


class AnnealedLangevin(Sampler):
    r"""Langevin dynamics at every noise level in turn, from noise to data.

    At each level, ``steps_per_level`` times,

    .. math::
        x \leftarrow x - \delta \sigma \hat\epsilon + \sqrt{2 \delta}\, \sigma z, \qquad
        \hat\epsilon = -\sigma \nabla \log p_t(x)

    then :math:`x/\alpha` is carried over to the next. In that coordinate it is the authors' update on a VE schedule,
    with their step :math:`\epsilon \sigma_i^2/\sigma_L^2` written as :math:`\delta \sigma_i^2`: delta = epsilon /
    sigma_L**2, which is 0.062 for their CIFAR-10 models. The last step takes the denoiser's estimate of the end of the
    grid, without noise. Any schedule will do: at alpha = 0, where x/alpha is infinite, x holds no signal yet and starts
    as the next level's noise. It lags behind where ``steps * steps_per_level * step_size`` is not well above the range
    of ln(sigma/alpha), about 10: hundreds of levels, evenly spaced in log-SNR (``sampler/grid=log_snr`` or
    ``exponential``). A larger step inflates the noise, by 1/(1 - delta/2) in variance. Stochastic, ``steps_per_level``
    evaluations a step and one more at the end.
    Source: Song & Ermon 2019 (arXiv 1907.05600), algorithm 1; 2020 (arXiv 2006.09011), algorithm 1 and section 3.4.
    When: score models as they were first sampled, or a look at Langevin dynamics itself.

    Args:
        steps: number of levels.
        steps_per_level: Langevin steps at each.
        step_size: delta, in (0, 1); for a ratio r of score to noise (the score SDE's ``snr``) it is 2 r**2.
        grid: the rule that places the levels.

    Raises:
        ValueError: steps_per_level < 1, or a step_size outside (0, 1).
    """

    def __init__(
        self,
        *,
        steps: int = 200,
        steps_per_level: int = 5,
        step_size: float = 0.062,
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, grid=grid)
        if steps_per_level < 1:
            raise ValueError(f"sampler.steps_per_level={steps_per_level} must be at least 1.")
        if not 0 < step_size < 1:
            raise ValueError(f"sampler.step_size={step_size} must lie in (0, 1): the step in units of sigma**2.")
        self.steps_per_level, self.step_size = steps_per_level, step_size

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        last = i + 1 == state.grid.steps
        if t.alpha == 0 and not last:
            return state.advance((s.sigma / t.sigma) * state.x, nfe=0, prediction=state.prediction)
        x = state.x
        for number in range(self.steps_per_level):
            p = denoise(x, t, again=number > 0)
            x = langevin_move(x, p, t, state.noise(i + 1, number), size=self.step_size)
        if not last:
            return state.advance((s.alpha / t.alpha) * x, nfe=self.steps_per_level * denoise.cost, prediction=p)
        p = denoise(x, t, again=True)
        x = s.alpha * p.x0 + s.sigma * p.eps
        return state.advance(x, nfe=(self.steps_per_level + 1) * denoise.cost, prediction=p)
