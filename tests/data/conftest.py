"""Small made data sets, and a machine on which no real one can be found."""

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ornstein  # noqa: F401 - its torchvision guard must come before a test imports Lightning

Make = Callable[..., Path]


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every place where data is looked for lies in an empty folder."""
    empty = tmp_path / "machine"
    empty.mkdir()
    monkeypatch.setenv("XDG_DATA_DIRS", str(empty / "share"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty / "cache"))
    monkeypatch.delenv("ORNSTEIN_DATA", raising=False)
    monkeypatch.setattr("sys.prefix", str(empty / "python"))
    monkeypatch.chdir(empty)
    return empty


def idx_bytes(array: np.ndarray) -> bytes:
    """An array as an IDX file."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Make:
    """Makes a folder of four IDX files: 50 train and 20 test images whose first pixel is their number."""

    def make(name: str = "idx", *, zipped: bool = False) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for stem, count in (("train", 50), ("t10k", 20)):
            images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            images[:, 0, 0] = np.arange(count)
            for kind, array in (
                ("images-idx3", images),
                ("labels-idx1", (np.arange(count) % 10).astype(np.uint8)),
            ):
                content = idx_bytes(array)
                path = folder / f"{stem}-{kind}-ubyte{'.gz' if zipped else ''}"
                path.write_bytes(gzip.compress(content) if zipped else content)
        return folder

    return make


@pytest.fixture
def picture_folder(tmp_path: Path) -> Make:
    """Makes a folder of random PNGs: `counts` maps a sub-folder ("" for none) to a number."""

    def make(counts: dict[str, int], name: str = "pictures") -> Path:
        folder = tmp_path / name
        rng = np.random.default_rng(len(counts))
        for below, count in counts.items():
            (folder / below).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                height, width = rng.integers(20, 60, 2)
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / below / f"{number:03d}.png")
        return folder

    return make


@pytest.fixture
def emoji_package(tmp_path: Path) -> Path:
    """A package like emoji-datasource-google's: 40 base emoji, two of them equal, two tones each."""
    package = tmp_path / "emoji" / "package"
    images = package / "img" / "google" / "64"
    images.mkdir(parents=True)
    categories = ["Activities", "Flags", "People & Body", "Component"]
    table = []
    for number in range(40):
        shade = 5 if number == 9 else number
        names = {"": f"{number:04x}", "1F3FB": f"{number:04x}-1f3fb", "1F3FB-1F3FF": f"{number:04x}-both"}
        for tone, name in enumerate(names.values()):
            picture = Image.new("RGBA", (64, 64), (6 * shade, 10 * tone, 200, 255))
            picture.paste((0, 0, 0, 0), (0, 0, 32, 64))
            picture.save(images / f"{name}.png")
        variants = {code: {"image": f"{name}.png", "has_img_google": True} for code, name in names.items() if code}
        row = {
            "image": f"{names['']}.png",
            "name": f"THING {number}",
            "category": categories[number % 4],
            "has_img_google": number != 39,
            "sort_order": 100 - number,
            "skin_variations": variants,
        }
        table.append(row)
    (package / "emoji.json").write_text(json.dumps(table), encoding="utf-8")
    return package


def numbered_picture(number: int) -> bytes:
    """A PNG of noise of its own, 12 x 10."""
    pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def tar_file(tmp_path: Path) -> Make:
    """Writes a tar file of members by name, in order."""

    def make(name: str, members: dict[str, bytes], *, mode: str = "w") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, mode) as tar:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return make


@pytest.fixture
def tar_shards(tmp_path: Path, tar_file: Make) -> Callable[..., Path]:
    """Writes a folder of shards of so many samples each, numbered through: image, class, caption and JSON."""

    def make(counts: list[int], name: str = "shards", *, classes: int = 3, first: int = 0) -> Path:
        number = first
        for shard, count in enumerate(counts):
            members = {}
            for each in range(number, number + count):
                label = str(each % classes)
                about = {"label": each % classes, "about": {"caption": f"json {each}"}}
                members |= {
                    f"{each:05d}.png": numbered_picture(each),
                    f"{each:05d}.cls": label.encode(),
                    f"{each:05d}.txt": f"picture {each}".encode(),
                    f"{each:05d}.json": json.dumps(about).encode(),
                }
            tar_file(f"{name}/t-{shard:03d}.tar", members)
            number += count
        return tmp_path / name

    return make
