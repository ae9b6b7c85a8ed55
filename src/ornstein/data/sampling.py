"""The order in which training sees the data: endless, sharded over ranks, and reachable at any batch."""

from collections.abc import Iterator

import numpy as np

from ornstein.errors import OrnsteinError


class EndlessBatches:
    """Index batches without end: each epoch a fresh permutation, batches running across the seam.

    Position p of the stream is image `permutation(p // size)[p % size]`, where the permutation is a pure
    function of (seed, epoch). Batch n of rank r holds positions `(n * world_size + r) * batch_size` and the
    `batch_size - 1` that follow, so the ranks together read what one process with the whole batch would, and
    the batch may be larger than the data set. Any batch is reached by computing one permutation.

    Args:
        size: number of images, at least 1.
        batch_size: images per rank and micro-batch, at least 1.
        seed: of the order, at least 0.
        rank, world_size: which shard of how many.
        start_batch: the batch that iteration begins with: the number of micro-batches trained so far.

    Raises:
        OrnsteinError: a number is out of its range.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
    ) -> None:
        if size < 1 or batch_size < 1:
            raise OrnsteinError(f"{size} images in batches of {batch_size}: both must be at least 1")
        if not 0 <= rank < world_size:
            raise OrnsteinError(f"rank {rank} is not one of {world_size} ranks")
        if seed < 0 or start_batch < 0:
            raise OrnsteinError(f"seed {seed} and start_batch {start_batch} must not be negative")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_batch = start_batch
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of an epoch: int64 (size,), a pure function of (seed, epoch)."""
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            self._epoch = epoch
        return self._order

    def indices(self, batch: int) -> np.ndarray:
        """The images of batch number `batch` (from 0) on this rank: int64 (batch_size,)."""
        position = (batch * self.world_size + self.rank) * self.batch_size
        end = position + self.batch_size
        pieces = []
        while position < end:
            epoch, offset = divmod(position, self.size)
            count = min(end - position, self.size - offset)
            pieces.append(self.permutation(epoch)[offset : offset + count])
            position += count
        return np.concatenate(pieces)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Batches from `start_batch` on, for ever."""
        batch = self.start_batch
        while True:
            yield self.indices(batch)
            batch += 1


class OrderedBatches:
    """Every index once, in order: int64 arrays of `batch_size`, the last one shorter."""

    def __init__(self, size: int, batch_size: int) -> None:
        if size < 0 or batch_size < 1:
            raise OrnsteinError(f"{size} images in batches of {batch_size}: the batch must be at least 1")
        self.size = size
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The batches, first to last."""
        for start in range(0, self.size, self.batch_size):
            yield np.arange(start, min(start + self.batch_size, self.size))
