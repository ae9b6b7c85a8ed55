"""Images as one array: .npz (ADM's reference batches, arrays of one's own), .npy and raw memory maps."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ornstein.data.array_files import (
    ChannelsFirst,
    Found,
    check_pixels,
    find_file,
    list_arrays,
    raw_array,
    row_keys,
    stamp_of,
)
from ornstein.data.base import KEY_BYTES, SPLITS, ImageDataset, Images, NoSplit, Split, checked_split
from ornstein.data.captions import check_template, from_classes
from ornstein.data.images import check_channels, check_size, resize_array, to_channels
from ornstein.data.remembered import STAMP_BYTES, recall, remember
from ornstein.data.splits import split_mask
from ornstein.data.stored import map_folder
from ornstein.errors import OrnsteinError

IMAGE_NAMES = ("arr_0", "images", "image", "x", "data", "x_train")
LABEL_NAMES = ("arr_1", "labels", "label", "y", "y_train")
MOST_CLASSES = 1 << 20


class ImageArrays(ImageDataset):
    """uint8 images in an .npz, an .npy or a raw file: (N, H, W, C), (N, C, H, W) or grey (N, H, W), of one size.

    An .npy and a raw file stay on disk, memory-mapped; an .npz is read into memory. Without files of their own, val and
    test are split off by content, so that equal images stay on one side.

    Args:
        split: "train", "val" or "test".
        root: the file; of train, where `val_root` is given.
        val_root, test_root: files of the same kind for the other splits.
        image_size: side in pixels; None: as it is, another: resized (bicubic, antialiased), in memory.
        channels: 3 (RGB) or 1 (grey); None: as it is. Grey images are repeated for 3; RGB ones are not made grey.
        images: name of the images' array in an .npz; None: arr_0 (ADM's), images, image, x, data, x_train, or the only
            one there is.
        label_array: name of the labels' array in an .npz; None: arr_1, labels, label, y or y_train, where it is there.
        label_root, val_label_root, test_label_root: .npy files of labels (or .npz, whose `label_array` or only array
            is taken) beside the images' files.
        layout: "nhwc", "nchw", or "auto": told by the shape.
        shape, dtype, offset: of a raw file, whose head says nothing: the whole array's shape, "uint8", and how many
            bytes to leave out. With `val_root` the first number of the shape may be -1: as many as the file holds.
        val_fraction, test_fraction: shares of the images held out, where they have no files of their own.
        labels: False leaves the classes out, True takes them if there are any.
        class_names: one a class; None: "0" to "K-1".
        caption_template: captions from the classes' names, `{}` being their place; None leaves captions out.

    Raises:
        OrnsteinError: no such file or array, arrays of floats, of other integers, of Python objects or of images of
            mixed sizes, a shape that does not fit the layout, or labels that are not one whole number an image.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS

    def __init__(
        self,
        *,
        split: str,
        root: str | None,
        val_root: str | None = None,
        test_root: str | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        images: str | None = None,
        label_array: str | None = None,
        label_root: str | None = None,
        val_label_root: str | None = None,
        test_label_root: str | None = None,
        layout: str = "auto",
        shape: Sequence[int] | None = None,
        dtype: str = "uint8",
        offset: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        labels: bool = True,
        class_names: Sequence[str] | None = None,
        caption_template: str | None = None,
    ) -> None:
        chosen = checked_split(split, self.splits)
        check_template(caption_template)
        roots = {"train": root, "val": val_root, "test": test_root}
        label_roots = {"train": label_root, "val": val_label_root, "test": test_label_root}
        own = chosen == "train" or roots[chosen] is not None
        if chosen == "test" and not own and (val_root is not None or test_fraction == 0):
            raise NoSplit("there is no test split: set data.test_root, or data.test_fraction to 0.1 say")
        if chosen == "val" and not own and test_root is not None:
            raise OrnsteinError("data.test_root without data.val_root: name a file for val as well")
        source: Split = chosen if own else "train"
        raw = None if shape is None else (shape, dtype, offset)
        found = find_images(roots[source], key=_key(source, "root"), name=images, raw=raw)
        pixels = ChannelsFirst(found, layout=check_pixels(found, layout=layout))
        keys = _keys(found, pixels)
        classes = None
        if labels:
            classes = _labels(found, pixels.shape[0], name=label_array, beside=label_roots[source], split=source)
        if val_root is None:
            mask = split_mask(
                [key.tobytes() for key in keys], chosen, val_fraction=val_fraction, test_fraction=test_fraction
            )
            rows = np.flatnonzero(mask)
            pixels, keys = pixels.take(rows), keys[rows]
            every, classes = classes, None if classes is None else classes[rows]
        else:
            every = classes
        names = _class_names(class_names, every)
        super().__init__(
            _sized(pixels, image_size, channels, asked=str(found)),
            name="arrays",
            split=chosen,
            labels=classes,
            class_names=names,
            captions=from_classes(caption_template, classes, names),
            content=f"{image_size} {channels}".encode() + keys.tobytes(),
            keys=keys,
        )

    @classmethod
    def count_classes(cls, options: Mapping[str, Any]) -> int | None:
        """How many classes train's labels have, or None: what `data.num_classes=auto` stands for."""
        classes: int | None = cls.fact(options, "num_classes")
        return classes

    @classmethod
    def fact(cls, options: Mapping[str, Any], name: str) -> Any:
        """What the heads of train's file say, image_size or channels; or its labels, num_classes."""
        return arrays_fact(options, name)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Refuse, before anything is built, files that hold no images (OrnsteinError); reads their heads alone."""
        for split in SPLITS:
            key = _key(split, "root").removeprefix("data.")
            if split == "train" or options.get(key) is not None:
                _found_of(options, key)


def find_images(root: str | None, *, key: str, name: str | None, raw: tuple[Sequence[int], str, int] | None) -> Found:
    """The array of images of a file, by its head.

    Args:
        root: the file.
        key: the option that names it.
        name: of the array in an .npz.
        raw: shape, dtype and offset of a file that has no head.

    Raises:
        OrnsteinError: no such file, or no such array in it.
    """
    path = find_file(root, key=key, option="memmap" if raw is not None else "npz")
    if raw is not None:
        sides, dtype, offset = list(raw[0]), raw[1], raw[2]
        if sides and sides[0] == -1:
            sides[0] = (path.stat().st_size - offset) // max(1, int(np.prod(sides[1:], dtype=np.int64)))
        return raw_array(path, shape=sides, dtype=dtype, offset=offset)
    arrays = list_arrays(path)
    if name is not None and name not in arrays:
        raise OrnsteinError(f"{key}={root} has no array {name}: it has {', '.join(arrays) or 'none'} (data.images)")
    pictures = [each for each in arrays if len(arrays[each].shape) >= 3 or arrays[each].dtype.hasobject]
    known = [each for each in IMAGE_NAMES if each in arrays]
    chosen = name if name is not None else next(iter(known or (pictures if len(pictures) == 1 else ())), None)
    if chosen is None:
        raise OrnsteinError(
            f"{key}={root} holds {', '.join(arrays) or 'no arrays'}: say which are the images by data.images=NAME"
        )
    return arrays[chosen]


def arrays_fact(options: Mapping[str, Any], name: str) -> Any:
    """What the files of a config's arrays say of themselves: image_size, channels or num_classes.

    Raises:
        OrnsteinError: as `ImageArrays` does.
    """
    found = _found_of(options, "root")
    layout = check_pixels(found, layout=str(options.get("layout", "auto")))
    if name == "num_classes":
        classes = _labels(
            found, found.shape[0], name=options.get("label_array"), beside=options.get("label_root"), split="train"
        )
        return None if classes is None else len(_class_names(options.get("class_names"), classes))
    if name == "image_size":
        return found.shape[2]
    if len(found.shape) == 3:
        return 1
    return found.shape[3] if layout == "nhwc" else found.shape[1]


def _found_of(options: Mapping[str, Any], key: str) -> Found:
    shape = options.get("shape")
    raw = None if shape is None else (list(shape), str(options.get("dtype", "uint8")), int(options.get("offset") or 0))
    found = find_images(options.get(key), key=f"data.{key}", name=options.get("images"), raw=raw)
    check_pixels(found, layout=str(options.get("layout", "auto")))
    return found


def _labels(found: Found, count: int, *, name: str | None, beside: str | None, split: Split) -> np.ndarray | None:
    """The class of each image, int64 (N,); None where there are none."""
    if beside is not None:
        key = _key(split, "label_root")
        arrays = list_arrays(find_file(beside, key=key, option="npz"))
        chosen = name if name in arrays else next(iter(arrays), None)
        if chosen is None or (len(arrays) > 1 and name is None):
            raise OrnsteinError(f"{key}={beside} holds {', '.join(arrays) or 'no arrays'}: say data.label_array=NAME")
        source: Found | None = arrays[chosen]
    else:
        arrays = list_arrays(found.path) if found.offset is None and found.name else {}
        if name is not None and name not in arrays:
            raise OrnsteinError(f"{found.path} has no array {name} (data.label_array): it has {', '.join(arrays)}")
        chosen = name or next((each for each in LABEL_NAMES if each in arrays), None)
        source = None if chosen is None else arrays[chosen]
    if source is None:
        return None
    if source.dtype.kind not in "iu" or (source.shape != (count,) and source.shape != (count, 1)):
        raise OrnsteinError(
            f"{source} is {source.dtype} of the shape {source.shape}, and labels are one whole number for each of the "
            f"{count} images: set data.num_classes=null to go without, or make them so"
        )
    values = source.load().reshape(-1).astype(np.int64)
    if len(values) and (values.min() < 0 or values.max() >= MOST_CLASSES):
        raise OrnsteinError(f"{source} has a label {values.min() if values.min() < 0 else values.max()}: count from 0")
    return values


def _class_names(given: Sequence[str] | None, classes: np.ndarray | None) -> tuple[str, ...]:
    """One name a class; the numbers where none are given."""
    if classes is None:
        return ()
    count = int(classes.max(initial=-1)) + 1
    if given is None:
        return tuple(map(str, range(count)))
    if len(given) < count:
        raise OrnsteinError(f"data.class_names has {len(given)} names and there is a label {count - 1}: add some")
    return tuple(given)


def _sized(pixels: ChannelsFirst, size: int | None, channels: int | None, *, asked: str) -> Images:
    """The images at a size and with channels; in memory where either differs from what is on disk."""
    _, there, side, _ = pixels.shape
    if size is not None:
        check_size(size, name=asked)
    if channels is not None:
        check_channels(channels)
        if channels < there:
            raise OrnsteinError(
                f"data.channels={channels} and {asked} is RGB: leave data.channels out, or save it grey"
            )
    if size in (None, side) and channels in (None, there):
        # What is in memory is an array from here on: whoever reads it need not ask how.
        return pixels if pixels.mapped else pixels[np.arange(pixels.shape[0])]
    found = resize_array(pixels[np.arange(pixels.shape[0])], size or side)
    return to_channels(found, channels or there)


def _keys(found: Found, pixels: ChannelsFirst) -> np.ndarray:
    """A content hash of each image, uint8 (N, 16); of a file on disk kept in the cache folder."""
    if not pixels.mapped:
        return row_keys(pixels)
    stamp = hashlib.blake2b(stamp_of(found) + repr(pixels.shape).encode(), digest_size=STAMP_BYTES).digest()
    place = map_folder() / f"keys-{stamp.hex()}.npy"
    known = recall(place, width=KEY_BYTES * pixels.shape[0]).get(stamp)
    if known is None:
        known = row_keys(pixels).tobytes()
        remember(place, {stamp: known})
    return np.frombuffer(known, dtype=np.uint8).reshape(-1, KEY_BYTES)


def _key(split: Split, name: str) -> str:
    """The option of a split's file."""
    return f"data.{name}" if split == "train" else f"data.{split}_{name}"
