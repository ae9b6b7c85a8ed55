"""Zip files of images: what EDM's tool writes, their splits and classes, reading side by side, and what is refused."""

import io
import json
import multiprocessing
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ornstein.data import DataModule, ImageFolder, ImageZip
from ornstein.data.bad import Bad
from ornstein.data.zip_members import ZipMembers
from ornstein.errors import OrnsteinError

Pack = Callable[..., Path]


def png(seed: int, size: int = 12) -> bytes:
    """A random picture."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size + 3, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def pack(tmp_path: Path, bare_machine: Path) -> Pack:
    """Makes a zip file of named members; every other one stored."""

    def make(members: dict[str, bytes | str | int], name: str = "images.zip") -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as file:
            for number, (member, content) in enumerate(members.items()):
                method = zipfile.ZIP_STORED if number % 2 else zipfile.ZIP_DEFLATED
                file.writestr(member, png(content) if isinstance(content, int) else content, method)
        return path

    return make


def edm(count: int = 20, classes: int = 3) -> dict[str, bytes | str | int]:
    """As EDM's dataset tool lays it out."""
    names = [f"{number // 8:05d}/img{number:08d}.png" for number in range(count)]
    labels = {"labels": [[name, number % classes] for number, name in enumerate(names)]}
    return {**{name: number for number, name in enumerate(names)}, "dataset.json": json.dumps(labels)}


def both(path: Path, **options: Any) -> tuple[ImageZip, ImageZip]:
    return tuple(ImageZip(split=split, root=str(path), image_size=8, **options) for split in ("train", "val"))  # type: ignore[return-value]


@pytest.mark.parametrize("storage", ["memory", "mapped", "lazy", "unchecked"])
@pytest.mark.parametrize("around", ["", "set/"])
def test_an_edm_zip_is_what_its_folder_is(pack: Pack, tmp_path: Path, storage: str, around: str) -> None:
    """The same images, labels and classes as ImageFolder finds in the unpacked files, however they are kept."""
    path = pack({around + name: content for name, content in edm().items()})
    zipfile.ZipFile(path).extractall(tmp_path / "unpacked")
    options = {"crop": "edm", "val_fraction": 0.3}
    splits = both(path, storage=storage, **options)
    folder = str(tmp_path / "unpacked" / around)
    there = [ImageFolder(split=split, root=folder, image_size=8, **options) for split in ("train", "val")]
    found = {image.tobytes(): label for each in splits for image, label in pairs(each)}
    assert len(splits[0]) + len(splits[1]) == 20 == len(found) and splits[0].class_names == ("0", "1", "2")
    assert found == {image.tobytes(): label for each in there for image, label in pairs(each)}
    assert not {*map(bytes, splits[0].content_keys)} & {*map(bytes, splits[1].content_keys)}


def pairs(dataset: Any) -> list[tuple[np.ndarray, int]]:
    return list(zip(dataset.images[np.arange(len(dataset))], dataset.labels.tolist(), strict=True))


CLASSES = [
    ({}, (), "unlabelled"),
    ({"dataset.json": '{"labels": null}'}, (), "null"),
    ({"cat/a.png": 30, "dog/deep/b.png": 31}, ("cat", "dog"), "folders"),
    ({"around/cat/a.png": 30, "around/dog/b.png": 31}, ("cat", "dog"), "wrapped"),
    ({"train/cat/a.png": 30, "train/dog/b.png": 31, "valid/dog/c.png": 32}, ("cat", "dog"), "splits"),
]


@pytest.mark.parametrize(("members", "names"), [row[:2] for row in CLASSES], ids=[row[2] for row in CLASSES])
def test_classes_without_labels(pack: Pack, members: dict[str, Any], names: tuple[str, ...]) -> None:
    """Folders where there is no dataset.json; hidden members and a Mac's shadow tree do not count."""
    noise = {".DS_Store": "x", "__MACOSX/cat/._a.png": "x", "notes.txt": "x"}
    path = pack((members if names else {"00000/a.png": 1, "00000/b.png": 2, **members}) | noise)
    train, val = both(path)
    assert train.class_names == val.class_names == names
    assert ImageZip.count_classes({"root": str(path)}) == (len(names) or None)
    assert ImageZip(split="train", root=str(path), labels=False).labels is None


