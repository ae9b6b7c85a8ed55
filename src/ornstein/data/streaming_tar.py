"""Tar shards in webdataset's layout: files of one key are one sample, read front to back from a disk or an address."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import os
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import urlsplit

from ornstein.data.streaming import Record
from ornstein.errors import OrnsteinError

BLOCK = tarfile.BLOCKSIZE
READ = 1 << 20
TIMEOUT_S = 30
# Seconds before an address is tried again; as many tries as there are numbers, and one.
WAITS = (1.0, 2.0, 4.0)
BUSY = (408, 425, 429, 500, 502, 503, 504)
END = -1
PACKED = (".gz", ".tgz")
REMOTE = ("http", "https")
IMAGES = "jpg;jpeg;png;webp;bmp;gif;tif;tiff;ppm;img"


class Unreachable(OrnsteinError):
    """A shard that cannot be had at all: no sample of it is bad, and leaving it out would be no small thing."""


def needs_extra(error: ImportError) -> OrnsteinError:
    """The sentence about a missing package of the extra."""
    return OrnsteinError(
        f"{error.name} is not installed, and reads data of this kind: python -m pip install 'ornstein[data]'"
    )


def expand(urls: str | Sequence[str], *, key: str) -> list[str]:
    """Shards by name, in order: brace patterns, `::` between patterns, lists of them, files, folders of *.tar, globs.

    Raises:
        OrnsteinError: nothing is named, a file or folder is not there, or an address is of a kind that is not read.
    """
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise needs_extra(error) from error
    patterns = [part for each in ([urls] if isinstance(urls, str) else urls) for part in each.split("::") if part]
    if not patterns:
        raise OrnsteinError(f"data.{key} names no shards: \"data.{key}='/data/train-{{0000..0099}}.tar'\", say")
    try:
        names = [name for pattern in patterns for name in braceexpand(pattern)]
    except ValueError as error:
        raise OrnsteinError(f"data.{key}={urls}: its braces do not match ({error})") from error
    found = [shard for name in names for shard in _local_shards(name, key=key)]
    missing = [name for name in found if scheme(name) == "" and not Path(name).is_file()]
    if missing:
        listed = ", ".join(missing[:10])
        raise OrnsteinError(f"data.{key}: {len(missing)} of {len(found)} shards are not there ({listed}): name others")
    twice = sorted({name for name in found if found.count(name) > 1}) if len(set(found)) < len(found) else []
    if twice:
        raise OrnsteinError(f"data.{key} names {twice[0]} more than once: name every shard once")
    return found


def scheme(name: str) -> str:
    """ "http", "https", "pipe", "s3", ...; "" for a file."""
    if name.startswith("pipe:"):
        return "pipe"
    found = urlsplit(name).scheme if "://" in name else ""
    return "" if found == "file" else found


def _local_shards(name: str, *, key: str) -> list[str]:
    """The shards that one name without braces stands for."""
    kind = scheme(name)
    if kind in (*REMOTE, "pipe"):
        return [name]
    if kind:
        raise OrnsteinError(
            f"data.{key}: {name} is at {kind}://, which is not read here: copy the shards to a disk, name their "
            f"https:// addresses, or, if you trust the command, data.{key}='pipe:COMMAND {name}' data.trust_pipes=true"
        )
    place = Path(name.removeprefix("file://")).expanduser()
    if place.is_dir():
        shards = sorted(str(path) for path in place.iterdir() if path.name.endswith((".tar", ".tar.gz", ".tgz")))
        if not shards:
            raise OrnsteinError(f"data.{key}={name}: the folder holds no .tar files; name the shards")
        return shards
    if any(sign in place.name for sign in "*?") and not place.is_file():
        shards = sorted(str(path) for path in place.parent.glob(place.name))
        if not shards:
            raise OrnsteinError(f"data.{key}={name} fits no file; name the shards")
        return shards
    return [str(place)]


class Column:
    """Where a sample keeps something: the members whose extensions are named, `jpg;png`, or a key of its JSON,
    `json.caption` (`json.a.b` for a key within a key).
    """

    def __init__(self, spec: str, *, key: str) -> None:
        if not isinstance(spec, str) or not spec.strip():
            raise OrnsteinError(f"data.{key}={spec!r}: name an extension (cls), several (jpg;png) or json.KEY")
        self.spec = spec
        self.path = spec.split(".")[1:] if spec.startswith("json.") else []
        self.members = ("json",) if self.path else tuple(part.strip().lower() for part in spec.split(";"))

    def member(self, files: Mapping[str, bytes]) -> bytes | None:
        """The content of the first member that is there."""
        return next((files[name] for name in self.members if name in files), None)

    def value(self, files: Mapping[str, bytes]) -> Any:
        """Text of a member, or what the JSON says; None where it is not there. ValueError: it is no text or JSON."""
        content = self.member(files)
        if content is None:
            return None
        if not self.path:
            return content.decode("utf-8").strip()
        found: Any = json.loads(content)
        for part in self.path:
            found = found.get(part) if isinstance(found, dict) else None
        return found


class TarFiles:
    """Tar shards whose samples hold an image and maybe a class and a caption.

    Args:
        shards: files and addresses, see `expand`.
        image: extensions of the image, the first that a sample has counts.
        label, caption: where those are; None: nowhere.
        trust_pipes: run the commands of shards named `pipe:COMMAND`.
    """

    def __init__(
        self, shards: Sequence[str], *, image: str, label: str | None, caption: str | None, trust_pipes: bool = False
    ) -> None:
        piped = [name for name in shards if scheme(name) == "pipe"]
        if piped and not trust_pipes:
            raise OrnsteinError(
                f"{piped[0]!r} would run a command of the shell: copy the shards to a disk, name their https:// "
                "addresses, or set data.trust_pipes=true if you trust it"
            )
        self.shards = list(shards)
        self.image = Column(image, key="image_column")
        self.label = None if label is None else Column(label, key="label_column")
        self.caption = None if caption is None else Column(caption, key="caption_column")
        every = (self.image, self.label, self.caption)
        self.wanted = frozenset(name for column in every if column is not None for name in column.members)

    def identity(self, shard: int) -> str:
        """What stands for a shard's content without reading it: its name, and a file's size and time of change."""
        name = self.shards[shard]
        if scheme(name):
            return name
        status = os.stat(name)
        return f"{Path(name).resolve()}\0{status.st_size}\0{status.st_mtime_ns}"

    def read(self, shard: int, at: Any = None) -> Iterator[tuple[Record, Any]]:
        """The samples of a shard in order, each with [place in bytes, number] of what follows it.

        Where the file is damaged or cut off the last record says so.

        Raises:
            Unreachable: the shard cannot be opened, or an address failed at every try.
        """
        offset, number = (0, 0) if at is None else (int(at[0]), int(at[1]))
        if offset == END:
            return
        name = self.shards[shard]
        tries = 0
        while True:
            try:
                for key, files, behind in groups(name, offset, wanted=self.wanted):
                    offset, tries = behind, 0
                    yield self._record(shard, number, key, files), [behind, number + 1]
                    number += 1
                return
            except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
                after = f"after its first {number} samples" if number else "from its start"
                fault = f"the tar file is damaged or cut off {after} ({error})"
                yield Record(shard, number, name, fault=fault), [END, number + 1]
                return
            except (OSError, http.client.HTTPException) as error:
                tries = _pause(name, error, tries)

    def _record(self, shard: int, number: int, key: str, files: Mapping[str, bytes]) -> Record:
        name = f"{self.shards[shard]}: {key}"
        image = self.image.member(files)
        if image is None:
            held = ", ".join(sorted(files)) or "none that is named"
            reason = f"it has no member {self.image.spec.replace(';', ', ')} (of data.image_column), but {held}"
            return Record(shard, number, name, fault=reason)
        try:
            label = None if self.label is None else self.label.value(files)
            caption = None if self.caption is None else self.caption.value(files)
        except ValueError as error:  # JSON's and Unicode's errors are ValueErrors
            return Record(shard, number, name, fault=f"its class or caption cannot be read ({error})")
        for column, key_, value in ((self.label, "label_column", label), (self.caption, "caption_column", caption)):
            if column is not None and value is None:
                return Record(shard, number, name, fault=f"it has no {column.spec} (data.{key_})")
        return Record(shard, number, name, image=image, label=label, caption=_line(caption))


def _line(caption: Any) -> str | None:
    """A caption on one line; the first of several."""
    first = caption[0] if isinstance(caption, list) and caption else caption
    return None if first is None else " ".join(str(first).split())


def _pause(name: str, error: Exception, tries: int) -> int:
    """Waits before an address is tried again; how often it has failed now. Raises Unreachable at the end of it."""
    again = scheme(name) in REMOTE and (not isinstance(error, urllib.error.HTTPError) or error.code in BUSY)
    if not again or tries == len(WAITS):
        often = f" at {tries + 1} tries" if tries else ""
        raise Unreachable(
            f"the shard {name} cannot be read{often} ({error}): look at the address or the file, and resume the run"
        ) from error
    time.sleep(WAITS[tries])
    return tries + 1


def groups(name: str, offset: int, *, wanted: frozenset[str]) -> Iterator[tuple[str, dict[str, bytes], int]]:
    """Key, wanted members by extension, and the place behind each sample of a tar file from a place on."""
    from webdataset.tariterators import base_plus_ext

    key: str | None = None
    files: dict[str, bytes] = {}
    with _Forward(name, offset) as file:
        for member in _members(file):
            base, extension = base_plus_ext(member.info.name)
            if base is None or not member.info.isreg() or _is_meta(member.info.name):
                continue
            if base != key:
                if key is not None:
                    yield key, files, member.info.offset
                key, files = base, {}
            if extension.lower() in wanted:
                files[extension.lower()] = member.read()
        if key is not None:
            yield key, files, END


def _is_meta(name: str) -> bool:
    """Whether a member is webdataset's own note and no sample."""
    return name.startswith("__") and name.partition("/")[0].endswith("__")


