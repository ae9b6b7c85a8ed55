"""Captions' embeddings on disk: one folder an encoder, in shards that are written once and never changed.

A shard holds the embeddings of some captions under the digests of their texts and appears whole or not at all; any
number of processes read and add to one folder. Those that encode take turns, a shard each, so that two runs that start
together share the work.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError

log = logging.getLogger(__name__)
SHARD_BYTES = 1 << 26
_DIGEST = 16
Encode = Callable[[Sequence[str]], dict[str, Tensor]]


def cache_dir() -> Path:
    """Where embeddings lie: ``ornstein/text`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ornstein" / "text"


class EmbeddingCache:
    """The embeddings of one encoder at one length, layer and precision.

    Args:
        folder: its own; made when the first shard is written.
        row_bytes: about what one caption takes, from which follows how many make a shard.
    """

    def __init__(self, folder: Path, *, row_bytes: int) -> None:
        self.folder = folder
        self.shard_rows = max(64, SHARD_BYTES // max(1, row_bytes))
        self._names: set[str] = set()
        self._shards: list[dict[str, Tensor]] = []
        self._places: dict[bytes, tuple[int, int]] = {}

    def refresh(self) -> None:
        """Takes in the shards that others have added. A damaged one is told of and passed over."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._names:
                self._names.add(path.name)
                self._take_in(path)

    def missing(self, captions: Sequence[str]) -> list[str]:
        """Those that are not in the shards taken in so far."""
        return [caption for caption in captions if _digest(caption) not in self._places]

    def fill(
        self, captions: Sequence[str], encode: Encode, *, advance: Callable[[int], None] = lambda count: None
    ) -> None:
        """Encodes and keeps what is not there yet.

        Args:
            captions: distinct texts.
            encode: texts to named tensors (B, ...).
            advance: called with how many more captions are there, whoever encoded them.

        Raises:
            OrnsteinError: a shard cannot be written.
        """
        self.refresh()
        for start in range(0, len(captions), self.shard_rows):
            block = captions[start : start + self.shard_rows]
            if self.missing(block):
                with self._turn():
                    self.refresh()
                    todo = self.missing(block)
                    if todo:
                        self._write(todo, encode(todo))
            advance(len(block))

    def take(self, captions: Sequence[str], *, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors (B, ...) of those names for captions that are there. Raises KeyError for one that is not."""
        places = [self._places[_digest(caption)] for caption in captions]
        return {name: torch.stack([self._shards[shard][name][row] for shard, row in places]) for name in names}

    def _write(self, captions: Sequence[str], found: dict[str, Tensor]) -> None:
        digests = [_digest(caption) for caption in captions]
        table = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).reshape(-1, _DIGEST)
        tensors = {"digest": table, **{name: value.contiguous() for name, value in found.items()}}
        name = hashlib.sha256(b"".join(digests)).hexdigest()[:24] + ".safetensors"
        try:
            _write_whole(self.folder / name, tensors)
        except OSError as error:
            raise OrnsteinError(
                f"captions' embeddings cannot be written to {self.folder} ({error.strerror or error}): make room, or "
                "name another folder with conditioner.cache=FOLDER."
            ) from error
        self._names.add(name)
        self._add(tensors)

    def _take_in(self, path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)  # memory-mapped: rows that nobody asks for are not read
        except (OSError, SafetensorError) as error:
            log.warning("%s is damaged (%s) and passed over; its captions are encoded again.", path, error)
            return
        if "digest" in tensors:
            self._add(tensors)

    def _add(self, tensors: dict[str, Tensor]) -> None:
        shard = len(self._shards)
        self._shards.append(tensors)
        digests = tensors["digest"].numpy().tobytes()
        for row in range(len(digests) // _DIGEST):
            self._places.setdefault(digests[row * _DIGEST : (row + 1) * _DIGEST], (shard, row))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One process at a time encodes; a file system without locks costs double work and nothing else."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                log.debug("%s lies on a file system without locks", self.folder)
            yield


def _write_whole(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}-{os.getpid()}-{secrets.token_hex(3)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(save(tensors))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _digest(caption: str) -> bytes:
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest()[:_DIGEST]
