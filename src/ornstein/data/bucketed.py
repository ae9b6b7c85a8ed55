"""Images of several shapes in one array-like: an array, a map or lazy files for each shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ornstein.data.buckets import Shape, assign, cropped_share
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.data.base import Images


class BucketedImages:
    """uint8 images that index like one array, as long as the rows asked for have one shape.

    Args:
        parts: the images of each shape, (n, C, h, w).
        rows: for each part, which images of the data set its rows are: int64 (n,), together 0 .. N-1.
        image_size: side of the square that stands for all of them where one size is asked for.
        cropped: what share of each image was cut away, float (N,), where that is known.

    Attributes:
        shapes: (height, width) of each part.
        bucket: int64 (N,), the part that each image lies in.
        place: int64 (N,), its row there.
        shape: (N, C, image_size, image_size).

    Raises:
        OrnsteinError: no parts, parts of different channels, or rows that are not 0 .. N-1, each once.
    """

    def __init__(
        self,
        parts: Sequence[Images],
        rows: Sequence[np.ndarray],
        *,
        image_size: int,
        cropped: np.ndarray | None = None,
    ) -> None:
        numbers = [np.asarray(each, dtype=np.int64) for each in rows]
        count = sum(map(len, numbers))
        if not parts or [part.shape[0] for part in parts] != [len(each) for each in numbers]:
            raise OrnsteinError("images of several shapes need a row number for every image of every part")
        if len({part.shape[1] for part in parts}) != 1:
            raise OrnsteinError("images of several shapes must have equally many channels")
        if not np.array_equal(np.sort(np.concatenate(numbers)), np.arange(count)):
            raise OrnsteinError("the row numbers of images of several shapes must be 0 to N-1, each once")
        self.parts = tuple(parts)
        self.rows = tuple(numbers)
        self.shapes: tuple[Shape, ...] = tuple((part.shape[2], part.shape[3]) for part in parts)
        self.shape = (count, parts[0].shape[1], image_size, image_size)
        self.cropped = cropped
        self.bucket, self.place = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        for number, own in enumerate(numbers):
            self.bucket[own] = number
            self.place[own] = np.arange(len(own))

    def __getitem__(self, rows: Any) -> np.ndarray:
        """uint8 (B, C, h, w) of B rows of one shape. Raises OrnsteinError for rows of several."""
        asked = np.asarray(rows, dtype=np.int64).ravel()
        buckets = np.unique(self.bucket[asked])
        if len(buckets) > 1:
            named = " and ".join("x".join(map(str, self.shapes[bucket])) for bucket in buckets[:2])
            raise OrnsteinError(
                f"images of {named} pixels do not fit into one batch: ask for rows of one shape, as "
                "ImageDataset.pieces gives them"
            )
        part = self.parts[int(buckets[0]) if len(buckets) else 0]
        return part[self.place[asked]]

    def subset(self, rows: np.ndarray, take: Callable[[Images, np.ndarray], Images]) -> BucketedImages:
        """The images at `rows`, those of a part as `take(part, its rows)` has them; shapes of none are left out."""
        asked = np.asarray(rows, dtype=np.int64)
        parts, numbers = [], []
        for bucket in np.unique(self.bucket[asked]).tolist():
            own = np.flatnonzero(self.bucket[asked] == bucket)
            parts.append(take(self.parts[bucket], self.place[asked[own]]))
            numbers.append(own)
        cropped = None if self.cropped is None else self.cropped[asked]
        return BucketedImages(parts, numbers, image_size=self.shape[2], cropped=cropped)


Store = Callable[[np.ndarray, tuple[int, int, int, int]], "tuple[Images, np.ndarray]"]


def bucketed(
    sizes: np.ndarray, shapes: Sequence[Shape], store: Store, *, image_size: int, channels: int
) -> tuple[BucketedImages, np.ndarray]:
    """N images as images of several shapes, each resized to cover the shape nearest to its own and cropped.

    Args:
        sizes: (N, 2), height and width of each, as `bucket_files.read_sizes` gives them; those of 0, 0 are left out.
        shapes: (height, width) each; see `ornstein.data.buckets`. Those that no image gets are left out.
        store: called for each shape with the images' numbers, int64 (n,), and `(n, channels, height, width)`; returns
            images of at most n rows and which of the n they are, int64, ascending.
        image_size: stands for all shapes where one size is asked for.
        channels: of the images.

    Returns:
        The images, and which of the N they are: int64 (M,), ascending.
    """
    bucket = np.full(len(sizes), -1, dtype=np.int64)
    readable = np.flatnonzero(sizes[:, 0] > 0)
    bucket[readable] = assign(sizes[readable], shapes)
    parts: list[Images] = []
    kept: list[np.ndarray] = []
    for number, (height, width) in enumerate(shapes):
        own = np.flatnonzero(bucket == number)
        if not len(own):
            continue
        images, good = store(own, (len(own), channels, height, width))
        if len(good):
            parts.append(images)
            kept.append(own[good])
    whole = np.sort(np.concatenate(kept)) if kept else np.empty(0, dtype=np.int64)
    if not parts:  # whoever looks for bad images says so in one sentence
        height, width = shapes[0]
        parts, kept = [np.empty((0, channels, height, width), dtype=np.uint8)], [whole]
    cropped = cropped_share(sizes[whole], np.asarray(shapes)[bucket[whole]])
    numbers = [np.searchsorted(whole, own) for own in kept]
    return BucketedImages(parts, numbers, image_size=image_size, cropped=cropped), whole
