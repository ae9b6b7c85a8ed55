"""What every data set is: uint8 images that a vectorised index turns into a whole batch."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from ornstein.data.bucketed import BucketedImages
from ornstein.errors import OrnsteinError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
# What a data set has that does not say: a class of its own `splits` may have a test split besides.
TWO_SPLITS: tuple[Split, ...] = ("train", "val")
CHUNK_BYTES = 1 << 24
COPIED_BYTES = 1 << 28
KEY_BYTES = 16


class NoSplit(OrnsteinError):
    """A split that the data set may have, but has not under these options: "test" with data.test_fraction=0, say.

    Raised by a data set's constructor, before it reads anything; `DataModule.test` is then None.
    """


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
        images: uint8 (N, C, H, W) with H = W: an array, a memory map, or anything that indexes like one; or
            `BucketedImages` of several shapes, whose batches have one each.
        name: what messages and reference statistics call the data set.
        split: "train", "val" or "test".
        labels: int64 (N,) in [0, len(class_names)), or None.
        class_names: one name a class; needed with labels.
        captions: N strings, or None.
        conditions: what each image is to be conditioned on, uint8 (N, C', H, W) like `images`, or None.
        content: bytes that stand for the images in the fingerprint; default: the images themselves.
        keys: uint8 (N, 16), a content hash of each image, by which the splits are held apart: of one kind in every
            split of the data set (a blake2b-16 of the file, say). Default: of the pixels, as `content_keys` finds them.

    Class attribute `splits`: those that a data set of this class may have ("train" and "val" unless it says so).
    Attributes: `images`, `labels`, `captions`, `conditions` as above; `image_size`, `channels`, `num_classes` (None
    without labels), `class_names` (empty without labels), `name`, `split`, `fingerprint`.
    """

    splits: ClassVar[tuple[Split, ...]] = TWO_SPLITS

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
        keys: np.ndarray | None = None,
    ) -> None:
        self.images = images
        self.name = name
        self.split: Split = split
        self.labels = None if labels is None else np.ascontiguousarray(labels, dtype=np.int64)
        self.class_names = () if labels is None else tuple(class_names)
        self.captions = None if captions is None else list(captions)
        self.conditions = conditions
        self._content = content
        self._keys = None if keys is None else np.ascontiguousarray(keys, dtype=np.uint8)
        if self._keys is not None and self._keys.shape != (len(self), KEY_BYTES):
            raise OrnsteinError(
                f"{name}: content keys of shape {self._keys.shape} for {len(self)} {split} images; give uint8 "
                f"({len(self)}, {KEY_BYTES})"
            )

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.images.shape[2]

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the images: one pair, or of a bucketed data set one for each bucket."""
        several: tuple[tuple[int, int], ...] | None = getattr(self.images, "shapes", None)
        return several if several is not None else ((self.images.shape[2], self.images.shape[3]),)

    @property
    def bucket_of(self) -> np.ndarray | None:
        """The place in `shapes` of each image's shape, int64 (N,); None where all have the one there is."""
        return getattr(self.images, "bucket", None)

    def pieces(self, *, size: int, rows: Any = None) -> Iterator[np.ndarray]:
        """All rows, or those of `rows`, in int64 arrays of at most `size` rows that fit into one batch.

        In order where all images have one shape; shape by shape, in order within each, where they have several.
        """
        bucket = self.bucket_of
        asked = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        groups = [asked] if bucket is None else [asked[bucket[asked] == each] for each in range(len(self.shapes))]
        for group in groups:
            for start in range(0, len(group), size):
                yield group[start : start + size]

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

    def facts(self, indices: Any, *, conditions: bool = True) -> dict[str, Any]:
        """What a batch of the images at `indices` holds beside them: as in `batch`, or without `condition`."""
        rows = np.asarray(indices, dtype=np.int64)
        facts: dict[str, Any] = {"index": torch.from_numpy(rows % max(len(self), 1))}
        if self.labels is not None:
            facts["label"] = torch.from_numpy(self.labels[rows])
        if self.captions is not None:
            facts["caption"] = [self.captions[row] for row in rows.tolist()]
        if self.conditions is not None and conditions:
            facts["condition"] = torch.from_numpy(np.ascontiguousarray(self.conditions[rows]))
        return facts

    def __getitem__(self, indices: Any) -> dict[str, Any]:
        """A whole batch for several indices, one example without the batch axis for a single integer."""
        if np.ndim(indices) == 0:
            return {key: value[0] for key, value in self.batch([int(indices)]).items()}
        return self.batch(indices)

    def subset(self, rows: Any) -> "ImageDataset":
        """The images at `rows` alone as a data set with a fingerprint of its own: copied into memory up to 256 MB,
        read through this one above.
        """
        rows = np.asarray(rows, dtype=np.int64)
        images = _rows_of(self.images, rows)
        content = self._content if isinstance(images, RowsOf | BucketedImages) else None
        return ImageDataset(
            images,
            name=self.name,
            split=self.split,
            labels=None if self.labels is None else self.labels[rows],
            class_names=self.class_names,
            captions=None if self.captions is None else [self.captions[row] for row in rows.tolist()],
            conditions=None if self.conditions is None else _rows_of(self.conditions, rows),
            content=None if content is None else content + rows.astype("<i8").tobytes(),
            keys=None if self._keys is None else self._keys[rows],
        )

    @cached_property
    def content_keys(self) -> np.ndarray:
        """A content hash of each image, uint8 (N, 16): those given, else blake2b of the pixels; computed once."""
        if self._keys is not None:
            return self._keys
        keys = np.empty((len(self), KEY_BYTES), dtype=np.uint8)
        for rows in self.pieces(size=chunk_rows(self.images.shape)):
            for row, image in zip(rows.tolist(), self.images[rows], strict=True):
                digest = hashlib.blake2b(image.tobytes(), digest_size=KEY_BYTES).digest()
                keys[row] = np.frombuffer(digest, dtype=np.uint8)
        return keys

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
        """The images, or the bytes that stand for them, piece by piece; also the shapes where there are several."""
        if self.bucket_of is not None:
            yield repr(self.shapes).encode() + self.bucket_of.astype("<i8").tobytes()
        if self._content is not None:
            yield self._content
            return
        for rows in self.pieces(size=chunk_rows(self.images.shape)):
            yield self.images[rows].tobytes()


