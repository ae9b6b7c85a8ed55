"""Predictor-corrector sampling of score SDEs."""

from __future__ import annotations

import math

from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.samplers.langevin import langevin_move
from ornstein.diffusion.schedules import Level, Scalar, transition_between

_PREDICTORS = ("reverse_diffusion", "ancestral")
_NORMS = ("sample", "expected")
_NORM_FLOOR = 0.25  # of the noise's expected square: a score near 0 would otherwise ask for an endless step


def size_by_norm(eps: Tensor, snr: float) -> Tensor:
    r"""Step size that keeps the ratio of noise to score at ``snr``, :math:`2 (r \|z\|/\|\epsilon\|)^2`, (B, 1, ...).

    The authors' code averages both norms over the batch. Here they are each sample's own, so that a sample depends on
    its seed and number alone, and the norm of z is its expected one, so that the noise stays Gaussian. The size is cut
    at four times 2 r**2, which images never meet.
    Source: Song et al. 2021 (arXiv 2011.13456), section 4.2.
    """
    square = eps.square().flatten(1).mean(1) if eps.ndim > 1 else eps.square()
    return (2 * snr**2 / square.clamp(min=_NORM_FLOOR)).reshape(-1, *([1] * (eps.ndim - 1)))


class PredictorCorrector(Sampler):
    r"""A step of the reverse SDE, then Langevin steps at the level it arrives at.

    With the forward kernel :math:`q(x_t | x_s) = N(a x_s, v I)` of the step, ``predictor="reverse_diffusion"`` is

    .. math:: x_s = (2 - a)\, x_t - \frac{v}{\sigma_t} \hat\epsilon(x_t) + \sqrt v\, z

    which is the paper's for VP (a = sqrt(1 - beta), v = beta) and for VE (a = 1, v = sigma_t^2 - sigma_s^2) alike, and
    right only as far as a is close to 1: hundreds of steps. Where alpha_t = 0 or sigma_s = 0 the posterior stands in.
    ``predictor="ancestral"`` draws from the posterior :math:`q(x_s | x_t, \hat x_0)`, as DDPM does, and takes any step.
    The corrector, ``corrector_steps`` times at s:

    .. math::
        x \leftarrow x - \delta \sigma_s \hat\epsilon + \sqrt{2 \delta}\, \sigma_s z, \qquad
        \delta = 2 a^2 r^2 \|z\|^2 / \|\hat\epsilon\|^2

    with r = ``snr``. The paper's code averages the norms over the batch; here they are each sample's own
    (``size_by_norm``), so that a sample depends on its seed and number alone. ``norm="expected"`` puts both at their
    expected value, which is delta = 2 a^2 r^2 and steadier for data of few dimensions. The last step adds no noise and
    is not corrected. Stochastic, 1 + ``corrector_steps`` evaluations a step, one for the last.
    Source: Song et al. 2021 (arXiv 2011.13456), section 4.2.
    When: score models, where quality counts and evaluations do not.

    Args:
        steps: number of predictor steps.
        corrector_steps: Langevin steps after each; 0 is the predictor alone.
        predictor: reverse_diffusion or ancestral.
        snr: ratio of noise to score in the corrector.
        norm: sample or expected.
        grid: the rule that places the steps.

    Raises:
        ValueError: corrector_steps < 0, an snr that is not positive, an unknown predictor or norm.
    """

    def __init__(
        self,
        *,
        steps: int = 500,
        corrector_steps: int = 1,
        predictor: str = "ancestral",
        snr: float = 0.16,
        norm: str = "sample",
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, grid=grid)
        if corrector_steps < 0:
            raise ValueError(f"sampler.corrector_steps={corrector_steps} must not be negative: 0 switches it off.")
        if predictor not in _PREDICTORS:
            raise ValueError(f"sampler.predictor={predictor!r} is unknown: choose one of {', '.join(_PREDICTORS)}.")
        if norm not in _NORMS:
            raise ValueError(f"sampler.norm={norm!r} is unknown: choose one of {', '.join(_NORMS)}.")
        if not 0 < snr < math.inf:
            raise ValueError(f"sampler.snr={snr} must be positive: the ratio of noise to score, 0.16 in the paper.")
        self.corrector_steps, self.predictor, self.snr, self.norm = corrector_steps, predictor, snr, norm

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        last = i + 1 == state.grid.steps
        p = denoise(state.x, t)
        x, deviation = self._predict(state.x, p, t, s)
        if last or s.sigma == 0:
            return state.advance(x, nfe=denoise.cost, prediction=p)
        x = x + deviation * state.noise(i + 1)
        kept, nfe = (t.alpha / s.alpha) ** 2, denoise.cost
        for number in range(self.corrector_steps if kept > 0 else 0):
            p = denoise(x, s, again=True)
            size = kept * (2 * self.snr**2 if self.norm == "expected" else size_by_norm(p.eps, self.snr))
            x = langevin_move(x, p, s, state.noise(i + 1, number + 1), size=size)
            nfe += denoise.cost
        return state.advance(x, nfe=nfe, prediction=p)

    def _predict(self, x: Tensor, p: Prediction, t: Level, s: Level) -> tuple[Tensor, Scalar]:
        """Mean and standard deviation of the predictor."""
        kernel = transition_between(t, s)
        if self.predictor == "ancestral" or t.alpha == 0 or s.sigma == 0:
            return kernel.on_x_t * x + kernel.on_x0 * p.x0, kernel.variance**0.5
        variance = kernel.forward_variance
        return (2 - kernel.forward_scale) * x - (variance / t.sigma) * p.eps, variance**0.5
