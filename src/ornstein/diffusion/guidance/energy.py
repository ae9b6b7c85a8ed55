"""Guidance by any differentiable loss on the predicted data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ornstein.diffusion.guidance.base import Call, Part, finite, gradient
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import Level, Scalar

_GRADIENTS = ("cheap", "exact")
NO_LOSS = "guidance=energy needs a loss: add +guidance.loss._target_=YOUR.CLASS, or use guidance=colour."


@dataclass(frozen=True)
class Energy(Part):
    r"""Steers by a loss on the predicted data: samples are drawn from about p(x0) exp(-scale * loss(x0)).

    The score loses :math:`w \nabla_{x_t} L(\hat x_0(x_t))`, so that

    .. math:: \tilde x_0 = \hat x_0 - w \frac{\sigma^2}{\alpha} \Big(\frac{\partial \hat x_0}{\partial x_t}\Big)^{\!T}
              \nabla L(\hat x_0) = \hat x_0 - w\, \mathrm{Cov}[x_0 | x_t]\, \nabla L(\hat x_0).

    ``exact`` differentiates through the denoiser, and takes about three times as long. ``cheap`` takes the denoiser
    as given, with the posterior variance of Gaussian data, :math:`\sigma^2 s^2/(\sigma^2 + \alpha^2 s^2)` with s =
    ``sigma_data``: on such data the two are equal. Where alpha = 0, whose quotient is 0/0, ``exact`` is ``cheap``.
    Each sample has its own loss: nothing is averaged over the batch. Backward passes are not counted in ``cost``.

    Args:
        loss: ``x0 (B, *shape) -> (B,)``, any differentiable function; of decoded images where the model is latent.
        scale: w; 0 is off.
        gradient: cheap or exact.
        sigma_data: the data's standard deviation, positive.
        decode: latents to data, which the command line fills in; None leaves x0 as it is.

    Source: Chung et al. 2023 (arXiv 2209.14687), section 3, for ``exact``; Song et al. 2023 (ICLR,
    "Pseudoinverse-guided diffusion models"), section 3, for ``cheap``'s variance; the conditional covariance is
    Tweedie's second-order formula.
    When: what is wanted can be written as a loss, and no model was trained for it.

    Raises:
        ValueError: a scale that is no finite number, an unknown gradient, a sigma_data that is not positive; when
            called, no loss, or one that does not give a number for each sample.
    """

    loss: Callable[[Tensor], Tensor] | None = None
    scale: float = 1.0
    gradient: str = "cheap"
    sigma_data: float = 1.0
    decode: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        finite("guidance.scale", self.scale)
        finite("guidance.sigma_data", self.sigma_data)
        if self.gradient not in _GRADIENTS:
            raise ValueError(f"guidance.gradient={self.gradient!r} is unknown: choose {' or '.join(_GRADIENTS)}.")
        if not self.sigma_data > 0:
            raise ValueError(f"guidance.sigma_data={self.sigma_data} is a standard deviation and must be positive.")

    @property
    def off(self) -> bool:
        return self.scale == 0.0

    @property
    def differentiates(self) -> bool:
        return self.gradient == "exact"

    def total(self, x0: Tensor) -> Tensor:
        """The sum of the samples' losses for x0 (B, *shape): its gradient is each sample's own."""
        if self.loss is None:
            raise ValueError(NO_LOSS)
        losses = self.loss(x0 if self.decode is None else self.decode(x0))
        if losses.shape != x0.shape[:1]:
            raise ValueError(
                f"guidance.loss gave shape {tuple(losses.shape)} for {x0.shape[0]} samples: it must give one number a "
                "sample, summed or averaged over everything but the batch."
            )
        return losses.sum()

    def apply(self, call: Call) -> Prediction:
        p, level = call.current, call.level
        exact = self.gradient == "exact"
        if not exact or _may_vanish(level.alpha):
            step = self._variance(level) * gradient(self.total, p.x0, keep=call.keep_graph)
        if exact and not (isinstance(level.alpha, float) and level.alpha == 0):
            (slope,) = torch.autograd.grad(
                self.total(p.x0), call.x_t, create_graph=call.keep_graph, retain_graph=True, materialize_grads=True
            )
            if isinstance(level.alpha, Tensor):
                gone = level.alpha == 0
                step = torch.where(gone, step, level.sigma**2 / torch.where(gone, 1.0, level.alpha) * slope)
            else:
                step = level.sigma**2 / level.alpha * slope
        return p.with_x0(lambda x0: x0 - self.scale * step)

    def _variance(self, level: Level) -> Scalar:
        s2 = self.sigma_data**2
        return level.sigma**2 * s2 / (level.sigma**2 + level.alpha**2 * s2)


def _may_vanish(alpha: Scalar) -> bool:
    return isinstance(alpha, Tensor) or alpha == 0


class Colour:
    r"""Distance of an image's mean colour to a target, as an energy: a teaching example.

    .. math:: L(x_0) = \tfrac12 HW \lVert \mathrm{mean}_{HW}(x_0) - c \rVert^2

    The number of pixels makes its gradient, mean - c in every pixel, independent of the image's size.

    Args:
        target: (red, green, blue), each in [0, 1].

    Source: the colour loss of Hugging Face's diffusion models course, unit 2, "Fine-tuning and guidance", which takes
    each pixel's distance.
    When: to see what guidance does, on a model that knows nothing of colours.

    Raises:
        ValueError: a target that is not three numbers in [0, 1]; when called, images that are not RGB.
    """

    def __init__(self, target: Sequence[float] = (0.1, 0.9, 0.5)) -> None:
        values = [float(value) for value in target]
        if len(values) != 3 or not all(0 <= value <= 1 for value in values):
            raise ValueError(f"guidance.loss.target={values} must be red, green and blue, each in [0, 1].")
        self.target = tuple(values)

    def __call__(self, x: Tensor) -> Tensor:
        """(B,) losses of images (B, 3, H, W) in [-1, 1]."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(
                f"guidance=colour needs RGB images and these have shape {tuple(x.shape[1:])}: choose data with "
                "data.channels=3, or another guidance."
            )
        wanted = x.new_tensor(self.target).mul(2).sub(1)
        return 0.5 * x.shape[2] * x.shape[3] * ((x.mean((2, 3)) - wanted) ** 2).sum(1)

    def __repr__(self) -> str:
        return f"Colour({list(self.target)})"
