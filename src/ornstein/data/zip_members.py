"""The members of a zip file as image sources, read where they lie: no unpacking, no lock between readers."""

import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ornstein.data.bad import Bad
from ornstein.data.remembered import STAMP_BYTES, WORTH_KEEPING, recall, remember
from ornstein.data.stored import map_folder
from ornstein.errors import OrnsteinError

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
LOCAL_HEAD = struct.Struct("<4s22xHH")  # signature, then the lengths of the name and of the extra field
ENCRYPTED = 0x1


class ZipMembers:
    """Some members of a zip file, as `ornstein.data.stored.Sources`.

    The file is opened once a process, and read by offset, so that any number of threads read at once. Pickled, it is
    its path and a table.

    Args:
        path: of the zip file.
        infos: of the members.
        base: what to leave out at the beginning of their names.

    Raises:
        OrnsteinError: members that are encrypted, or packed by another method than deflate.
    """

    def __init__(self, path: Path, infos: Sequence[zipfile.ZipInfo], *, base: str = "") -> None:
        for info in infos:
            if info.flag_bits & ENCRYPTED or info.compress_type not in METHODS:
                what = "encrypted" if info.flag_bits & ENCRYPTED else f"packed by method {info.compress_type}"
                raise OrnsteinError(
                    f"data.root={path}: {info.filename} is {what}, and images are read stored or deflated: pack the "
                    "zip file anew, without"
                )
        self.path = path
        self.home = str(path)
        self.names = [info.filename.removeprefix(base) for info in infos]
        table = [(i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type) for i in infos]
        self._table = np.array(table, dtype=np.int64).reshape(-1, 5)
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        """How many there are."""
        return len(self.names)

    def __getitem__(self, row: int) -> bytes:
        """A member's content. Raises OrnsteinError where it is damaged."""
        offset, packed_size, size, crc, method = self._table[row].tolist()
        file = self._file
        if file is None:  # two threads may both open it; each keeps the one that it reads from
            file = self._file = self.path.open("rb", buffering=0)
        descriptor = file.fileno()
        head = os.pread(descriptor, LOCAL_HEAD.size, offset)
        if len(head) < LOCAL_HEAD.size or head[:4] != b"PK\x03\x04":
            raise OrnsteinError("the zip file is damaged here (no member begins where it should)")
        _, name_size, extra_size = LOCAL_HEAD.unpack(head)
        packed = _read(descriptor, packed_size, offset + LOCAL_HEAD.size + name_size + extra_size)
        try:
            content = zlib.decompress(packed, -zlib.MAX_WBITS) if method == zipfile.ZIP_DEFLATED else packed
        except zlib.error as error:
            raise OrnsteinError("the zip file is damaged here (it does not unpack)") from error
        if len(content) != size or zlib.crc32(content) != crc:
            raise OrnsteinError("the zip file is damaged here (wrong checksum)")
        return content

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file: each process has its own."""
        return self.__dict__ | {"_file": None}

    def stamps(self) -> list[bytes]:
        """Path, size and time of the zip file, and each member's name, size and checksum."""
        status = self.path.stat()
        own = os.fsencode(self.path.resolve()) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode()
        rows = self._table[:, 2:4].tolist()
        return [own + f"{name}\0{row}".encode() for name, row in zip(self.names, rows, strict=True)]

    def take(self, rows: Sequence[int]) -> "ZipMembers":
        """Some of them."""
        found = object.__new__(ZipMembers)
        found.__dict__ |= self.__getstate__()
        found.names, found._table = [self.names[row] for row in rows], self._table[np.asarray(rows, dtype=np.int64)]
        return found

    def content_keys(self, bad: Bad) -> tuple[list[int], list[bytes]]:
        """The rows that can be read, and a hash of 16 bytes of each one's content; read once, kept in the cache folder.

        Args:
            bad: takes the others.
        """
        stamps = [hashlib.blake2b(stamp, digest_size=STAMP_BYTES).digest() for stamp in self.stamps()]
        place = map_folder() / f"keys-{hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:24]}.npy"
        known = recall(place, width=STAMP_BYTES)

        def look(row: int) -> bytes | None:
            try:
                return known.get(stamps[row]) or hashlib.blake2b(self[row], digest_size=STAMP_BYTES).digest()
            except (OSError, OrnsteinError) as error:
                bad.add(self.names[row], str(error))
            return None

        with ThreadPoolExecutor() as pool:
            found = list(pool.map(look, range(len(self))))
        news = {stamp: key for stamp, key in zip(stamps, found, strict=True) if key is not None and stamp not in known}
        if len(news) >= WORTH_KEEPING:
            remember(place, known | news)
        return [row for row, key in enumerate(found) if key is not None], [key for key in found if key is not None]


def _read(descriptor: int, size: int, offset: int) -> bytes:
    """That many bytes; fewer where the file ends. One call may give fewer than asked for."""
    pieces = []
    while size > 0 and (piece := os.pread(descriptor, size, offset)):
        pieces.append(piece)
        size, offset = size - len(piece), offset + len(piece)
    return b"".join(pieces)
