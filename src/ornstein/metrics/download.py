"""Weights that no package carries, brought here: with a progress bar, whole and checked, or not at all."""

import hashlib
import os
import tempfile
import urllib.request
from pathlib import Path
from typing import IO

CONNECT_SECONDS = 10.0
_BLOCK = 1 << 18


def fetch(url: str, target: Path, *, checksum: str) -> None:
    """Fetch ``url`` into the file ``target``, showing on standard error how far it is.

    Written beside the target and moved in place once its digest is right; safe when several processes do it at once.

    Args:
        url: where the file is.
        target: the file to make; its folder is made too.
        checksum: what the SHA-256 of the file begins with.

    Raises: OSError if it cannot be had within :data:`CONNECT_SECONDS` of silence, or cannot be written;
        RuntimeError if it is another file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            digest = _stream(url, file, label=target.name)
        if not digest.startswith(checksum):
            raise RuntimeError(f'invalid hash value (expected "{checksum}", got "{digest}")')
        partial.chmod(0o644)  # mkstemp's files are its owner's alone
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _stream(url: str, file: IO[bytes], *, label: str) -> str:
    """Write what an address gives, and return its SHA-256 in hexadecimal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    digest = hashlib.sha256()
    with urllib.request.urlopen(urllib.request.Request(url), timeout=CONNECT_SECONDS) as response:
        length = response.headers.get("Content-Length")
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"fetching {label}", total=int(length) if length else None)
            while block := response.read(_BLOCK):
                file.write(block)
                digest.update(block)
                progress.advance(task, len(block))
    return digest.hexdigest()
