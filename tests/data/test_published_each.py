"""Published data sets one by one: what is special about their files, and their faults."""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
import socket
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ornstein.data import AFHQ, CIFAR10, CIFAR100, FFHQ, LSUN, CelebA, ImageNet, published_ffhq
from ornstein.data.base import NoSplit
from ornstein.data.images import load_image
from ornstein.errors import OrnsteinError

from .published_layouts import TEN, afhq, celeba, cifar, ffhq, imagenet, lsun, module, picture, put, refused


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory maps and what is remembered of files stay in the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_cifar_pixels_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 3072 are red, green, blue planes; labels and captions go with them; resizing keeps the count."""
    cifar(tmp_path, monkeypatch, "CIFAR10")
    data = CIFAR10(split="train", root=str(tmp_path), caption_template="a {}")
    with (tmp_path / "cifar-10-batches-py" / "data_batch_1").open("rb") as file:
        first = pickle.load(file)
    assert np.array_equal(data.images[:20].reshape(20, -1), first["data"])
    assert data.labels[:20].tolist() == first["labels"] and data.class_names == tuple(TEN)
    assert data.captions[3] == "a cat"
    inside = CIFAR10(split="val", root=str(tmp_path / "cifar-10-batches-py"), image_size=16, labels=False)
    assert inside.images.shape == (20, 3, 16, 16) and inside.labels is None
    with pytest.raises(OrnsteinError, match=r"data\.channels=1"):
        CIFAR10(split="val", root=str(tmp_path), channels=1)


def test_cifar_archive_is_unpacked_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    cifar(tmp_path / "made", monkeypatch, "CIFAR10")
    packed = tmp_path / "packed" / datasets.CIFAR10.filename
    packed.parent.mkdir()
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    monkeypatch.setattr(socket, "create_connection", refused)
    half = put(tmp_path / "half" / packed.name, packed.read_bytes()[:1000])
    with pytest.raises(OrnsteinError, match="data=cifar10 is not in"):
        CIFAR10(split="train", root=str(half.parent), download=False)
    assert len(CIFAR10(split="train", root=str(packed.parent), download=False)) == 100
    # Unpacking that was stopped half-way is done again.
    (packed.parent / "cifar-10-batches-py" / "data_batch_5").unlink()
    assert len(CIFAR10(split="train", root=str(packed.parent), download=False)) == 100


def test_damaged_cifar_isrefused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign pickle is never opened: its md5 is looked at first."""
    cifar(tmp_path, monkeypatch, "CIFAR10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"cposix\nsystem\n(S'false'\ntR.")
    with pytest.raises(OrnsteinError, match="is not what was published as cifar10"):
        CIFAR10(split="train", root=str(tmp_path))


def test_superclasses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five classes each; the coarse labels of a few known classes, by name."""
    cifar(tmp_path, monkeypatch, "CIFAR100")
    fine = CIFAR100(split="val", root=str(tmp_path))
    coarse = CIFAR100(split="val", root=str(tmp_path), coarse=True)
    assert coarse.num_classes == 20 and np.bincount(coarse.labels).tolist() == [10] * 20
    above = {fine.class_names[f]: coarse.class_names[c] for f, c in zip(fine.labels, coarse.labels, strict=True)}
    for below, name in {"whale": "aquatic_mammals", "tank": "vehicles_2", "worm": "non-insect_invertebrates"}.items():
        assert above[below] == name
    # The first ten of the table that others use: apple, aquarium_fish, baby, bear, ...
    assert [coarse.labels[fine.labels == label][0] for label in range(10)] == [4, 1, 14, 8, 0, 6, 7, 7, 18, 3]


@pytest.mark.parametrize(
    ("attribute", "count", "names", "of_two"),
    [
        ("Smiling", 2, ("not Smiling", "Smiling"), (0, 1)),
        (["Male", "Smiling"], 4, None, (0, 3)),
    ],
)
def test_celeba_attributes(
    attribute: Any, count: int, names: Any, of_two: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images 1 (neither) and 4 (both male and smiling) are the first two of train."""
    options = celeba(tmp_path, monkeypatch)
    data = module("celeba", **options, attribute=attribute, num_classes=count)
    data.setup("fit")
    assert data.train.num_classes == count == CelebA.count_classes({"attribute": attribute})
    assert names is None or data.train.class_names == names
    assert data.train.labels[:2].tolist() == list(of_two)
    with pytest.raises(OrnsteinError, match=rf"say data\.num_classes={count}"):
        module("celeba", **options, attribute=attribute).setup("fit")


@pytest.mark.parametrize(("region", "box"), [("ddim", (25, 57, 153, 185)), ("score_sde", (19, 39, 159, 179))])
def test_celeba_regions(region: str, box: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The box is cut out before anything is resized; splits and keys stay the file's."""
    options = celeba(tmp_path, monkeypatch)
    path = tmp_path / "celeba" / "img_align_celeba" / "000001.jpg"
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB").crop(box)).transpose(2, 0, 1)
    side = box[2] - box[0]
    for storage in ("memory", "mapped", "lazy"):
        data = CelebA(split="train", **options, region=region, image_size=side, storage=storage)
        assert np.array_equal(data.images[np.array([0])][0], expected)
    whole = CelebA(split="train", **options, region="square", image_size=16)
    assert np.array_equal(whole.images[0], load_image(path, size=16))
    assert np.array_equal(whole.content_keys, data.content_keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attribute": "Smilling"}, r"data\.attribute=Smilling does not exist: choose of Male, Bald, Smiling"),
        ({"region": "face"}, r"data\.region=face does not exist"),
        ({"split": "all"}, "no split 'all'"),
        ({"image_size": 0}, r"data\.image_size=0"),
        ({"crop": "middle"}, r"data\.crop=middle"),
        ({"storage": "disc"}, r"data\.storage=disc"),
    ],
)
def test_celeba_refusals(change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = celeba(tmp_path, monkeypatch)
    with pytest.raises(OrnsteinError, match=message):
        CelebA(**{"split": "train", **options, **change})


def test_images_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named and refused, or left out up to max_bad, labels following."""
    options = celeba(tmp_path, monkeypatch)
    put(tmp_path / "celeba" / "img_align_celeba" / "000004.jpg", b"no image")
    put(tmp_path / "celeba" / "img_align_celeba" / "000007.jpg", picture(1, (40, 40)))
    (tmp_path / "celeba" / "img_align_celeba" / "000010.jpg").unlink()
    with pytest.raises(OrnsteinError, match=r"3 images of data=celeba.*000004.jpg.*40 x 40.*data\.max_bad=3"):
        CelebA(split="train", **options, attribute="Male")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = CelebA(split="train", **options, attribute="Male", max_bad=3)
    # Of images 1, 4, ..., 28 the even ones are Male; 4, 7 and 10 are gone.
    assert data.labels.tolist() == [0, 0, 1, 0, 1, 0, 1] and len(data) == 7 == len(data.content_keys)


def test_lsun_scenes_and_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the keys; a zipped val is unpacked; objects are split by content, scenes only for a test."""
    import lmdb

    options = lsun(tmp_path, monkeypatch)
    # lmdb opens no path twice in one process.
    copy = shutil.copytree(tmp_path / "bedroom_train_lmdb", tmp_path / "copy")
    data = LSUN(split="train", **options, image_size=16)
    with lmdb.open(str(copy), readonly=True, lock=False) as env, env.begin() as look:
        for row, (_, content) in enumerate(look.cursor()):
            assert np.array_equal(data.images[row], load_image(bytes(content), size=16))
    assert len(LSUN(split="val", **options, image_size=16)) == 3
    with pytest.raises(NoSplit, match=r"data\.test_fraction"):
        LSUN(split="test", **options)
    for category, sizes in {"bedroom": (9, 3, 3), "cat": (6, 2, 2)}.items():
        splits = [
            LSUN(split=split, **options, category=category, image_size=8, val_fraction=0.2, test_fraction=0.25)
            for split in ("train", "val", "test")
        ]
        assert tuple(map(len, splits)) == sizes
        keys = [key for each in splits for key in map(bytes, each.content_keys)]
        assert len(keys) == len(set(keys))
    with pytest.raises(OrnsteinError, match=r"data\.category=bathroom does not exist: choose one of bedroom, "):
        LSUN(split="train", **options, category="bathroom")
    put(tmp_path / "tower_train_lmdb" / "data.mdb", b"no database")
    with pytest.raises(OrnsteinError, match="is no lmdb database"):
        LSUN(split="train", **options, category="tower")


def test_lsun_in_worker_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database opened here is opened anew there."""
    options = lsun(tmp_path, monkeypatch) | {"storage": "lazy", "image_size": 8, "batch_size": 4, "overlap": "allow"}
    here, there = (module("lsun", **options, num_workers=workers) for workers in (0, 2))
    for _, ours, theirs in zip(range(4), here.train_dataloader(), there.train_dataloader(), strict=False):
        assert ours["image"].equal(theirs["image"]) and ours["index"].equal(theirs["index"])


def test_ffhq_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip, the folder it unpacks to, and thumbnails give the same images by number; the number is the split."""
    ffhq(tmp_path, monkeypatch)
    whole = FFHQ(split="val", root=str(tmp_path))
    named = FFHQ(split="val", root=str(tmp_path / "ffhq-64x64.zip"))
    for number in (3, 69998, 69999):
        put(tmp_path / "folder" / "thumbnails128x128" / f"{number:05d}.png", picture(number, (64, 64)))
    folder = FFHQ(split="val", root=str(tmp_path / "folder"))
    assert whole.images.shape == (2, 3, 64, 64)
    assert np.array_equal(whole.images, named.images) and np.array_equal(whole.images, folder.images)
    assert np.array_equal(whole.images[0], load_image(picture(69998, (64, 64)), size=64))
    assert len(FFHQ(split="train", root=str(tmp_path), held_out=1)) == 9
    with pytest.raises(OrnsteinError, match=r"128 x 128 and data\.image_size=256"):
        FFHQ(split="train", root=str(tmp_path / "folder"), image_size=256)
    put(tmp_path / "folder" / "thumbnails128x128" / "me.png", picture(0))
    with pytest.raises(OrnsteinError, match=r"me\.png .* bears no number"):
        FFHQ(split="train", root=str(tmp_path / "folder"))
    with pytest.raises(OrnsteinError, match="no split 'test'"):
        FFHQ(split="test", root=str(tmp_path))


def test_ffhq_is_known_by_its_first_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip that came from somewhere but holds something else, or is cut off, does not stay."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("thumbnails128x128/00000.png", picture(0))
    served = {"content": archive.getvalue()}

    def stream(url: str, target: Path, *, label: str) -> None:
        target.write_bytes(served["content"])

    monkeypatch.setattr("ornstein.data.fetch._stream", stream)
    monkeypatch.setattr("ornstein.data.published._check_room", lambda home, needed: None)
    for content, fault in ((archive.getvalue(), "first image is not FFHQ's"), (archive.getvalue()[:-30], "is no zip")):
        served["content"] = content
        with pytest.raises(OrnsteinError, match=fault):
            FFHQ(split="train", root=str(tmp_path / "home"))
        assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []
    monkeypatch.setitem(published_ffhq.PUBLISHED, "thumbnails128x128", (1, hashlib.md5(picture(0)).hexdigest()))
    served["content"] = archive.getvalue()
    assert len(FFHQ(split="train", root=str(tmp_path / "home"))) == 1


def test_images_in_two_splits_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = afhq(tmp_path, monkeypatch)
    put(tmp_path / "afhq_v2" / "test" / "dog" / "twice.png", picture(2))
    with pytest.raises(OrnsteinError, match=r"val image dog/twice\.png is train image cat/pixabay_000002\.png"):
        module("afhq", **options, overlap="refuse").setup("fit")
    assert len(module("afhq", **options).val) == 15


def test_afhq_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """v1's held-out folder is val, v2's test; a fetched zip is unpacked into the folder that is looked for."""
    options = afhq(tmp_path, monkeypatch)
    assert AFHQ(split="train", **options, image_size=8).labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    with pytest.raises(OrnsteinError, match="data=afhq is not in"):
        AFHQ(split="train", **options, version="v1", download=False)
    (tmp_path / "afhq_v2" / "test").rename(tmp_path / "afhq_v2" / "val")
    (tmp_path / "afhq_v2").rename(tmp_path / "afhq")
    assert len(AFHQ(split="val", **options, version="v1", image_size=8)) == 15
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        for path in sorted((tmp_path / "afhq").rglob("*.png")):
            below = path.relative_to(tmp_path / "afhq").as_posix().replace("val/", "test/")
            made.writestr(below, path.read_bytes())
    monkeypatch.setattr(
        "ornstein.data.fetch._stream", lambda url, target, *, label: target.write_bytes(archive.getvalue())
    )
    monkeypatch.setattr("ornstein.data.published._check_room", lambda home, needed: None)
    assert len(AFHQ(split="val", root=str(tmp_path / "fetched"), image_size=8)) == 15
    assert sorted(path.name for path in (tmp_path / "fetched").iterdir()) == ["afhq_v2"]


def test_imagenet_names_and_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = imagenet(tmp_path, monkeypatch)
    root = options["root"]
    assert ImageNet.count_classes({"root": root}) == 3
    data = ImageNet(split="val", root=root, image_size=8, caption_template="a {}")
    assert data.class_names == ("tench", "goldfish", "kit fox") and data.captions[4] == "a goldfish"
    val = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    put(val / "ILSVRC2012_val_00000001.JPEG", picture(5))
    with pytest.raises(OrnsteinError, match=r"ILSVRC2012_val_00000001\.JPEG lies in no class folder.*devkit"):
        ImageNet(split="val", root=root)
    val.rename(tmp_path / "elsewhere")
    with pytest.raises(OrnsteinError, match=r"no images of imagenet apart from train.*data\.val_from=train"):
        ImageNet(split="val", root=root)
    assert len(ImageNet(split="val", root=root, val_from="train", val_fraction=0.3, image_size=8)) == 3


def test_imagenet_tars_are_unpacked_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar of a tar for each synset, as it is published; a damaged one leaves no folder behind."""
    from torchvision.datasets import imagenet as reader

    outer = tmp_path / "ILSVRC2012_img_train.tar"
    with tarfile.open(outer, "w") as archive:
        for place, synset in enumerate(("n01440764", "n01443537")):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for number in range(3):
                    content = picture(10 * place + number, kind="JPEG")
                    member = tarfile.TarInfo(f"{synset}_{number}.JPEG")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            member = tarfile.TarInfo(f"{synset}.tar")
            member.size = inner.tell()
            inner.seek(0)
            archive.addfile(member, inner)
    options = {"root": str(tmp_path), "val_from": "train", "val_fraction": 0.3, "image_size": 8}
    with pytest.raises(OrnsteinError, match=r"tars in .* cannot be unpacked"):
        ImageNet(split="train", **options)  # its md5 is not the published one
    assert sorted(path.name for path in tmp_path.iterdir()) == [outer.name]
    monkeypatch.setitem(reader.ARCHIVE_META, "train", (outer.name, hashlib.md5(outer.read_bytes()).hexdigest()))
    data = ImageNet(split="train", **options)
    assert len(data) == 4 and data.class_names == ("n01440764", "n01443537")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "cache"] == ["train"]
