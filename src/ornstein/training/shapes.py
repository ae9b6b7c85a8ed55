"""Samples of several shapes: which sample has which, and how they are batched, shown and compiled for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from ornstein.data import ImageDataset
    from ornstein.training.module import DiffusionModule

Shape = tuple[int, int]
"""Height and width in pixels."""

# The inverse of the golden ratio: its multiples, modulo 1, fill [0, 1) evenly however many are taken.
GOLDEN = (5**0.5 - 1) / 2
Each = TypeVar("Each")


def grouped(size: Shape | Sequence[Shape] | None, count: int) -> Iterator[tuple[Shape | None, list[int] | None]]:
    """(size, places) of ``count`` samples in groups of one size each; (size, None) where all have one.

    Args:
        size: (height, width) of all, or of each, or None for the model's own.
        count: how many samples.

    Raises:
        ValueError: not one size for each.
    """
    if size is None:
        yield None, None
        return
    whole = [side for side in size if isinstance(side, int)]
    if whole:
        height, width = whole
        yield (height, width), None
        return
    each = [shape for shape in size if not isinstance(shape, int)]
    if len(each) != count:
        raise ValueError(f"{len(each)} sizes for {count} samples: give one for each, or one for all")
    places: dict[Shape, list[int]] = {}
    for place, (height, width) in enumerate(each):
        places.setdefault((int(height), int(width)), []).append(place)
    yield from places.items()


def taken(values: Sequence[Each] | None, places: list[int] | None) -> Sequence[Each] | None:
    """Those of ``values`` at ``places``: all of them where that is None."""
    return values if values is None or places is None else [values[place] for place in places]


def most_frequent(dataset: ImageDataset, most: int) -> list[Shape]:
    """The shapes that most images of a data set have, at most so many, the most frequent first."""
    if dataset.bucket_of is None:
        return list(dataset.shapes[:most])
    counts = np.bincount(dataset.bucket_of, minlength=len(dataset.shapes))
    order = sorted(range(len(counts)), key=lambda bucket: (-counts[bucket], bucket))
    return [dataset.shapes[bucket] for bucket in order[:most] if counts[bucket]]


def shown_shapes(module: DiffusionModule, data: Any, most: int) -> list[Shape] | None:
    """The shapes that pictures of samples show, at most so many; None where all images have one, the model's own.

    Those that most training images have; of a model that is conditioned on images, which held-out data give, those that
    most held-out images have.
    """
    given = {"image", "condition"} & set(module.conditioner.needs)
    dataset = data.val if given else data.train
    return None if dataset.bucket_of is None else most_frequent(dataset, most)


def rows_of_one_shape(dataset: ImageDataset, count: int) -> list[int]:
    """The first ``count`` images (or as many as there are) of the most frequent shape: a batch to look at."""
    if dataset.bucket_of is None:
        return list(range(min(count, len(dataset))))
    bucket = dataset.shapes.index(most_frequent(dataset, 1)[0])
    own: list[int] = np.flatnonzero(dataset.bucket_of == bucket)[:count].tolist()
    return own


def sizes_like(
    dataset: ImageDataset, indices: Sequence[int] | range, *, labels: Sequence[int] | None = None
) -> list[Shape] | None:
    """A size for each sample, in the proportions of the data: sample i's depends on i, and on its label, alone.

    Sample i takes the shape at the quantile frac(i / golden ratio) of the data's shapes, or where its class is known of
    the shapes of that class: any run of samples has the data's shares nearly exactly, whatever classes they go
    through in turn.

    Args:
        dataset: the training images.
        indices: the samples' numbers.
        labels: one a sample, where they and the data have classes.

    Returns:
        (height, width) each; None where all images have one shape, the model's own.
    """
    bucket = dataset.bucket_of
    if bucket is None:
        return None
    by_label: dict[int, np.ndarray] = {}
    sizes = []
    for place, index in enumerate(indices):
        label = -1 if labels is None or dataset.labels is None else int(labels[place])
        if label not in by_label:
            own = bucket if label < 0 or dataset.labels is None else bucket[dataset.labels == label]
            counts = np.bincount(own if len(own) else bucket, minlength=len(dataset.shapes))
            by_label[label] = counts.cumsum() / counts.sum()
        quantile = (index + 0.5) * GOLDEN % 1.0
        sizes.append(dataset.shapes[int(np.searchsorted(by_label[label], quantile, side="right"))])
    return sizes


def sizes_of_rows(dataset: ImageDataset, rows: Sequence[int]) -> list[Shape] | None:
    """The sizes of some images of a data set; None where all have one."""
    bucket = dataset.bucket_of
    return None if bucket is None else [dataset.shapes[int(bucket[row])] for row in rows]


def compile_for(network: nn.Module, shapes: int) -> None:
    """torch.compile in place; one graph for each of several shapes.

    A graph of its own serves each shape at full speed and costs its compile time once, when the shape first comes up;
    one graph for all would carry symbolic sizes. torch gives up after eight graphs unless told that there are more:
    each shape has one for training, and one without gradients.
    """
    if shapes <= 1:
        network.compile()
        return
    limit = 2 * shapes + 2
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    network.compile(dynamic=False)