class _Member(Protocol):
    """A member of a tar file, and its content."""

    info: tarfile.TarInfo

    def read(self) -> bytes: ...


class _TarMember:
    def __init__(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        self.tar, self.info = tar, info

    def read(self) -> bytes:
        opened = self.tar.extractfile(self.info)
        return b"" if opened is None else opened.read()


def _members(file: _Forward) -> Iterator[_Member]:
    """Members from where a file stands; tarfile.ReadError where it does not end as a tar file does."""
    with tarfile.TarFile(fileobj=cast(Any, file)) as tar:
        while (info := tar.next()) is not None:
            yield _TarMember(tar, info)
            tar.members.clear()  # type: ignore[attr-defined]
        # tarfile takes a damaged head, or none, for the end.
        if file.last.strip(b"\0"):
            raise tarfile.ReadError("a damaged head")
        if not file.last:
            raise tarfile.ReadError("unexpected end")


class _Forward:
    """A file that is only ever read forward, as `tarfile` needs one: of a disk, an address or a command, unpacked.

    `last` is what was read last: at the end of a tar file a block of zeros.
    """

    def __init__(self, name: str, offset: int) -> None:
        self.last = b""
        self._place = 0
        self._raw, self._file, self._place = _opened(name, offset)
        self.seek(offset)

    def __enter__(self) -> _Forward:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._raw.close()

    def tell(self) -> int:
        """Where the file stands, in unpacked bytes."""
        return self._place

    def read(self, size: int) -> bytes:
        """The next bytes, fewer only at the end."""
        pieces = []
        while size > 0 and (piece := self._file.read(min(size, READ))):
            pieces.append(piece)
            size -= len(piece)
        self.last = b"".join(pieces)
        self._place += len(self.last)
        return self.last

    def seek(self, place: int) -> int:
        """Goes forward to a place: by a jump in a file, by reading elsewhere."""
        if place < self._place:
            raise OSError(f"cannot go back from {self._place} to {place}")
        if place > self._place and isinstance(self._file, io.BufferedReader):  # a file of a disk, not packed
            self._file.seek(place)
            self._place = place
        while self._place < place and self.read(min(READ, place - self._place)):
            pass
        return self._place


def _opened(name: str, offset: int) -> tuple[BinaryIO, BinaryIO, int]:
    """The bytes of a shard, as they lie there and unpacked, and the place where they begin."""
    kind, begin = scheme(name), 0
    if kind == "pipe":
        from webdataset.gopen import gopen

        raw = cast(BinaryIO, gopen(name))
    elif kind:
        raw, begin = _address(name, 0 if name.endswith(PACKED) else offset)
    else:
        raw = open(name.removeprefix("file://"), "rb")  # noqa: SIM115 - _Forward closes it
    unpacked = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if name.endswith(PACKED) else raw
    return raw, unpacked, begin


def _address(url: str, offset: int) -> tuple[BinaryIO, int]:
    """What an address gives, from a place on where the server can, and the place where it begins."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    return cast(BinaryIO, _Whole(answer)), offset if answer.status == 206 else 0


class _Whole:
    """An answer that says so where the connection ends before all of it has come."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        length = answer.headers.get("Content-Length")
        self.left = None if length is None else int(length)

    def read(self, size: int = -1) -> bytes:
        """Its next bytes. OSError: fewer came than were announced."""
        piece: bytes = self.answer.read(size)
        if self.left is not None:
            self.left -= len(piece)
            if not piece and size != 0 and self.left > 0:
                raise OSError(f"the connection ended {self.left} bytes early")
        return piece

    def close(self) -> None:
        """Closes the connection."""
        self.answer.close()
