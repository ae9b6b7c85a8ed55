"""Adaptive projected guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.guidance.base import Call, Part, finite
from ornstein.diffusion.guidance.free import unconditional
from ornstein.diffusion.prediction import Prediction


@dataclass(frozen=True)
class AdaptiveProjected(Part):
    r"""Adaptive projected guidance: cfg whose update is averaged, bounded, and turned away from the prediction.

    With :math:`\Delta = \hat x_0(c) - \hat x_0(\varnothing)`, per sample:

    .. math::
        \bar\Delta &= \Delta + \beta \bar\Delta_{previous}, \qquad
        \bar\Delta \leftarrow \bar\Delta \min(1, r / \lVert\bar\Delta\rVert), \\
        \tilde x_0 &= \hat x_0(c) + (w - 1)(\bar\Delta_\perp + \eta \bar\Delta_\parallel),

    parallel and orthogonal to :math:`\hat x_0(c)`. The parallel part is what saturates images. At eta = 1 without
    threshold and momentum this is cfg. The average stands still within a step: where a sampler calls twice, both calls
    add the average of the steps before. An adaptive solver, which discards steps, refuses momentum.

    Args:
        scale: w; 1 is off.
        eta: how much of the parallel part stays; 0 is the paper's.
        norm_threshold: r, a bound on the norm over all elements of a sample; null is off. It grows with the size of
            the data: 2.5 to 15 in the paper.
        momentum: beta in (-1, 1), negative in the paper: -0.75 to -0.5 push away from what the last steps did.

    Source: Sadat et al. 2024 (arXiv 2410.02416).
    When: high scales that oversaturate under cfg are wanted.

    Raises:
        ValueError: a number that is not finite, eta below 0, a threshold that is not positive, |momentum| not below 1;
            when called, an unconditional denoiser.
    """

    scale: float = 4.0
    eta: float = 0.0
    norm_threshold: float | None = None
    momentum: float = -0.5

    def __post_init__(self) -> None:
        finite("guidance.scale", self.scale)
        finite("guidance.eta", self.eta)
        finite("guidance.momentum", self.momentum)
        if self.norm_threshold is not None:
            finite("guidance.norm_threshold", self.norm_threshold)
        if self.eta < 0:
            raise ValueError(f"guidance.eta={self.eta} must not be negative: 0 leaves the parallel part out, 1 is cfg.")
        if self.norm_threshold is not None and not self.norm_threshold > 0:
            raise ValueError(f"guidance.norm_threshold={self.norm_threshold} must be positive, or null for none.")
        if not -1 < self.momentum < 1:
            raise ValueError(f"guidance.momentum={self.momentum} must lie in (-1, 1): 0 is off, -0.5 is usual.")

    @property
    def off(self) -> bool:
        return self.scale == 1.0

    @property
    def needs_null(self) -> bool:
        return not self.off

    @property
    def remembers(self) -> bool:
        return not self.off and self.momentum != 0

    def branches(self, denoiser: Denoise, null: Mapping[str, Tensor]) -> dict[str, Denoise]:
        return {"null": unconditional(denoiser, null, "apg")}

    def apply(self, call: Call) -> Prediction:
        x0 = call.cond.x0
        update = self._averaged(x0 - call.branch("null").x0, call)
        dims = tuple(range(1, x0.ndim))
        if self.norm_threshold is not None:
            norm = (update**2).sum(dims, keepdim=True).sqrt()
            update = update * (self.norm_threshold / norm.clamp(min=self.norm_threshold))
        size = (x0**2).sum(dims, keepdim=True).clamp(min=1e-12)
        parallel = ((update * x0).sum(dims, keepdim=True) / size) * x0
        update = update + (self.eta - 1) * parallel
        return call.accept(call.cond.with_x0(lambda x0: x0 + (self.scale - 1) * update))

    def _averaged(self, difference: Tensor, call: Call) -> Tensor:
        if self.momentum == 0:
            return difference
        before = call.recall("before" if call.again else "average")
        average = difference if before is None else difference + self.momentum * before
        if not call.again:
            if before is not None:
                call.remember("before", before)
            call.remember("average", average)
        return average
