"""Arrays of images on disk: .npz, .npy and raw memory maps, looked at before any of their pixels are read."""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ornstein.errors import OrnsteinError

Layout = Literal["auto", "nhwc", "nchw"]
LAYOUTS: tuple[Layout, ...] = ("auto", "nhwc", "nchw")
CHANNELS = (1, 3)
MOST_CHANNELS = 4


@dataclass(frozen=True, kw_only=True)
class Found:
    """An array on disk.

    Attributes:
        path: of the file.
        name: of the array in an .npz; "" elsewhere.
        shape, dtype: as they are on disk.
        offset: of a raw file's pixels in bytes; None where numpy knows.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int | None = None

    def load(self) -> np.ndarray:
        """The array: a memory map of an .npy or a raw file, in memory from an .npz. Raises OrnsteinError."""
        try:
            if self.offset is not None:
                return np.memmap(self.path, mode="r", dtype=self.dtype, shape=self.shape, offset=self.offset)
            if not self.name:
                found: np.ndarray = np.load(self.path, mmap_mode="r", allow_pickle=False)
                return found
            with np.load(self.path, allow_pickle=False) as file:
                return np.asarray(file[self.name])
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise OrnsteinError(f"{self} cannot be read ({error}): make the file anew") from error

    def __str__(self) -> str:
        return f"{self.path}{f':{self.name}' if self.name else ''}"


def find_file(path: str | Path | None, *, key: str, option: str) -> Path:
    """The file that an option names. Raises OrnsteinError where it is not there."""
    if path is None:
        raise OrnsteinError(f"data={option} needs a file of images: say {key}=FILE")
    found = Path(path).expanduser()
    if not found.is_file():
        fault = "is a folder" if found.is_dir() else "does not exist"
        raise OrnsteinError(f"{key}={path} {fault}: name a file")
    return found


def list_arrays(path: Path) -> dict[str, Found]:
    """The arrays of an .npz by name, or the one of an .npy under "", from their heads alone.

    Raises:
        OrnsteinError: neither of the two, or damaged.
    """
    try:
        with path.open("rb") as file:
            start = file.read(6)
            file.seek(0)
            if start.startswith(b"\x93NUMPY"):
                shape, dtype = _head(file)
                return {"": Found(path=path, name="", shape=shape, dtype=dtype)}
            if not start.startswith(b"PK"):
                raise OrnsteinError(
                    f"{path} is neither .npz nor .npy (it begins with {start!r}): name another, or say "
                    "what a file of bare numbers holds by data=memmap data.shape=[N,H,W,C]"
                )
            with zipfile.ZipFile(file) as archive:
                found = {}
                for member in archive.namelist():
                    if member.endswith(".npy"):
                        with archive.open(member) as array:
                            shape, dtype = _head(array)
                        name = member.removesuffix(".npy")
                        found[name] = Found(path=path, name=name, shape=shape, dtype=dtype)
                return found
    except OrnsteinError:  # which is a ValueError, too
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise OrnsteinError(f"{path} cannot be read ({error}): make the file anew") from error


def raw_array(path: Path, *, shape: Sequence[int], dtype: str, offset: int = 0) -> Found:
    """A file of bare numbers. Raises OrnsteinError where it has another size than the shape asks for."""
    sides = tuple(int(side) for side in shape)
    try:
        kind = np.dtype(dtype)
    except TypeError as error:
        raise OrnsteinError(f"data.dtype={dtype} does not exist: say uint8") from error
    needed = offset + int(np.prod(sides, dtype=np.int64)) * kind.itemsize
    if path.stat().st_size != needed:
        raise OrnsteinError(
            f"data.root={path} has {path.stat().st_size:,} bytes, and data.shape={list(sides)} of {kind} behind "
            f"data.offset={offset} makes {needed:,}: say what the file holds"
        )
    return Found(path=path, name="", shape=sides, dtype=kind, offset=offset)


def check_pixels(found: Found, *, layout: str) -> Literal["nhwc", "nchw"]:
    """Where the channels of an array of images stand, from its shape and dtype alone.

    Args:
        found: the array.
        layout: "nhwc" or "nchw", or "auto": the axis of 1, 3 or 4.

    Raises:
        OrnsteinError: an array of Python objects, of floats or other numbers than bytes, of another rank, of oblong
            images, or one that fits both layouts.
    """
    if layout not in LAYOUTS:
        raise OrnsteinError(f"data.layout={layout} does not exist: choose one of {', '.join(LAYOUTS)}")
    if found.dtype.hasobject:
        raise OrnsteinError(
            f"{found} is an array of Python objects, as images of mixed sizes become, and is never unpickled: save one "
            "uint8 array (N, H, W, C) of images of one size"
        )
    if found.dtype != np.uint8:
        hint = "np.rint(x * 255) for x in [0, 1]" if found.dtype.kind == "f" else "x.astype(np.uint8) for x in 0..255"
        raise OrnsteinError(f"{found} is {found.dtype}, and images are uint8 in 0..255: save it so ({hint})")
    shape = "x".join(map(str, found.shape))
    if len(found.shape) == 3:  # grey, without an axis for it
        return _square(found, *found.shape[1:], layout="nhwc")
    if len(found.shape) != 4:
        raise OrnsteinError(f"{found} has the shape {shape}, and images are (N, H, W, C), (N, C, H, W) or (N, H, W)")
    last, first = found.shape[3], found.shape[1]
    axes = {"nhwc": last, "nchw": first}
    fits = [name for name, channels in axes.items() if channels in CHANNELS]
    fits = fits or [name for name, channels in axes.items() if channels == MOST_CHANNELS]  # to be refused by name
    if layout == "auto" and len(fits) != 1:
        why = "both the second and the last axis could be channels" if fits else "no axis of 1, 3 or 4 channels"
        raise OrnsteinError(f"{found} has the shape {shape} ({why}): say data.layout=nhwc or nchw")
    chosen = fits[0] if layout == "auto" else layout
    channels = last if chosen == "nhwc" else first
    if channels not in CHANNELS:
        what = "with transparency or in CMYK" if channels == MOST_CHANNELS else "of that many channels"
        raise OrnsteinError(
            f"{found} has {channels} channels ({shape}, {chosen}): images {what} are not read; save RGB"
        )
    sides = found.shape[1:3] if chosen == "nhwc" else found.shape[2:]
    return _square(found, *sides, layout="nhwc" if chosen == "nhwc" else "nchw")


def _square(found: Found, height: int, width: int, *, layout: Literal["nhwc", "nchw"]) -> Literal["nhwc", "nchw"]:
    if height != width:
        raise OrnsteinError(f"{found} holds images of {height}x{width}: images are squares here, so crop them first")
    return layout


class ChannelsFirst:
    """An array of images on disk or in memory that indexes like (N, C, H, W), whatever its layout.

    Safe to hand to worker processes: a memory map is mapped anew.

    Args:
        found: the array.
        layout: of it.
        rows: which of its images; None: all.
    """

    def __init__(
        self, found: Found, *, layout: Literal["nhwc", "nchw"], rows: np.ndarray | None = None, array: Any = None
    ) -> None:
        self._found, self._layout, self._rows = found, layout, rows
        self._array = found.load() if array is None else array
        if len(found.shape) == 3:
            sides: tuple[int, ...] = (1, *found.shape[1:])
        else:
            sides = (found.shape[3], *found.shape[1:3]) if layout == "nhwc" else found.shape[1:]
        self.shape: tuple[int, ...] = (found.shape[0] if rows is None else len(rows), *sides)

    @property
    def mapped(self) -> bool:
        """Whether it lies on disk."""
        return isinstance(self._array, np.memmap)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """uint8 (B, C, H, W) for B rows."""
        found = np.asarray(self._array[rows if self._rows is None else self._rows[rows]])
        if found.ndim == 3:
            return found[:, None]
        return np.ascontiguousarray(found.transpose(0, 3, 1, 2)) if self._layout == "nhwc" else found

    def take(self, rows: np.ndarray) -> "ChannelsFirst":
        """Some of the images, of the same array."""
        chosen = rows if self._rows is None else self._rows[rows]
        return ChannelsFirst(self._found, layout=self._layout, rows=chosen, array=self._array)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a map as its path, an array in memory as itself."""
        array = None if self.mapped else self._array
        return _channels_first, (self._found, self._layout, self._rows, array)


def _channels_first(found: Found, layout: Any, rows: np.ndarray | None, array: Any) -> ChannelsFirst:
    return ChannelsFirst(found, layout=layout, rows=rows, array=array)


def row_keys(images: ChannelsFirst) -> np.ndarray:
    """A content hash of each image, uint8 (N, 16)."""
    digests = []
    for start in range(0, images.shape[0], 256):
        block = images[np.arange(start, min(start + 256, images.shape[0]))]
        digests += [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in block]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16)


def stamp_of(found: Found) -> bytes:
    """Changes when the file does."""
    status = found.path.stat()
    return os.fsencode(found.path.resolve()) + f"\0{status.st_size}\0{status.st_mtime_ns}\0{found.name}".encode()


def _head(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an .npy. Raises ValueError where it is none."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran:
        raise ValueError("its axes are in Fortran's order; save np.ascontiguousarray of it")
    return shape, dtype
