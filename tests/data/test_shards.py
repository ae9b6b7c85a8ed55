"""What latents and prepared images share: arrays that are written whole or not at all, and a disk that is full."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ornstein.data import shards_write
from ornstein.data.shards import Maps, checksum, whole_facts
from ornstein.data.shards_write import check_room, new_array, replace, save_array, told_when_full
from ornstein.errors import OrnsteinError


def full(*args: object) -> None:
    """A disk without room."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("shape", [(3, 2, 4), (0, 3, 4, 4), (1,)], ids=str)
def test_saved_arrays_are_what_numpy_saves(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    save_array(tmp_path / "a.npy", array[:, ::-1] if array.ndim > 1 else array)
    np.save(tmp_path / "b.npy", np.ascontiguousarray(array[:, ::-1]) if array.ndim > 1 else array)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_a_new_array_takes_its_room_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that is written into on a full disk would end the process; so the file has no holes, or is refused."""
    array = new_array(tmp_path / "a.npy", dtype="float32", shape=(100, 1000))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 400_000
    array[:] = 1
    del array
    assert np.load(tmp_path / "a.npy").sum() == 100_000
    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(OrnsteinError, match=r"the disk of out=.* is full .*same command again"),
        told_when_full(tmp_path),
    ):
        new_array(tmp_path / "b.npy", dtype="uint8", shape=(10,))


def test_other_errors_of_a_disk_are_not_called_full(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), told_when_full(tmp_path):
        raise PermissionError(errno.EPERM, "no")


@pytest.mark.parametrize("fails", ["write", "sync"])
def test_what_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    write: Callable[[Path], object] = full if fails == "write" else lambda place: place.write_text("after")
    if fails == "sync":
        monkeypatch.setattr(shards_write, "sync", full)
    with pytest.raises(OSError, match="No space"):
        replace(path, write)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_room_is_looked_at_beforehand(tmp_path: Path) -> None:
    check_room(tmp_path, 1, holds="images", or_else="")
    with pytest.raises(OrnsteinError, match=r"MB of images do not fit into the .* free at out=.*larger disk, or wait"):
        check_room(tmp_path, 1 << 60, holds="images", or_else=", or wait")


def test_a_shard_is_whole_or_none(tmp_path: Path) -> None:
    array, facts = tmp_path / "a.npy", tmp_path / "a.json"
    np.save(array, np.arange(5))
    told = f'"bytes": {array.stat().st_size}, "sha256": "{checksum(array)}"'
    rows = [
        ("{" + told + ', "labels": null}', True, True),
        ("{" + told + "}", False, False),
        ("{" + told.replace('"sha256": "', '"sha256": "0') + ', "labels": null}', True, False),
        ('{"bytes": 1, "sha256": "", "labels": null}', False, False),
        ("[]", False, False),
        ("{", False, False),
    ]
    for text, by_size, by_checksum in rows:
        facts.write_text(text)
        for verify, whole in ((False, by_size), (True, by_checksum)):
            found = whole_facts(facts, lambda _: {"": array}, needs=("labels",), verify=verify)
            assert (found is not None) == whole, (text, verify)


def test_maps_are_opened_once(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5))
    maps = Maps()
    assert maps[tmp_path / "a.npy"] is maps[tmp_path / "a.npy"] and len(maps) == 1
