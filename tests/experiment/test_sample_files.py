"""Samples kept for others' evaluators: the layout, bounded memory, and nothing left of a file that was cut off."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.experiment import sample_files
from ornstein.experiment.sample_files import KeptSamples, NpzSamples, PngSamples, check_format, kept_samples


def pictures(count: int, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def fill(file: KeptSamples, images: torch.Tensor, *, batch: int, first: int = 0, labels: bool = True) -> None:
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        index = torch.arange(first + start, first + start + len(part))
        file.add(part, index % 10 if labels else None, index)
    file.close()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("world", [1, 3])
def test_the_layout_is_adms(tmp_path: Path, channels: int, labels: bool, world: int) -> None:
    images = pictures(11, channels)
    shares = [range(11 * rank // world, 11 * (rank + 1) // world) for rank in range(world)]
    files = [kept_samples("npz", tmp_path, 11, rank=rank, world=world) for rank in range(world)]
    for file, share in zip(files, shares, strict=True):
        fill(file, images[share.start : share.stop], batch=3, first=share.start, labels=labels)
        assert not (tmp_path / "samples.npz").exists()
    path = files[0].finish()
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"] == [path.name]
    with np.load(path, allow_pickle=False) as stored:
        assert stored.files == (["arr_0", "arr_1"] if labels else ["arr_0"])
        assert stored["arr_0"].dtype == np.uint8 and stored["arr_0"].shape == (11, 4, 6, 3)
        assert np.array_equal(stored["arr_0"], images.permute(0, 2, 3, 1).expand(11, 4, 6, 3).numpy())
        if labels:
            assert stored["arr_1"].dtype == np.int64 and stored["arr_1"].tolist() == [i % 10 for i in range(11)]
    # Stored as it is, so that ADM's evaluator can stream it from the archive.
    assert {entry.compress_type for entry in zipfile.ZipFile(path).infolist()} == {zipfile.ZIP_STORED}


def test_png_files_are_named_by_number(tmp_path: Path) -> None:
    from PIL import Image

    images = pictures(5)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "of_an_earlier_run.png").touch()
    file = kept_samples("png", tmp_path, 5)
    fill(file, images, batch=2, first=7)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["of_an_earlier_run.png"]
    file.finish()
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [f"{i:06d}.png" for i in range(7, 12)]
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "images" / "000009.png")), images[2].permute(1, 2, 0).numpy()
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("kind", [NpzSamples, PngSamples])
def test_too_few_samples_leave_nothing(tmp_path: Path, kind: type[KeptSamples]) -> None:
    file = kind(tmp_path / "kept", 6)
    fill(file, pictures(5), batch=2)
    with pytest.raises(OrnsteinError, match="should hold 6 samples, and 5 were drawn"):
        file.finish()
    assert not list(tmp_path.iterdir())


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    file = NpzSamples(tmp_path / "samples.npz", 4)
    file.add(pictures(2))
    with pytest.raises(OrnsteinError, match="one size, and these samples have several: choose keep_samples=png"):
        file.add(pictures(2).transpose(2, 3))
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_fit_is_refused_at_its_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    file = NpzSamples(tmp_path / "samples.npz", 1_000_000)
    with pytest.raises(OrnsteinError, match=r"the disk is full \(72 MB are needed and 0 MB are free\).*Nothing of it"):
        file.add(pictures(1))
    assert not list(tmp_path.iterdir())


class _Full:
    """A file on a disk that is full: its first write takes the header, the next none."""

    def __init__(self, inner: object) -> None:
        self.inner, self.writes = inner, 0

    def write(self, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        self.inner.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fills_up_on_the_way_leaves_nothing(tmp_path: Path, rank: int) -> None:
    file = NpzSamples(tmp_path / "samples.npz", 6, rank=rank, world=2)
    file.add(pictures(2))
    assert list(tmp_path.iterdir())
    file._file = _Full(file._file)  # type: ignore[assignment]
    with pytest.raises(
        OrnsteinError, match=r"the disk is full .* leave keep_samples out\. Nothing of it was left behind"
    ):
        file.add(pictures(2))
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    import tracemalloc

    peaks = []
    for count in (20, 400):
        file = NpzSamples(tmp_path / "samples.npz", count * 10)
        batch = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
        tracemalloc.start()
        for _ in range(count):
            file.add(batch, torch.zeros(10, dtype=torch.int64))
        file.close()
        file.finish()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Labels are kept, 8 bytes a sample and an array a batch; images of the longer file are 12 MB.
    assert peaks[1] < peaks[0] + 500_000, peaks


@pytest.mark.parametrize(
    ("value", "known"), [(None, True), ("npz", True), ("png", True), ("jpg", False), (True, False)]
)
def test_formats(value: object, known: bool) -> None:
    if known:
        assert check_format(value) == value
    else:
        with pytest.raises(OrnsteinError, match=f"keep_samples={value} is unknown: choose npz"):
            check_format(value)


def test_torch_fidelity_reads_both(tmp_path: Path) -> None:
    torch_fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.datasets import ImagesPathDataset

    assert torch_fidelity is not None and sample_files.FORMATS == ("npz", "png")
    images = pictures(4)
    for kind in sample_files.FORMATS:
        file = kept_samples(kind, tmp_path, 4)
        fill(file, images, batch=3)
        file.finish()
    from torch_fidelity.datasets import TransformPILtoRGBTensor

    paths = [str(path) for path in sorted((tmp_path / "images").iterdir())]
    folder = ImagesPathDataset(paths, TransformPILtoRGBTensor())
    stored = torch.from_numpy(np.load(tmp_path / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    assert torch.equal(torch.stack([folder[i] for i in range(4)]), stored)
