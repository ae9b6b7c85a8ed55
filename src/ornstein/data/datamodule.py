"""Serving a data set to Lightning: splits built once and held apart, one endless epoch, whole batches by one index."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from ornstein.data.bad import plainly
from ornstein.data.base import TWO_SPLITS, ImageDataset, NoSplit, Split
from ornstein.data.bucket_order import BucketBatches, BucketsOnce
from ornstein.data.buckets import checked_buckets
from ornstein.data.describe import measure_sigma_data
from ornstein.data.latents import COMMAND, LatentDataset, Latents, Recipe, check_images
from ornstein.data.options import BALANCED_WAY_OUT, check_options
from ornstein.data.overlap import Overlap, apart, checked_policy
from ornstein.data.sampling import (
    BalancedBatches,
    EndlessBatches,
    OrderedBatches,
    behind,
    equally_many,
    evenly_spaced,
)
from ornstein.data.workers import surviving
from ornstein.errors import OrnsteinError

# A figure copied from another data set is off by more; that of another image size by less.
SIGMA_TOLERANCE = 0.2
SIGMA_IMAGES = 512
# Whose images a split may not hold: val gives way to train, test to both.
EARLIER: dict[Split, tuple[Split, ...]] = {"train": (), "val": ("train",), "test": ("train", "val")}


class Batches:
    """What Lightning iterates: a loader behind a face that it cannot mistake for a plain DataLoader.

    Lightning swaps the sampler of a DataLoader for its own (DistributedSampler, SequentialSampler under
    `overfit_batches`), which would break both the order and the batching. Anything iterable it leaves alone.
    """

    def __init__(self, loader: "DataLoader[dict[str, Any]]") -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches in the sampler's order, whatever becomes of the workers."""
        if self.loader.num_workers == 0 and not self.loader.pin_memory:
            # What the loader would do, without what it asks and notes around each batch.
            dataset: Any = self.loader.dataset
            return (dataset[rows] for rows in self.loader.sampler)
        return plainly(surviving(lambda: iter(self.loader), self._again))

    def _again(self, given: int) -> Iterator[dict[str, Any]]:
        """The batches behind the first `given` ones, by new workers."""
        self.loader = _copy(self.loader, self.loader.sampler)
        return iter(_copy(self.loader, behind(self.loader.sampler, given)))

    def __len__(self) -> int:
        """Number of batches; TypeError for the endless ones, as Lightning expects."""
        return len(self.loader)


