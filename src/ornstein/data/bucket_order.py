"""The order of images of several shapes: one shape a batch, on all ranks at once, reachable at any batch."""

from collections.abc import Iterator, Sequence

import numpy as np

from ornstein.data.buckets import Shape
from ornstein.data.sampling import EndlessBatches
from ornstein.errors import OrnsteinError


class BucketBatches(EndlessBatches):
    """Index batches without end, each of images of one shape, every image met equally often.

    A whole batch is what all ranks read at one step: `world_size * batch_size` images of one shape, of which each rank
    takes its slice, so that steps cost all ranks alike and the ranks together read what one process with the whole
    batch would. Each bucket has an endless stream of its own, as in `EndlessBatches`: a fresh permutation each time
    through, batches running across the seam. So a bucket smaller than a batch repeats its images within one, and
    comes up as rarely: no image is left out, and none is met more often than others.

    In epoch e, that is N images long, a bucket of n images comes up `(e n + n + u) // G - (e n + u) // G` times, G
    being the whole batch and u in [0, G) drawn once from the seed; so its batches keep pace with n / G an epoch to
    within one, and when a rare bucket comes up first is left to chance. The order of shapes within an epoch is a
    permutation from (seed, epoch). Everything is a pure function of the seed and the batch's number: any batch is
    reached by computing one epoch's order and one permutation of one bucket.

    Source: one shape a batch, shapes drawn as often as they have images: NovelAI (2022, "Aspect Ratio Bucketing"),
    whose buckets drop what fills no batch.

    Args:
        buckets: int64 (N,), the bucket of each image.
        shapes: (height, width) of each bucket; a bucket's order depends on its shape and its images alone.
        batch_size, seed, rank, world_size, start_batch: as of `EndlessBatches`.

    Raises:
        OrnsteinError: a number is out of its range.
    """

    def __init__(
        self,
        buckets: np.ndarray,
        shapes: Sequence[Shape],
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
    ) -> None:
        super().__init__(len(buckets), batch_size, seed=seed, rank=rank, world_size=world_size, start_batch=start_batch)
        self.members = [np.flatnonzero(buckets == number) for number in range(len(shapes))]
        self.counts = [len(rows) for rows in self.members]
        self.whole = batch_size * world_size
        # The last words keep apart what draws phases, orders of shapes and orders of a bucket's images.
        self.phases = np.random.default_rng([seed, 0, 0, 3]).integers(self.whole, size=len(shapes)).tolist()
        self.streams = [
            _Stream(count, batch_size, seed=seed, rank=rank, world_size=world_size, shape=shape) if count else None
            for count, shape in zip(self.counts, shapes, strict=True)
        ]
        self._number = -1
        self._shapes = np.empty(0, dtype=np.int64)

    def bucket(self, batch: int) -> int:
        """The bucket of batch number `batch` (from 0), the same on every rank."""
        return self._find(batch)[0]

    def indices(self, batch: int) -> np.ndarray:
        """The images of batch number `batch` (from 0) on this rank: int64 (batch_size,), all of one shape."""
        bucket, turn = self._find(batch)
        stream = self.streams[bucket]
        assert stream is not None
        return self.members[bucket][stream.indices(turn)]

    def _before(self, epoch: int) -> list[int]:
        """How many batches of each bucket stand before an epoch."""
        return [(epoch * count + phase) // self.whole for count, phase in zip(self.counts, self.phases, strict=True)]

    def _find(self, batch: int) -> tuple[int, int]:
        """The bucket of a batch, and which of that bucket's batches it is."""
        epoch = batch * self.whole // self.size
        # The estimate is off by less than one batch a bucket.
        while sum(self._before(epoch)) > batch:
            epoch -= 1
        while sum(self._before(epoch + 1)) <= batch:
            epoch += 1
        before = self._before(epoch)
        if epoch != self._number:
            times = np.subtract(self._before(epoch + 1), before)
            order = np.repeat(np.arange(len(times)), times)
            self._shapes = np.random.default_rng([self.seed, epoch, 0, 4]).permutation(order)
            self._number = epoch
        place = batch - sum(before)
        bucket = int(self._shapes[place])
        return bucket, before[bucket] + int((self._shapes[:place] == bucket).sum())


class _Stream(EndlessBatches):
    """The images of one bucket, whose permutations depend on its shape too."""

    def __init__(self, size: int, batch_size: int, *, seed: int, rank: int, world_size: int, shape: Shape) -> None:
        super().__init__(size, batch_size, seed=seed, rank=rank, world_size=world_size)
        self.shape = shape

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of an epoch: int64 (size,), a pure function of (seed, shape, epoch)."""
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch, *self.shape, 5]).permutation(self.size)
            self._epoch = epoch
        return self._order


class BucketsOnce:
    """Every index once, in batches of one shape each, whose shapes are mixed: the first few stand for all.

    A bucket's images come in order; the order of the batches is the same every time.

    Args:
        buckets: int64 (N,), the bucket of each image.
        batch_size: images a batch; the last one of a bucket may be shorter.
    """

    def __init__(self, buckets: np.ndarray, batch_size: int) -> None:
        if batch_size < 1:
            raise OrnsteinError(f"{len(buckets)} images in batches of {batch_size}: the batch must be at least 1")
        batches = [
            rows[start : start + batch_size]
            for rows in (np.flatnonzero(buckets == number) for number in np.unique(buckets))
            for start in range(0, len(rows), batch_size)
        ]
        self.batches = [batches[place] for place in np.random.default_rng(0).permutation(len(batches))]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The batches, first to last."""
        return iter(self.batches)
