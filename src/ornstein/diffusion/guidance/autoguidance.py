"""Autoguidance: a model guided by a bad version of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ornstein.diffusion.denoiser import Denoise, Denoiser
from ornstein.diffusion.guidance.base import Call, Part, beside, finite
from ornstein.diffusion.prediction import Prediction

_CONDITIONS = ("same", "null", "none")
NO_RUN = "guidance=autoguidance needs a weaker model: add guidance.run=FOLDER, a run's, or a checkpoint."


@dataclass(frozen=True)
class Autoguidance(Part):
    r"""Guides with a second, weaker model: what it lacks is what the first one is pushed towards.

    .. math:: \tilde x_0 = \hat x_0^{weak}(x_t) + w\,(\hat x_0(x_t) - \hat x_0^{weak}(x_t))

    The weak model may have another network, schedule and parameterization: it is evaluated at the same log-SNR, and the
    two are mixed in x0.

    Args:
        scale: w; 1 is off.
        run: the weak model, a run folder or a checkpoint (an early one of the same run, say). The command line opens
            it; from Python give ``denoiser``.
        checkpoint: last or best, where ``run`` is a folder.
        weights: ema or model.
        condition: ``same`` as the main model's; ``null`` (or None, which is what a command line makes of it), the
            weak model's null form; ``none``, a weak model without condition.
        denoiser: the weak model ready-made, without conditioning.

    Source: Karras et al. 2024 (arXiv 2406.02507).
    When: quality should rise without the loss of variety that cfg brings, or the model is unconditional.

    Raises:
        ValueError: a scale that is no finite number, an unknown condition; when called, no weak model, or no null form
            where it was asked for.
    """

    scale: float = 2.0
    run: str | None = None
    checkpoint: str = "last"
    weights: str = "ema"
    condition: str | None = "same"
    denoiser: Denoiser | None = None

    def __post_init__(self) -> None:
        finite("guidance.scale", self.scale)
        if self.condition is None:
            object.__setattr__(self, "condition", "null")
        if self.condition not in _CONDITIONS:
            raise ValueError(f"guidance.condition={self.condition!r} is unknown: choose {', '.join(_CONDITIONS)}.")

    @property
    def off(self) -> bool:
        return self.scale == 1.0

    @property
    def needs_null(self) -> bool:
        return not self.off and self.condition == "null"

    def branches(self, denoiser: Denoise, null: Mapping[str, Tensor]) -> dict[str, Denoise]:
        if self.denoiser is None:
            raise ValueError(NO_RUN)
        beside(self.denoiser.network, denoiser)
        if self.condition == "none":
            return {"weak": self.denoiser}
        own = denoiser.cond if isinstance(denoiser, Denoiser) else {}
        if self.condition == "null" and set(null) != set(own):
            raise ValueError(
                "guidance.condition=null needs the null form of the condition: choose guidance.condition=same, or "
                "train with conditioner.dropout=0.1."
            )
        return {"weak": self.denoiser.bind(null if self.condition == "null" else own)}

    def apply(self, call: Call) -> Prediction:
        weak = call.branch("weak").x0
        return call.accept(call.cond.with_x0(lambda x0: weak + self.scale * (x0 - weak)))
