"""Scoring samples: drawn, measured and compared with training and held-out images, in one place for all who score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ornstein.diffusion.guidance import Guidance
from ornstein.diffusion.samplers import Sampler
from ornstein.training.conditions import balanced_labels
from ornstein.training.module import DiffusionModule
from ornstein.training.shapes import Shape, sizes_like, sizes_of_rows

if TYPE_CHECKING:
    from PIL.Image import Image

    from ornstein.metrics.floor import RealFloor
    from ornstein.metrics.generative import GenerativeMetrics
    from ornstein.metrics.realism import BestWorst
    from ornstein.metrics.statistics import Statistics
    from ornstein.training.generate import Generated

KEPT_SAMPLES = 2000  # samples, and held-out images, that memorisation is judged by
SHOWN, NEIGHBOURS = 10, 5  # samples in the picture of nearest training images, and how many of these each has

Pictures = Tensor | list[Tensor]


@dataclass(frozen=True)
class Drawn:
    """What was drawn for a score.

    Attributes:
        images: the first of the samples, uint8 (N, C, H, W) with N up to ``KEPT_SAMPLES``, on the CPU; where samples
            have several shapes, a list of such batches.
        nfe: network evaluations per sample.
        index: their numbers, int64 (N,).
        paired: PSNR, SSIM and LPIPS of all samples, over all processes, beside the images that they should restore;
            empty where the model is not conditioned on images.
    """

    images: Pictures
    nfe: int
    index: Tensor | None = None
    paired: Mapping[str, float] = field(default_factory=dict)


def set_references(metrics: GenerativeMetrics, dataset: Any, *, batch_size: int = 256) -> None:
    """Gives every feature space of ``metrics`` its real images: a published file for the main one, where
    ``metrics.reference`` names one, else the data set's, from the cache or computed now.

    Every process of a distributed run may call it: one of those on a machine computes, the others wait and read.
    """
    from ornstein.metrics import read_published

    for number, space in enumerate(metrics.spaces):
        options: dict[str, Any] = {"batch_size": batch_size, "max_features": metrics.keep_features}
        options["spatial"] = metrics.choice.sfid
        if metrics.published is not None and number == 0:
            statistics = read_published(metrics.published, space.features, **options)
        else:
            statistics = _statistics(space.features, dataset, **options)
        metrics.set_reference(statistics, space=space.features)


def _statistics(features: Any, dataset: Any, **options: Any) -> Statistics:
    from ornstein.metrics import reference_statistics

    return reference_statistics(features, dataset, **options)


def floor_of(metrics: GenerativeMetrics, dataset: Any, count: int, *, batch_size: int = 256) -> RealFloor:
    """What real images score against other real ones in the main feature space, ``count`` of them; cached."""
    from ornstein.metrics import cached_floor

    return cached_floor(metrics.features, dataset, count, batch_size=batch_size)


def further_floors(
    metrics: GenerativeMetrics, dataset: Any, count: int, *, batch_size: int = 256
) -> dict[str, RealFloor]:
    """The floor in each further feature space, by the name of its figure."""
    from ornstein.metrics import cached_floor
    from ornstein.metrics.figures.naming import floor_name

    return {
        floor_name(space.features): cached_floor(space.features, dataset, count, batch_size=batch_size)
        for space in metrics.spaces[1:]
    }


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
    size: Shape | None = None,
    seed: int = 0,
    batch_size: int = 256,
    advance: Callable[[], None] | None = None,
    take: Callable[[Generated], None] | None = None,
    judge: BestWorst | None = None,
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
        size: (height, width) of all samples; unless given the model's own, or where ``dataset`` has several shapes
            those in their proportions, so that like is compared with like.
        seed: of the samples' noise.
        batch_size: samples at once.
        advance: called after each step of each batch.
        take: called with each batch, to keep it.
        judge: is given each sample with its features in the main space.
    """
    from ornstein.metrics.paired import PairedScore

    captions = captions_of(dataset, module.conditioner.num_classes)
    kept: list[Tensor] = []
    numbers: list[Tensor] = []
    first = torch.tensor(list(indices[:KEPT_SAMPLES]), dtype=torch.int64)
    nfe = 0
    sizes: Shape | list[Shape] | None = size
    if size is None:
        sizes = sizes_of(module, dataset, indices, labels=labels, prompts=prompts, images=images)
    drawn = module.generate(
        indices,
        sampler=sampler,
        guidance=guidance,
        labels=labels,
        prompts=prompts,
        negative_prompt=negative_prompt,
        images=images,
        size=sizes,
        seed=seed,
        batch_size=batch_size,
        watch=None if advance is None else lambda step, state: advance(),
    )
    paired = PairedScore()
    for batch in drawn:
        texts = batch.captions
        if texts is None and captions is not None and metrics.names_clip:
            texts = [captions(index) for index in batch.index.tolist()]
        features = metrics.update(batch.images, batch.labels, captions=texts, index=batch.index)
        if judge is not None:
            judge.add(features, batch.images, index=batch.index, labels=batch.labels)
        if batch.originals is not None:
            paired.update(batch.images, batch.originals)
        if take is not None:
            take(batch)
        # Samples of several shapes come shape by shape: the first by their numbers are kept, not the first to come.
        if len(mine := torch.isin(batch.index.cpu(), first).nonzero().flatten()):
            kept.append(batch.images.cpu()[mine])
            numbers.append(batch.index.cpu()[mine])
        nfe = batch.nfe
    # Every process asks, or none: one without a share has nothing to add.
    beside = paired.compute(collective=True) if {"image", "condition"} & set(module.conditioner.needs) else {}
    if isinstance(sizes, list):
        return Drawn(kept, nfe, torch.cat([*numbers, torch.empty(0, dtype=torch.int64)]), beside)
    if not kept:  # a process without a share
        return Drawn(torch.empty(0, 1, 1, 1, dtype=torch.uint8), nfe, torch.empty(0, dtype=torch.int64), beside)
    return Drawn(torch.cat(kept)[:KEPT_SAMPLES], nfe, torch.cat(numbers)[:KEPT_SAMPLES], beside)


