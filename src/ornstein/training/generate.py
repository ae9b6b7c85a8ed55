"""Samples in batches, where sample number i depends on (seed, i) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ornstein.codecs import Codec
from ornstein.conditioning import Conditioner
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.guidance import Guidance
from ornstein.diffusion.noise import NoiseSource
from ornstein.diffusion.samplers import Sampler
from ornstein.diffusion.samplers.base import State
from ornstein.training.conditions import Conditions, HeldOut, balanced_labels

Watch = Callable[[int, State], None]


@dataclass(frozen=True)
class Generated:
    """A batch of samples.

    Attributes:
        images: uint8 (B, C, H, W).
        index: (B,) int64, the samples' numbers.
        labels: (B,) int64, the classes that they should show, or None where none are known.
        nfe: network evaluations per sample.
        captions: B texts, or None where the model reads none.
        conditions: what the model was shown, as uint8 pictures (B, 1 or 3, h, w), or None.
        originals: the whole images that those were made of, uint8 like ``images``; None where none of this size are
            known.
    """

    images: Tensor
    index: Tensor
    labels: Tensor | None
    nfe: int
    captions: list[str] | None = None
    conditions: Tensor | None = None
    originals: Tensor | None = None


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to uint8 by rounding to the nearest of 256 levels, as FID's authors' code stores images."""
    return x.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def generate(
    denoiser: Denoiser,
    indices: Sequence[int] | range,
    *,
    codec: Codec,
    conditioner: Conditioner,
    sampler: Sampler,
    guidance: Guidance,
    shape: tuple[int, int, int],
    device: torch.device,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    negative_prompt: str | None = None,
    images: Tensor | None = None,
    held_out: HeldOut | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    watch: Watch | None = None,
) -> Iterator[Generated]:
    """Yields batches of samples number ``indices``, in order.

    Args:
        denoiser: without conditioning; its network is put into eval mode and back.
        indices: the samples' numbers, each in [0, 2**32).
        codec: decodes what the sampler leaves.
        conditioner: makes labels, captions and images into conditioning and gives the null form.
        sampler: the fixed-step sampler.
        guidance: wraps the denoiser.
        shape: of one sample in the space being diffused.
        device: where to sample.
        labels: one a sample; balanced over the classes unless given. Unused without classes.
        prompts: a caption for each sample; those of held-out data unless given. Unused without captions.
        negative_prompt: takes the null condition's place in guidance, of a model that reads captions.
        images: uint8 (len(indices), C, H, W), an image to be conditioned on for each sample; those of held-out data
            unless given. Unused without such.
        held_out: gives the data that conditions which nobody gave are taken from; see
            :class:`ornstein.training.conditions.Conditions`.
        size: (height, width) in pixels of the images that ``shape`` decodes to, which held-out images that samples are
            conditioned on must have; None asks for nothing.
        seed: of the noise, and of masks.
        batch_size: samples at once; changes nothing but rounding.
        watch: called with (step, state) after each step of each batch.
    """
    source = NoiseSource(seed)
    conditions = Conditions(
        conditioner, indices, labels=labels, prompts=prompts, images=images, held_out=held_out, size=size, seed=seed
    )
    network = denoiser.network
    was_training = network.training
    network.eval()
    try:
        for start in range(0, len(indices), batch_size):
            given = conditions.batch(start, start + batch_size, device=device)
            index = given.values["index"]
            cond = conditioner.cond(given.values)
            null = _null(conditioner, cond, given.values, negative_prompt)
            guided = guidance(denoiser.bind(cond), null)
            state = sampler.sample(guided, source.bind(index, shape), watch=watch)
            decoded = to_uint8(codec.decode(state.x))
            originals = given.originals
            if originals is not None and originals.shape != decoded.shape:
                originals = None  # asked for by the user, at another size
            pictures = conditioner.pictures(cond)
            yield Generated(decoded, index, given.labels, state.nfe, given.captions, pictures, originals)
    finally:
        network.train(was_training)


def _null(
    conditioner: Conditioner, cond: Mapping[str, Tensor], given: Mapping[str, Any], negative_prompt: str | None
) -> dict[str, Tensor]:
    """What guidance steers away from: the null condition, or the negative prompt's; empty where there is neither.

    A part of the condition that was never dropped in training stays as it is.
    """
    index = given["index"]
    if not conditioner.has_null and negative_prompt is None:
        return {}
    null = dict(cond) | (conditioner.null(len(index), index.device) if conditioner.has_null else {})
    # Of samples of another size than the model's own.
    if "concat" in null and null["concat"].shape != cond["concat"].shape:
        null["concat"] = torch.zeros_like(cond["concat"])
    if negative_prompt is None:
        return null
    negative = conditioner.cond({**given, "caption": [negative_prompt] * len(index)})
    return null | {name: negative[name] for name in ("text", "text_mask", "pooled") if name in negative}


__all__ = ["Generated", "Watch", "balanced_labels", "generate", "to_uint8"]
