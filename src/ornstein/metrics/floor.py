"""The real-vs-real floor: what FID and IS say of images that are real."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureExtractor
from ornstein.metrics.frechet import frechet_distance
from ornstein.metrics.images import Source, extract
from ornstein.metrics.reference import inception_score


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

    def expected_fid(self, samples: int, reference: int) -> float:
        """What ``samples`` images of a perfect generator would score against ``reference`` real ones.

        Carries :attr:`fid` over by its bias, linear in 1/N (Chong and Forsyth 2020, arXiv 1911.07023): an estimate
        for counts that the data cannot give two disjoint sets of.
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
            are read.
        n: images on each side, at best as many as are generated; None, or more than there are, halves the data.
        seed: of the random halves.

    Raises: ValueError if there are fewer than four images.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(dataset, Tensor) or hasattr(dataset, "batch"):
        count = _half(len(dataset), n)
        rows = torch.randperm(len(dataset), generator=generator)[: 2 * count]
        values, logits = extract(features, _rows(dataset, rows, batch_size), batch_size=batch_size)
    else:
        values, logits = extract(features, dataset, batch_size=batch_size)
        count = _half(len(values), n)
        rows = torch.randperm(len(values), generator=generator)[: 2 * count]
        values, logits = values[rows], None if logits is None else logits[rows]
    first, second = values[:count].double(), values[count:].double()
    fid = frechet_distance(first.mean(0), first.T.cov(), mean2=second.mean(0), cov2=second.T.cov())
    return RealFloor(fid=fid, count=count, inception_score=None if logits is None else inception_score(logits[:count]))


def _half(total: int, n: int | None) -> int:
    if total < 4:
        raise OrnsteinError(f"a real-vs-real floor needs four real images at least, got {total}; look at data.root.")
    return total // 2 if n is None else max(2, min(n, total // 2))


def _rows(dataset: Source, rows: Tensor, batch_size: int) -> Iterator[Tensor]:
    for chunk in rows.split(batch_size):
        yield dataset[chunk] if isinstance(dataset, Tensor) else dataset.batch(chunk)["image"]
