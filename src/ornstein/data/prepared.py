"""Prepared images: any data set as memory-mapped uint8 shards, so that training reads at the speed of memory.

A prepared folder holds `index.json` (what the data set is, how it was read, which command made it), `preview.png` and
for each split shards: `train/00000.npy`, uint8 (n, C, H, W), beside it `train/00000.json` with its checksum, the
images' labels, captions and content keys, and where the data set has conditions `train/00000.condition.npy`. Images of
several shapes lie in a folder a shape, `train/48x32/00000.npy` (height x width).
`python -m ornstein.cli.prepare` writes them, by `ornstein.data.prepared_write`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ornstein.data.base import KEY_BYTES, SPLITS, ImageDataset, Images, NoSplit, Split, checked_split
from ornstein.data.bucketed import BucketedImages
from ornstein.data.shards import CHECKED_BYTES, Maps, array_path, damaged_index, facts_path, read_index, whole_facts
from ornstein.errors import OrnsteinError

FORMAT = "ornstein.images.1"
COMMAND = "python -m ornstein.cli.prepare data=DATA out=FOLDER"
NEEDED = ("images", "rows", "source", "labels", "captions", "keys")
# What a config may ask the folder for.
FACTS = (
    *("name", "image_size", "channels", "num_classes", "class_names"),
    *("sigma_data", "flip", "features", "condition_channels", "buckets", "captions"),
)


class Prepared(ImageDataset):
    """A split of a folder that `python -m ornstein.cli.prepare` wrote.

    Args:
        split: "train", "val", or "test" where the data set had one.
        root: the folder.
        image_size, channels, condition_channels, buckets: of the prepared images; None takes what is there.
        labels: False leaves the classes out, True takes them if there are any.

    Raises:
        OrnsteinError: no prepared folder or an unfinished one, shards that are missing or damaged (checksums are
            looked at where the split is no larger than a gigabyte, sizes above), or another size than was prepared.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS

    def __init__(
        self,
        *,
        split: str,
        root: str | None,
        image_size: int | None = None,
        channels: int | None = None,
        condition_channels: int | None = None,
        buckets: Sequence[Sequence[int]] | None = None,
        labels: bool = True,
    ) -> None:
        chosen = checked_split(split, self.splits)
        index = read_prepared(root)
        folder = Path(str(root)).expanduser()
        sizes = {"image_size": image_size, "channels": channels, "condition_channels": condition_channels}
        shapes = None if buckets is None else [list(shape) for shape in buckets]
        for key, asked in {**sizes, "buckets": shapes}.items():
            if asked is not None and asked != index[key]:
                raise OrnsteinError(
                    f"data.{key}={asked} and data.root={root} was prepared with {key}={index[key]}: leave data.{key} "
                    f"out, or prepare the images anew with data.{key}={asked} (`{index['command']}` made these)"
                )
        if chosen not in index["splits"]:
            raise NoSplit(f"data.root={root} has no {chosen} split: the data set that was prepared had none")
        super().__init__(split=chosen, **opened(folder, chosen, index, labels=labels))

    @classmethod
    def fact(cls, options: Mapping[str, Any], name: str) -> Any:
        """What the folder says of the data: one of `FACTS`."""
        return read_prepared(options.get("root"))[name]


class ShardedImages:
    """Shards that index like one array (N, C, H, W), read from memory maps.

    Args:
        paths: of the shards.
        counts: images in each.
        shape: (C, H, W) of one.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], shape: tuple[int, ...]) -> None:
        self._paths = list(paths)
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._maps = Maps()
        self.shape: tuple[int, ...] = (int(self._starts[-1]), *shape)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Copy rows out: uint8 (B, C, H, W) for B integers in [-N, N). Raises IndexError outside the range."""
        asked, count = np.asarray(rows, dtype=np.int64), self.shape[0]
        if len(asked) and not -count <= asked.min() <= asked.max() < count:
            raise IndexError(f"rows {asked.min()} to {asked.max()} of {count} images")
        asked = np.where(asked < 0, asked + count, asked)
        if len(self._paths) == 1:
            return np.take(self._maps[self._paths[0]], asked, axis=0)
        shards = np.searchsorted(self._starts, asked, side="right") - 1
        found = np.empty((len(asked), *self.shape[1:]), dtype=np.uint8)
        places = (asked - self._starts[shards]).tolist()
        # One at a time: a batch of a shuffled epoch has about as many shards as images.
        for at, (shard, place) in enumerate(zip(shards.tolist(), places, strict=True)):
            found[at] = self._maps[self._paths[shard]][place]
        return found


