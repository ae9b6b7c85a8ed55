"""Streams of images: shards read front to back, shared out over processes, shuffled, and stopped anywhere.

What is promised: which images a process meets, and in which order, is a pure function of (shards, seed, number of
devices, rank, `num_workers`, batch size, shuffle buffer), and a stream that is put back to where its state says goes
on to the bit. Unlike data that can be indexed, another `num_workers` is another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ornstein.data.bad import Bad, BadImage
from ornstein.data.images import Crop, load_image
from ornstein.data.splits import content_key
from ornstein.errors import OrnsteinError

# A process that meets no image in so many passes through its shards has none.
EMPTY_EPOCHS = 64
AHEAD = 256
SHARD_BITS = 32


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as it lies in its shard, undecoded.

    Attributes:
        shard, number: the shard's number and the sample's number within it.
        name: shard and key, for messages.
        image: the file's bytes.
        label, caption: as they lie there; None where there are none or nobody asked.
        fault: what is wrong with the sample, if that was seen already.
    """

    shard: int
    number: int
    name: str
    image: bytes = b""
    label: Any = None
    caption: str | None = None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """A sample ready for a batch: uint8 (C, H, W), its class, its caption, the hash of its file's content."""

    image: np.ndarray
    label: int | None
    caption: str | None
    key: bytes


@dataclass(frozen=True)
class Decode:
    """From a record to what a batch holds.

    Args:
        size, channels, crop: as `load_image` takes them.
        classes: names of the classes; None leaves labels out. A label is one of the names or its number.
        captions: whether the records' captions are kept.
        template: captions from the names of the classes instead, `{}` being their place.
        held_out: content keys of images that are not to be met: those of other splits.
        refuse: whether to meet one is an error.
    """

    size: int
    channels: int
    crop: Crop
    classes: tuple[str, ...] | None
    captions: bool
    template: str | None = None
    held_out: frozenset[bytes] = frozenset()
    refuse: bool = False

    def __call__(self, record: Record) -> Decoded | None:
        """The sample; None for an image of another split. OrnsteinError: its image or its label cannot be used."""
        key = content_key(record.image)
        if key in self.held_out:
            if self.refuse:
                raise OrnsteinError("it is in a held-out split too: remove it there, or set data.overlap=drop")
            return None
        label = None if self.classes is None else self._class(record.label)
        caption = record.caption if self.captions else None
        if self.template is not None and label is not None and self.classes is not None:
            caption = self.template.replace("{}", self.classes[label])
        image = load_image(record.image, size=self.size, channels=self.channels, crop=self.crop, name=record.name)
        return Decoded(image, label, caption, key)

    def _class(self, label: Any) -> int:
        assert self.classes is not None
        text = label_text(label)
        if text in self.classes:
            return self.classes.index(text)
        if text is not None and text.isdecimal() and int(text) < len(self.classes):
            return int(text)
        raise OrnsteinError(f"its class {text!r} is none of the {len(self.classes)}: look at data.num_classes")


def label_text(label: Any) -> str | None:
    """A label as text, however it is written: "3", 3 and 3.0 are one."""
    if label is None or isinstance(label, str):
        return label
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


class Source(Protocol):
    """Shards of samples, each readable from its start or from where a reader of before stood."""

    @property
    def shards(self) -> Sequence[str]:
        """Their names, for messages."""

    def read(self, shard: int, at: Any = None) -> Iterator[tuple[Record, Any]]:
        """The samples of a shard in order, each with the position behind it (plain JSON types), from `at` on."""