def chunk_rows(shape: tuple[int, ...]) -> int:
    """How many images of a uint8 array of that shape make about 16 MB, for reading it bit by bit."""
    return max(1, CHUNK_BYTES // max(1, int(np.prod(shape[1:]))))


def row_chunks(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Row indices of a uint8 array of that shape in chunks of about 16 MB, for reading it bit by bit."""
    count, rows = shape[0], chunk_rows(shape)
    return [np.arange(start, min(start + rows, count)) for start in range(0, count, rows)]


class RowsOf:
    """Some rows of an array of images, in an order, copied out only when they are asked for."""

    def __init__(self, images: Images, rows: np.ndarray) -> None:
        self.images, self.rows = images, rows
        self.shape: tuple[int, ...] = (len(rows), *images.shape[1:])

    def __getitem__(self, rows: Any) -> np.ndarray:
        """uint8 (B, C, H, W)."""
        return self.images[self.rows[rows]]


def _rows_of(images: Images, rows: np.ndarray) -> Images:
    """Rows of an array: a copy where it is small, else a view through which they are read."""
    if isinstance(images, BucketedImages):
        return images.subset(rows, _rows_of)
    size = len(rows) * int(np.prod(images.shape[1:], dtype=np.int64))
    return np.ascontiguousarray(images[rows]) if size <= COPIED_BYTES else RowsOf(images, rows)


def checked_split(split: str, known: Sequence[Split] = TWO_SPLITS) -> Split:
    """`split` itself, or an error that names those there are: train and val, unless a data set knows of more."""
    for each in known:
        if split == each:
            return each
    listed = f"{', '.join(known[:-1])} and {known[-1]}"
    raise OrnsteinError(f"there is no split '{split}': the data set has {listed}")
