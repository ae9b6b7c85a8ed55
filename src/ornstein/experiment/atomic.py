"""Files that a reader sees whole or not at all."""

import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

TMP_SUFFIX = ".tmp"


def replace_file(path: str | os.PathLike[str], write: Callable[[IO[bytes]], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it into place in one step.

    The temporary file lies in the same folder, because a move is atomic only within a file system; the data
    are on the disk before the move and the folder's entry after it, so that a power cut leaves the old file
    or the new.

    Raises:
        OSError: from the file system; ``path`` is then what it was, and the temporary file is gone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}{TMP_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # some file systems let no folder be opened; the file itself is safe by then
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically. Raises ``OSError`` as ``replace_file`` does."""
    replace_file(path, lambda file: _write_all(file, text.encode()))


def _write_all(file: IO[bytes], data: bytes) -> None:
    file.write(data)


def write_json(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, atomically; numbers that JSON lacks (nan, inf) become null.

    Scalars of torch and numpy are written as plain numbers and paths as text.

    Raises:
        TypeError: for a value that JSON cannot hold. Nothing is written then.
        OSError: as ``replace_file`` does.
    """
    write_text(path, json.dumps(plain_json(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain_json(value: Any) -> Any:
    """``value`` with JSON's own types only, as :func:`write_json` has it. Raises ``TypeError``."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"a value of type {type(value).__name__} has no place in JSON: {value!r}")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a JSON file; empty where the file is missing.

    Raises:
        ValueError: where the file is not JSON (``json.JSONDecodeError``).
    """
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
