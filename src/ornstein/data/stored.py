"""Image files as an array: decoded once, into memory or a memory map, or at every access where disk is short."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from ornstein.data.bad import Bad, BadImage, write_json
from ornstein.data.base import Images, RowsOf
from ornstein.data.fetch import cache_dir
from ornstein.data.images import load_image
from ornstein.data.options import STORAGES, Crop, Storage
from ornstein.data.remembered import STAMP_BYTES, WORTH_KEEPING, recall, remember
from ornstein.errors import OrnsteinError

MEMORY_LIMIT = 1 << 28
BAR_FROM = 2000
# Part of the name of every memory map: a change of the decoding must not find maps of before.
DECODING = "1"


class Sources(Protocol):
    """Where images are read from, one by one: files of a folder, members of an archive.

    Picklable; `home` says what holds them, the same from run to run; `names` are what messages call them, no two
    alike.
    """

    @property
    def home(self) -> str:
        """The folder, or the archive's path."""

    @property
    def names(self) -> Sequence[str]:
        """One for each."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, row: int, /) -> Path | bytes:
        """What `load_image` takes."""

    def stamps(self) -> list[bytes]:
        """For each something that changes when the image does, without reading it: path, size and time of a file."""


class Files:
    """The sources that are files below a folder, named by their place in it."""

    def __init__(self, paths: Sequence[Path], *, base: Path) -> None:
        self.paths = list(paths)
        self.base = base
        self.home = str(base)
        self.names = [str(path.relative_to(base)) if path.is_relative_to(base) else str(path) for path in self.paths]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.paths)

    def __getitem__(self, row: int) -> Path:
        """The path."""
        return self.paths[row]

    def stamps(self) -> list[bytes]:
        """Path, size and time of change."""
        return stamps_of(self.paths)


def stamps_of(paths: Iterable[Path]) -> list[bytes]:
    """Path, size and time of change of each file; the path alone of one that is gone."""
    homes: dict[Path, Path] = {}
    found = []
    for path in paths:
        home = homes.get(path.parent)
        if home is None:
            home = homes[path.parent] = path.parent.resolve()
        try:
            status = path.stat()
        except OSError:
            found.append(os.fsencode(home / path.name))
            continue
        found.append(os.fsencode(home / path.name) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return found


class LazyImages:
    """Images that index like an array (N, C, H, W) and decode on the way out.

    Raises:
        BadImage: an OrnsteinError that names the image which cannot be read (any more).
    """

    def __init__(self, sources: Sources, shape: tuple[int, ...], *, crop: Crop = "adm", checked: bool = False) -> None:
        self.sources = sources
        self.shape = shape
        self.crop: Crop = crop
        self.checked = checked

    @property
    def names(self) -> Sequence[str]:
        """What messages call the images."""
        return self.sources.names

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Decode the images at `rows`, (B,) or (B, 1...): uint8 (B, C, H, W)."""
        decoded = [self._decode(row) for row in np.ravel(rows).tolist()]
        return np.stack(decoded) if decoded else np.empty((0, *self.shape[1:]), dtype=np.uint8)

    def _decode(self, row: int) -> np.ndarray:
        try:
            return decode(self.sources, row, self.shape, self.crop)
        except BadImage as error:
            if not self.checked:
                raise BadImage(
                    f"{error.name} of {self.sources.home} cannot be used ({error.reason}), and data.storage=unchecked "
                    "meets such images only when their turn comes: repair or remove it and resume the run, or have all "
                    "of them named beforehand by data.storage=lazy",
                    name=error.name,
                    reason=error.reason,
                ) from error
            raise BadImage(
                f"{error.name} of {self.sources.home} can no longer be read ({error.reason}): it was whole when the "
                "data were set up, so restore it and resume the run",
                name=error.name,
                reason=error.reason,
            ) from error


class MappedImages:
    """A read-only memory map of a .npy file that indexes like an array; worker processes open it anew.

    A numpy memory map would be pickled as its whole content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = np.load(path, mmap_mode="r")
        self.shape: tuple[int, ...] = self._map.shape

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Copy rows out: uint8 (B, C, H, W)."""
        return np.asarray(self._map[rows])

    def __reduce__(self) -> tuple[type["MappedImages"], tuple[Path]]:
        """Pickle the path alone."""
        return MappedImages, (self.path,)


