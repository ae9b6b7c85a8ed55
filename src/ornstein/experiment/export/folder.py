"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ornstein.errors import OrnsteinError


def check_free(out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The place of an export, refused where something is in the way.

    Raises:
        OrnsteinError: a file, or a folder that holds something and is not to be overwritten.
    """
    place = Path(out).expanduser()
    if place.exists() and not place.is_dir():
        raise OrnsteinError(f"out={out} is a file: name a folder, which the export makes.")
    if place.is_dir() and any(place.iterdir()):
        if not overwrite:
            raise OrnsteinError(f"out={out} holds something already: name another folder, or add overwrite=true.")
        if not (place / EXPORTED).is_file():
            raise OrnsteinError(f"out={out} holds something that is no export, which overwrite=true leaves alone.")
    return place


EXPORTED = "ornstein.json"  # what every export holds: its run's config, and what was exported


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """An empty folder beside ``place`` that takes its place at the end; after an error nothing is left of it.

    An export that was there before stays until then.

    Raises:
        OrnsteinError: the file system refuses.
    """
    temporary = place.absolute().with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _move(temporary, place)
    except OSError as error:
        raise OrnsteinError(
            f"the export to {place} could not be written ({error.strerror or error}): make room or name another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, place: Path) -> None:
    if not place.exists():
        os.replace(temporary, place)
        return
    # A folder that is not empty cannot be replaced in one step: the old one steps aside, and comes back on failure.
    aside = temporary.with_suffix(".old")
    os.replace(place, aside)
    try:
        os.replace(temporary, place)
    except OSError:
        os.replace(aside, place)
        raise
    shutil.rmtree(aside, ignore_errors=True)
