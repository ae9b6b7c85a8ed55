"""Captions from classes' names and from files, and the images that a folder's images are conditioned on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ornstein.data import DataModule, Digits, ImageDataset, ImageFolder
from ornstein.data.captions import DIGIT_WORDS, from_classes, from_files
from ornstein.data.images import load_image


def test_digits_are_told_in_words() -> None:
    data = Digits(split="val", caption_template="a handwritten digit {}")
    assert data.captions == [f"a handwritten digit {DIGIT_WORDS[label]}" for label in data.labels]
    batch = data.batch([3, 5])
    assert batch["caption"] == [data.captions[3], data.captions[5]]
    without_labels = Digits(split="val", caption_template="{}", labels=False)
    assert without_labels.labels is None and without_labels.captions[0] == DIGIT_WORDS[data.labels[0]]
    assert Digits(split="val").captions is None
    assert Digits(split="val").fingerprint == data.fingerprint, "captions are no part of the images"


def test_the_bundled_option_has_captions(compose) -> None:
    from ornstein.cli.build import build_data

    assert build_data(compose("data=digits")).val.captions[0].startswith("a handwritten digit ")
    assert build_data(compose("data=digits", "data.caption_template=null")).val.captions is None


@pytest.mark.parametrize("template", ["no place", "{} and {}", 3])
def test_templates_without_their_place_are_refused(template) -> None:
    with pytest.raises(ValueError, match=r"data\.caption_template"):
        Digits(split="val", caption_template=template)
    with pytest.raises(ValueError, match=r"data\.num_classes=auto"):
        from_classes("a {}", None, ())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of ten images with depth maps of other sizes and extensions in a parallel tree."""
    generator = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        for number in range(10):
            for root, mode, end in (("images", "RGB", "png"), ("depth", "L", "png" if number % 2 else "webp")):
                path = tmp_path / root / name / f"{number}.{end}"
                path.parent.mkdir(parents=True, exist_ok=True)
                shape = (12, 16) if mode == "L" else (12, 16, 3)
                Image.fromarray(generator.integers(0, 256, shape).astype(np.uint8)).save(path)
    return tmp_path


def read(folder: Path, *, split: str = "train", **options) -> ImageFolder:
    return ImageFolder(split=split, root=str(folder / "images"), image_size=8, val_fraction=0.2, **options)


def test_class_folders_name_captions(folder: Path) -> None:
    data = read(folder, caption_template="a photo of {}")
    assert data.captions == [f"a photo of {data.class_names[label]}" for label in data.labels]


def test_text_files_beside_images_are_captions(folder: Path) -> None:
    for path in (folder / "images").rglob("*.png"):
        path.with_suffix(".txt").write_text(f"  {path.parent.name}\nnumber {path.stem} \n")
    data = read(folder, caption_files=True)
    assert data.captions == [f"{path.parent.name} number {path.stem}" for path in data.paths]
    assert len(data.subset([0, 2]).captions) == 2
    (folder / "images" / "cats" / "3.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of \d+ images have no caption file.*3\.txt.*data\.caption_files=false"):
        from_files(sorted((folder / "images").rglob("*.png")))
    with pytest.raises(ValueError, match="leave one out"):
        read(folder, caption_files=True, caption_template="{}")


@pytest.mark.parametrize("storage", ["memory", "mapped", "lazy"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_conditions_are_the_partners_of_their_images(folder: Path, storage, split, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    data = read(folder, split=split, condition_root=str(folder / "depth"), storage=storage)
    rows = [0, len(data) - 1]
    batch = data.batch(rows)
    assert batch["condition"].dtype == torch.uint8 and batch["condition"].shape == (2, 1, 8, 8)
    for place, row in enumerate(rows):
        path = data.paths[row]
        (partner,) = (folder / "depth" / path.parent.name).glob(f"{path.stem}.*")
        assert np.array_equal(batch["condition"][place].numpy(), load_image(partner, size=8, channels=1))
    assert data.facts(rows)["condition"].equal(batch["condition"])
    assert data.subset(rows).batch([0, 1])["condition"].equal(batch["condition"])


def test_colour_conditions(folder: Path) -> None:
    data = read(folder, condition_root=str(folder / "depth"), condition_channels=3)
    assert data.batch([0])["condition"].shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"data\.condition_channels=2"):
        read(folder, condition_root=str(folder / "depth"), condition_channels=2)


def test_missing_partners_are_refused_by_the_first_name(folder: Path) -> None:
    for number in (1, 4):
        next((folder / "depth" / "dogs").glob(f"{number}.*")).unlink()
    with pytest.raises(ValueError, match=r"no image for \d of \d+ images, .*dogs.(1|4)\.png the first"):
        read(folder, condition_root=str(folder / "depth"))
    with pytest.raises(ValueError, match="is no folder"):
        read(folder, condition_root=str(folder / "nowhere"))


def test_the_data_module_serves_both(folder: Path) -> None:
    data = DataModule(
        ImageFolder,
        batch_size=3,
        num_classes=2,
        root=str(folder / "images"),
        image_size=8,
        caption_template="a {}",
        condition_root=str(folder / "depth"),
        val_fraction=0.2,
    )
    batch = next(iter(data.train_dataloader()))
    assert len(batch["caption"]) == len(batch["condition"]) == 3


def test_a_data_set_without_either_has_neither_key() -> None:
    plain = ImageDataset(np.zeros((3, 1, 4, 4), dtype=np.uint8), name="plain", split="train")
    assert set(plain.batch([0])) == {"image", "index"}
