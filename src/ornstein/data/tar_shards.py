"""`data=webdataset`: which tar shards make up each split, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ornstein.data.base import SPLITS, NoSplit, checked_split
from ornstein.data.splits import content_key, val_mask
from ornstein.data.streaming_index import Index, class_table, index_of
from ornstein.data.streaming_tar import IMAGES, TarFiles, expand, scheme
from ornstein.errors import OrnsteinError


class TarShards:
    """The shards of a split in webdataset's layout: `00017.jpg`, `00017.cls`, `00017.txt` are one sample.

    Args:
        split: "train", "val" or "test".
        urls: of training: see `ornstein.data.streaming_tar.expand`.
        val_urls, test_urls: those held out. Without `val_urls` a share of `urls` is val, whole shards by their names.
        val_fraction: that share; at least one shard, never all.
        image_column: extensions of the image.
        label_column, caption_column: an extension, or `json.KEY`; a column of None is not read.
        labels: False leaves the classes out.
        trust_pipes: run the commands of `pipe:` shards.

    Raises:
        NoSplit: test, and no `test_urls`.
        OrnsteinError: missing shards, commands that are not trusted, one shard of which none can be held out.
    """

    splits = SPLITS
    name = "webdataset"

    def __init__(
        self,
        *,
        split: str,
        urls: str | Sequence[str] | None = None,
        val_urls: str | Sequence[str] | None = None,
        test_urls: str | Sequence[str] | None = None,
        val_fraction: float = 0.1,
        image_column: str = IMAGES,
        label_column: str | None = "cls",
        caption_column: str | None = None,
        labels: bool = True,
        trust_pipes: bool = False,
    ) -> None:
        chosen = checked_split(split, SPLITS)
        if not urls:
            raise OrnsteinError(
                "data=webdataset needs shards: \"data.urls='/data/train-{0000..0099}.tar'\", say, or a folder"
            )
        if chosen == "test" and not test_urls:
            raise NoSplit("there are no test shards: name them with data.test_urls")
        if labels and label_column is None:
            raise OrnsteinError("data.label_column=null and data.num_classes asks for classes: name one of the two")
        shards = _shards(chosen, urls, val_urls, test_urls, val_fraction=val_fraction)
        label = label_column if labels else None
        self.source = TarFiles(shards, image=image_column, label=label, caption=caption_column, trust_pipes=trust_pipes)

    @cached_property
    def identity(self) -> Sequence[str]:
        """Name, size and time of change of each shard; the name alone of an address."""
        return [self.source.identity(shard) for shard in range(len(self.source.shards))]

    @property
    def captions(self) -> bool:
        """Whether a caption is read of each sample."""
        return self.source.caption is not None

    def classes(self, count: int | None) -> tuple[str, ...] | None:
        """As the labels of shards on a disk say; None of others, where nothing but reading them would tell."""
        if self._far and count is not None:
            return None
        return class_table(self._index.classes, count=count)

    def count(self) -> int | None:
        """Samples of all shards, None of such that are not on a disk."""
        return None if self._far else sum(self._index.counts)

    def counts(self) -> Sequence[int]:
        """Samples of each shard. OrnsteinError: they are not on a disk."""
        return self._index.counts

    @cached_property
    def _index(self) -> Index:
        return index_of(self.source)

    @property
    def _far(self) -> bool:
        return any(scheme(name) for name in self.source.shards)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Refuses, before anything is built, options that name no shards, or shards that are not there."""
        mine = {key: options[key] for key in _OPTIONS if options.get(key) is not None}
        for split in ("train", "val"):
            cls(split=split, labels=False, **mine)
        if options.get("class_names") is not None and options.get("num_classes") not in (None, "auto"):
            names, count = list(options["class_names"]), options["num_classes"]
            if len(names) != count:
                raise OrnsteinError(f"data.num_classes={count} and data.class_names has {len(names)} names")
        if options.get("limit") is not None:
            cls(split="train", labels=False, **mine).counts()

    @classmethod
    def count_classes(cls, options: Mapping[str, Any]) -> int | None:
        """What `data.num_classes=auto` stands for: the names that are given, or the classes found in the shards."""
        if options.get("class_names") is not None:
            return len(options["class_names"])
        mine = {key: options[key] for key in (*_OPTIONS, "label_column") if options.get(key) is not None}
        found = cls(split="train", **mine).classes(None)
        return len(found) if found else None


_OPTIONS = ("urls", "val_urls", "test_urls", "val_fraction", "image_column", "caption_column", "trust_pipes")


def _shards(
    split: str,
    urls: str | Sequence[str],
    val_urls: str | Sequence[str] | None,
    test_urls: str | Sequence[str] | None,
    *,
    val_fraction: float,
) -> list[str]:
    """The shards of a split; no shard is in two."""
    named = {
        key: expand(given, key=key)
        for key, given in (("urls", urls), ("val_urls", val_urls), ("test_urls", test_urls))
        if given
    }
    every = [name for found in named.values() for name in found]
    if len(set(every)) < len(every):
        twice = sorted({name for name in every if every.count(name) > 1})[0]
        raise OrnsteinError(f"the shard {twice} is in two of data.urls, data.val_urls and data.test_urls: take it out")
    if split == "test":
        return named["test_urls"]
    if val_urls:
        return named["urls"] if split == "train" else named["val_urls"]
    if len(named["urls"]) < 2:
        raise OrnsteinError(
            f"data.urls={urls} is one shard, of which none can be held out: name held-out ones with data.val_urls"
        )
    held_out = val_mask([content_key(name.rpartition("/")[2].encode()) for name in named["urls"]], val_fraction)
    rows = np.flatnonzero(held_out == (split == "val")).tolist()
    return [named["urls"][row] for row in rows]
