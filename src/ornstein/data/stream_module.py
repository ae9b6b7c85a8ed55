"""Serving a stream to Lightning: endless batches whose place is state, and a bounded part of it as data sets."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, Protocol

import lightning
import torch
from torch.utils.data import DataLoader

from ornstein.data.bad import Bad
from ornstein.data.base import KEY_BYTES, SPLITS, ImageDataset, NoSplit, Split
from ornstein.data.captions import check_template
from ornstein.data.datamodule import SIGMA_IMAGES, SIGMA_TOLERANCE, Batches, _as_it_is
from ornstein.data.describe import measure_sigma_data
from ornstein.data.images import check_channels, check_size, checked_crop
from ornstein.data.options import check_options
from ornstein.data.sampling import OrderedBatches
from ornstein.data.stream_place import Place, StreamedBatches, gathered
from ornstein.data.streaming import Decode, Source, Stream, collated, in_order
from ornstein.data.streaming_view import first_images
from ornstein.errors import OrnsteinError

PREPARE = "python -m ornstein.cli.prepare"


class ShardSet(Protocol):
    """The shards of one split, and what is known of them."""

    @property
    def name(self) -> str:
        """What messages call the data set."""

    @property
    def source(self) -> Source:
        """The shards."""

    @property
    def identity(self) -> Sequence[str]:
        """What stands for the content of each shard."""

    @property
    def captions(self) -> bool:
        """Whether its samples have captions."""

    def classes(self, count: int | None) -> tuple[str, ...] | None:
        """Names of the classes that its labels count over, at least `count`; None where nothing tells."""

    def count(self) -> int | None:
        """How many samples they hold together, None where that cannot be told."""

    def counts(self) -> Sequence[int]:
        """How many samples each shard holds. OrnsteinError: that cannot be told."""


class StreamModule(lightning.LightningDataModule):
    """Shards that are read front to back, with the face of `DataModule`.

    Training is an endless stream in the order that `ornstein.data.streaming` promises. Its place, of every worker
    process of every device, is part of each checkpoint, and a resumed run meets the batches that an undisturbed one
    would have met, to the bit, as long as devices, `num_workers`, `batch_size` and shards are the same.

    `train`, `val` and `test` are data sets that can be indexed: the first `reference_images` of the training shards,
    by which metrics judge, and the first `val_limit` of the held-out ones. Training leaves out what val and test hold
    by content, and test what val holds.

    Args:
        dataset: called as `dataset(split="train" | "val" | "test", **options)`, returns the shards of a split (a
            `ShardSet`) or raises `NoSplit`.
        batch_size, eval_batch_size, image_size, channels, class_names, sigma_data, flip, features: as of `DataModule`.
        num_workers: processes that read and decode; the order depends on their number.
        seed: of the order.
        num_classes: None leaves labels out, "auto" counts them in the shards.
        crop: as of `load_image`.
        shuffle_buffer: samples that each process reads ahead and shuffles; 1 keeps the order of the shards.
        max_bad: bad samples that may be left out, on each device, before training stops.
        num_images: how many images the training shards hold; None counts them, once.
        reference_images, val_limit: how many images are decoded for metrics and for validation, at most.
        limit: train on the first that many images only, in the order of the shards.
        overlap: "drop", "refuse" or "allow" training images whose file is in a held-out split too.
        caption_template: captions from the names of the classes, as of `ImageFolder`.
        exact_resume: False: where the place cannot be restored, since devices or `num_workers` are others, begin a
            new epoch instead of refusing.
        latents: refused; there for its sentence.
        options: whatever else the shards take (`urls`, ...).

    Raises:
        OrnsteinError: the options do not fit, shards are missing, too many samples are bad.
    """

    streams = True

    def __init__(
        self,
        dataset: Callable[..., ShardSet],
        *,
        batch_size: int,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        image_size: int = 64,
        channels: int = 3,
        num_classes: int | Literal["auto"] | None = None,
        class_names: Sequence[str] | None = None,
        sigma_data: float | None = None,
        flip: bool = False,
        features: str | None = None,
        crop: str = "adm",
        shuffle_buffer: int = 1000,
        max_bad: int = 0,
        num_images: int | None = None,
        reference_images: int = 50_000,
        val_limit: int = 2_000,
        limit: int | None = None,
        overlap: str = "drop",
        caption_template: str | None = None,
        exact_resume: bool = True,
        latents: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        own = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "num_workers": num_workers, "limit": limit}
        check_options({**own, "max_bad": max_bad, "overlap": overlap, "crop": crop})
        numbers = {"shuffle_buffer": shuffle_buffer, "num_images": num_images}
        numbers |= {"reference_images": reference_images, "val_limit": val_limit}
        for key, value in numbers.items():
            if value is not None and value < 1:
                raise OrnsteinError(f"data.{key}={value}: give a number of 1 or more")
        check_size(image_size, name="a stream")
        check_channels(channels)
        check_template(caption_template)
        if latents is not None:
            raise OrnsteinError(
                f"data.latents={latents}: a stream has no rows that latents could stand for; make the images a "
                f"prepared folder by `{PREPARE}` and encode that"
            )
        self.dataset, self.options = dataset, options
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed = num_workers, seed
        self.image_size, self.channels, self.crop = image_size, channels, checked_crop(crop)
        self.num_classes, self.sigma_data, self.flip, self.features = num_classes, sigma_data, flip, features
        self.class_names = None if class_names is None else tuple(class_names)
        self.shuffle_buffer, self.max_bad = shuffle_buffer, max_bad
        self.reference_images, self.val_limit, self.limit = reference_images, val_limit, limit
        self.overlap, self.caption_template = overlap, caption_template
        self.exact_resume = exact_resume
        self.latents, self.latents_with_images, self.latents_command = None, False, PREPARE
        self.start_batch = 0
        self._num_images = num_images
        self._shards: dict[Split, ShardSet | None] = {}
        self._built: dict[Split, ImageDataset] = {}
        self._classes: tuple[str, ...] | None = None
        self._place: Place | None = None
        self._batches: StreamedBatches | None = None

    @property
    def train(self) -> ImageDataset:
        """The first `reference_images` of the training stream; decoded when they are first asked for."""
        return self._first("train")

    @property
    def reference(self) -> ImageDataset:
        """The images that metrics are held against: those of `train`."""
        return self.train

    @property
    def val(self) -> ImageDataset:
        """The first `val_limit` held-out images; decoded when they are first asked for."""
        return self._first("val")

    @property
    def test(self) -> ImageDataset | None:
        """The first `val_limit` test images, or None where no shards are named for them."""
        return None if self._of("test") is None else self._first("test")

    @property
    def num_images(self) -> int | None:
        """How many images an epoch of training has, as the user says, or as was counted; None where nobody knows."""
        stops = self._stops("train")
        if stops is not None:
            return sum(stops)
        return self._num_images if self._num_images is not None else self._shards_of("train").count()

    @property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) over what stands for every split's shards, and how they are read and decoded."""
        found = {split: list(shards.identity) for split in SPLITS if (shards := self._of(split)) is not None}
        facts = (self.image_size, self.channels, self.crop, self._names(), self.caption_template, self.overlap)
        options = sorted((key, str(value)) for key, value in self.options.items())
        return hashlib.sha256(repr((found, facts, options, self.limit)).encode()).hexdigest()

    def prepare_data(self) -> None:
        """Decode what `train` and `val` hold, once a machine: other processes then find it in place."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Look at the shards and make `train` and `val`, if that has not been done."""
        found, said = self._names(), self.num_classes
        if isinstance(said, int) and found is not None and len(found) != said:
            raise OrnsteinError(f"data.num_classes is {said} in the config and {len(found)} in the shards: say that")
        for split in ("val", "train"):
            self._first(split)

    def served(self, split: Split) -> ImageDataset:
        """The images of a split that can be indexed."""
        return self._first(split)

    def open_latents(self) -> Any:
        """Refused: there are none."""
        raise OrnsteinError(f"a stream has no latents: prepare the images by `{PREPARE}` and encode that")

    def val_dataloader(self) -> Batches:
        """Every held-out image that was decoded once, in order."""
        loader = DataLoader(
            self.val,
            batch_size=None,
            sampler=OrderedBatches(len(self.val), self.eval_batch_size),
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
        )
        return Batches(loader)

    def train_dataloader(self) -> StreamedBatches:
        """Endless training batches of this rank, from `start_batch` on.

        Raises:
            OrnsteinError: the place there is unknown, or was left by other devices or another `num_workers`.
        """
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        shape = {"world_size": world_size, "num_workers": self.num_workers, "batch_size": self.batch_size}
        shape |= {"shuffle_buffer": self.shuffle_buffer, "shards": len(self._shards_of("train").source.shards)}
        place = self._place if self.start_batch else None
        if self.start_batch and place is None:
            raise OrnsteinError(
                f"the stream's place after {self.start_batch} batches is unknown: the checkpoint is of other data"
            )
        fresh = place is not None and place.misfit(shape, exact=self.exact_resume, batches=self.start_batch)
        stream = Stream(
            self._shards_of("train").source,
            self._decode("train"),
            batch_size=self.batch_size,
            seed=self.seed,
            buffer=self.shuffle_buffer,
            max_bad=self.max_bad,
            stops=self._stops("train"),
            rank=rank,
            world_size=world_size,
            first_epoch=place.next_epoch if place is not None and fresh else 0,
        )
        self._batches = StreamedBatches(
            stream,
            num_workers=self.num_workers,
            start_batch=self.start_batch,
            place=None if place is None or fresh else place.ranks[rank],
            shape=shape,
        )
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """The place of every device's stream behind the batches that were trained on, in plain JSON types."""
        if self._batches is None or self.trainer is None:
            return {}
        trained = int(self.trainer.lightning_module.micro_batches_seen)  # type: ignore[arg-type]
        own = self._batches.behind(trained)
        if own is None:
            return {}
        return {"batches": trained, "shape": self._batches.shape, "ranks": gathered(own)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the place back, for `train_dataloader`."""
        self._place = Place(**state) if state else None

    def read(self, split: Split, *, batch_size: int = 256) -> Iterator[dict[str, Any]]:
        """Every image of a split once, in the order of its shards, not only those that can be indexed, in batches.

        Yields `image` uint8 (B, C, H, W), `label` int64 (B,) and `caption` where there are such, `keys` uint8 (B, 16),
        hashes of the files' content.
        """
        bad = Bad(self.max_bad, where=f"the {split} stream")
        samples = in_order(self._shards_of(split).source, self._decode(split), bad=bad, stops=self._stops(split))
        while block := [sample for _, sample in islice(samples, batch_size)]:
            keys = torch.frombuffer(bytearray(b"".join(sample.key for sample in block)), dtype=torch.uint8)
            yield {**collated(block), "keys": keys.reshape(-1, KEY_BYTES)}
        bad.settle()

    def _of(self, split: Split) -> ShardSet | None:
        """The shards of a split, or None where it has none."""
        if split not in self._shards:
            arguments = {"split": split, "labels": self.num_classes is not None, **self.options}
            arguments = {key: value for key, value in arguments.items() if value is not None}
            try:
                inspect.signature(self.dataset).bind(**arguments)
            except TypeError as error:
                raise OrnsteinError(f"the data config does not fit its shards: {error}") from error
            try:
                self._shards[split] = self.dataset(**arguments)
            except NoSplit:
                self._shards[split] = None
        return self._shards[split]

    def _shards_of(self, split: Split) -> ShardSet:
        found = self._of(split)
        if found is None:
            raise OrnsteinError(f"there are no {split} shards: name them with data.{split}_urls")
        return found

    def _names(self) -> tuple[str, ...] | None:
        """Names of the classes; None without labels."""
        if self._classes is None and self.num_classes is not None:
            count = None if self.num_classes == "auto" else self.num_classes
            found = self.class_names if self.class_names is not None else self._shards_of("train").classes(count)
            if found is None and count is not None:
                found = tuple(str(number) for number in range(count))
            if found is None:
                raise OrnsteinError("data.num_classes=auto: nothing tells the classes; give data.num_classes=N")
            self.class_names = self._classes = found
        return self._classes

    def _stops(self, split: Split) -> tuple[int, ...] | None:
        """How many samples of each shard count under `limit`."""
        if self.limit is None or split != "train":
            return None
        left, stops = self.limit, []
        for count in self._shards_of("train").counts():
            stops.append(min(count, left))
            left -= stops[-1]
        return tuple(stops)

    def _decode(self, split: Split) -> Decode:
        """How samples of a split become images, and which of them other splits hold."""
        earlier: dict[Split, tuple[Split, ...]] = {"val": (), "test": ("val",), "train": ("val", "test")}
        held_out: set[bytes] = set()
        for other in earlier[split] if self.overlap != "allow" else ():
            if self._of(other) is not None:
                flat = self._first(other).content_keys.tobytes()
                held_out |= {flat[start : start + KEY_BYTES] for start in range(0, len(flat), KEY_BYTES)}
        return Decode(
            size=self.image_size,
            channels=self.channels,
            crop=self.crop,
            classes=self._names(),
            captions=self._shards_of(split).captions,
            template=self.caption_template,
            held_out=frozenset(held_out),
            refuse=self.overlap == "refuse",
        )

    def _first(self, split: Split) -> ImageDataset:
        """The first images of a split, decoded, and checked where they are those of training."""
        if split not in self._built:
            shards = self._shards_of(split)
            self._built[split] = found = first_images(
                shards.source,
                self._decode(split),
                count=self.reference_images if split == "train" else self.val_limit,
                identity=shards.identity,
                name=shards.name,
                split=split,
                max_bad=self.max_bad,
                stops=self._stops(split),
            )
            if split == "train" and self.sigma_data is not None:
                measured = measure_sigma_data(found, limit=SIGMA_IMAGES)
                if abs(measured - self.sigma_data) > SIGMA_TOLERANCE * self.sigma_data:
                    warnings.warn(
                        f"data.sigma_data is {self.sigma_data} and the images' standard deviation is "
                        f"{measured:.3f}: say data.sigma_data={measured:.3f} unless you mean it",
                        stacklevel=2,
                    )
        return self._built[split]
