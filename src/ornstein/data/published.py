"""What published data sets share: found where they lie, fetched where they do not, or a sentence on how to get them."""

import hashlib
import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar

import numpy as np

from ornstein.data.bad import Bad
from ornstein.data.base import KEY_BYTES, ImageDataset, Split
from ornstein.data.fetch import TIMEOUT_S, announce, places
from ornstein.data.images import check_channels, check_size, checked_crop
from ornstein.data.remembered import STAMP_BYTES, WORTH_KEEPING, recall, remember
from ornstein.data.splits import content_key
from ornstein.data.stored import DECODING, Sources, checked_storage, map_folder, report_path, stored
from ornstein.errors import OrnsteinError

Found = TypeVar("Found")
HEAD_BYTES = 1 << 16
# What bringing a data set here may end in: no network, no such page, damage on the way, a missing helper package.
FAILURES = (OSError, ValueError, RuntimeError, ImportError, HTTPException, zipfile.BadZipFile, EOFError)


def find(
    name: str,
    root: str | None,
    *,
    seek: Callable[[Path], Found | None],
    fetch: Callable[[Path], None] | None,
    what: str,
    how: str,
    needed: int = 0,
) -> Found:
    """What `seek` finds in the first of a data set's places (`ornstein.data.fetch.places`) that has it.

    Args:
        name: of the data set, as in `data=<name>`.
        root: the one folder to look in, or None.
        seek: gives what is found in a folder, or None.
        fetch: brings the data set into a folder; None: do not.
        what: is brought, for the line that says so.
        how: one gets it by hand: the end of "Fetch ...", with `{home}` as the folder to fill.
        needed: bytes free that `fetch` needs.

    Raises:
        OrnsteinError: it is nowhere, and could not be fetched; the sentence says why, and which folder to fill.
    """
    searched = places(name, root)
    for folder in searched:
        if (found := seek(folder)) is not None:
            return found
    home, reason = searched[0], ""
    if fetch is not None:
        try:
            _check_room(home, needed)
            announce(what, home)
            with hasty():
                fetch(home)
        except FAILURES as error:
            told = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            reason = f", and fetching it failed: {told}"
        if (found := seek(home)) is not None:
            return found
    listed = " or ".join(str(folder) for folder in searched)
    raise OrnsteinError(
        f"data={name} is not in {listed}{reason}. {how.format(home=home)}, or name its folder with data.root=..."
    )


@contextmanager
def hasty() -> Iterator[None]:
    """Connections that other libraries open give up after `TIMEOUT_S` without an answer, not after minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _check_room(home: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    place = next(folder for folder in (home, *home.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OrnsteinError(f"it takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there")


def check_zip(path: Path) -> None:
    """Refuse an archive that is none, or damaged. Raises OSError."""
    if not zipfile.is_zipfile(path):
        raise OSError("what came is no zip: the address wants a browser, it seems")
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise OSError(f"its member {broken} is damaged")


class PublishedImages(ImageDataset):
    """Images of a published data set that are decoded from files, archives or tables.

    Args:
        sources: where this split's images are read from.
        keys: of these, as `source_keys` gives them.
        name, split, labels, class_names, captions: as of `ImageDataset`; labels and captions one a source.
        image_size, channels: what the images are made.
        crop: how, see `ornstein.data.images.fit`.
        storage: see `ornstein.data.stored.stored`.
        max_bad: how many that cannot be read may be left out.

    Attribute beside those of `ImageDataset`: `file_names`, what the sources call the images.

    Raises:
        OrnsteinError: an option out of its range, more bad images than `max_bad`, or no room on the disk.
    """

    def __init__(
        self,
        sources: Sources,
        *,
        keys: np.ndarray,
        name: str,
        split: Split,
        labels: np.ndarray | None,
        class_names: Sequence[str],
        captions: Sequence[str] | None = None,
        image_size: int,
        channels: int,
        crop: str,
        storage: str,
        max_bad: int,
    ) -> None:
        check_size(image_size, name=name)
        check_channels(channels)
        cut, way = checked_crop(crop), checked_storage(storage)
        bad = Bad(max_bad, where=f"data={name} ({sources.home})")
        images, kept = stored(way, sources, (len(sources), channels, image_size, image_size), crop=cut, bad=bad)
        bad.settle(report_path(sources.home))
        if not len(kept):
            raise OrnsteinError(f"no {split} image of data={name} is left in {sources.home}: fetch it again")
        super().__init__(
            images,
            name=name,
            split=split,
            labels=None if labels is None else labels[kept],
            class_names=class_names,
            captions=None if captions is None else [captions[row] for row in kept.tolist()],
            content=f"{DECODING} {cut}".encode() + keys[kept].tobytes(),
            keys=keys[kept],
        )
        self.file_names = [sources.names[row] for row in kept.tolist()]


class Some:
    """Some of the images of other sources, in an order."""

    def __init__(self, sources: Sources, rows: np.ndarray) -> None:
        self.sources, self.rows = sources, np.asarray(rows, dtype=np.int64)
        self.home = sources.home
        self.names = [sources.names[row] for row in self.rows.tolist()]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.rows)

    def __getitem__(self, row: int) -> Path | bytes:
        """What `load_image` takes."""
        return self.sources[int(self.rows[row])]

    def stamps(self) -> list[bytes]:
        """Those of the others."""
        stamps = self.sources.stamps()
        return [stamps[row] for row in self.rows.tolist()]


def source_keys(sources: Sources) -> np.ndarray:
    """A content key of each image, uint8 (N, 16): blake2b of its file's size and first 64 KB.

    Read once: they are kept in the cache folder for as long as the sources' stamps stay. What cannot be read has a key
    of its name; decoding tells of it.
    """
    stamps = [hashlib.blake2b(stamp, digest_size=STAMP_BYTES).digest() for stamp in sources.stamps()]
    place = map_folder() / f"sources-{hashlib.sha256(os.fsencode(os.path.abspath(sources.home))).hexdigest()[:24]}.npy"
    known = recall(place, width=KEY_BYTES)
    unread: set[bytes] = set()

    def look(row: int) -> bytes:
        try:
            return known.get(stamps[row]) or _content_key(sources[row])
        except Exception:  # an archive's reader has errors of its own for a damaged member
            unread.add(stamps[row])
            return content_key(sources.names[row].encode())

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(look, range(len(sources)), chunksize=64))
    news = {stamp: key for stamp, key in zip(stamps, found, strict=True) if stamp not in known and stamp not in unread}
    if len(news) >= WORTH_KEEPING:
        remember(place, known | news)
    return np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, KEY_BYTES)


def key_list(keys: np.ndarray) -> list[bytes]:
    """Content keys as `ornstein.data.splits` takes them."""
    flat = keys.tobytes()
    return [flat[start : start + KEY_BYTES] for start in range(0, len(flat), KEY_BYTES)]


def _content_key(source: Path | bytes) -> bytes:
    """Of an image's file."""
    if isinstance(source, bytes):
        return content_key(str(len(source)).encode() + source[:HEAD_BYTES])
    with source.open("rb") as file:
        return content_key(str(os.fstat(file.fileno()).st_size).encode() + file.read(HEAD_BYTES))
