"""Folders of images of any size as data sets of several shapes, and the data module that serves them."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ornstein.data import DataModule, ImageFolder
from ornstein.data.bad import Bad
from ornstein.data.bucket_files import SomeOf, read_sizes
from ornstein.data.bucketed import BucketedImages
from ornstein.data.images import load_image
from ornstein.data.stored import Files
from ornstein.errors import OrnsteinError

SHAPES = ((8, 16), (12, 12), (16, 8))
SIZES = ((20, 40), (30, 30), (44, 20), (25, 40), (9, 90))  # nearest: wide, square, tall, wide, wide


@pytest.fixture
def mixed_folder(tmp_path: Path, bare_machine: Path) -> Callable[..., Path]:
    """Makes a folder of 20 images of five sizes, two sub-folders as classes, and one map for each in another."""

    def make(*, name: str = "mixed") -> Path:
        rng = np.random.default_rng(0)
        for number in range(20):
            for home, channels in ((name, 3), (f"{name}_maps", 1)):
                place = tmp_path / home / "ab"[number % 2]
                place.mkdir(parents=True, exist_ok=True)
                height, width = SIZES[number % 5]
                pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
                pixels = np.repeat(np.repeat(pixels[:4, :4], -(-height // 4), 0), -(-width // 4), 1)[:height, :width]
                picture = pixels[..., 0] if channels == 1 else pixels
                Image.fromarray(picture).save(place / f"{number:02}.png")
        return tmp_path / name

    return make


def folder(root: Path, **options: Any) -> ImageFolder:
    settings = {"split": "train", "image_size": 12, "buckets": SHAPES, "val_fraction": 0.2}
    return ImageFolder(root=str(root), **{**settings, **options})


@pytest.mark.parametrize("storage", ["memory", "mapped", "lazy"])
def test_each_image_has_the_shape_nearest_to_its_own(mixed_folder: Callable[..., Path], storage: str) -> None:
    """Decoded as `load_image` does it at that shape, whatever holds it; train and val together are all."""
    root = mixed_folder()
    count = 0
    for split in ("train", "val"):
        data = folder(root, split=split, storage=storage)
        assert data.bucket_of is not None and data.image_size == 12
        for row, path in enumerate(data.paths):
            shape = SHAPES[[0, 1, 2, 0, 0][int(path.stem) % 5]]
            assert data.shapes[data.bucket_of[row]] == shape
            found = data.batch([row])
            np.testing.assert_array_equal(found["image"][0], load_image(path, size=shape))
            assert int(found["label"]) == "ab".index(path.parent.name)
        count += len(data)
    assert count == 20


def test_storages_have_one_fingerprint(mixed_folder: Callable[..., Path]) -> None:
    """What the images are decides it, and which shapes they have, not where they are held."""
    root = mixed_folder()
    assert folder(root, storage="memory").fingerprint == folder(root, storage="lazy").fingerprint
    other = folder(root, buckets=((8, 16), (12, 12)))
    assert len({folder(root).fingerprint, other.fingerprint, folder(root, buckets=None).fingerprint}) == 3


def test_conditions_have_the_shape_of_their_image(mixed_folder: Callable[..., Path]) -> None:
    """Whatever their own size is."""
    root = mixed_folder()
    maps = Path(f"{root}_maps")
    Image.new("L", (70, 10), 77).save(maps / "b" / "01.png")  # of a square image
    data = folder(root, condition_root=str(maps), split="train", val_fraction=0.05)
    for rows in data.pieces(size=3):
        batch = data.batch(rows)
        assert batch["condition"].shape[2:] == batch["image"].shape[2:]
        for row, found in zip(rows.tolist(), batch["condition"], strict=True):
            path = maps / data.paths[row].relative_to(root)
            np.testing.assert_array_equal(found, load_image(path, size=tuple(found.shape[1:]), channels=1))
    assert "condition" not in data.facts(range(len(data)), conditions=False)


def test_bad_images_are_left_out(mixed_folder: Callable[..., Path]) -> None:
    """A file without a head, and one that is damaged further on: named, counted, and no row is shifted."""
    root = mixed_folder()
    (root / "a" / "02.png").write_bytes(b"no image")
    whole = (root / "b" / "05.png").read_bytes()
    (root / "b" / "05.png").write_bytes(whole[: len(whole) - 30])
    with pytest.raises(OrnsteinError, match=r"2 images of .* cannot be used: a/02\.png: .*b/05\.png"):
        folder(root)
    with pytest.warns(UserWarning, match="2 images of"):
        parts = [folder(root, split=split, max_bad=2) for split in ("train", "val")]
    assert sum(map(len, parts)) == 18
    for data in parts:
        for row, path in enumerate(data.paths):
            image = data.batch([row])["image"][0]
            np.testing.assert_array_equal(image, load_image(path, size=tuple(image.shape[1:])))


def test_sizes_are_read_without_decoding(
    mixed_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From heads alone, turned as EXIF says; and those of many files only once."""
    root = mixed_folder()
    turned = Image.new("RGB", (30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(root / "a" / "turned.jpg", exif=exif)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    paths = [root / "a" / "turned.jpg", root / "a" / "00.png", root / "b" / "01.png"]
    bad = Bad(0, where="here")
    assert read_sizes(Files(paths, base=root), bad=bad).tolist() == [[30, 10], [20, 40], [30, 30]]
    monkeypatch.setattr("ornstein.data.bucket_files.WORTH_KEEPING", 1)
    read_sizes(Files(paths, base=root), bad=bad)
    monkeypatch.setattr("ornstein.data.bucket_files.read_size", lambda *_, **__: pytest.fail("read again"))
    assert read_sizes(SomeOf(Files(paths, base=root), np.array([1])), bad=bad).tolist() == [[20, 40]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_one_shape_whoever_reads_them(mixed_folder: Callable[..., Path], workers: int) -> None:
    """The same batches for any number of workers; gone on with at any of them; validation is everything once."""
    root = str(mixed_folder())
    options = {"batch_size": 3, "seed": 1, "root": root, "image_size": 12, "buckets": [[8, 16], [12, 12], [16, 8]]}
    plain = DataModule(ImageFolder, **options)
    expected = [(batch["index"].tolist(), batch["image"]) for batch in islice(plain.train_dataloader(), 14)]
    assert len({image.shape for _, image in expected}) == 3
    module = DataModule(ImageFolder, **options, num_workers=workers, storage="lazy")
    module.start_batch = 4
    for (index, image), batch in zip(expected[4:], module.train_dataloader(), strict=False):
        assert batch["index"].tolist() == index and torch.equal(batch["image"], image)
    seen = [batch["index"] for batch in module.val_dataloader()]
    assert sorted(torch.cat(seen).tolist()) == list(range(len(module.val)))


def test_limit_keeps_the_shapes(mixed_folder: Callable[..., Path]) -> None:
    """A part of the images, batched like all of them."""
    module = DataModule(ImageFolder, batch_size=4, root=str(mixed_folder()), image_size=12, buckets=SHAPES, limit=6)
    assert len(module.train) == 6 and isinstance(module.train.images, BucketedImages)
    seen = {row for batch in islice(module.train_dataloader(), 12) for row in batch["index"].tolist()}
    assert seen == set(range(6))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"balanced": True, "num_classes": 2}, "data.buckets data.balanced=true"),
        ({"latents": "/nowhere"}, "data.latents=/nowhere data.buckets"),
        ({"crop": "edm_wide"}, "data.crop=edm_wide data.buckets data.crop=adm"),
        ({"buckets": "auto", "image_size": None}, "data.buckets=auto data.image_size"),
    ],
)
def test_refused_beside_buckets(mixed_folder: Callable[..., Path], options: dict[str, Any], words: str) -> None:
    """Both options by name, and a way out."""
    settings = {"batch_size": 4, "root": str(mixed_folder()), "image_size": 12, "buckets": SHAPES}
    with pytest.raises(OrnsteinError) as refused:
        DataModule(ImageFolder, **{**settings, **options}).setup()
    assert all(word in str(refused.value) for word in words.split())


def test_data_sets_of_squares_say_so() -> None:
    """An option that the data set cannot take is told of by its name."""
    from ornstein.data import Digits

    with pytest.raises(OrnsteinError, match=r"data\.buckets .* squares only.*data=image_folder"):
        DataModule(Digits, batch_size=4, image_size=8, buckets=[[8, 16]]).setup()


def test_a_folder_of_labels_by_file(mixed_folder: Callable[..., Path]) -> None:
    """Classes of a dataset.json go along with their images."""
    root = mixed_folder()
    files = sorted(root.rglob("*.png"))
    labels = [[path.relative_to(root).as_posix(), int(path.stem) % 5] for path in files]
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    data = folder(root)
    assert data.labels is not None
    assert data.labels.tolist() == [int(path.stem) % 5 for path in data.paths]
