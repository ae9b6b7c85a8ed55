"""Guidance by a classifier of noisy data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ornstein.diffusion.denoiser import Denoise, Denoiser
from ornstein.diffusion.guidance.base import Call, Part, beside, finite, gradient
from ornstein.diffusion.guidance.interval import between
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import Level, Scalar

_CONDITIONINGS = ("log_ratio", "time")
LOG_RATIO_LIMIT = 10.0  # ln(sigma/alpha) that a classifier is asked about: beyond it there is only data, or only noise


@dataclass(frozen=True)
class Classifier(Part):
    r"""Classifier guidance: the gradient of a noise-aware classifier's log-probability joins the score.

    .. math::
        \tilde\epsilon = \hat\epsilon(x_t) - \sigma\, w\, \nabla_{x_t} \log p(y | x_t, t), \qquad
        \tilde x_0 = \hat x_0(x_t) + \frac{\sigma^2}{\alpha}\, w\, \nabla_{x_t} \log p(y | x_t, t),

    that is, score + w grad for every alpha and sigma. At w = 1 and with the true p, an unconditional model becomes
    the conditional one. Where alpha = 0 (flow's t = 1) x_t says nothing about y and the prediction stays as it is; so
    it does at levels that the classifier was not trained on, where a large :math:`\sigma^2/\alpha` would make much of
    a gradient that means nothing. ``cost`` counts the classifier's evaluation as one of a network; its backward pass
    is not counted.

    Args:
        network: ``(x_in (B, *shape), noise_cond (B,)) -> logits (B, classes)``. Where it has an attribute
            ``log_ratio_range`` = (low, high), its gradient counts as 0, and is not taken, unless low < ln(sigma/alpha)
            <= high. The package's own are good for -5 to 4.
        scale: w; 0 is off.
        target: the class to steer to; null takes the label of each sample, which a conditional model has.
        conditioning: ``log_ratio`` gives the network x_t / sqrt(alpha**2 + sigma**2) and ln(sigma/alpha)/4, so that
            one classifier serves every schedule; ``time`` gives it x_t (brought down to unit scale) and 1000 t, as
            classifiers trained for one schedule have it.
        weights: a safetensors file for the network, which the command line loads; ``bundled`` is the package's own.

    Source: Dhariwal & Nichol 2021 (arXiv 2105.05233), section 4.
    When: the model is unconditional, or was trained without label dropout, and a classifier is easier than a retrained
    model.

    Raises:
        ValueError: a scale that is no finite number, an unknown conditioning, a target below 0; when called, no label
            to steer to.
    """

    network: nn.Module
    scale: float = 1.0
    target: int | None = None
    conditioning: str = "log_ratio"
    weights: str | None = None

    def __post_init__(self) -> None:
        finite("guidance.scale", self.scale)
        if self.conditioning not in _CONDITIONINGS:
            raise ValueError(
                f"guidance.conditioning={self.conditioning!r} is unknown: choose {' or '.join(_CONDITIONINGS)}."
            )
        if self.target is not None and self.target < 0:
            raise ValueError(f"guidance.target={self.target} is no class: give a class number, or null for labels.")

    @property
    def off(self) -> bool:
        return self.scale == 0.0

    @property
    def needs_condition(self) -> bool:
        return not self.off and self.target is None

    def own_cost(self, level: Level | None) -> int:
        return 0 if self._inside(level) is False else 1

    def branches(self, denoiser: Denoise, null: Mapping[str, Tensor]) -> dict[str, Denoise]:
        beside(self.network, denoiser)
        return {}

    def apply(self, call: Call) -> Prediction:
        level, inside = call.level, self._inside(call.level)
        label = self._label(call)
        if inside is False:
            return call.current
        slope = gradient(lambda x: self.log_prob(x, level, label).sum(), call.x_t, keep=call.keep_graph)
        step = self.scale * _signal_ratio(level) * slope
        if isinstance(inside, Tensor):
            step = torch.where(inside, step, 0.0)
        return call.current.with_x0(lambda x0: x0 + step)

    def log_prob(self, x_t: Tensor, level: Level, label: Tensor) -> Tensor:
        """The log-probability of each label given x_t, (B,), for x_t (B, *shape) and labels (B,)."""
        size = level.alpha**2 + level.sigma**2
        if self.conditioning == "time":
            size = size.clamp(min=1.0) if isinstance(size, Tensor) else max(size, 1.0)
        logits = self.network(x_t / size**0.5, self._noise_cond(x_t, level))
        return logits.log_softmax(dim=1).gather(1, label[:, None]).squeeze(1)

    def _noise_cond(self, x_t: Tensor, level: Level) -> Tensor:
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        value = 1000.0 * level.t if self.conditioning == "time" else 0.25 * log_ratio(level)
        if isinstance(value, Tensor):
            return value.reshape(-1).to(x_t.device, dtype).expand(x_t.shape[0])
        return torch.full((x_t.shape[0],), value, device=x_t.device, dtype=dtype)

    def _inside(self, level: Level | None) -> bool | Tensor:
        known = getattr(self.network, "log_ratio_range", None)
        return True if known is None else between(level, *(math.exp(end) for end in known))

    def _label(self, call: Call) -> Tensor:
        if self.target is not None:
            return torch.full((call.x_t.shape[0],), self.target, device=call.x_t.device, dtype=torch.int64)
        if not isinstance(call.denoiser, Denoiser) or "label" not in call.denoiser.cond:
            raise ValueError(
                "guidance=classifier takes its classes from the samples' labels and the model is unconditional: add "
                "guidance.target=CLASS."
            )
        return call.denoiser.cond["label"]


def log_ratio(level: Level) -> Scalar:
    """ln(sigma/alpha), held within ``LOG_RATIO_LIMIT``."""
    if isinstance(level.sigma, Tensor) or isinstance(level.alpha, Tensor):
        ratio = torch.log(torch.as_tensor(level.sigma)) - torch.log(torch.as_tensor(level.alpha))
        return ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if level.alpha == 0 or level.sigma == 0:
        return LOG_RATIO_LIMIT if level.alpha == 0 else -LOG_RATIO_LIMIT
    return max(-LOG_RATIO_LIMIT, min(LOG_RATIO_LIMIT, math.log(level.sigma / level.alpha)))


def _signal_ratio(level: Level) -> Scalar:
    """sigma**2 / alpha, and 0 where alpha = 0."""
    if isinstance(level.alpha, Tensor):
        gone = level.alpha == 0
        return torch.where(gone, 0.0, level.sigma**2 / torch.where(gone, 1.0, level.alpha))
    return level.sigma**2 / level.alpha if level.alpha > 0 else 0.0