class _Part:
    """The shards of one shape of a split: their facts, each looked at."""

    def __init__(self, folder: Path, below: str, count: int, index: dict[str, Any], *, verify: bool) -> None:
        self.numbers = range(count)
        self.folder, self.below = folder, below
        with_conditions = index["condition_channels"] is not None
        found = [
            shard_facts(folder, below, number, conditions=with_conditions, verify=verify) for number in self.numbers
        ]
        missing = [number for number, each in enumerate(found) if each is None]
        if missing:
            raise OrnsteinError(
                f"data.root={folder}: {len(missing)} of the {count} shards of {below} are missing or damaged, "
                f"{below}/{missing[0]:05d}.npy among them: `{index['command']}` makes them anew and keeps the others."
            )
        self.facts = [each for each in found if each is not None]
        side = index["image_size"]
        height, width = map(int, below.split("/")[1].split("x")) if "/" in below else (side, side)
        self.shape = (index["channels"], height, width)
        self.condition_shape = (index["condition_channels"], height, width)

    @property
    def rows(self) -> np.ndarray:
        """The images' numbers in the data set, int64 (n,)."""
        return np.concatenate([np.array(each["rows"], dtype=np.int64) for each in self.facts])

    def images(self, *, conditions: bool) -> ShardedImages:
        """The images, or what they are conditioned on."""
        place = condition_path if conditions else array_path
        paths = [place(self.folder, self.below, number) for number in self.numbers]
        counts = [each["images"] for each in self.facts]
        return ShardedImages(paths, counts, self.condition_shape if conditions else self.shape)


def condition_path(folder: Path, below: str, number: int) -> Path:
    """Where what a shard's images are conditioned on lies."""
    return array_path(folder, below, number).with_suffix(".condition.npy")


def shard_facts(folder: Path, below: str, number: int, *, conditions: bool, verify: bool) -> dict[str, Any] | None:
    """A shard's checksum, labels, captions and keys; None where it is missing or not what it says."""
    paths = {"": array_path(folder, below, number)}
    if conditions:
        paths["condition_"] = condition_path(folder, below, number)
    return whole_facts(facts_path(folder, below, number), lambda _: paths, needs=NEEDED, verify=verify)


def read_prepared(root: str | Path | None) -> dict[str, Any]:
    """The index of a prepared folder.

    Raises:
        OrnsteinError: no folder is named, it holds no prepared images, or the preparation has not ended.
    """
    if root is None:
        raise OrnsteinError(f"data=prepared needs a folder: make one by `{COMMAND}`, then say data.root=FOLDER")
    asked = f"data.root={root}"
    index = read_index(root, form=FORMAT, asked=asked, holds="prepared images", command=COMMAND)
    try:
        complete, command = index["complete"], index["command"]
    except KeyError as error:
        raise damaged_index(error, asked=asked, command=COMMAND) from error
    if not complete:
        raise OrnsteinError(f"{asked} is not finished: `{command}` goes on where it stopped.")
    if missing := [key for key in ("splits", *FACTS) if key not in index]:
        raise damaged_index(KeyError(missing[0]), asked=asked, command=command)
    return index


def opened(folder: Path, split: Split, index: dict[str, Any], *, labels: bool = True) -> dict[str, Any]:
    """What `ImageDataset` takes beside `split`, read from the shards of a split.

    Raises:
        OrnsteinError: shards that are missing or damaged.
    """
    parts = _parts(folder, split, index)
    facts = [each for part in parts for each in part.facts]
    rows = np.concatenate([part.rows for part in parts])
    order = np.argsort(rows, kind="stable")  # the data set's own order; that of the shards unless it has shapes
    found = _gathered(facts, "labels", order) if labels else None
    keys = np.frombuffer(bytes.fromhex("".join(each["keys"] for each in facts)), dtype=np.uint8)
    arrays = [_assembled(parts, rows[order], image_size=index["image_size"])]
    if index["condition_channels"] is not None:
        arrays.append(_assembled(parts, rows[order], image_size=index["image_size"], conditions=True))
    return {
        "images": arrays[0],
        "name": index["name"],
        "labels": None if found is None else np.array(found, dtype=np.int64),
        "class_names": index["class_names"],
        "captions": _gathered(facts, "captions", order),
        "conditions": arrays[1] if len(arrays) > 1 else None,
        "content": "".join(each["sha256"] + each.get("condition_sha256", "") for each in facts).encode(),
        "keys": keys.reshape(-1, KEY_BYTES)[order],
    }


def _parts(folder: Path, split: Split, index: dict[str, Any]) -> list[_Part]:
    """The shards of a split, by shape."""
    shards, count = index["splits"][split]["shards"], index["splits"][split]["count"]
    side = index["image_size"]
    size = count * index["channels"] * side * side
    numbers = {split: shards} if isinstance(shards, int) else {f"{split}/{name}": n for name, n in shards.items()}
    return [_Part(folder, below, n, index, verify=size <= CHECKED_BYTES) for below, n in numbers.items()]


def _assembled(parts: list[_Part], rows: np.ndarray, *, image_size: int, conditions: bool = False) -> Images:
    """The images of all shapes as one array. `rows`: the numbers of all images in the data set, ascending."""
    every = [part.images(conditions=conditions) for part in parts]
    if "/" not in parts[0].below:
        return every[0]
    # Numbers of images that could not be read are left out: the others move up.
    return BucketedImages(every, [np.searchsorted(rows, part.rows) for part in parts], image_size=image_size)


def _gathered(facts: list[dict[str, Any]], key: str, order: np.ndarray) -> list[Any] | None:
    """A list that the shards hold pieces of, in the data set's order; None where they have none."""
    if any(each[key] is None for each in facts):
        return None
    every = [value for each in facts for value in each[key]]
    return [every[row] for row in order.tolist()]
