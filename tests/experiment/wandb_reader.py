"""Reads an offline ``.wandb`` file: a LevelDB-style log of protobuf records.

The file begins with 7 bytes of header; then come blocks of 32 KiB (the header counts as part of the first) of
chunks: crc32 (LE, over type byte and body), length (u16 LE), type (1 FULL, 2 FIRST, 3 MIDDLE, 4 LAST), body.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK, _HEAD = 32 * 1024, 7
_FULL, _FIRST, _LAST = 1, 2, 4


@dataclass
class WandbRun:
    """What one offline segment holds."""

    run_id: str = ""
    project: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Path]] = field(default_factory=dict)  # name -> path in it -> where the file lies
    references: dict[str, str] = field(default_factory=dict)  # path in an artifact -> what it refers to
    complete: bool = False  # the run was finished, not killed, and its last record is there


def records(path: Path) -> Iterator[bytes]:
    """The bodies of the records in the file. Raises ``ValueError`` for a wrong header or checksum."""
    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise ValueError(f"{path} is no .wandb file")
    at, parts = _HEAD, []
    while at + _HEAD <= len(data):
        room = _BLOCK - at % _BLOCK
        if room < _HEAD:  # too little left for a chunk's head: padding
            at += room
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:  # never written: the rest is zeros
            break
        body = data[at + _HEAD : at + _HEAD + length]
        if zlib.crc32(bytes([kind]) + body) != crc:
            raise ValueError(f"{path}: wrong checksum at byte {at}")
        at += _HEAD + length
        parts = [body] if kind in (_FULL, _FIRST) else [*parts, body]
        if kind in (_FULL, _LAST):
            yield b"".join(parts)


def read_wandb(path: Path) -> WandbRun:
    """Run, config, history rows, summary, files and defined metrics (name -> x axis) of a ``.wandb`` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    out = WandbRun()
    for body in records(path):
        record = Record()
        record.ParseFromString(body)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            out.run_id, out.project = record.run.run_id, record.run.project
            out.name = record.run.display_name
            out.group, out.job_type, out.tags = record.run.run_group, record.run.job_type, list(record.run.tags)
            out.config.update(_items(record.run.config.update))
        elif kind == "config":
            out.config.update(_items(record.config.update))
        elif kind == "history":
            out.history.append(_items(record.history.item))
        elif kind == "summary":
            out.summary.update(_items(record.summary.update))
        elif kind == "files":
            out.files += [each.path for each in record.files.files]
        elif kind == "artifact":
            contents = record.artifact.manifest.contents
            out.artifacts[record.artifact.name] = {each.path: Path(each.local_path) for each in contents}
            out.references.update({each.path: each.ref for each in contents if each.ref})
        elif kind == "exit":
            out.complete = True
        elif kind == "metric":
            out.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return out


def _items(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