def checked_storage(storage: str) -> Storage:
    """`storage` itself, or an error that names what there is."""
    for known in STORAGES:
        if storage == known:
            return known
    raise OrnsteinError(f"data.storage={storage} does not exist: choose one of {', '.join(STORAGES)}")


def stored(
    storage: Storage, sources: Sources, shape: tuple[int, ...], *, crop: Crop = "adm", bad: Bad
) -> tuple[Images, np.ndarray]:
    """The images of some sources in the way that was asked for, without those that cannot be read.

    Args:
        storage: "memory" holds uint8 arrays; "mapped" decodes once into a file of the cache folder and maps it, which
            any number of processes share; "lazy" decodes at every access, after every image has been decoded once to
            see that it can be, which later runs need not do again; "unchecked" is that without looking; "auto" is
            "memory" up to 256 MB, "mapped" above.
        shape: (N, C, H, W), N the number of sources.
        crop: how images come to that size.
        bad: takes what cannot be read. The caller settles it.

    Returns the images that were kept and their rows among the sources, int64 (M,), rising.

    Raises:
        OrnsteinError: no room for the memory map.
    """
    size = int(np.prod(shape, dtype=np.int64))
    everything = np.arange(len(sources), dtype=np.int64)
    if storage == "unchecked":
        return LazyImages(sources, shape, crop=crop), everything
    if storage == "lazy":
        kept = verify(sources, shape, crop=crop, bad=bad)
        return _rows(LazyImages(sources, shape, crop=crop, checked=True), kept)
    if storage == "memory" or (storage == "auto" and size <= MEMORY_LIMIT):
        images = np.zeros(shape, dtype=np.uint8)
        kept = _kept(len(sources), decode_all(sources, everything, shape, crop=crop, bad=bad, put=images.__setitem__))
        return (images, kept) if len(kept) == len(images) else (images[kept], kept)
    return _mapped(sources, shape, crop=crop, bad=bad)


def verify(sources: Sources, shape: tuple[int, ...], *, crop: Crop, bad: Bad) -> np.ndarray:
    """Decode every image that has not been seen to decode before; the rows that do, int64 (M,)."""
    name = hashlib.sha256(repr((DECODING, shape[1:], crop, os.path.abspath(sources.home))).encode()).hexdigest()
    place = map_folder() / f"readable-{name[:24]}.npy"
    stamps = [hashlib.blake2b(stamp, digest_size=STAMP_BYTES).digest() for stamp in sources.stamps()]
    known = recall(place, width=0)
    unknown = np.array([row for row, stamp in enumerate(stamps) if stamp not in known], dtype=np.int64)
    faults = decode_all(sources, unknown, shape, crop=crop, bad=bad, what="checking images")
    news = {stamps[row]: b"" for row in unknown.tolist() if row not in faults}
    if len(news) >= WORTH_KEEPING:
        remember(place, known | news)
    return _kept(len(sources), faults)


def decode(sources: Sources, row: int, shape: tuple[int, ...], crop: Crop) -> np.ndarray:
    """One image, uint8 (C, H, W). Raises BadImage."""
    _, channels, height, width = shape
    name = sources.names[row]
    try:
        source = sources[row]
    except BadImage:
        raise
    # An archive's reader has errors of its own for a damaged member.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise BadImage(f"{name}: {reason}", name=name, reason=reason) from error
    return load_image(source, size=(height, width), channels=channels, crop=crop, name=name)


