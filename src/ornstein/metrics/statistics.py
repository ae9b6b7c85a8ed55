"""What is kept of a set of images in a feature space: enough for every figure, bounded whatever their number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureBatch, FeatureExtractor, check_images
from ornstein.metrics.subset import Subset

KEPT_FEATURES = 10_000
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean, float64 ``(D,)``, and unbiased covariance, float64 ``(D, D)``."""

    mean: Tensor
    cov: Tensor


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the Inception Score needs of the classes' probabilities p, for each of S splits (image i is in i mod S).

    Attributes:
        total: float64 ``(S, K)``, sum of p.
        entropy: float64 ``(S,)``, sum of p ln p.
        count: float64 ``(S,)``, how many images.
    """

    total: Tensor
    entropy: Tensor
    count: Tensor


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A set of images in one feature space.

    Attributes:
        count: how many images; 0 where published moments do not say.
        moments: of all images' features.
        features: float32 ``(M, D)``, those of a uniform subset of the images, in order of image number; all of them
            where there are no more than the accumulator keeps; none (M = 0) where only moments are published.
        index: int64 ``(M,)``, the subset's image numbers.
        predictions: of all images, or None without logits.
        spatial: moments of all images' spatial features, or None.
        logits: float32 ``(M, K)`` of the subset, or None where they are not kept.
        spatial_features: float32 ``(M, S)`` of the subset, or None where they are not kept.
        source: what was measured, for the report.
    """

    count: int
    moments: Moments
    features: Tensor
    index: Tensor
    predictions: Predictions | None = None
    spatial: Moments | None = None
    logits: Tensor | None = None
    spatial_features: Tensor | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """Mean feature, float64 ``(D,)``."""
        return self.moments.mean

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance of the features, float64 ``(D, D)``."""
        return self.moments.cov

    @property
    def inception_score(self) -> float | None:
        """Of all images at once, without splits; None without logits."""
        from ornstein.metrics.figures.inception_score import unsplit_score

        return None if self.predictions is None else unsplit_score(self.predictions)

    def on(self, device: torch.device | str) -> Statistics:
        """The same with the kept rows on ``device``; sums stay on the CPU."""
        return replace(
            self,
            features=self.features.to(device),
            logits=None if self.logits is None else self.logits.to(device),
            spatial_features=None if self.spatial_features is None else self.spatial_features.to(device),
        )


def moments_of(total: Tensor, outer: Tensor, *, count: int) -> Moments:
    """Mean and unbiased covariance from float64 sums of ``count`` >= 2 vectors ``(D,)`` and outer products ``(D, D)``.

    Raises: OrnsteinError for fewer than two.
    """
    if count < 2:
        raise OrnsteinError(f"a covariance needs two images at least, got {count}; raise metrics.num_samples.")
    mean = total / count
    return Moments(mean=mean, cov=(outer - count * torch.outer(mean, mean)) / (count - 1))


def world_size() -> int:
    """How many processes score together."""
    return torch.distributed.get_world_size() if _distributed() else 1


def rank() -> int:
    """This process's number among them."""
    return torch.distributed.get_rank() if _distributed() else 0


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _Together:
    """Joins what the processes hold, on the CPU of each of them; ``alone``, or of one process, it is its own."""

    def __init__(self, *, alone: bool = False) -> None:
        self.alone = alone or world_size() == 1
        self._place = torch.device("cpu")
        if not self.alone and torch.distributed.get_backend() == "nccl":
            self._place = torch.device("cuda")

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.alone:
            return value.detach().cpu().clone()
        total = value.detach().to(self._place, copy=True)
        torch.distributed.all_reduce(total)
        return total.cpu()

    def rows(self, value: Tensor) -> Tensor:
        """The rows of all processes, in order of rank; they may differ in number."""
        from torchmetrics.utilities.distributed import gather_all_tensors

        parts = [part.cpu() for part in gather_all_tensors(value.contiguous().to(self._place))]
        return torch.cat([part for part in parts if len(part)] or parts[:1])


def summed(value: Tensor) -> Tensor:
    """The sum over all processes, on the CPU of each of them (collective)."""
    return _Together().sum(value)


def gathered(value: Tensor) -> Tensor:
    """The rows of all processes, in order of rank, on the CPU of each of them (collective)."""
    together = _Together()
    return value.cpu() if together.alone else together.rows(value)


def from_all(value: Found) -> list[Found]:
    """What each process holds, in order of rank, on all of them (collective): for small things that are no tensors."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def from_first(compute: Callable[[], Found]) -> Found:
    """What ``compute`` gives on the first process, on all of them (collective): the others do not work it out.

    Raises: on all of them the OrnsteinError that the first one met.
    """
    if world_size() == 1:
        return compute()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = compute()
        except OrnsteinError as error:
            told[1] = str(error)
    torch.distributed.broadcast_object_list(told)
    if told[1] is not None:
        raise OrnsteinError(told[1])
    found: Found = told[0]
    return found


class _Sums:
    """Float64 sums of vectors and of their outer products."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        wide = values.to(self.total.device, torch.float64)
        self.total += wide.sum(0)
        self.outer.addmm_(wide.T, wide)

    def moments(self, count: int, together: _Together) -> Moments:
        return moments_of(together.sum(self.total), together.sum(self.outer), count=count)

    def to(self, device: torch.device) -> None:
        self.total, self.outer = self.total.to(device), self.outer.to(device)


