"""Reading IDX files, whole and damaged."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from ornstein.data.idx import read_idx, read_pair
from ornstein.errors import OrnsteinError

IMAGES = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
HEAD = bytes([0, 0, 8, 3]) + struct.pack(">3I", 3, 4, 4)
WHOLE = HEAD + IMAGES.tobytes()
LABELS = bytes([0, 0, 8, 1]) + struct.pack(">I", 3) + bytes([2, 0, 1])


@pytest.mark.parametrize("content", [WHOLE, gzip.compress(WHOLE)], ids=["raw", "gzipped"])
def test_reads_what_was_written(tmp_path: Path, content: bytes) -> None:
    """The suffix is not asked: content tells gzip from raw."""
    path = tmp_path / "images"
    path.write_bytes(content)
    np.testing.assert_array_equal(read_idx(path, dims=3), IMAGES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG\r\n\x1a\n", "not an IDX file"),
        (bytes([0, 0, 13, 3]) + WHOLE[4:], "type 0x0d"),
        (LABELS, "1 axes.*swapped"),
        (WHOLE[:9], "inside its head"),
        (WHOLE[:-1], "truncated: its head promises 48 bytes of data and 47"),
        (WHOLE + b"x", "too long: its head promises 48 bytes of data and 49"),
        (HEAD[:4] + struct.pack(">3I", 2**31, 2**31, 4), "truncated"),
        (gzip.compress(WHOLE)[:-12], "damaged"),
        (gzip.compress(WHOLE)[:-8] + bytes(8), "damaged"),
    ],
    ids=["empty", "png", "type", "axes", "head", "short", "long", "overflow", "gzip-cut", "gzip-crc"],
)
def test_refuses_damage(tmp_path: Path, content: bytes, message: str) -> None:
    """Every damage is one sentence that names the file."""
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(OrnsteinError, match=message) as caught:
        read_idx(path, dims=3)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (HEAD[:4] + struct.pack(">3I", 2, 4, 4) + bytes(32), "2 images and .* 3 labels"),
        (HEAD[:4] + struct.pack(">3I", 3, 4, 2) + bytes(24), "square"),
    ],
    ids=["count", "square"],
)
def test_pair_must_agree(tmp_path: Path, images: bytes, message: str) -> None:
    """Images and labels of different data sets are not put together."""
    (tmp_path / "images").write_bytes(images)
    (tmp_path / "labels").write_bytes(LABELS)
    with pytest.raises(OrnsteinError, match=message):
        read_pair(tmp_path / "images", tmp_path / "labels")


def test_empty_pair_is_refused(tmp_path: Path) -> None:
    """No images at all are no data set."""
    (tmp_path / "images").write_bytes(HEAD[:4] + struct.pack(">3I", 0, 4, 4))
    (tmp_path / "labels").write_bytes(LABELS[:4] + struct.pack(">I", 0))
    with pytest.raises(OrnsteinError, match="square images were expected"):
        read_pair(tmp_path / "images", tmp_path / "labels")
