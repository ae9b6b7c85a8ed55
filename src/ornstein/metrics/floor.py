"""The real-vs-real floor: what FID and IS say of images that are real."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureBatch, FeatureExtractor
from ornstein.metrics.figures.frechet import distance
from ornstein.metrics.images import Source, extract
from ornstein.metrics.reference import cache_folder
from ornstein.metrics.statistics import Accumulator

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RealFloor:
    """FID of real images against other real images, and their Inception Score.

    Attributes:
        fid: between two disjoint random sets of ``count`` real images each. Not 0: a FID of few images is biased
            upwards, by about ``c (1/n + 1/m)`` for sets of n and m.
        count: size of each of the two sets.
        inception_score: of the first set (no splits), or None without logits.
    """

    fid: float
    count: int
    inception_score: float | None

    def expected_fid(self, samples: float, reference: float) -> float:
        """What ``samples`` images of a perfect generator would score against ``reference`` real ones.

        Carries :attr:`fid` over by its bias, linear in 1/N (Chong and Forsyth 2020, arXiv 1911.07023): an estimate
        for counts that the data cannot give two disjoint sets of, ``math.inf`` among them.
        """
        return self.fid * (1 / samples + 1 / reference) * self.count / 2

    def to_dict(self) -> dict[str, float | int | None]:
        """The three figures as plain JSON types."""
        return asdict(self)


def real_floor(
    features: FeatureExtractor, dataset: Source, n: int | None = None, *, seed: int = 0, batch_size: int = 256
) -> RealFloor:
    """FID between two disjoint random sets of ``n`` images of ``dataset``, the floor to read any FID against.

    Args:
        features: the extractor that the samples are judged with.
        dataset: the training images (see :data:`ornstein.metrics.images.Source`); only 2 n of a data set or tensor
            are read, in bounded memory. Of an iterable all are, and their features held.
        n: images on each side, at best as many as are generated; None, or more than there are, halves the data.
        seed: of the random halves.

    Raises: ValueError if there are fewer than four images.
    """
    generator = torch.Generator().manual_seed(seed)
    halves = [Accumulator(features, keep=2) for _ in range(2)]
    if isinstance(dataset, Tensor) or hasattr(dataset, "batch"):
        count = _half(len(dataset), n)
        rows = torch.randperm(len(dataset), generator=generator)
        for half, chosen in zip(halves, (rows[:count], rows[count : 2 * count]), strict=True):
            for images in _rows(dataset, chosen, batch_size):
                half.update(images)
    else:
        values, logits = extract(features, dataset, batch_size=batch_size)
        count = _half(len(values), n)
        rows = torch.randperm(len(values), generator=generator)
        for half, chosen in zip(halves, (rows[:count], rows[count : 2 * count]), strict=True):
            half.add(FeatureBatch(values[chosen], None if logits is None else logits[chosen]))
    first, second = (half.own_statistics() for half in halves)
    return RealFloor(fid=distance(first.moments, second.moments), count=count, inception_score=first.inception_score)


def cached_floor(
    features: FeatureExtractor,
    dataset: Source,
    n: int | None = None,
    *,
    seed: int = 0,
    batch_size: int = 256,
    folder: str | Path | None = None,
) -> RealFloor:
    """:func:`real_floor`, kept on disk beside the reference statistics; data without a fingerprint are never kept."""
    content, size = getattr(dataset, "fingerprint", None), getattr(dataset, "image_size", None)
    if content is None or size is None:
        return real_floor(features, dataset, n, seed=seed, batch_size=batch_size)
    key = {
        "data": content, "split": str(getattr(dataset, "split", "all")), "image_size": int(size),
        "channels": getattr(dataset, "channels", None), "extractor": features.name,
        "extractor_fingerprint": features.fingerprint, "count": _half(len(dataset), n), "seed": seed,
        "format": "ornstein.real_floor.1",
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = (cache_folder() if folder is None else Path(folder)) / f"floor-{features.name}-{digest}.json"
    try:
        stored = json.loads(path.read_text())
        return RealFloor(**stored["floor"])
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the cached real-vs-real floor %s is damaged (%s): measuring it again.", path, error)
    floor = real_floor(features, dataset, n, seed=seed, batch_size=batch_size)
    try:
        _write(path, json.dumps({"floor": floor.to_dict(), "source": key}, indent=2) + "\n")
    except OSError as error:
        log.warning("the real-vs-real floor is not cached, %s cannot be written (%s).", path.parent, error)
    return floor


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _half(total: int, n: int | None) -> int:
    if total < 4:
        raise OrnsteinError(f"a real-vs-real floor needs four real images at least, got {total}; look at data.root.")
    return total // 2 if n is None else max(2, min(n, total // 2))


def _rows(dataset: Source, rows: Tensor, batch_size: int) -> Iterator[Tensor]:
    if isinstance(dataset, Tensor):
        yield from (dataset[chunk] for chunk in rows.split(batch_size))
        return
    pieces = dataset.pieces(size=batch_size, rows=rows) if hasattr(dataset, "pieces") else rows.split(batch_size)
    for chunk in pieces:
        yield dataset.batch(chunk)["image"]
