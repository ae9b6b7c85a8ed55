"""Scoring samples: drawn, measured and compared with training and held-out images, in one place for all who score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ornstein.diffusion.guidance import Guidance
from ornstein.diffusion.samplers import Sampler
from ornstein.training.module import DiffusionModule

if TYPE_CHECKING:
    from ornstein.metrics.floor import RealFloor
    from ornstein.metrics.generative import GenerativeMetrics

KEPT_SAMPLES = 2000  # samples, and held-out images, that memorisation is judged by


@dataclass(frozen=True)
class Drawn:
    """What was drawn for a score.

    Attributes:
        images: the first of the samples, uint8 (N, C, H, W) with N up to ``KEPT_SAMPLES``, on the CPU.
        nfe: network evaluations per sample.
    """

    images: Tensor
    nfe: int


def draw_into(
    metrics: GenerativeMetrics,
    module: DiffusionModule,
    indices: Sequence[int] | range,
    *,
    dataset: Any,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    negative_prompt: str | None = None,
    images: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 256,
    advance: Callable[[], None] | None = None,
) -> Drawn:
    """Draws samples number ``indices`` and feeds them to ``metrics``, batch by batch.

    Args:
        metrics: takes images, labels and captions: those that the samples were given, else some of ``dataset``.
        module: the model, sampled with its evaluation weights.
        indices: the samples' numbers.
        dataset: training images, whose captions stand for the samples'.
        sampler: the run's own unless given.
        guidance: the run's own unless given.
        labels: one a sample; balanced over the classes unless given.
        prompts: a caption for each sample; those of held-out data, in order, unless given.
        negative_prompt: what guidance steers away from.
        images: an image to be conditioned on for each sample; held-out ones, in order, unless given.
        seed: of the samples' noise.
        batch_size: samples at once.
        advance: called after each step of each batch.
    """
    captions = captions_of(dataset, module.conditioner.num_classes)
    kept: list[Tensor] = []
    nfe = 0
    drawn = module.generate(
        indices,
        sampler=sampler,
        guidance=guidance,
        labels=labels,
        prompts=prompts,
        negative_prompt=negative_prompt,
        images=images,
        seed=seed,
        batch_size=batch_size,
        watch=None if advance is None else lambda step, state: advance(),
    )
    for batch in drawn:
        texts = batch.captions
        if texts is None and captions is not None and metrics.names_clip:
            texts = [captions(index) for index in batch.index.tolist()]
        metrics.update(batch.images, batch.labels, captions=texts)
        if sum(map(len, kept)) < KEPT_SAMPLES:
            kept.append(batch.images.cpu())
        nfe = batch.nfe
    return Drawn(torch.cat(kept)[:KEPT_SAMPLES], nfe)


def memorisation(
    metrics: GenerativeMetrics, images: Tensor, *, held_out: Any, batch_size: int = 256
) -> dict[str, float | int | str]:
    """Distances of samples to their nearest training images, beside those of held-out images.

    The training images are those whose features the metrics' reference keeps: all, or a random ten thousand.
    """
    from ornstein.metrics import extract, memorisation_of_features

    assert metrics.reference is not None
    found = [
        extract(metrics.features, source, batch_size=batch_size, limit=KEPT_SAMPLES)[0] for source in (images, held_out)
    ]
    report = memorisation_of_features(found[0], found[1], training=metrics.reference.features)
    return report.to_dict() | {"extractor": metrics.features.name, "fingerprint": metrics.features.fingerprint}


def figures_beside(
    metrics: GenerativeMetrics, floor: RealFloor, values: dict[str, float], count: int
) -> dict[str, float]:
    """What real images score, to read the figures of ``count`` samples against."""
    assert metrics.reference is not None
    beside = {"fid_floor": floor.expected_fid(count, metrics.reference.count)}
    if metrics.reference.inception_score is not None and "inception_score" in values:
        beside["real_inception_score"] = metrics.reference.inception_score
    return beside


def sampling_facts(
    module: DiffusionModule, *, sampler: Sampler, guidance: Guidance, weights: str, nfe: int, seed: int
) -> dict[str, Any]:
    """How samples were made: what has to stand beside a figure for anybody to believe it."""
    return {
        "images_seen": module.images_seen,
        "weights": weights,
        "sampler": type(sampler).__name__,
        "steps": sampler.steps,
        "nfe": nfe,
        "guidance": type(guidance).__name__,
        "guidance_scale": getattr(guidance, "scale", None),
        "seed": seed,
    }


def label_protocol(module: DiffusionModule, *, given: bool = False) -> str:
    """How samples' conditions were chosen: ``given`` by the user, ``balanced`` classes, ``held_out`` data's own, or
    ``none``.
    """
    needs = module.conditioner.needs
    return "given" if given else "none" if not needs else "balanced" if needs == ("label",) else "held_out"


def captions_of(dataset: Any, num_classes: int | None) -> Callable[[int], str] | None:
    """A caption for each sample: that of a training image, of the sample's class where there are classes."""
    if dataset.captions is None:
        return None
    rows: list[Sequence[int]] = [range(len(dataset))]
    if num_classes is not None:
        rows = [(dataset.labels == label).nonzero()[0].tolist() for label in range(num_classes)]

    def caption(index: int) -> str:
        own = rows[index % len(rows)]
        return str(dataset.captions[own[index // len(rows) % len(own)]]) if own else ""

    return caption
