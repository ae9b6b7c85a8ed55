"""The order in which training sees the data: endless, sharded over ranks, and reachable at any batch."""

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from itertools import islice

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


class BalancedBatches(EndlessBatches):
    """Index batches without end in which every class is met equally often, however many images it has.

    The stream is cut into rounds of one image of each class that has images: position p is in round `p // classes`,
    whose order of classes is a pure function of (seed, round); the image of class c in round r is number r of an
    endless stream over that class's images, each pass through them a fresh permutation from (seed, c, pass). So
    between any two positions the classes' counts differ by two at most, every image of a class is met equally often,
    and, as in `EndlessBatches`, any batch of any rank is reached at once.

    Args:
        labels: int64 (N,), at least one.
        batch_size, seed, rank, world_size, start_batch: as of `EndlessBatches`.
    """

    def __init__(
        self,
        labels: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
    ) -> None:
        super().__init__(len(labels), batch_size, seed=seed, rank=rank, world_size=world_size, start_batch=start_batch)
        self.members = _by_class(labels)
        self._passes: dict[int, tuple[int, np.ndarray]] = {}
        self._round: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def indices(self, batch: int) -> np.ndarray:
        """The images of batch number `batch` (from 0) on this rank: int64 (batch_size,)."""
        start = (batch * self.world_size + self.rank) * self.batch_size
        return np.array([self.image(position) for position in range(start, start + self.batch_size)], dtype=np.int64)

    def image(self, position: int) -> int:
        """The image at a position of the stream."""
        turn, place = divmod(position, len(self.members))
        if self._round[0] != turn:
            # The last word keeps apart what draws rounds, passes and the epochs of `EndlessBatches`.
            order = np.random.default_rng([self.seed, turn, 0, 1]).permutation(len(self.members))
            self._round = (turn, order)
        number = int(self._round[1][place])
        members = self.members[number]
        lap, offset = divmod(turn, len(members))
        if self._passes.get(number, (-1,))[0] != lap:
            order = np.random.default_rng([self.seed, lap, number, 2]).permutation(members)
            self._passes[number] = (lap, order)
        return int(self._passes[number][1][offset])


class _Behind:
    """An order of batches without the first so many."""

    def __init__(self, order: Iterable[np.ndarray], skipped: int) -> None:
        self.order, self.skipped = order, skipped

    def __iter__(self) -> Iterator[np.ndarray]:
        return islice(iter(self.order), self.skipped, None)


def behind(order: Iterable[np.ndarray], skipped: int) -> Iterable[np.ndarray]:
    """What follows the first `skipped` batches of an order; of an endless one, reached at once."""
    if isinstance(order, EndlessBatches):
        moved = copy(order)
        moved.start_batch += skipped
        return moved
    return _Behind(order, skipped)


def evenly_spaced(count: int, limit: int) -> np.ndarray:
    """`limit` of `count` rows, evenly spaced: int64 (limit,), ascending."""
    return np.arange(limit, dtype=np.int64) * count // limit


def equally_many(labels: np.ndarray, limit: int, *, class_names: Sequence[str]) -> np.ndarray:
    """`limit` rows with equally many of each class that has any (the first classes one more where it does not
    divide), evenly spaced within each: int64 (limit,), ascending.

    Raises:
        OrnsteinError: a class has too few, or there are more classes than rows to take.
    """
    present, counts = np.unique(labels, return_counts=True)
    if limit < len(present):
        raise OrnsteinError(
            f"data.limit={limit} with data.balanced=true takes equally many of {len(present)} classes: "
            f"set data.limit to {len(present)} or more"
        )
    wanted = np.full(len(present), limit // len(present)) + (np.arange(len(present)) < limit % len(present))
    short = np.flatnonzero(counts < wanted)
    if len(short):
        first = short[0]
        raise OrnsteinError(
            f"data.limit={limit} with data.balanced=true takes {wanted[first]} images a class, and class "
            f"'{class_names[present[first]]}' has {counts[first]}: set data.limit={len(present) * counts.min()} or "
            "less, or data.balanced=false"
        )
    rows = [own[evenly_spaced(len(own), many)] for own, many in zip(_by_class(labels), wanted, strict=True)]
    return np.sort(np.concatenate(rows))


def _by_class(labels: np.ndarray) -> list[np.ndarray]:
    """The rows of each class that has any, ascending."""
    _, starts = np.unique(np.sort(labels), return_index=True)
    return np.split(np.argsort(labels, kind="stable"), starts[1:])


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
