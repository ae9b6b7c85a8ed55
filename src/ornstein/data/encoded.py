"""A data set whose images are gone: the codec's latents alone, as `python -m ornstein.cli.encode` left them."""

from collections.abc import Mapping
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ornstein.data.base import KEY_BYTES, ImageDataset, checked_split
from ornstein.data.latents import COMMAND, FORMAT, Latents, read_recipe
from ornstein.data.shards import read_index
from ornstein.errors import OrnsteinError

WAY_OUT = (
    "set metrics=none and choose a conditioner that looks at no images, or name the data set that was encoded, with "
    "data.latents=FOLDER beside it"
)


class LatentFolder(ImageDataset):
    """The facts of a data set that latents were made of: its size, labels and captions, all but its images.

    `DataModule(latents=FOLDER)` serves the latents themselves in the place of images, by the same way as beside a data
    set whose images are there. What looks at real images is refused, before training where that can be known: decoded
    latents would be other images than those that a figure's reference, its floor and its nearest neighbours claim to be
    about, and look better or worse by the codec's own error. So figures are off here (`metrics=none`), and so are
    conditioners on images.

    The splits are those that were encoded, held apart then; their contents cannot be compared again.

    Args:
        split: "train" or "val".
        root: the folder of latents.
        image_size, channels: of the images that were encoded; None takes what the folder says.
        labels: False leaves the classes out, True takes them if there are any.

    Raises:
        OrnsteinError: no latents, or missing or damaged shards.
    """

    def __init__(
        self,
        *,
        split: str,
        root: str | None,
        image_size: int | None = None,
        channels: int | None = None,
        labels: bool = True,
    ) -> None:
        chosen = checked_split(split)
        latents = Latents(_named(root), chosen, command=command_of(root))
        recipe = latents.recipe
        for key, asked in (("image_size", image_size), ("channels", channels)):
            if asked is not None and asked != getattr(recipe, key):
                there = getattr(recipe, key)
                raise OrnsteinError(f"data.{key}={asked} and data.root={root} was made of images with {key}={there}")
        count = recipe.counts[chosen]
        classes = latents.labels if labels else None
        super().__init__(
            NoImages((count, recipe.channels, recipe.image_size, recipe.image_size), folder=str(root)),
            name=recipe.data,
            split=chosen,
            labels=classes,
            class_names=() if classes is None else class_names_of(root, classes),
            captions=latents.captions,
            content=repr(recipe.to_json()).encode(),
            keys=_distinct(count, split=chosen),
        )
        self._encoded, self._folder = recipe.images[chosen], str(root)

    @property
    def images_fingerprint(self) -> str:
        """That of the images which were encoded."""
        return self._encoded

    def subset(self, rows: Any) -> "LatentFolder":
        """The facts of the images at `rows` alone."""
        rows = np.asarray(rows, dtype=np.int64)
        found = copy(self)
        for name in [each for each, kind in vars(ImageDataset).items() if isinstance(kind, cached_property)]:
            found.__dict__.pop(name, None)
        found.images = NoImages((len(rows), *self.images.shape[1:]), folder=self._folder)
        found.labels = None if self.labels is None else self.labels[rows]
        found.captions = None if self.captions is None else [self.captions[row] for row in rows.tolist()]
        found._keys = None if self._keys is None else self._keys[rows]
        found._content = (self._content or b"") + rows.astype("<i8").tobytes()
        return found

    @classmethod
    def fact(cls, options: Mapping[str, Any], name: str) -> Any:
        """What the folder says of the data: image_size, channels, num_classes, class_names or flip."""
        root = options.get("root")
        recipe = read_recipe(_named(root), command=COMMAND, key="data.root")
        if name in ("image_size", "channels", "flip", "name"):
            return getattr(recipe, "data" if name == "name" else name)
        latents = Latents(_named(root), "train", command=command_of(root))
        if name == "captions":
            return latents.captions is not None
        labels = latents.labels
        names = None if labels is None else class_names_of(root, labels)
        return names if name == "class_names" else None if names is None else len(names)


class NoImages:
    """Where images would be: they have a shape, and cannot be looked at."""

    def __init__(self, shape: tuple[int, ...], *, folder: str) -> None:
        self.shape, self.folder = shape, folder

    def __getitem__(self, rows: Any) -> Any:
        """Refuses (OrnsteinError)."""
        raise OrnsteinError(f"data=latents data.root={self.folder} holds latents and no images: {WAY_OUT}")


def command_of(root: str | Path | None) -> str:
    """The command that made a folder of latents, which mends it where the images are."""
    index = read_index(
        _named(root), form=FORMAT, asked=f"data.root={root}", holds="latents", command=f"{COMMAND} out={root}"
    )
    return str(index.get("command", COMMAND))


def class_names_of(root: str | Path | None, labels: np.ndarray) -> list[str]:
    """The classes' names that were kept with latents, or their numbers."""
    index = read_index(_named(root), form=FORMAT, asked=f"data.root={root}", holds="latents", command=COMMAND)
    return list(index.get("class_names") or map(str, range(int(labels.max(initial=-1)) + 1)))


def _named(root: str | Path | None) -> str | Path:
    if root is None:
        raise OrnsteinError(f"data=latents needs a folder: make one by `{COMMAND} data=...`, then say data.root=FOLDER")
    return root


def _distinct(count: int, *, split: str) -> np.ndarray:
    """A key for each image, none of them twice."""
    keys = np.zeros((count, KEY_BYTES), dtype=np.uint8)
    keys[:, :8] = np.arange(count, dtype="<i8").view(np.uint8).reshape(count, 8)
    keys[:, 8:] = np.frombuffer(split.encode().ljust(8, b"\0"), dtype=np.uint8)
    return keys