class DataModule(lightning.LightningDataModule):
    """A data set's splits as Lightning wants them, and the facts of its config, checked.

    Training is one endless epoch in the order of `EndlessBatches`, a pure function of the seed; set
    `start_batch` to the number of micro-batches trained so far before training starts again. Give the trainer
    `max_steps` and a `val_check_interval` in steps. Validation is every held-out image once, in order, on
    every rank.

    Args:
        dataset: called as `dataset(split="train" | "val" | "test", labels=bool, **options)`, with `image_size` and
            `channels` among the options where they are given; returns an `ImageDataset`. Called for "test" only
            where its `splits` name it.
        batch_size: images per rank and micro-batch.
        eval_batch_size: images per validation batch; default: `batch_size`.
        num_workers: processes that read batches ahead; the order does not depend on it. For arrays in memory
            0 is fastest.
        seed: of the order of the images.
        image_size, channels, num_classes, class_names: what the config says the data is. None is not checked,
            except `num_classes`: None means no labels, "auto" what is found.
        sigma_data: std of the images in [-1, 1]; more than 20 % off the measured one is warned about.
        flip: whether training may mirror the images. features: default features of metrics. Both are only
            kept here, for those who ask.
        limit: train on that many images, evenly spaced over the data set, instead of all; with `balanced` equally
            many of each class. Val and test stay whole, and hold none of the train images left out either.
        limit_reference: which train images metrics are held against under `limit`: "whole", as papers on limited data
            do (Karras et al. 2020, arXiv 2006.06676), so that figures of several limits compare; or "limited".
        balanced: training meets every class equally often, see `BalancedBatches`; needs labels.
        overlap: what to do with val images whose content is in train, and test images whose content is in either:
            "drop" leaves them out of val and test and says how many, "refuse" raises, "allow" does not look.
        latents: folder of `python -m ornstein.cli.encode`, whose latents batches hold in the place of images;
            `train` and `val` stay the images themselves. Opened when a batch, or `open_latents`, asks for it.
        buckets: several shapes instead of squares of `image_size`: see `ornstein.data.buckets.parse_buckets`. Batches
            then have one shape each, in the order of `BucketBatches`; the data set is given the shapes, `buckets`.
        options: whatever else the data set takes (`root`, `val_fraction`, ...).

    Raises:
        OrnsteinError: in `setup`: the data disagree with the config, or cannot be read, or their splits overlap and
            may not.

    Attributes beside these: `latents_with_images`, whether batches of latents hold the images too (for a conditioner
    that looks at them), and `latents_command`, which makes the latents, for messages.
    """

    def __init__(
        self,
        dataset: Callable[..., ImageDataset],
        *,
        batch_size: int,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        image_size: int | None = None,
        channels: int | None = None,
        num_classes: int | Literal["auto"] | None = "auto",
        class_names: Sequence[str] | None = None,
        sigma_data: float | None = None,
        flip: bool = False,
        features: str | None = None,
        limit: int | None = None,
        limit_reference: Literal["whole", "limited"] = "whole",
        balanced: bool = False,
        overlap: Overlap = "drop",
        latents: str | None = None,
        buckets: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        own = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "num_workers": num_workers, "limit": limit}
        chosen = {"limit_reference": limit_reference, "balanced": balanced}
        check_options({**own, **chosen, "num_classes": num_classes})
        self.dataset = dataset
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.image_size = image_size
        self.channels = channels
        self.num_classes = num_classes
        self.class_names = None if class_names is None else tuple(class_names)
        self.sigma_data = sigma_data
        self.flip = flip
        self.features = features
        self.limit = limit
        self.limit_reference = limit_reference
        self.balanced = balanced
        self.overlap = checked_policy(overlap)
        self.buckets = checked_buckets(buckets, image_size=image_size, balanced=balanced, latents=latents)
        self.options = options
        self.start_batch = 0
        self.latents = latents
        self.latents_with_images = False
        self.latents_command = COMMAND
        self._built: dict[Split, ImageDataset] = {}
        self._whole: dict[Split, ImageDataset] = {}
        self._latents: dict[Split, Latents] = {}

    @property
    def train(self) -> ImageDataset:
        """The training split; built when it is first asked for."""
        return self._split("train")

    @property
    def val(self) -> ImageDataset:
        """The held-out split; built when it is first asked for."""
        return self._split("val")

    @property
    def test(self) -> ImageDataset | None:
        """The split that nothing is chosen by; built when it is first asked for. None where the data set has none."""
        if "test" not in declared_splits(self.dataset):
            return None
        try:
            return self._split("test")
        except NoSplit:
            return None

    @property
    def reference(self) -> ImageDataset:
        """The train images that metrics are held against: all there are, unless `limit_reference` says otherwise."""
        train = self.train
        return train if self.limit_reference == "limited" else self._all("train")

    def prepare_data(self) -> None:
        """Fetch and decode, once a machine: other processes then find everything in place."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Build train and val, if that has not been done, and check them against the config and each other.

        Test waits until it is asked for: training needs none of it. Under `overlap="refuse"` it is looked at now.
        """
        for split in TWO_SPLITS:
            self._split(split)
        if self.overlap == "refuse":
            _ = self.test

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """A batch on the device. Its tensors go there at once and captions stay; Lightning's own way searches both for
        anything nested, which costs as much as several callbacks together, and is left what else a batch holds.
        """
        whole = super().transfer_batch_to_device
        if type(batch) is not dict:
            return whole(batch, device, dataloader_idx)
        behind_the_host = device.type not in ("cpu", "mps")

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device, non_blocking=behind_the_host)
            captions = isinstance(value, list) and bool(value) and isinstance(value[0], str)
            return value if captions else whole(value, device, dataloader_idx)

        return {key: moved(value) for key, value in batch.items()}

    def train_dataloader(self) -> Batches:
        """Endless training batches of this rank, from `start_batch` on."""
        trainer = self.trainer
        place = {
            "seed": self.seed,
            "rank": trainer.global_rank if trainer else 0,
            "world_size": trainer.world_size if trainer else 1,
            "start_batch": self.start_batch,
        }
        if (buckets := self.train.bucket_of) is not None:
            order: EndlessBatches = BucketBatches(buckets, self.train.shapes, self.batch_size, **place)
        elif self.balanced:
            order = BalancedBatches(self._labels(self.train), self.batch_size, **place)
        else:
            order = EndlessBatches(len(self.train), self.batch_size, **place)
        return self._batches(self.served("train"), order)

    def val_dataloader(self) -> Batches:
        """Every held-out image once, in order; where they have several shapes, of one a batch."""
        if (buckets := self.val.bucket_of) is not None:
            return self._batches(self.served("val"), BucketsOnce(buckets, self.eval_batch_size))
        return self._batches(self.served("val"), OrderedBatches(len(self.val), self.eval_batch_size))

    def open_latents(self) -> Recipe:
        """The recipe of the latents, which are opened if they have not been.

        Raises:
            OrnsteinError: there are none, some are missing or damaged, or they are those of other images.
        """
        if self.latents is None:
            raise OrnsteinError(f"data.latents is not set: name a folder that `{self.latents_command}` wrote.")
        for split in TWO_SPLITS:
            if split not in self._latents:
                images = self._split(split)
                found = Latents(self.latents, split, command=self.latents_command)
                check_images(found, self._whole.get(split, images))
                self._latents[split] = found
        return self._latents["train"].recipe

    def served(self, split: Split) -> ImageDataset | LatentDataset:
        """What the batches of a split are made of: its images, or their latents where there are such.

        Raises:
            OrnsteinError: as `open_latents` does.
        """
        images = self._split(split)
        if self.latents is None:
            return images
        self.open_latents()
        return LatentDataset(
            images,
            self._latents[split],
            rows=self._rows(self._whole[split]) if split in self._whole else None,
            flip=self.flip and split == "train",
            with_images=self.latents_with_images,
        )

    def _rows(self, whole: ImageDataset) -> np.ndarray:
        """The images that `limit` leaves of all."""
        assert self.limit is not None
        if self.balanced:
            return equally_many(self._labels(whole), self.limit, class_names=whole.class_names)
        return evenly_spaced(len(whole), self.limit)

    def _labels(self, dataset: ImageDataset) -> np.ndarray:
        """The labels that `balanced` goes by."""
        if dataset.labels is None:
            raise OrnsteinError(f"data.balanced=true needs classes and {dataset.name} has none: {BALANCED_WAY_OUT}")
        return dataset.labels

    def _batches(self, dataset: ImageDataset | LatentDataset, order: Iterable[np.ndarray]) -> Batches:
        """A loader that hands each array of indices of `order` to the data set as a whole."""
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=order,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own stream: making an iterator must not move the global one that resuming restores.
            generator=torch.Generator().manual_seed(self.seed),
        )
        return Batches(loader)

    def _split(self, split: Split) -> ImageDataset:
        """Build a split and check it, the first time."""
        if split not in self._built:
            facts = {"image_size": self.image_size, "channels": self.channels, "buckets": self.buckets}
            options = {**facts, **self.options}
            arguments = {"split": split, "labels": self.num_classes is not None, **_given(options)}
            try:
                inspect.signature(self.dataset).bind(**arguments)
            except TypeError as error:
                if "'buckets'" in str(error):
                    raise OrnsteinError(
                        "data.buckets sorts images by shape and this data set has squares only: leave it out, or name "
                        "one that takes it, data=image_folder say"
                    ) from error
                raise OrnsteinError(f"the data config does not fit its data set: {error}") from error
            built = self.dataset(**arguments)
            self._check(built)
            before = {} if self.overlap == "allow" else {other: self._all(other) for other in EARLIER[split]}
            built = apart(built, before, policy=self.overlap)
            if split == "train" and self.limit is not None and self.limit < len(built):
                self._whole[split] = built  # what latents were made of, and metrics are held against
                built = built.subset(self._rows(built))
            self._built[split] = built
        return self._built[split]

    def _all(self, split: Split) -> ImageDataset:
        """A split as if there were no `limit`: val and test are the same whatever part of train is used."""
        images = self._split(split)
        return self._whole.get(split, images)

    def _check(self, found: ImageDataset) -> None:
        """Compare the facts of the config with the data."""
        facts: dict[str, tuple[Any, Any]] = {
            "image_size": (self.image_size, found.image_size),
            "channels": (self.channels, found.channels),
            "num_classes": (None if self.num_classes == "auto" else self.num_classes, found.num_classes),
        }
        if self.num_classes is not None:
            facts["class_names"] = (self.class_names, found.class_names)
        for key, (said, is_so) in facts.items():
            if said is not None and said != is_so:
                raise OrnsteinError(
                    f"data.{key} is {_plain(said)} in the config and {_plain(is_so)} in the {found.split} "
                    f"images of {found.name}: say data.{key}={_plain(is_so)}"
                )
        if self.sigma_data is not None and found.split == "train":
            measured = measure_sigma_data(found, limit=SIGMA_IMAGES)
            if abs(measured - self.sigma_data) > SIGMA_TOLERANCE * self.sigma_data:
                warnings.warn(
                    f"data.sigma_data is {self.sigma_data} and the images' standard deviation is "
                    f"{measured:.3f}: say data.sigma_data={measured:.3f} unless you mean it",
                    stacklevel=2,
                )


def _copy(loader: "DataLoader[dict[str, Any]]", order: Iterable[np.ndarray]) -> "DataLoader[dict[str, Any]]":
    """The same loader of another order, with workers of its own."""
    return DataLoader(
        loader.dataset,
        batch_size=None,
        sampler=order,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        persistent_workers=loader.persistent_workers,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
    )


def declared_splits(dataset: Callable[..., ImageDataset]) -> tuple[Split, ...]:
    """The splits that a data set may have: `splits` of its class, behind any `functools.partial`."""
    while isinstance(dataset, partial):
        dataset = dataset.func
    splits: tuple[Split, ...] = getattr(dataset, "splits", TWO_SPLITS)
    return splits


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments without those that are None."""
    return {key: value for key, value in arguments.items() if value is not None}


def _as_it_is(batch: Any) -> Any:
    """The data set has made the batch already."""
    return batch


def _plain(value: Any) -> str:
    """A fact as the command line would write it."""
    if value is None:
        return "null"
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)
