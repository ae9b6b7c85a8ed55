"""W&B's offline ``.wandb`` files, record by record: a log in LevelDB's format, of protobuf messages.

After 7 bytes of header come blocks of 32 KiB (the header counts as part of the first) of chunks: crc32 (LE, over type
byte and body), length (u16 LE), type (1 whole, 2 first, 3 middle, 4 last), body. A chunk needs 7 bytes and a byte of
body; what is left of a block without room for them is zeros.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from ornstein.experiment.atomic import replace_file

HEADER = 7
_MAGIC = b":W&B"
_BLOCK, _HEAD = 32 * 1024, 7
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def is_segment(path: Path) -> bool:
    """Whether a file is of the form that is read here, or has not got so far as to have one. Raises ``OSError``."""
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    return _MAGIC.startswith(start)


def read_records(path: Path) -> Iterator[bytes]:
    """The bodies of the whole records in a file; what a killed writer left torn ends it. Raises ``OSError``."""
    data = path.read_bytes()
    if data[: len(_MAGIC)] != _MAGIC:
        return
    at, parts = HEADER, list[bytes]()
    while at + _HEAD <= len(data):
        room = _BLOCK - at % _BLOCK
        if room < _HEAD:
            at += room
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, at)
        body = data[at + _HEAD : at + _HEAD + length]
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or zlib.crc32(bytes([kind]) + body) != crc:
            return
        at += _HEAD + length
        parts = [body] if kind in (_WHOLE, _FIRST) else [*parts, body]
        if kind in (_WHOLE, _LAST):
            yield b"".join(parts)


def replace_records(path: Path, bodies: Iterable[bytes]) -> None:
    """Has a file hold these records, under the header that it has, atomically. Raises ``OSError``."""
    header = path.read_bytes()[:HEADER]
    kept = list(bodies)

    def write(file: IO[bytes]) -> None:
        file.write(header)
        at = HEADER
        for body in kept:
            at = _write_record(file, body, at)

    replace_file(path, write)


def _write_record(file: IO[bytes], body: bytes, at: int) -> int:
    first = True
    while first or body:
        room = _BLOCK - at % _BLOCK
        if room < _HEAD:
            file.write(bytes(room))
            at += room
            continue
        part, body = body[: room - _HEAD], body[room - _HEAD :]
        kind = (_WHOLE if first else _LAST) if not body else (_FIRST if first else _MIDDLE)
        file.write(struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part)
        at += _HEAD + len(part)
        first = False
    return at
