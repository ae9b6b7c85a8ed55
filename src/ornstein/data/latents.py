"""Latents on disk in the place of images: what a codec made of every image, once, as memory-mapped shards.

A folder of latents holds `index.json` (its recipe, and the command that made it) and, for each split, shards of as many
images each: `train/00000.npy`, an array (images, planes, C, h, w), and beside it `train/00000.json` with its checksum,
the images' labels and captions. A shard's JSON appears after its array, so that what has one is whole.
`ornstein.data.latents_write` writes them.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ornstein.codecs import Codec
from ornstein.codecs.codec import sides_of
from ornstein.data.base import ImageDataset, Split
from ornstein.data.shards import (
    CHECKED_BYTES,
    Maps,
    array_path,
    damaged_index,
    facts_path,
    read_index,
    whole_facts,
)
from ornstein.errors import OrnsteinError

FORMAT = "ornstein.latents.1"
COMMAND = "python -m ornstein.cli.encode"
Store = Literal["mean", "sample", "moments"]
STORES: tuple[Store, ...] = ("mean", "sample", "moments")
DTYPES = ("float32", "float16")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the numbers in a folder of latents: folders with equal recipes hold the same.

    Attributes:
        data: name of the data set. image_size, channels: of its images.
        images: `ImageDataset.images_fingerprint` of each split; counts: its number of images.
        codec: class of the codec. codec_fingerprint: `Codec.fingerprint`. scale, shift: its buffers.
        stochastic: whether the codec draws.
        shape: (C, h, w) of one latent.
        store: "mean" (what a codec that does not draw gives), "moments" (mean and standard deviation, to draw anew
            at every visit) or "sample" (one draw, the same for good).
        flip: whether the training images were also encoded mirrored: a mirrored image's latent is not the mirrored
            latent.
        dtype: "float32" or "float16". precision: that the codec ran in.
        seed: of the draws of "sample", else 0.
        shard_images: images in each shard but the last.
    """

    data: str
    image_size: int
    channels: int
    images: dict[str, str]
    counts: dict[str, int]
    codec: str
    codec_fingerprint: str
    scale: list[float]
    shift: list[float]
    stochastic: bool
    shape: tuple[int, int, int]
    store: Store
    flip: bool
    dtype: str
    precision: str
    seed: int
    shard_images: int

    def planes(self, split: Split) -> tuple[str, ...]:
        """The planes of a shard, by the names that they have in a batch; held-out images are never mirrored."""
        views = ("latent", "latent_flipped") if self.flip and split == "train" else ("latent",)
        ends = ("", "_std") if self.store == "moments" else ("",)
        return tuple(view + end for view in views for end in ends)

    def shards(self, split: Split) -> int:
        """How many shards a split has."""
        return -(-self.counts[split] // self.shard_images)

    def rows(self, split: Split, number: int) -> range:
        """The images of a shard."""
        return range(number * self.shard_images, min((number + 1) * self.shard_images, self.counts[split]))

    def nbytes(self, split: Split) -> int:
        """Bytes of a split's latents."""
        values = int(np.prod(self.shape)) * len(self.planes(split)) * self.counts[split]
        return values * np.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types."""
        return asdict(self) | {"shape": list(self.shape)}


def read_recipe(folder: str | Path, *, command: str = COMMAND, key: str = "data.latents") -> Recipe:
    """The recipe of a folder of latents, which the option `key` names.

    Raises:
        OrnsteinError: there is no such folder, or it holds no latents; names `command`, which makes them.
    """
    asked = f"{key}={folder}"
    index = read_index(folder, form=FORMAT, asked=asked, holds="latents", command=command)
    try:
        stored = index["recipe"]
        return Recipe(**stored | {"shape": tuple(stored["shape"])})
    except (KeyError, TypeError) as error:
        raise damaged_index(error, asked=asked, command=command) from error


def check_codec(
    recipe: Recipe, codec: Codec, *, folder: str | Path, flip: bool = False, command: str = COMMAND
) -> None:
    """Whether latents are what `codec` would give.

    Args:
        recipe: of the latents.
        codec: of the run.
        folder: what the user wrote, for the sentence.
        flip: whether training mirrors images.
        command: that makes the right latents, for the sentence.

    Raises:
        OrnsteinError: another codec or another scale, means of a codec that draws, draws of one that does not, or
            no mirrored views where they are asked for.
    """
    place = f"data.latents={folder}"
    name, what = type(codec).__name__, ""
    if recipe.codec != name:
        what = f"another codec ({recipe.codec}, and this run's is {name})"
    elif recipe.codec_fingerprint != codec.fingerprint:
        what = f"a {name} with other weights than this run's"
    elif not is_unmeasured(codec) and (recipe.scale, recipe.shift) != scale_of(codec):
        what = f"a {name} with another scale or shift than this run's"
    if what:
        raise OrnsteinError(f"{place} holds latents of {what}: make those of this one by `{command}`.")
    if codec.stochastic and recipe.store == "mean":
        raise OrnsteinError(
            f"{place} holds the posterior's means and this run's codec draws from the posterior: set "
            f"codec.sample_posterior=false, or make latents to draw from by `{command}`."
        )
    if not codec.stochastic and recipe.store == "sample":
        raise OrnsteinError(
            f"{place} holds draws of the posterior and this run's codec takes its mean: set "
            f"codec.sample_posterior=true, or make the means by `{command}`."
        )
    if flip and not recipe.flip:
        raise OrnsteinError(
            f"{place} holds no mirrored views and data.flip=true asks for them: set data.flip=false, or make them by "
            f"`{command}`."
        )


def scale_of(codec: Codec) -> tuple[list[float], list[float]]:
    """A codec's scale and shift as lists; empty for one without."""
    values = (getattr(codec, name, None) for name in ("scale", "shift"))
    scale, shift = (value.flatten().tolist() if isinstance(value, Tensor) else [] for value in values)
    return scale, shift


def is_unmeasured(codec: Codec) -> bool:
    """Whether a codec's scale and shift are yet to be measured on the training images."""
    return bool(getattr(codec, "measured_images", 0))


def take_scale(codec: Codec, recipe: Recipe) -> None:
    """Gives a codec whose scale and shift are yet to be measured those that its latents were written with."""
    if is_unmeasured(codec):
        for name in ("scale", "shift"):
            value: Tensor = getattr(codec, name)
            value.copy_(torch.tensor(getattr(recipe, name)).reshape(value.shape))
        codec.measured_images = 0  # type: ignore[assignment]


def shape_of(codec: Codec) -> tuple[int, int, int]:
    """(C, h, w) of one latent."""
    return (codec.channels, *sides_of(codec.size))


class Latents:
    """The latents of one split, in row order, read from memory-mapped shards.

    Safe to hand to worker processes: each maps the files anew.

    Args:
        folder: of the latents.
        split: "train" or "val".
        command: that mends them, for sentences.

    Raises:
        OrnsteinError: no latents, an unfinished split, or a damaged shard (checksums are looked at where the split is
            no larger than a gigabyte; the encode command looks at all of them).
    """

    def __init__(self, folder: str | Path, split: Split, *, command: str = COMMAND) -> None:
        self.folder, self.split, self.command = Path(folder).expanduser(), split, command
        self.recipe = read_recipe(folder, command=command)
        self.planes = self.recipe.planes(split)
        self._facts = self._checked(verify=self.recipe.nbytes(split) <= CHECKED_BYTES)
        self._maps = Maps()

    def __len__(self) -> int:
        """Number of images."""
        return self.recipe.counts[self.split]

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Labels, int64 (N,), as the data had them when they were encoded; None without."""
        if any(facts["labels"] is None for facts in self._facts):
            return None
        return np.array([label for facts in self._facts for label in facts["labels"]], dtype=np.int64)

    @cached_property
    def captions(self) -> list[str] | None:
        """N captions, as the data had them when they were encoded; None without."""
        if any(facts["captions"] is None for facts in self._facts):
            return None
        return [str(caption) for facts in self._facts for caption in facts["captions"]]

    def batch(self, indices: Any, *, flip: bool = False) -> dict[str, Tensor]:
        """The latents of B images, each plane (B, C, h, w) in the dtype on disk: `latent`, and where there are
        moments `latent_std`; with `flip` also those of the mirrored images, `latent_flipped` (`latent_flipped_std`).
        """
        rows = np.asarray(indices, dtype=np.int64)
        if len(rows) and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)} latents")
        kept = [number for number, plane in enumerate(self.planes) if flip or not plane.startswith("latent_flipped")]
        found = np.empty((len(kept), len(rows), *self.recipe.shape), dtype=self.recipe.dtype)
        shard, place = np.divmod(rows % max(len(self), 1), self.recipe.shard_images)
        for number in np.unique(shard).tolist():
            mine = np.flatnonzero(shard == number)
            array = self._maps[array_path(self.folder, self.split, number)]
            found[:, mine] = array[place[mine], np.array(kept)[:, None]]
        return {self.planes[plane]: torch.from_numpy(found[at]) for at, plane in enumerate(kept)}

    def _checked(self, *, verify: bool) -> list[dict[str, Any]]:
        """The facts of every shard, each looked at."""
        count = self.recipe.shards(self.split)
        facts = [shard_facts(self.folder, self.recipe, self.split, number, verify=verify) for number in range(count)]
        missing = [number for number, found in enumerate(facts) if found is None]
        if missing:
            raise OrnsteinError(
                f"data.latents={self.folder}: {len(missing)} of the {count} shards of {self.split} are missing or "
                f"damaged, {self.split}/{missing[0]:05d}.npy among them: `{self.command}` goes on where it stopped and "
                "makes them anew."
            )
        return [found for found in facts if found is not None]


def shard_facts(folder: Path, recipe: Recipe, split: Split, number: int, *, verify: bool) -> dict[str, Any] | None:
    """A shard's checksum, labels and captions; None where it is missing or not what it says.

    `verify` reads the whole shard and compares its checksum; else its size alone is looked at.
    """
    path = array_path(folder, split, number)
    needs = ("images", "labels", "captions")
    facts = whole_facts(facts_path(folder, split, number), lambda _: {"": path}, needs=needs, verify=verify)
    return facts if facts is not None and facts["images"] == len(recipe.rows(split, number)) else None


class LatentDataset(Dataset[dict[str, Any]]):
    """A data set's batches with latents in the place of images.

    Args:
        images: the data set, or a subset of it; gives index, label and caption, so that they are what the config says.
        latents: of the whole data set.
        rows: which of them `images` holds, int64 (N,); None: all, in order.
        flip: whether batches hold the mirrored views too.
        with_images: whether they hold the images too, for a conditioner that looks at them.
    """

    def __init__(
        self,
        images: ImageDataset,
        latents: Latents,
        *,
        rows: np.ndarray | None = None,
        flip: bool = False,
        with_images: bool = False,
    ) -> None:
        self.images, self.latents, self.rows, self.flip = images, latents, rows, flip
        self.with_images = with_images

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def batch(self, indices: Any) -> dict[str, Any]:
        """What `ImageDataset.batch` gives, with the planes of `Latents.batch` in the place of `image`."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = chosen if self.rows is None else self.rows[chosen]
        rest = self.images.batch(chosen) if self.with_images else self.images.facts(chosen)
        return {**self.latents.batch(rows, flip=self.flip), **rest}

    def __getitem__(self, indices: Any) -> dict[str, Any]:
        """A whole batch for several indices."""
        return self.batch(indices)


def check_images(latents: Latents, images: ImageDataset) -> None:
    """Whether latents are those of a data set's images.

    Raises:
        OrnsteinError: other images, or as many of another data set.
    """
    recipe, split = latents.recipe, images.split
    if recipe.images[split] != images.images_fingerprint:
        raise OrnsteinError(
            f"data.latents={latents.folder} was made of other {split} images ({recipe.counts[split]:,} of "
            f"{recipe.data} at {recipe.image_size}x{recipe.image_size}) than this run reads ({len(images):,} of "
            f"{images.name} at {images.image_size}x{images.image_size}): make theirs by `{latents.command}`."
        )
