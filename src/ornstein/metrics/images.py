"""Images in, features out: the many forms in which images reach the metrics, in batches."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureExtractor

Source = Any
"""uint8 ``(N, C, H, W)``; or a data set with ``batch(indices)`` and a length; or an iterable of uint8 batches or of
batch dicts with ``image`` (a DataLoader, say)."""


def batches(source: Source, *, batch_size: int = 256, limit: int | None = None) -> Iterator[Tensor]:
    """uint8 batches ``(B, C, H, W)`` of at most ``batch_size`` (an iterable's own batches are kept as they come).

    ``limit`` ends the walk after that many images, the last batch cut to fit.

    Raises: ValueError if ``source`` is none of the forms of :data:`Source`.
    """
    left = limit if limit is not None else None
    for _, images in _some(source, batch_size, limit):
        if left is not None:
            images = images[:left]
            left -= len(images)
        if len(images):
            yield images
        if left == 0:
            return


def _some(source: Source, batch_size: int, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    if limit is None or getattr(source, "bucket_of", None) is None or limit >= len(source):
        yield from numbered_batches(source, batch_size=batch_size)
        return
    # The first of a data set of several shapes would all have one: these have them in the data's proportions.
    for rows in source.pieces(size=batch_size, rows=torch.arange(limit) * len(source) // limit):
        yield torch.as_tensor(rows), source.batch(rows)["image"]


def numbered_batches(source: Source, *, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """The images' numbers in ``source``, int64 ``(B,)``, and uint8 batches ``(B, C, H, W)``; see :func:`batches`."""
    if not isinstance(source, Tensor) and hasattr(source, "batch") and hasattr(source, "__len__"):
        # A data set of several shapes is walked shape by shape: a batch has one.
        for rows in source.pieces(size=batch_size) if hasattr(source, "pieces") else _ranges(source, batch_size):
            index = torch.as_tensor(rows)
            yield index, source.batch(index)["image"]
        return
    count = 0
    for images in _walk(source, batch_size):
        yield torch.arange(count, count + len(images)), images
        count += len(images)


def _ranges(source: Source, size: int) -> Iterator[Tensor]:
    return iter(torch.arange(len(source)).split(size))


def _walk(source: Source, batch_size: int) -> Iterator[Tensor]:
    if isinstance(source, Tensor):
        yield from source.split(batch_size)
    elif isinstance(source, Iterable):
        for item in source:
            yield item["image"] if isinstance(item, Mapping) else item
    else:
        raise OrnsteinError(
            f"images come as a uint8 tensor, a data set, or an iterable of batches, not as {type(source).__name__}."
        )


@torch.no_grad()
def extract(
    features: FeatureExtractor, source: Source, *, batch_size: int = 256, limit: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Features ``(N, D)`` and logits ``(N, K)`` or None of all images, float32 on the CPU.

    Images go to the extractor's device batch by batch. Raises ValueError if there are no images.
    """
    device = next(features.parameters()).device
    found: list[Tensor] = []
    heads: list[Tensor] = []
    for images in batches(source, batch_size=batch_size, limit=limit):
        values, logits = features.features_and_logits(images.to(device, non_blocking=True))
        found.append(values.float().cpu())
        if logits is not None:
            heads.append(logits.float().cpu())
    if not found:
        raise OrnsteinError("there are no images to take features of; the data set or the iterable is empty.")
    return torch.cat(found), torch.cat(heads) if heads else None
