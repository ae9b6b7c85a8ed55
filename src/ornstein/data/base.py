"""What every data set is: uint8 images that a vectorised index turns into a whole batch."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from ornstein.errors import OrnsteinError

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
CHUNK_BYTES = 1 << 24


class Images(Protocol):
    """An array of images, in memory or not: `shape` (N, C, H, W), and uint8 rows by an array of indices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """uint8 (B, C, H, W) for an int64 array of B rows."""


class ImageDataset(Dataset[dict[str, Any]]):
    """Square uint8 images with labels and captions where there are any.

    Args:
        images: uint8 (N, C, H, W) with H = W: an array, a memory map, or anything that indexes like one.
        name: what messages and reference statistics call the data set.
        split: "train" or "val".
        labels: int64 (N,) in [0, len(class_names)), or None.
        class_names: one name a class; needed with labels.
        captions: N strings, or None.
        conditions: what each image is to be conditioned on, uint8 (N, C', H, W) like `images`, or None.
        content: bytes that stand for the images in the fingerprint; default: the images themselves.

    Attributes: `images`, `labels`, `captions`, `conditions` as above; `image_size`, `channels`, `num_classes` (None
    without labels), `class_names` (empty without labels), `name`, `split`, `fingerprint`.
    """

    def __init__(
        self,
        images: Images,
        *,
        name: str,
        split: Split,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] = (),
        captions: Sequence[str] | None = None,
        conditions: Images | None = None,
        content: bytes | None = None,
    ) -> None:
        self.images = images
        self.name = name
        self.split: Split = split
        self.labels = None if labels is None else np.ascontiguousarray(labels, dtype=np.int64)
        self.class_names = () if labels is None else tuple(class_names)
        self.captions = None if captions is None else list(captions)
        self.conditions = conditions
        self._content = content

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.images.shape[2]

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.images.shape[1]

    @property
    def num_classes(self) -> int | None:
        """How many classes the labels count over, or None without labels."""
        return None if self.labels is None else len(self.class_names)

    def __len__(self) -> int:
        """Number of images."""
        return self.images.shape[0]

    def batch(self, indices: Any) -> dict[str, Any]:
        """The images at `indices` (B integers in [-N, N): tensor, array or list) as one batch.

        Returns `image` uint8 (B, C, H, W); `index` int64 (B,); `label` int64 (B,) with labels; `caption`
        list of B strings with captions; `condition` uint8 (B, C', H, W) with conditions. Raises IndexError
        outside the range.
        """
        rows = np.asarray(indices, dtype=np.int64)
        return {"image": torch.from_numpy(np.ascontiguousarray(self.images[rows])), **self.facts(rows)}

    def facts(self, indices: Any) -> dict[str, Any]:
        """What a batch of the images at `indices` holds beside them: as in `batch`."""
        rows = np.asarray(indices, dtype=np.int64)
        facts: dict[str, Any] = {"index": torch.from_numpy(rows % max(len(self), 1))}
        if self.labels is not None:
            facts["label"] = torch.from_numpy(self.labels[rows])
        if self.captions is not None:
            facts["caption"] = [self.captions[row] for row in rows.tolist()]
        if self.conditions is not None:
            facts["condition"] = torch.from_numpy(np.ascontiguousarray(self.conditions[rows]))
        return facts

    def __getitem__(self, indices: Any) -> dict[str, Any]:
        """A whole batch for several indices, one example without the batch axis for a single integer."""
        if np.ndim(indices) == 0:
            return {key: value[0] for key, value in self.batch([int(indices)]).items()}
        return self.batch(indices)

    def subset(self, rows: Any) -> "ImageDataset":
        """The images at `rows` alone, copied into memory, as a data set with a fingerprint of its own."""
        rows = np.asarray(rows, dtype=np.int64)
        return ImageDataset(
            np.ascontiguousarray(self.images[rows]),
            name=self.name,
            split=self.split,
            labels=None if self.labels is None else self.labels[rows],
            class_names=self.class_names,
            captions=None if self.captions is None else [self.captions[row] for row in rows.tolist()],
            conditions=None if self.conditions is None else np.ascontiguousarray(self.conditions[rows]),
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) over the facts, the labels and the content of this split; computed once."""
        facts = (self.name, self.split, tuple(self.images.shape), self.class_names)
        digest = hashlib.sha256(repr(facts).encode())
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        for content in self._contents():
            digest.update(content)
        return digest.hexdigest()

    @cached_property
    def images_fingerprint(self) -> str:
        """As `fingerprint`, but without labels and classes: what depends on the images alone is known by it."""
        digest = hashlib.sha256(repr((self.name, self.split, tuple(self.images.shape))).encode())
        for content in self._contents():
            digest.update(content)
        return digest.hexdigest()

    def _contents(self) -> Iterator[bytes]:
        """The images, or the bytes that stand for them, piece by piece."""
        if self._content is not None:
            yield self._content
            return
        for rows in row_chunks(self.images.shape):
            yield self.images[rows].tobytes()


def row_chunks(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Row indices of a uint8 array of that shape in chunks of about 16 MB, for reading it bit by bit."""
    count, rows = shape[0], max(1, CHUNK_BYTES // max(1, int(np.prod(shape[1:]))))
    return [np.arange(start, min(start + rows, count)) for start in range(0, count, rows)]


def checked_split(split: str) -> Split:
    """`split` itself, or an error that names the two there are."""
    for known in SPLITS:
        if split == known:
            return known
    raise OrnsteinError(f"there is no split '{split}': a data set has {' and '.join(SPLITS)}")