def sizes_of(
    module: DiffusionModule,
    dataset: Any,
    indices: Sequence[int] | range,
    *,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    images: Tensor | None = None,
) -> list[Shape] | None:
    """The size of each sample of a model of several shapes: that of the held-out image which it takes its condition
    from, else in the proportions of the training images, of its class where it has one; None where all have one shape.
    """
    if getattr(dataset, "bucket_of", None) is None:
        return None
    needs = module.conditioner.needs
    if set(needs) - {"label"} and prompts is None and images is None and labels is None and module.held_out is not None:
        held_out = module.held_out()
        return sizes_of_rows(held_out, [index % len(held_out) for index in indices])
    if labels is None and needs == ("label",) and module.conditioner.num_classes is not None:
        labels = balanced_labels(indices, module.conditioner.num_classes)
    return sizes_like(dataset, indices, labels=labels)


def together(drawn: Drawn) -> Drawn:
    """The first samples of all processes, in order of their numbers: the same whatever their number (collective).

    Samples of several shapes stay each process's own.
    """
    from ornstein.metrics.statistics import gathered

    if isinstance(drawn.images, list) or drawn.index is None:
        return drawn
    images, index = gathered(drawn.images), gathered(drawn.index)
    order = index.argsort()[:KEPT_SAMPLES]
    return Drawn(images[order], drawn.nfe, index[order])


def memorisation(
    metrics: GenerativeMetrics, images: Pictures, *, held_out: Any, training: Any = None, batch_size: int = 256
) -> dict[str, float | int | str]:
    """Distances of samples to their nearest training images, beside those of held-out images.

    Args:
        images: the samples, as :class:`Drawn` has them.
        held_out: a data set that the model has not seen.
        training: the data set that it has seen; unless given, the images that figures are measured against. Of more
            images than the metrics keep features of, a random subset.
    """
    from ornstein.metrics import extract, memorisation_of_features

    found = [
        extract(metrics.features, source, batch_size=batch_size, limit=KEPT_SAMPLES)[0] for source in (images, held_out)
    ]
    bank = training_statistics(metrics, training, batch_size=batch_size).features
    report = memorisation_of_features(found[0], found[1], training=bank)
    return report.to_dict() | {"extractor": metrics.features.name, "fingerprint": metrics.features.fingerprint}


