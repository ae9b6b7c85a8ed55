"""Guidance turns a denoiser with conditioning into another denoiser, so that every sampler takes every guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ornstein.diffusion.denoiser import Denoise, Denoiser
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import Level, NoiseSchedule, Scalar


class Guidance(Protocol):
    """Builds a guided denoiser from a bound one and the null (dropped) form of its conditioning."""

    @property
    def needs_null(self) -> bool:
        """Whether the model must have been trained with dropped conditioning."""
        ...

    def __call__(self, denoiser: Denoiser, null: Mapping[str, Tensor]) -> Denoise: ...


@dataclass(frozen=True)
class NoGuidance:
    """The denoiser as it is."""

    @property
    def needs_null(self) -> bool:
        return False

    def __call__(self, denoiser: Denoiser, null: Mapping[str, Tensor]) -> Denoise:
        return denoiser


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance: uncond + scale * (cond - uncond); scale 1 is off (diffusers' convention).

    Source: Ho & Salimans 2022 (arXiv 2207.12598), eq. 6, with its w written as scale - 1.
    """

    scale: float = 2.0

    @property
    def needs_null(self) -> bool:
        return self.scale != 1.0

    def __call__(self, denoiser: Denoiser, null: Mapping[str, Tensor]) -> Denoise:
        if self.scale == 1.0:
            return denoiser
        if not denoiser.cond:
            raise ValueError(
                "guidance=cfg needs a conditional model: use guidance=none, or train with conditioner=class_label."
            )
        if self.scale == 0.0:
            return denoiser.bind(null)
        both = {key: torch.cat([value, null[key]]) for key, value in denoiser.cond.items()}
        return _ClassifierFreeDenoiser(denoiser.bind(both), self.scale)


@dataclass(frozen=True)
class _ClassifierFreeDenoiser:
    """Runs both branches through the network in one batch and mixes their predictions."""

    both: Denoiser
    scale: float

    @property
    def schedule(self) -> NoiseSchedule:
        return self.both.schedule

    @property
    def cost(self) -> int:
        return 2 * self.both.cost

    def __call__(self, x_t: Tensor, t: Scalar | Level) -> Prediction:
        level = t if isinstance(t, Level) else self.schedule.level(t, x_t.ndim)
        cond, uncond = self.both.predict(torch.cat([x_t, x_t]), level.repeat(2)).split(2)
        return self.both.clip(cond.mix(uncond, self.scale))
