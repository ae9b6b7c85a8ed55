"""Guidance in a limited interval of noise levels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.guidance.base import Call, Part, finite
from ornstein.diffusion.guidance.free import ClassifierFree
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import Level


@dataclass(frozen=True)
class Interval(Part):
    r"""Limited-interval guidance: cfg, or another guidance, at some noise levels; elsewhere the conditional model.

    .. math:: w(t) = w \text{ where } \sigma_{min} < \sigma(t)/\alpha(t) \le \sigma_{max}, \text{ else } 1

    Outside the interval only the conditional branch is evaluated, and only it is counted. With a level for each sample
    (an adaptive solver's) every branch is evaluated for all of them. A grid of few steps may have no level inside;
    then nothing is guided, and only the number of network evaluations tells, which is that of guidance=none: take more
    steps, or wider bounds.

    Args:
        scale: of cfg inside the interval; not read where ``part`` is given.
        sigma_min: lower bound of sigma/alpha, itself outside; null is none.
        sigma_max: upper bound of sigma/alpha, itself inside; null is none.
        log_snr_min: the upper bound of noise written as 2 ln(alpha/sigma), instead of sigma_max.
        log_snr_max: the lower bound of noise written so, instead of sigma_min.
        part: the guidance inside, instead of cfg.

    Source: Kynkäänniemi et al. 2024 (arXiv 2404.07724); the default bounds are those of its largest ImageNet-512
    model, for data of standard deviation 0.5.
    When: cfg costs variety or evaluations: at high noise it only narrows, at low noise it does little.

    Raises:
        ValueError: a scale that is no finite number, one bound in both units, bounds that leave nothing between, or a
            part that cannot be composed.
    """

    scale: float = 2.0
    sigma_min: float | None = 0.19
    sigma_max: float | None = 1.61
    log_snr_min: float | None = None
    log_snr_max: float | None = None
    part: Part | None = None

    def __post_init__(self) -> None:
        finite("guidance.scale", self.scale)
        for sigma, snr in (("sigma_max", "log_snr_min"), ("sigma_min", "log_snr_max")):
            if getattr(self, sigma) is not None and getattr(self, snr) is not None:
                raise ValueError(
                    f"guidance.{sigma}={getattr(self, sigma)} and guidance.{snr}={getattr(self, snr)} are one bound in "
                    f"two units: set one of them to null."
                )
        if self.part is not None and not isinstance(self.part, Part):
            raise ValueError(f"guidance.part={self.part!r} is no guidance: subclass guidance.Part.")
        low, high = self.bounds
        if not 0 <= low < high:
            raise ValueError(
                f"guidance=interval has no level between sigma/alpha = {low:g} and {high:g}: give sigma_min below "
                "sigma_max (or log_snr_min below log_snr_max)."
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval of sigma/alpha, open below and closed above."""
        low = self.sigma_min if self.log_snr_max is None else math.exp(-0.5 * self.log_snr_max)
        high = self.sigma_max if self.log_snr_min is None else math.exp(-0.5 * self.log_snr_min)
        return low or 0.0, math.inf if high is None else high

    @property
    def inner(self) -> Part:
        """The guidance inside the interval."""
        return ClassifierFree(self.scale) if self.part is None else self.part

    @property
    def off(self) -> bool:
        return self.inner.off

    @property
    def needs_null(self) -> bool:
        return self.inner.needs_null

    @property
    def needs_condition(self) -> bool:
        return self.inner.needs_condition

    @property
    def renoises(self) -> bool:
        return self.inner.renoises

    @property
    def remembers(self) -> bool:
        return self.inner.remembers

    @property
    def differentiates(self) -> bool:
        return self.inner.differentiates

    def branches(self, denoiser: Denoise, null: Mapping[str, Tensor]) -> dict[str, Denoise]:
        return self.inner.branches(denoiser, null)

    def wanted(self, names: Sequence[str], level: Level | None) -> tuple[str, ...]:
        return () if self._inside(level) is False else self.inner.wanted(names, level)

    def own_cost(self, level: Level | None) -> int:
        return 0 if self._inside(level) is False else self.inner.own_cost(level)

    def apply(self, call: Call) -> Prediction:
        inside = self._inside(call.level)
        if not isinstance(inside, Tensor):
            return self.inner.apply(call) if inside else call.current
        before = dict(call.memory)
        guided, plain = self.inner.apply(call), call.current
        for name, value in call.memory.items():
            if name.startswith(call.prefix):
                call.memory[name] = torch.where(inside, value, before.get(name, torch.zeros_like(value)))
        chosen = plain.with_x0(lambda x0: torch.where(inside, guided.x0, x0))
        if not self.renoises:
            return chosen
        return chosen.with_renoise_eps(torch.where(inside, guided.renoise_eps, plain.renoise_eps))

    def _inside(self, level: Level | None) -> bool | Tensor:
        return between(level, *self.bounds)


def between(level: Level | None, low: float, high: float) -> bool | Tensor:
    """Whether low < sigma/alpha <= high at a level, or for each sample; True where no level is given."""
    if level is None:
        return True
    # Products, not the ratio: alpha may be 0.
    above: bool | Tensor = level.sigma > low * level.alpha
    below: bool | Tensor = high == math.inf or level.sigma <= high * level.alpha
    if isinstance(above, Tensor) or isinstance(below, Tensor):
        return torch.as_tensor(above) & torch.as_tensor(below)
    return above and below