def test_given_splits(pack: Pack) -> None:
    """train, val and test, each with labels of its own."""
    members: dict[str, Any] = {}
    for part, count in (("train", 6), ("val", 3), ("test", 2)):
        names = [f"{part}/{number}.png" for number in range(count)]
        members |= {name: len(members) + number for number, name in enumerate(names)}
        members[f"{part}/dataset.json"] = json.dumps({"labels": [[name[len(part) + 1 :], 0] for name in names]})
    path = pack(members)
    module = DataModule(ImageZip, batch_size=2, num_classes=1, root=str(path), image_size=8, overlap="allow")
    assert module.test is not None and [len(module.train), len(module.val), len(module.test)] == [6, 3, 2]
    module = DataModule(ImageZip, batch_size=2, root=str(pack(edm())), image_size=8)
    assert module.test is None and len(module.val) == 2


def test_threads_and_processes_read_side_by_side(pack: Pack) -> None:
    path = pack(edm(60))
    with zipfile.ZipFile(path) as file:
        infos = [info for info in file.infolist() if info.filename.endswith("png")]
        expected = [file.read(info) for info in infos]
    members = ZipMembers(path, infos)
    rows = list(range(60)) * 5
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(members.__getitem__, rows)) == [expected[row] for row in rows]
    assert len(pickle.dumps(members)) < 20_000 and pickle.loads(pickle.dumps(members))[7] == expected[7]
    with multiprocessing.get_context("fork").Pool(2) as processes:
        assert processes.map(members.__getitem__, range(60)) == expected
    assert members.take([3, 1])[0] == expected[3] and members.take([3, 1]).names == [members.names[3], members.names[1]]


def spoiled(path: Path, names: set[str]) -> Path:
    """Turns one bit in the middle of some members."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        for info in file.infolist():
            if info.filename in names:
                content[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 1
    path.write_bytes(content)
    return path


def test_bad_members_are_named_and_left_out(pack: Pack) -> None:
    """One that does not unpack, one with a wrong checksum, one that is no image, one empty."""
    path = spoiled(pack({**edm(), "00000/zero.png": b"", "00000/text.png": b"no image"}), {
        "00000/img00000000.png", "00000/img00000001.png"
    })  # fmt: skip
    options = {"root": str(path), "image_size": 8, "labels": False}
    with pytest.raises(OrnsteinError) as caught:
        ImageZip(split="train", **options)
    for name in ("img00000000.png", "img00000001.png", "zero.png", "text.png"):
        assert f"00000/{name}: " in str(caught.value)
    assert "4 images" in str(caught.value) and "data.max_bad=4" in str(caught.value)
    with pytest.warns(UserWarning, match="left out"):
        train, val = (ImageZip(split=split, max_bad=4, **options) for split in ("train", "val"))
    assert len(train) + len(val) == 18


def test_content_keys_are_remembered(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(edm(300))
    with zipfile.ZipFile(path) as file:
        members = ZipMembers(path, [info for info in file.infolist() if info.filename.endswith("png")])
    rows, keys = members.content_keys(Bad(0, where="here"))
    assert rows == list(range(300)) and len(set(keys)) == 300
    monkeypatch.setattr(ZipMembers, "__getitem__", lambda self, row: pytest.fail("read again"))
    assert members.content_keys(Bad(0, where="here"))[1] == keys


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"readme.txt": "x"}, r"holds no images \(png, jpg"),
    ({"a.png": 1, "b.png": 2, "dataset.json": "{"}, r"images.zip:dataset.json is no JSON"),
    ({"a.png": 1, "b.png": 2, "dataset.json": '{"labels": [["a.png", 0]]}'}, r"dataset.json has no label for 1 of 2"),
    ({"cat/a.png": 1, "dog/b.png": 2, "c.png": 3}, "1 image.* lie in no class folder of train's, c.png among them"),
    ({"a.png": 1}, "1 image.* fewer than two different ones"),
]


@pytest.mark.parametrize(("members", "told"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_is_refused(pack: Pack, members: dict[str, Any], told: str) -> None:
    with pytest.raises(OrnsteinError, match=told):
        ImageZip(split="train", root=str(pack(members)), image_size=8)


def test_what_is_no_zip_file_is_refused(pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("no zip")
    whole = pack(edm()).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    for root, told in (
        (None, "data=zip needs a zip file of images: say data.root="),
        ("/nowhere.zip", "/nowhere.zip does not exist"),
        (str(tmp_path), "is a folder, which data=image_folder reads"),
        (str(tmp_path / "text.zip"), "cannot be read as a zip file"),
        (str(tmp_path / "cut.zip"), "cannot be read as a zip file"),
    ):
        with pytest.raises(OrnsteinError, match=told):
            ImageZip.check({"root": root})
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("a.png", png(1))
        file.writestr("b.png", png(2))
    with pytest.raises(OrnsteinError, match=r"a.png is packed by method 14, and images are read stored or deflated"):
        ImageZip(split="train", root=str(tmp_path / "lzma.zip"))