class _PredictionSums:
    def __init__(self, classes: int, splits: int, device: torch.device) -> None:
        self.total = torch.zeros(splits, classes, dtype=torch.float64, device=device)
        self.entropy = torch.zeros(splits, dtype=torch.float64, device=device)
        self.count = torch.zeros(splits, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, index: Tensor) -> None:
        # In float64: float32 probabilities of a sure classifier underflow, and 0 times log 0 is not a number.
        logp = logits.to(self.total.device, torch.float64).log_softmax(dim=1)
        p = logp.exp()
        split = (index % len(self.total)).to(self.total.device)
        self.total.index_add_(0, split, p)
        self.entropy.index_add_(0, split, (p * logp).sum(1))
        self.count.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))

    def predictions(self, together: _Together) -> Predictions:
        total, entropy, count = (together.sum(value) for value in (self.total, self.entropy, self.count))
        return Predictions(total=total, entropy=entropy, count=count)

    def to(self, device: torch.device) -> None:
        self.total, self.entropy, self.count = (value.to(device) for value in (self.total, self.entropy, self.count))


class Accumulator:
    """Takes in images batch by batch and keeps their :class:`Statistics`; memory does not grow with their number.

    Sums are float64, and the kept subset is chosen by image number: neither the batch size, nor the order, nor the
    number of processes matters beyond the rounding of the extractor itself.

    Args:
        features: the feature space.
        keep: how many images' features are kept for the figures that compare images one by one.
        splits: of the Inception Score.
        spatial: also take spatial features, where the space has them.
        rows: also keep the subset's logits and spatial features, for the intervals of the figures made of them.
        seed: of the subset.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        *,
        keep: int = KEPT_FEATURES,
        splits: int = 1,
        spatial: bool = False,
        rows: bool = False,
        seed: int = 0,
    ) -> None:
        self.features, self.keep, self.splits, self.seed = features, keep, splits, seed
        self._wants_spatial = spatial and features.num_spatial is not None
        self._rows = rows
        self.reset()

    @property
    def device(self) -> torch.device:
        """Where the extractor is."""
        parameter = next(self.features.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def to(self, device: torch.device | str) -> None:
        """Moves the extractor, and the sums with it (these stay on the CPU where a device has no float64)."""
        self.features.to(device)
        for sums in (self._sums, self._spatial, self._predictions):
            if sums is not None:
                sums.to(self._sums_device())

    def _sums_device(self) -> torch.device:
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def reset(self) -> None:
        """Forget all images."""
        device = self._sums_device()
        features = self.features
        self._count = 0
        self._sums = _Sums(features.num_features, device)
        self._spatial = _Sums(features.num_spatial, device) if self._wants_spatial and features.num_spatial else None
        self._predictions = (
            None if features.num_logits is None else _PredictionSums(features.num_logits, self.splits, device)
        )
        widths = {"features": features.num_features}
        if self._rows and features.num_logits is not None:
            widths["logits"] = features.num_logits
        if self._rows and self._spatial is not None and features.num_spatial is not None:
            widths["spatial"] = features.num_spatial
        self._subset = Subset(self.keep, widths, seed=self.seed)

    @torch.no_grad()
    def update(self, images: Tensor, index: Tensor | None = None) -> FeatureBatch:
        """Takes in uint8 images ``(B, 1 or 3, H, W)`` and returns what the extractor says of them.

        Args:
            index: int64 ``(B,)``, the images' numbers; None counts on (each process a residue class of its own).

        Raises: OrnsteinError if the images are not such, or their features not finite.
        """
        check_images(images)
        given = images.to(self.device, non_blocking=True)
        batch = (
            self.features.all_features(given)
            if self._spatial is not None
            else FeatureBatch(*self.features.features_and_logits(given))
        )
        self.add(batch, index)
        return batch

    def add(self, batch: FeatureBatch, index: Tensor | None = None) -> None:
        """Takes in what the extractor said of a batch of images; see :meth:`update`."""
        length = len(batch.features)
        if not batch.features.isfinite().all():
            raise OrnsteinError(f"the {self.features.name} features of a batch are not finite; look at its images.")
        if index is None:
            index = (torch.arange(length) + self._count) * world_size() + rank()
        index = index.to("cpu", torch.int64)
        if len(index) != length:
            raise OrnsteinError(f"{length} images came with {len(index)} numbers; give one for each image.")
        self._count += length
        self._sums.add(batch.features)
        rows = {"features": batch.features}
        if batch.logits is not None and self._predictions is not None:
            self._predictions.add(batch.logits, index)
            rows["logits"] = batch.logits
        if batch.spatial is not None and self._spatial is not None:
            self._spatial.add(batch.spatial)
            rows["spatial"] = batch.spatial
        self._subset.add(index, rows)

    def count(self) -> int:
        """How many images have come in, over all processes (collective)."""
        return int(_Together().sum(torch.tensor(self._count)))

    def statistics(self, source: Mapping[str, Any] | None = None) -> Statistics:
        """The statistics of all images so far; under torch.distributed every process must call this and gets them.

        Raises: OrnsteinError for fewer than two images.
        """
        return self._statistics(source, _Together())

    def own_statistics(self, source: Mapping[str, Any] | None = None) -> Statistics:
        """The statistics of the images that this process has seen, whatever others there are."""
        return self._statistics(source, _Together(alone=True))

    def _statistics(self, source: Mapping[str, Any] | None, together: _Together) -> Statistics:
        count = int(together.sum(torch.tensor(self._count)))
        moments = self._sums.moments(count, together)
        kept = self._subset.rows(None if together.alone else together.rows)
        return Statistics(
            count=count,
            moments=moments,
            features=kept["features"],
            index=kept["index"],
            predictions=None if self._predictions is None else self._predictions.predictions(together),
            spatial=None if self._spatial is None else self._spatial.moments(count, together),
            logits=kept.get("logits"),
            spatial_features=kept.get("spatial"),
            source=source or {},
        )