def training_statistics(metrics: GenerativeMetrics, training: Any = None, *, batch_size: int = 256) -> Statistics:
    """The training images in the main feature space: the reference where it is of them, else from the cache or new."""
    reference = metrics.reference
    assert reference is not None
    if training is None or reference.source.get("data") == training.fingerprint:
        return reference
    return _statistics(
        metrics.features,
        training,
        batch_size=batch_size,
        max_features=metrics.keep_features,
        spatial=metrics.choice.sfid,
    )


def first_tiles(images: Pictures, count: int) -> Tensor:
    """The first ``count`` samples as tiles of one shape, uint8 (N, C, H, W): letterboxed where they have several, one
    of each in turn.
    """
    from ornstein.training.pictures import letterboxed

    if isinstance(images, Tensor):
        return images[:count]
    return letterboxed(_in_turn(images)[:count])


def _in_turn(batches: Sequence[Tensor]) -> list[Tensor]:
    """The images of some batches: the first of each batch, then the second of each, ..."""
    return [image for row in zip_longest(*batches) for image in row if image is not None]


def draw_neighbours(metrics: GenerativeMetrics, images: Pictures, *, training: Any, batch_size: int = 256) -> Image:
    """A picture of the first samples beside the training images that are nearest to them in feature space.

    Args:
        images: the samples, as :class:`Drawn` has them.
        training: the data set that the model has seen; neighbours are looked for among the images whose features are
            kept.
    """
    from ornstein.metrics import extract, nearest_neighbours, neighbour_grid
    from ornstein.training.pictures import letterboxed

    kept = training_statistics(metrics, training, batch_size=batch_size)
    shown = _in_turn(images if isinstance(images, list) else [images])[:SHOWN]
    queries = extract(metrics.features, [image[None] for image in shown])[0]
    found = nearest_neighbours(queries, kept.features, k=min(NEIGHBOURS, len(kept.features)))[1]
    rows, places = torch.unique(kept.index[found], return_inverse=True)
    real = [training.batch([row])["image"][0] for row in rows.tolist()]
    tiles = letterboxed([*shown, *real])
    return neighbour_grid(tiles[: len(shown)], tiles[len(shown) :], neighbours=places)


def figures_beside(
    metrics: GenerativeMetrics,
    floor: RealFloor,
    values: Mapping[str, float],
    count: int,
    *,
    further: Mapping[str, RealFloor] | None = None,
) -> dict[str, float]:
    """What real images score, to read the figures of ``count`` samples against.

    Args:
        floor: of the main feature space.
        further: of further ones, as :func:`further_floors` gives them.
    """
    from ornstein.metrics.figures.naming import floor_name

    floors = {floor_name(metrics.features): floor} | dict(further or {})
    beside = {}
    for space, (name, each) in zip(metrics.spaces, floors.items(), strict=False):
        assert space.reference is not None
        # Published moments do not say of how many images they are: of many.
        beside[name] = each.expected_fid(count, space.reference.count or math.inf)
    assert metrics.reference is not None
    if metrics.reference.inception_score is not None and any(name.startswith("inception_score") for name in values):
        beside["real_inception_score"] = metrics.reference.inception_score
    return beside


def sampling_facts(
    module: DiffusionModule,
    *,
    sampler: Sampler,
    guidance: Guidance,
    weights: str,
    nfe: int,
    seed: int,
    ema: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """How samples were made: what has to stand beside a figure for anybody to believe it.

    Args:
        ema: the averages' length (decay, warm-up, updates so far, ...), where ``weights`` are averages.
    """
    return {
        "images_seen": module.images_seen,
        "weights": weights,
        "ema": None if ema is None else dict(ema),
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
