"""Bits/dim of held-out images under a trained model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ornstein.codecs import Identity
from ornstein.diffusion.likelihood import ProbabilityFlow
from ornstein.diffusion.noise import NoiseSource
from ornstein.diffusion.variational_bound import Bound, VariationalBound
from ornstein.errors import OrnsteinError
from ornstein.training.module import DiffusionModule

Method = ProbabilityFlow | VariationalBound
TICKS = 100  # that a batch's progress is told in


@dataclass(frozen=True)
class HeldOutLikelihood:
    """Bits/dim of held-out images.

    Attributes:
        name: of the figure, ``nll_bits_per_dim`` (exact) or ``vlb_bits_per_dim`` (bound).
        bits: (N,) of each image.
        index: (N,) int64, the images' places in the held-out split.
        nfe: network evaluations per image, those of the slowest of all.
        seconds: that it took.
        settings: of the method.
        per_step: of a bound of all T steps, (T,) bits/dim of step 1 to T, their mean over the images; else None.
        parts: mean bits/dim of a bound's ``prior`` and ``reconstruction``.
    """

    name: str
    bits: Tensor
    index: Tensor
    nfe: int
    seconds: float
    settings: dict[str, Any]
    per_step: Tensor | None = None
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """The mean over the images and, of more than one, its standard error, under the figure's name."""
        mean = {self.name: float(self.bits.mean())}
        if len(self.bits) == 1:
            return mean
        return mean | {f"{self.name}_stderr": float(self.bits.std() / math.sqrt(len(self.bits)))}

    def facts(self) -> dict[str, Any]:
        """How the figure came about, in plain types."""
        return {
            **self.settings,
            "num_images": len(self.bits),
            "split": "val",
            "guidance": "not applied",
            "nfe": self.nfe,
            "seconds": round(self.seconds, 3),
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types: values, facts, every image's bits/dim and every step's."""
        whole: dict[str, Any] = {"values": self.values, **self.facts(), **self.parts}
        whole |= {"images": self.index.tolist(), "bits_per_dim": self.bits.tolist()}
        return whole if self.per_step is None else whole | {"per_step": self.per_step.tolist()}


def check_space(module: DiffusionModule) -> None:
    """Refuses a model of latents.

    Raises:
        OrnsteinError: its codec is not the identity.
    """
    if not isinstance(module.codec, Identity):
        raise OrnsteinError(
            "likelihood= needs a model of pixels: bits/dim of latents do not compare with anything, so choose "
            "likelihood=none, or a run with codec=identity."
        )


def held_out_images(dataset: Any, num_images: int | None) -> Tensor:
    """(N,) int64 places of N images, evenly spaced over the held-out split; all where ``num_images`` is None.

    Raises:
        OrnsteinError: fewer than one, or more than there are.
    """
    count = len(dataset) if num_images is None else int(num_images)
    if not 1 <= count <= len(dataset):
        raise OrnsteinError(
            f"likelihood.num_images={num_images} must be between 1 and the {len(dataset):,} held-out images, or null "
            "for all."
        )
    return torch.arange(count) * len(dataset) // count


def held_out_likelihood(
    module: DiffusionModule,
    dataset: Any,
    method: Method,
    *,
    num_images: int | None = 64,
    seed: int = 0,
    batch_size: int = 256,
    advance: Callable[[], None] | None = None,
) -> HeldOutLikelihood:
    """Bits/dim of images of ``dataset`` under the evaluation network, each under its own condition where there is one.

    Guidance is not applied: guided samples come from no density that this could be the likelihood of.

    Args:
        module: the model, of pixels.
        dataset: the held-out split.
        method: exact or bound.
        num_images: how many, evenly spaced; None takes all.
        seed: image i's noise depends on (seed, i) alone.
        batch_size: images at once.
        advance: called ``TICKS`` times for each batch.

    Raises:
        OrnsteinError: a model of latents, more images than there are, or what the method refuses.
    """
    check_space(module)
    rows = held_out_images(dataset, num_images)
    denoiser = module.denoiser(evaluation=True)
    was_training = denoiser.network.training
    denoiser.network.eval()
    started = time.perf_counter()
    results = []
    parts = [torch.as_tensor(piece) for piece in dataset.pieces(size=batch_size, rows=rows)]  # of one shape each
    try:
        for part in parts:
            batch = dataset.batch(part)
            x0 = batch["image"].to(module.device).float().div(127.5).sub(1.0)
            noise = NoiseSource(seed).bind(part.to(module.device), x0.shape[1:])
            own = {key: value.to(module.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            given = denoiser.bind(module.conditioner.cond({**own, "seed": seed}))
            ticks = _Ticks(advance)
            results.append(method(given, x0, noise, watch=ticks))
            ticks(1.0)
    except ValueError as error:
        raise OrnsteinError(str(error)) from error
    finally:
        denoiser.network.train(was_training)
    return HeldOutLikelihood(
        name="nll_bits_per_dim" if isinstance(method, ProbabilityFlow) else "vlb_bits_per_dim",
        bits=torch.cat([result.bits.cpu() for result in results]).double(),
        index=torch.cat(parts),
        nfe=max(result.nfe for result in results),
        seconds=time.perf_counter() - started,
        settings={"method": type(method).__name__, "seed": seed, **vars(method)},
        **_of_bounds([result for result in results if isinstance(result, Bound)]),
    )


def _of_bounds(bounds: list[Bound]) -> dict[str, Any]:
    if not bounds:
        return {}
    parts = {
        name: float(torch.cat([getattr(bound, name) for bound in bounds]).mean())
        for name in ("prior", "reconstruction")
    }
    whole = bool((bounds[0].weight == 1).all())  # otherwise each image has steps of its own
    per_step = torch.cat([bound.terms for bound in bounds]).double().mean(0).cpu() if whole else None
    return {"parts": parts, "per_step": per_step}


class _Ticks:
    """Turns a share of the way into calls of ``advance``."""

    def __init__(self, advance: Callable[[], None] | None) -> None:
        self.advance, self.told = advance, 0

    def __call__(self, share: float) -> None:
        while self.advance is not None and self.told < int(share * TICKS + 1e-6):
            self.told += 1
            self.advance()
