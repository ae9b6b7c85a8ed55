"""Samples kept for others' evaluators: one ``.npz`` in ADM's layout, or a folder of PNG files.

Both are written batch by batch, so that memory does not grow with the number of samples, and appear under their name
when they are whole: what is cut off leaves nothing. Several processes write one file together: each its share of the
samples, the first of them the whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ornstein.errors import OrnsteinError
from ornstein.experiment.atomic import TMP_SUFFIX

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FORMATS = ("npz", "png")
_CHUNK = 1 << 22  # bytes copied at once


def check_format(value: Any, *, key: str = "keep_samples") -> str | None:
    """``npz``, ``png`` or None.

    Raises:
        OrnsteinError: for anything else.
    """
    if value is None or value in FORMATS:
        return None if value is None else str(value)
    raise OrnsteinError(f"{key}={value} is unknown: choose npz (ADM's layout), png, or null to keep no samples.")


class NpzSamples:
    """``samples.npz`` as openai/guided-diffusion's evaluator reads it, which EDM's and others' do as well.

    ``arr_0``: uint8 ``(N, H, W, 3)``, grey images with their channel three times; ``arr_1``: int64 ``(N,)``, the
    labels, where samples have them. Stored without compression, so that ``numpy.load`` reads it at disk speed.

    Source: Dhariwal and Nichol 2021 (arXiv 2105.05233), the layout of their sample batches.

    Args:
        path: of the file.
        count: samples in all, known beforehand.
        channels: 3 repeats the channel of grey images; None keeps the images' own.
        rank, world: this process among those that write the file; ranks hold consecutive shares.
    """

    def __init__(
        self, path: str | Path, count: int, *, channels: int | None = 3, rank: int = 0, world: int = 1
    ) -> None:
        self.path, self.count, self.channels, self.rank, self.world = Path(path), count, channels, rank, world
        self._labels: list[np.ndarray] = []
        self._archive: zipfile.ZipFile | None = None
        self._file: IO[bytes] | None = None
        self._shape: tuple[int, ...] = ()
        self._written = 0

    def add(self, images: Tensor, labels: Tensor | None = None, index: Tensor | None = None) -> None:
        """Appends uint8 images (B, C, H, W) and their labels (B,), in the order in which they come.

        Raises:
            OrnsteinError: images of several sizes, or a full disk; nothing of the file stays then.
        """
        with self._told():
            pixels = images.permute(0, 2, 3, 1).cpu()
            if self.channels is not None and pixels.shape[-1] != self.channels:
                pixels = pixels.expand(*pixels.shape[:-1], self.channels)
            if self._file is None:
                self._begin(tuple(pixels.shape[1:]))
            if tuple(pixels.shape[1:]) != self._shape:
                raise OrnsteinError(
                    f"{self.path} holds images of one size, and these samples have several: choose keep_samples=png, "
                    "or one size by size=[HEIGHT,WIDTH]."
                )
            assert self._file is not None
            self._file.write(pixels.contiguous().numpy().tobytes())
            self._written += len(pixels)
            if labels is not None:
                self._labels.append(labels.cpu().numpy().astype("int64"))

    def close(self) -> None:
        """This process has no more samples. Others than the first leave their share beside the file.

        Raises:
            OrnsteinError: the disk is full.
        """
        import numpy as np

        if self.rank and self._file is not None:
            with self._told():
                if self._labels:
                    with open(self._part(self.rank, "labels"), "wb") as file:
                        file.write(np.concatenate(self._labels).tobytes())
                self._file.close()

    def finish(self) -> Path:
        """Makes the file from all shares; by the first process, when the others have closed.

        Raises:
            OrnsteinError: the disk is full, or there are not as many samples as were promised.
        """
        import numpy as np

        with self._told():
            assert self._archive is not None and self._file is not None
            labels = [part.tobytes() for part in self._labels]
            for rank in range(1, self.world):
                part = self._part(rank)
                if part.exists():
                    with open(part, "rb") as file:
                        shutil.copyfileobj(file, self._file, _CHUNK)
                    self._written += part.stat().st_size // int(np.prod(self._shape))
                    part.unlink()
                if (named := self._part(rank, "labels")).exists():
                    labels.append(named.read_bytes())
                    named.unlink()
            self._file.close()
            if self._written != self.count:
                raise OrnsteinError(f"{self.path} should hold {self.count} samples, and {self._written} were drawn.")
            if labels:
                values = np.frombuffer(b"".join(labels), dtype="int64")
                with self._archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, values, allow_pickle=False)
            self._archive.close()
            with open(self._part(0), "rb+") as whole:
                os.fsync(whole.fileno())
            os.replace(self._part(0), self.path)
        return self.path

    def discard(self) -> None:
        """Removes what was written so far; nothing where the file is whole."""
        for handle in (self._file, self._archive):
            if handle is not None:
                with contextlib.suppress(OSError, ValueError):
                    handle.close()
        for rank in range(self.world) if self.rank == 0 else (self.rank,):
            for kind in ("", "labels"):
                self._part(rank, kind).unlink(missing_ok=True)

    def _begin(self, shape: tuple[int, ...]) -> None:
        import numpy as np

        self._shape = shape
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_room(self.path, self.count * int(np.prod(shape)))
        if self.rank:
            self._file = open(self._part(self.rank), "wb")  # noqa: SIM115  (stays open from batch to batch)
            return
        self._archive = zipfile.ZipFile(self._part(0), "w", zipfile.ZIP_STORED)
        self._file = self._archive.open("arr_0.npy", "w", force_zip64=True)
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *shape)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def _part(self, rank: int, kind: str = "") -> Path:
        """A name that ``RunDirectory.lock`` sweeps up after a process that was killed."""
        return self.path.with_name(f".{self.path.name}.{rank}{kind}{TMP_SUFFIX}")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard()
            raise _unwritten(self.path, error) from error
        except BaseException:
            self.discard()
            raise


class PngSamples:
    """A folder of ``000123.png``, named by the samples' numbers; it gets its name when all of them are there.

    Args:
        path: of the folder.
        count: samples in all.
    """

    def __init__(self, path: str | Path, count: int) -> None:
        self.path, self.count = Path(path), count
        self._partial = self.path.with_name(f".{self.path.name}{TMP_SUFFIX}")

    def add(self, images: Tensor, labels: Tensor | None, index: Tensor) -> None:
        """Writes uint8 images (B, C, H, W), numbered by ``index`` (B,); labels have no place in a folder.

        Raises:
            OrnsteinError: the disk is full; nothing of the folder stays then.
        """
        from ornstein.training.pictures import to_pil

        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            for number, image in zip(index.tolist(), images, strict=True):
                to_pil(image).save(self._partial / f"{number:06d}.png", format="PNG")
        except OSError as error:
            self.discard()
            raise _unwritten(self.path, error) from error

    def close(self) -> None:
        """This process has no more samples."""

    def finish(self) -> Path:
        """Gives the folder its name, in the place of one that is there.

        Raises:
            OrnsteinError: there are not as many samples as were promised.
        """
        written = sum(1 for _ in self._partial.glob("*.png"))
        if written != self.count:
            self.discard()
            raise OrnsteinError(f"{self.path} should hold {self.count} samples, and {written} were drawn.")
        if self.path.is_dir():
            shutil.rmtree(self.path)
        os.replace(self._partial, self.path)
        return self.path

    def discard(self) -> None:
        """Removes what was written so far; nothing where the folder is whole."""
        shutil.rmtree(self._partial, ignore_errors=True)


KeptSamples = NpzSamples | PngSamples


def kept_samples(kind: str, folder: str | Path, count: int, *, rank: int = 0, world: int = 1) -> KeptSamples:
    """``samples.npz`` or the folder ``images`` in ``folder``, to be filled.

    Args:
        kind: one of :data:`FORMATS`.
        folder: of the run.
        count: samples in all, over all processes.
        rank, world: this process among those that write together.
    """
    if kind == "npz":
        return NpzSamples(Path(folder) / "samples.npz", count, rank=rank, world=world)
    return PngSamples(Path(folder) / "images", count)


def check_room(path: Path, needed: int) -> None:
    """Refuses a file that does not fit, before hours of sampling go into it.

    Raises:
        OrnsteinError: fewer than ``needed`` bytes are free where ``path`` lies.
    """
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free")


def _unwritten(path: Path, error: OSError) -> OrnsteinError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = f"the disk is full ({error.strerror})" if full else str(error)
    return OrnsteinError(
        f"{path} cannot be written: {why}; free some space, write elsewhere by hydra.run.dir=FOLDER, or leave "
        "keep_samples out. Nothing of it was left behind."
    )