def units_of(shards: int, lanes: int, *, seed: int, epoch: int, lane: int) -> list[tuple[int, int, int]]:
    """What a lane, one worker process of one device, reads in an epoch: (shard, part, parts), in order.

    Of the shards in an order drawn from (seed, epoch) every lane takes each `lanes`-th. Where there are fewer shards
    than lanes, a shard has parts: its samples number `part`, `part + parts`, ... So the lanes together read every
    sample of an epoch exactly once. Shares differ by one unit at most; lanes do not wait for each other at the end of
    an epoch.
    """
    parts = -(-lanes // shards)
    order = np.random.default_rng([seed, epoch]).permutation(shards * parts)
    return [(int(unit) % shards, int(unit) // shards, parts) for unit in order[lane::lanes]]


@dataclass(frozen=True)
class Stream(IterableDataset[dict[str, Any]]):
    """Endless batches of a source, shared out over devices and worker processes.

    Iterate it through torchdata's `StatefulDataLoader` with `batch_size=None`: each batch is a dict like
    `ImageDataset.batch`'s, with `index` = shard number * 2**32 + number within the shard and with `bad`, the names and
    reasons of samples that were left out on the way to it.

    Args:
        source: the shards.
        decode: a sample from its record; None for one to leave out silently. OrnsteinError: the sample is bad.
        batch_size: images a batch.
        seed: of the order of the shards and of the shuffle.
        buffer: samples that are read, then served in random order, before the next are read; 1 keeps the order.
        max_bad: bad samples that may be left out, a process.
        stops: the samples that count of each shard, from its start; None for all.
        rank, world_size: which device of how many.
        first_epoch: the epoch to begin with.
    """

    source: Source
    decode: Callable[[Record], Decoded | None]
    batch_size: int
    seed: int
    buffer: int = 1
    max_bad: int = 0
    stops: Sequence[int] | None = None
    rank: int = 0
    world_size: int = 1
    first_epoch: int = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches of this worker process, from the start."""
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return Lane(self, self.rank * count + number, self.world_size * count)


@dataclass
class Lane(Iterator[dict[str, Any]]):
    """What one process reads of a stream. Its state is a place in a shard and numbers: no images, no generator.

    Samples are read in blocks of `buffer`, each block's order drawn from (seed, lane, block). The state says where the
    running block began and how many of its samples were served; putting it back reads that block again.
    """

    stream: Stream
    lane: int
    lanes: int
    bad: dict[str, str] = field(default_factory=dict)
    block: int = 0
    taken: int = 0

    def __post_init__(self) -> None:
        self.start: tuple[int, int, Any] = (self.stream.first_epoch, 0, None)
        self._end = self.start
        self._met = self.start[0]  # the epoch of the last good sample
        self._records: list[Record] | None = None
        self._order = np.empty(0, dtype=np.int64)
        self._open: tuple[Any, Iterator[tuple[Record, Any]]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The place, in plain JSON types."""
        epoch, unit, at = self.start
        place = {"epoch": epoch, "unit": unit, "at": at, "block": self.block, "taken": self.taken}
        return {**place, "bad": dict(self.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the place that `state_dict` told."""
        self.start = (int(state["epoch"]), int(state["unit"]), state["at"])
        self.block, self.taken = int(state["block"]), int(state["taken"])
        self.bad = dict(state["bad"])
        self._met = self.start[0]
        self._records, self._open = None, None

    def __next__(self) -> dict[str, Any]:
        """The next batch. OrnsteinError: too many samples are bad, or a shard cannot be had."""
        samples: list[Decoded] = []
        index: list[int] = []
        news: list[tuple[str, str]] = []
        while len(samples) < self.stream.batch_size:
            record = self._next()
            try:
                if record.fault is not None:
                    raise OrnsteinError(record.fault)
                sample = self.stream.decode(record)
            except OrnsteinError as error:
                if record.name not in self.bad:
                    reason = self.bad[record.name] = reason_of(error)
                    news.append((record.name, reason))
                    refuse_bad(self.bad, self.stream.max_bad)
                continue
            if sample is not None:
                samples.append(sample)
                index.append((record.shard << SHARD_BITS) + record.number)
                self._met = self.start[0]
        return {**collated(samples), "index": torch.tensor(index, dtype=torch.int64), "bad": news}

    def _next(self) -> Record:
        """The next record in shuffled order."""
        while self._records is None or self.taken >= len(self._records):
            if self._records is not None:
                self.start, self.block, self.taken = self._end, self.block + 1, 0
            self._fill()
            if self.start[0] - self._met > EMPTY_EPOCHS:
                raise OrnsteinError(
                    f"the {len(self.stream.source.shards)} shard(s) of the stream, {self.stream.source.shards[0]} the "
                    "first, hold no image that can be used: look at data.urls and data.image_column"
                )
        record = self._records[self._order[self.taken]]
        self.taken += 1
        return record

    def _fill(self) -> None:
        """Reads the block that begins at `start`; it ends with the buffer's size or with the epoch."""
        epoch, unit, at = self.start
        units = self._units(epoch)
        records: list[Record] = []
        while unit < len(units) and len(records) < self.stream.buffer:
            shard, part, parts = units[unit]
            stop = None if self.stream.stops is None else self.stream.stops[shard]
            for record, behind in self._reader(epoch, unit, shard, at):
                if stop is not None and record.number >= stop:
                    unit, at = unit + 1, None
                    break
                at = behind
                if record.number % parts == part:
                    records.append(record)
                    if len(records) == self.stream.buffer:
                        break
            else:
                unit, at = unit + 1, None
        self._end = (epoch, unit, at) if unit < len(units) else (epoch + 1, 0, None)
        self._records = records
        self._order = np.random.default_rng([self.stream.seed, self.lane, self.block, 1]).permutation(len(records))
        if self.stream.buffer == 1:
            self._order = np.arange(len(records))

    def _units(self, epoch: int) -> list[tuple[int, int, int]]:
        shards = len(self.stream.source.shards)
        return units_of(shards, self.lanes, seed=self.stream.seed, epoch=epoch, lane=self.lane)

    def _reader(self, epoch: int, unit: int, shard: int, at: Any) -> Iterator[tuple[Record, Any]]:
        """The samples of a shard from a place on: those of the reader that stands there already, if there is one."""
        key = (epoch, unit, at)
        reader = (
            self._open[1] if self._open is not None and self._open[0] == key else self.stream.source.read(shard, at)
        )
        for record, behind in reader:
            self._open = ((epoch, unit, behind), reader)
            yield record, behind
        self._open = None


def collated(samples: Sequence[Decoded]) -> dict[str, Any]:
    """Samples as one batch: `image` uint8 (B, C, H, W), `label` int64 (B,) and `caption` where they have such."""
    batch: dict[str, Any] = {"image": torch.from_numpy(np.stack([sample.image for sample in samples]))}
    if samples[0].label is not None:
        batch["label"] = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    if samples[0].caption is not None:
        batch["caption"] = [sample.caption for sample in samples]
    return batch


def reason_of(error: OrnsteinError) -> str:
    """Why a sample is bad, without its name."""
    return error.reason if isinstance(error, BadImage) else str(error)


def refuse_bad(found: dict[str, str], limit: int) -> None:
    """Stops with the sentence of `Bad` where more samples are bad than may be left out."""
    if len(found) <= limit:
        return
    bad = Bad(limit, where="the stream")
    for name, reason in found.items():
        bad.add(name, reason)
    bad.settle()


def in_order(
    source: Source, decode: Callable[[Record], Decoded | None], *, bad: Bad, stops: Sequence[int] | None = None
) -> Iterator[tuple[Record, Decoded]]:
    """Every sample once, shard after shard, decoded here; bad ones are noted and left out.

    Raises:
        OrnsteinError: a shard cannot be had, or more samples are bad than may be.
    """

    def one(record: Record) -> Decoded | OrnsteinError | None:
        try:
            if record.fault is not None:
                raise OrnsteinError(record.fault)
            return decode(record)
        except OrnsteinError as error:
            return error

    records = (
        record
        for shard in range(len(source.shards))
        for record, _ in source.read(shard)
        if stops is None or record.number < stops[shard]
    )
    # Pillow decodes and resizes outside the interpreter's lock, so threads do.
    with ThreadPoolExecutor() as pool:
        while block := list(islice(records, AHEAD)):
            for record, sample in zip(block, pool.map(one, block), strict=True):
                if isinstance(sample, Decoded):
                    yield record, sample
                elif sample is not None:
                    bad.add(record.name, reason_of(sample))
                    if bad.count > bad.limit:
                        bad.settle()
