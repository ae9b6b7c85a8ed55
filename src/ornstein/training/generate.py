"""Samples in batches, where sample number i depends on (seed, i) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ornstein.codecs import Codec
from ornstein.conditioning import Conditioner
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.guidance import Guidance
from ornstein.diffusion.noise import NoiseSource
from ornstein.diffusion.samplers import Sampler
from ornstein.diffusion.samplers.base import State

Watch = Callable[[int, State], None]


@dataclass(frozen=True)
class Generated:
    """A batch of samples.

    Attributes:
        images: uint8 (B, C, H, W).
        index: (B,) int64, the samples' numbers.
        labels: (B,) int64, or None.
        nfe: network evaluations per sample.
    """

    images: Tensor
    index: Tensor
    labels: Tensor | None
    nfe: int


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to uint8 by rounding to the nearest of 256 levels, as FID's authors' code stores images."""
    return x.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def balanced_labels(indices: Sequence[int] | range, num_classes: int) -> list[int]:
    """Label of sample i: i mod num_classes, so that any run of samples holds the classes equally."""
    return [i % num_classes for i in indices]


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
    seed: int = 0,
    batch_size: int = 256,
    watch: Watch | None = None,
) -> Iterator[Generated]:
    """Yields batches of samples number ``indices``, in order.

    Args:
        denoiser: without conditioning; its network is put into eval mode and back.
        indices: the samples' numbers, each in [0, 2**32).
        codec: decodes what the sampler leaves.
        conditioner: makes labels into conditioning and gives the null form.
        sampler: the fixed-step sampler.
        guidance: wraps the denoiser.
        shape: of one sample in the space being diffused.
        device: where to sample.
        labels: one a sample; balanced over the classes unless given. Unused without classes.
        seed: of the noise.
        batch_size: samples at once; changes nothing but rounding.
        watch: called with (step, state) after each step of each batch.
    """
    source = NoiseSource(seed)
    if conditioner.num_classes is not None and labels is None:
        labels = balanced_labels(indices, conditioner.num_classes)
    network = denoiser.network
    was_training = network.training
    network.eval()
    try:
        for start in range(0, len(indices), batch_size):
            index = torch.tensor(indices[start : start + batch_size], dtype=torch.int64, device=device)
            label = None
            if conditioner.num_classes is not None and labels is not None:
                label = torch.tensor(labels[start : start + batch_size], dtype=torch.int64, device=device)
            cond = conditioner.cond(label)
            null = conditioner.null(len(index), device) if conditioner.has_null else {}
            guided = guidance(denoiser.bind(cond), null)
            state = sampler.sample(guided, source.bind(index, shape), watch=watch)
            yield Generated(to_uint8(codec.decode(state.x)), index, label, state.nfe)
    finally:
        network.train(was_training)
