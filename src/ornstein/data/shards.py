"""Arrays on disk as shards, what latents and prepared images have in common: each split a folder of `00000.npy` with
`00000.json` beside it, which holds its checksum and what belongs to its rows.

A shard's JSON appears after its arrays, so that what has one is whole. `ornstein.data.shards_write` writes them.
"""

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from ornstein.errors import OrnsteinError

INDEX = "index.json"
CHECKED_BYTES = 1 << 30


def array_path(folder: Path, split: str, number: int) -> Path:
    """Where a shard's array lies."""
    return folder / split / f"{number:05d}.npy"


def facts_path(folder: Path, split: str, number: int) -> Path:
    """Where a shard's checksum, labels and captions lie."""
    return folder / split / f"{number:05d}.json"


def checksum(path: Path) -> str:
    """sha256 (64 hex digits) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_index(folder: str | Path, *, form: str, asked: str, holds: str, command: str) -> dict[str, Any]:
    """The index of a folder of shards.

    Args:
        folder: holds the index.
        form: the `format` that this version reads.
        asked: the option as the user typed it, `data.root=FOLDER` say.
        holds: what the folder should hold, in the plural.
        command: that makes such a folder.

    Raises:
        OrnsteinError: there is no index, it is damaged, or it is of another format.
    """
    path = Path(folder).expanduser() / INDEX
    if not path.is_file():
        raise OrnsteinError(f"{asked} holds no {holds} (no {INDEX}): make them by `{command}`.")
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = index["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged_index(error, asked=asked, command=command) from error
    if str(found).rpartition(".")[0] != form.rpartition(".")[0]:
        raise OrnsteinError(f"{asked} holds {found} and no {holds}: name another folder, or make one by `{command}`.")
    if found != form:
        raise OrnsteinError(
            f"{asked} is of the format {found} and this version reads {form}: remove the folder and make it again by "
            f"`{command}`."
        )
    return index


def damaged_index(error: Exception, *, asked: str, command: str) -> OrnsteinError:
    """The sentence about an index that does not say what it should."""
    return OrnsteinError(
        f"{asked}: its {INDEX} is damaged ({error}); remove the folder and make it again by `{command}`."
    )


def whole_facts(
    facts: Path, arrays: Callable[[dict[str, Any]], dict[str, Path]], *, needs: Collection[str], verify: bool
) -> dict[str, Any] | None:
    """What a shard's JSON says; None where it is missing, or its arrays are not what it says.

    Args:
        facts: the JSON.
        arrays: the file of each array, given what the JSON says, by the prefix of its `bytes` and `sha256` there, ""
            for the shard itself.
        needs: keys that it must have.
        verify: read the arrays whole and compare their checksums; else their sizes alone are looked at.
    """
    try:
        found: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
        whole = set(needs) <= found.keys()
        for prefix, path in arrays(found).items():
            whole = whole and found[f"{prefix}bytes"] == path.stat().st_size
            whole = whole and (not verify or found[f"{prefix}sha256"] == checksum(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if whole else None


class Maps:
    """Memory maps of files, each opened when it is first asked for.

    Safe to hand to worker processes: each maps the files anew, where numpy would pickle a map as its whole content.
    """

    def __init__(self) -> None:
        self._open: dict[Path, np.ndarray] = {}

    def __getitem__(self, path: Path) -> np.ndarray:
        """The array of a `.npy` file; a plain view, since indexing a numpy memory map costs microseconds more."""
        found = self._open.get(path)
        if found is None:
            found = self._open[path] = np.load(path, mmap_mode="r").view(np.ndarray)
        return found

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def __reduce__(self) -> tuple[type["Maps"], tuple[()]]:
        """Pickle none of them."""
        return Maps, ()
