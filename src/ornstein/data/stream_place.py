"""Where a stream is: noted behind every batch, kept in checkpoints, and put back."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ornstein.data.bad import Bad, plainly
from ornstein.data.datamodule import _as_it_is
from ornstein.data.streaming import Stream
from ornstein.data.streaming_tar import needs_extra
from ornstein.data.workers import surviving
from ornstein.errors import OrnsteinError

# Lightning fetches one batch ahead of the one that is trained on.
AHEAD = 16


@dataclass(frozen=True)
class Place:
    """What a checkpoint knows of a stream.

    Attributes:
        batches: micro-batches trained on.
        shape: what the place depends on: devices, `num_workers`, batch size, shuffle buffer, number of shards.
        ranks: the state of each device's `StatefulDataLoader`.
    """

    batches: int
    shape: dict[str, int]
    ranks: list[Any]

    def misfit(self, shape: dict[str, int], *, exact: bool, batches: int) -> bool:
        """Whether the place means nothing to a stream of this shape, which may begin a new epoch instead.

        Raises:
            OrnsteinError: it does not, and the stream has to go on exactly.
        """
        others = {key: value for key, value in self.shape.items() if shape.get(key) != value}
        if batches != self.batches:
            raise OrnsteinError(f"the checkpoint holds the stream's place after {self.batches} batches, not {batches}")
        if others and exact:
            told = {"world_size": "trainer.devices times trainer.num_nodes", "shards": "the number of shards"}
            listed = ", ".join(
                f"{told.get(key, f'data.{key}')} was {value} and is {shape.get(key)}" for key, value in others.items()
            )
            raise OrnsteinError(
                f"the stream cannot go on where it stopped: {listed}; resume with what it was, or with "
                "data.exact_resume=false, which begins a new pass through the shards"
            )
        return bool(others)

    @property
    def next_epoch(self) -> int:
        """The first epoch that no process has begun."""
        return max((int(epoch) for rank in self.ranks for epoch in _found(rank, "epoch")), default=-1) + 1


class StreamedBatches:
    """What Lightning iterates: a stream's batches, the place behind each noted.

    Lightning is a batch ahead of training, so a checkpoint asks for the place behind the batches that were trained on.

    Args:
        stream: of this rank.
        num_workers: processes that read it.
        start_batch: how many batches came before.
        place: the loader's state there; None at the beginning of a stream.
        shape: what the place depends on, for checkpoints.

    Raises:
        OrnsteinError: torchdata is not installed; while iterating, more samples were bad than may be.
    """

    def __init__(
        self, stream: Stream, *, num_workers: int, start_batch: int, place: Any, shape: dict[str, int]
    ) -> None:
        try:
            import torchdata.stateful_dataloader  # noqa: F401
        except ImportError as error:
            raise needs_extra(error) from error
        self.loader = _loader(stream, num_workers, place)
        self.stream, self.num_workers = stream, num_workers
        self.start_batch, self.shape = start_batch, shape
        self._places: deque[tuple[int, Any]] = deque([(start_batch, place)], maxlen=AHEAD)
        self._bad = Bad(stream.max_bad, where="the training stream")
        for known in _found(place, "bad"):
            for name, reason in known.items():
                self._bad.add(name, reason)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches from `start_batch` on, for ever."""
        batches = plainly(surviving(lambda: iter(self.loader), self._again))
        for number, batch in enumerate(batches, start=self.start_batch + 1):
            self._places.append((number, self.loader.state_dict()))
            for name, reason in batch.pop("bad"):
                self._bad.add(name, reason)
                warnings.warn(
                    f"{name} is left out of the training stream, {self._bad.count} of data.max_bad={self._bad.limit}: "
                    f"{reason}",
                    stacklevel=2,
                )
                if self._bad.count > self._bad.limit:
                    self._bad.settle()
            yield batch

    def _again(self, given: int) -> Iterator[dict[str, Any]]:
        """The batches behind the last one that was given, by new workers."""
        self.loader = _loader(self.stream, self.num_workers, self.behind(self.start_batch + given))
        return iter(self.loader)

    def behind(self, batches: int) -> Any:
        """The loader's state behind that many batches; None at the beginning of a stream.

        Raises:
            OrnsteinError: it is so long ago that it has been forgotten.
        """
        for number, place in self._places:
            if number == batches:
                return place
        raise OrnsteinError(f"the stream's place after {batches} batches is not known any more: report this")


def _loader(stream: Stream, num_workers: int, place: Any) -> Any:
    """A ``StatefulDataLoader`` at a place of its own, the stream's beginning where that is None."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata's own
        loader = StatefulDataLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            # Its own stream: making an iterator must not move the global one that resuming restores.
            generator=torch.Generator().manual_seed(stream.seed),
            snapshot_every_n_steps=1,
        )
    if place is not None:
        loader.load_state_dict(place)
    return loader


def gathered(own: Any) -> list[Any]:
    """What each device has, on every device; all have to ask at once."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    return every


def _found(nested: Any, key: str) -> Iterator[Any]:
    """Every value of that key in nested dicts and lists."""
    for value in nested.values() if isinstance(nested, dict) else nested if isinstance(nested, list) else ():
        yield from _found(value, key)
    if isinstance(nested, dict) and key in nested:
        yield nested[key]
