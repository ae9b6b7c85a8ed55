"""No guidance, classifier-free guidance, and CFG++."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ornstein.diffusion.denoiser import Denoise, Denoiser
from ornstein.diffusion.guidance.base import Call, Part, finite
from ornstein.diffusion.parameterizations import Parameterization
from ornstein.diffusion.prediction import Prediction

_SPACES = ("output", "x0")


@dataclass(frozen=True)
class NoGuidance(Part):
    r"""The denoiser as it is.

    .. math:: \tilde x_0 = \hat x_0(x_t, c)

    When: the model's own distribution is what is asked for, or is to be compared with a guided one.
    """

    @property
    def off(self) -> bool:
        return True

    def apply(self, call: Call) -> Prediction:
        return call.current


@dataclass(frozen=True)
class ClassifierFree(Part):
    r"""Classifier-free guidance: uncond + scale * (cond - uncond); scale 1 is off (diffusers' convention).

    .. math:: \tilde\epsilon = \hat\epsilon(x_t, \varnothing)
              + w\,(\hat\epsilon(x_t, c) - \hat\epsilon(x_t, \varnothing))

    With ``rescale`` :math:`\phi`, the guided output is brought back to the conditional one's standard deviation (per
    sample, over all its elements): :math:`o \leftarrow \phi\, o\,\mathrm{std}(o_c)/\mathrm{std}(o) + (1 - \phi)\, o`.

    Args:
        scale: w; 0 is the unconditional model, 1 the conditional one.
        rescale: phi in [0, 1]; 0 is off, 0.7 is the paper's.
        rescale_in: ``output``, the network's own output (as published, v there, and as diffusers has it), or ``x0``,
            which makes the result independent of the parameterization.
        negative: a class number to steer away from, in the place of the null condition.

    Source: Ho & Salimans 2022 (arXiv 2207.12598), section 3.2, with its w written as scale - 1; Lin et al. 2023 (arXiv
    2305.08891), section 3.4, for ``rescale``.
    When: a class-conditional model was trained with label dropout, and fidelity matters more than variety.

    Raises:
        ValueError: a scale that is no finite number, a rescale outside [0, 1], an unknown rescale_in, a negative class
            number; when called, an unconditional denoiser.
    """

    scale: float = 2.0
    rescale: float = 0.0
    rescale_in: str = "output"
    negative: int | None = None

    def __post_init__(self) -> None:
        finite("guidance.scale", self.scale)
        finite("guidance.rescale", self.rescale)
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance.rescale={self.rescale} must lie in [0, 1]: 0 is off, 0.7 is the paper's.")
        if self.rescale_in not in _SPACES:
            raise ValueError(f"guidance.rescale_in={self.rescale_in!r} is unknown: choose {' or '.join(_SPACES)}.")
        if self.negative is not None and self.negative < 0:
            raise ValueError(f"guidance.negative={self.negative} is no class: give a class number, or null for none.")

    @property
    def off(self) -> bool:
        return self.scale == 1.0

    @property
    def needs_null(self) -> bool:
        return not self.off and self.negative is None

    @property
    def needs_condition(self) -> bool:
        return not self.off

    def branches(self, denoiser: Denoise, null: Mapping[str, Tensor]) -> dict[str, Denoise]:
        return {"null": unconditional(denoiser, null, "cfg", self.negative)}

    def __call__(self, denoiser: Denoise, null: Mapping[str, Tensor]) -> Denoise:
        if self.scale == 0.0 and self.rescale == 0.0:
            return unconditional(denoiser, null, "cfg", self.negative)
        return super().__call__(denoiser, null)

    def apply(self, call: Call) -> Prediction:
        guided = call.cond.mix(call.branch("null"), self.scale)
        if self.rescale > 0:
            guided = self._rescaled(guided, call)
        return call.accept(guided)

    def _rescaled(self, guided: Prediction, call: Call) -> Prediction:
        if self.rescale_in == "x0":
            return guided.with_x0(lambda x0: x0 * self._factor(call.cond.x0, x0))
        assert isinstance(call.denoiser, Denoiser)
        meaning = mean_of(call.denoiser.parameterization)
        output = meaning.target(guided.x0, guided.eps, call.level)
        factor = self._factor(meaning.target(call.cond.x0, call.cond.eps, call.level), output)
        rescaled = meaning.predict(output * factor, call.x_t, call.level)
        return guided.with_x0(lambda _: rescaled.x0)

    def _factor(self, cond: Tensor, guided: Tensor) -> Tensor | float:
        dims = tuple(range(1, cond.ndim))
        if cond.numel() <= len(cond):  # samples of one element have no spread to bring back, and no samples neither
            return 1.0
        ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return self.rescale * ratio + (1 - self.rescale)


@dataclass(frozen=True)
class CFGPlusPlus(Part):
    r"""CFG++: interpolates the denoised means, and renoises with the unconditional noise.

    .. math::
        \tilde\epsilon = \hat\epsilon_\varnothing + \lambda (\hat\epsilon_c - \hat\epsilon_\varnothing), \qquad
        x_s = \alpha_s \frac{x_t - \sigma_t \tilde\epsilon}{\alpha_t} + \sigma_s \hat\epsilon_\varnothing

    The second half of the step is the sampler's: one that cannot renoise in a direction of its own refuses.

    Args:
        scale: lambda in [0, 1]; unlike cfg's scale, 1 is strong guidance.

    Source: Chung et al. 2024 (arXiv 2406.08070), section 3.
    When: cfg at high scales saturates, or inversion with guidance must come back to its image.

    Raises:
        ValueError: a scale outside [0, 1]; when called, an unconditional denoiser.
    """

    scale: float = 0.6

    def __post_init__(self) -> None:
        finite("guidance.scale", self.scale)
        if not 0 <= self.scale <= 1:
            raise ValueError(f"guidance.scale={self.scale} of cfgpp is an interpolation: give a number in [0, 1].")

    @property
    def needs_null(self) -> bool:
        return True

    @property
    def renoises(self) -> bool:
        return True

    def branches(self, denoiser: Denoise, null: Mapping[str, Tensor]) -> dict[str, Denoise]:
        return {"null": unconditional(denoiser, null, "cfgpp")}

    def apply(self, call: Call) -> Prediction:
        null = call.branch("null")
        return call.accept(call.cond.mix(null, self.scale)).with_renoise_eps(null.eps)


def unconditional(
    denoiser: Denoise, null: Mapping[str, Tensor], guidance: str, negative: int | None = None
) -> Denoiser:
    """The denoiser under the null condition, or under another class.

    Raises:
        ValueError: the denoiser has no condition, or no null form of it.
    """
    if not isinstance(denoiser, Denoiser) or not denoiser.cond:
        raise ValueError(
            f"guidance={guidance} needs a conditional model: use guidance=none, or train with conditioner=class_label."
        )
    if negative is not None:
        if "label" not in denoiser.cond:
            raise ValueError(f"guidance.negative={negative} names a class and the model has none: leave it null.")
        return denoiser.bind({**denoiser.cond, "label": torch.full_like(denoiser.cond["label"], negative)})
    if set(null) != set(denoiser.cond):
        raise ValueError(
            f"guidance={guidance} needs the null form of the model's condition: train with conditioner.dropout=0.1, "
            "or use guidance=none."
        )
    return denoiser.bind(null)


def mean_of(parameterization: Parameterization) -> Parameterization:
    """What the mean's channels mean, where a network also learns the variance."""
    mean = getattr(parameterization, "mean", None)
    return mean if isinstance(mean, Parameterization) else parameterization