def decode_all(
    sources: Sources,
    rows: np.ndarray,
    shape: tuple[int, ...],
    *,
    crop: Crop,
    bad: Bad,
    put: Callable[[int, np.ndarray], None] | None = None,
    what: str = "decoding images",
) -> dict[int, str]:
    """Decode some rows, in threads, and hand each to `put`; a progress bar where there are many.

    Returns the reasons of the rows that cannot be read, which `bad` is told too.
    """
    from rich.console import Console
    from rich.progress import Progress

    faults: dict[int, str] = {}

    def one(row: int) -> None:
        try:
            image = decode(sources, row, shape, crop)
        except BadImage as error:
            bad.add(sources.names[row], error.reason)
            faults[row] = error.reason
            return
        if put is not None:
            put(row, image)

    console = Console(stderr=True)
    quiet = len(rows) < BAR_FROM or not console.is_terminal
    # Pillow decodes and resizes outside the interpreter's lock, so threads do.
    with ThreadPoolExecutor() as pool, Progress(console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task(what, total=len(rows))
        waiting = iter(rows.tolist())
        while block := list(islice(waiting, 256)):
            list(pool.map(one, block))
            progress.advance(task, len(block))
    return faults


def map_folder() -> Path:
    """Where decoded images, and what is known of files, lie."""
    return cache_dir() / "image_folder"


def report_path(home: str | os.PathLike[str]) -> Path:
    """Where the report on the bad images of a folder lies: beside its decoded images."""
    return map_folder() / f"bad-{hashlib.sha256(os.fsencode(os.path.abspath(home))).hexdigest()[:24]}.json"


def _kept(count: int, faults: Iterable[int]) -> np.ndarray:
    """All rows but those."""
    return np.setdiff1d(np.arange(count, dtype=np.int64), np.fromiter(faults, dtype=np.int64))


def _rows(images: Images, kept: np.ndarray) -> tuple[Images, np.ndarray]:
    """The kept rows of an array, and which they are."""
    return (images if len(kept) == images.shape[0] else RowsOf(images, kept)), kept


def _mapped(sources: Sources, shape: tuple[int, ...], *, crop: Crop, bad: Bad) -> tuple[Images, np.ndarray]:
    """The images as a read-only memory map of a file in the cache folder, made if it is not there.

    Its name is a digest of the sources' stamps and of how they are decoded; it appears whole or not at all. Where
    some could not be read their rows are zeros, a JSON beside it says which, and it counts only together with that.
    """
    digest = hashlib.sha256(repr((DECODING, shape) if crop == "adm" else (DECODING, shape, crop)).encode())
    for stamp in sources.stamps():
        digest.update(stamp)
    whole = map_folder() / f"{digest.hexdigest()[:32]}.npy"
    if whole.is_file():
        return _rows(MappedImages(whole), np.arange(len(sources), dtype=np.int64))
    holed, listed = whole.with_suffix(".holes.npy"), whole.with_suffix(".holes.json")
    faults = _read_holes(listed) if holed.is_file() else None
    if faults is None:
        faults = _make_map(sources, shape, crop=crop, bad=bad, whole=whole, holed=holed, listed=listed)
    for row, reason in faults.items():
        bad.add(sources.names[row], reason)
    return _rows(MappedImages(holed if faults else whole), _kept(len(sources), faults))


def _make_map(
    sources: Sources, shape: tuple[int, ...], *, crop: Crop, bad: Bad, whole: Path, holed: Path, listed: Path
) -> dict[int, str]:
    """Write the map, under the name that says whether it has holes; the reasons of those."""
    folder = whole.parent
    needed = int(np.prod(shape, dtype=np.int64))
    name = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise _no_room(needed, free, folder)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            images = np.lib.format.open_memmap(name, mode="w+", dtype=np.uint8, shape=shape)
            # A write into a map that finds the disk full ends the process: take the room beforehand.
            if needed and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, os.fstat(handle).st_size)
        finally:
            os.close(handle)
        rows = np.arange(len(sources), dtype=np.int64)
        faults = decode_all(sources, rows, shape, crop=crop, bad=bad, put=images.__setitem__)
        images.flush()
        if faults:
            write_json(listed, {"holes": [[row, faults[row]] for row in sorted(faults)]})
        Path(name).replace(holed if faults else whole)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(needed, shutil.disk_usage(folder).free, folder) from error
        raise OrnsteinError(
            f"decoded images cannot be kept in {folder} ({error.strerror or error}): set XDG_CACHE_HOME to a folder "
            "that can be written to, or data.storage=lazy"
        ) from error
    finally:
        if name:
            Path(name).unlink(missing_ok=True)
    return faults


def _read_holes(path: Path) -> dict[int, str] | None:
    """The rows that a map lacks; None where that cannot be told, so that the map is made anew."""
    try:
        holes = cast("list[list[Any]]", json.loads(path.read_text(encoding="utf-8"))["holes"])
        return {int(row): str(reason) for row, reason in holes} or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _no_room(needed: int, free: int, folder: Path) -> OrnsteinError:
    return OrnsteinError(
        f"{needed >> 20} MB of decoded images do not fit into the {free >> 20} MB free at "
        f"{folder}: set XDG_CACHE_HOME to a larger disk, or data.storage=lazy"
    )
