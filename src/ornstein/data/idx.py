"""The IDX files of MNIST and its kin: a big-endian head, then raw uint8."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ornstein.errors import OrnsteinError

UINT8 = 0x08


def read_idx(path: Path, *, dims: int) -> np.ndarray:
    """Read an IDX file, gzipped or raw, into a uint8 array with `dims` axes.

    Head: two zero bytes, the type (8: uint8), the number of axes, then each axis as a big-endian uint32.

    Raises:
        OrnsteinError: the file is not IDX, holds another type or number of axes, or is shorter or longer
            than its head says.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise OrnsteinError(f"{path} is damaged ({error}): fetch it again") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise OrnsteinError(f"{path} is not an IDX file: its first bytes are {content[:4].hex() or 'missing'}")
    kind, axes = content[2], content[3]
    if kind != UINT8 or axes != dims:
        raise OrnsteinError(
            f"{path} holds type {kind:#04x} with {axes} axes, where uint8 (0x08) with {dims} was expected: "
            "are images and labels swapped?"
        )
    head = 4 + 4 * axes
    if len(content) < head:
        raise OrnsteinError(f"{path} ends inside its head ({len(content)} bytes): fetch it again")
    shape = struct.unpack(f">{axes}I", content[4:head])
    promised, found = math.prod(shape), len(content) - head
    if promised != found:
        fault = "is truncated" if found < promised else "is too long"
        raise OrnsteinError(f"{path} {fault}: its head promises {promised} bytes of data and {found} are there")
    # A copy: an array over immutable bytes could not be handed to torch.
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(shape).copy()


def read_pair(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (N, 1, H, H), and labels, int64 (N,), that must agree in number.

    Raises:
        OrnsteinError: as `read_idx`; also for no images, images that are not square, or unequal counts.
    """
    images, labels = read_idx(images_path, dims=3), read_idx(labels_path, dims=1)
    if len(images) != len(labels):
        raise OrnsteinError(
            f"{images_path} has {len(images)} images and {labels_path} has {len(labels)} labels: "
            "they are not of one data set"
        )
    if len(images) == 0 or images.shape[1] != images.shape[2]:
        raise OrnsteinError(f"{images_path} holds an array of shape {images.shape}: square images were expected")
    return images[:, None], labels.astype(np.int64)
