"""Any folder of images: classes, splits, storage, and what is refused."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ornstein.data import ImageFolder
from ornstein.data.base import SPLITS, NoSplit
from ornstein.data.describe import class_names, count_classes, measure_sigma_data
from ornstein.data.images import load_image
from ornstein.errors import OrnsteinError

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports and what is known of files stay in the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own-cache"))


def both(root: Path, **options: object) -> tuple[ImageFolder, ImageFolder]:
    """Train and val at 8 pixels."""
    return tuple(ImageFolder(split=split, root=str(root), image_size=8, **options) for split in ("train", "val"))


def test_flat_folder(picture_folder: Make) -> None:
    """No sub-folders: no classes; every image on one side; rows are the files' own pixels."""
    root = picture_folder({"": 30})
    train, val = both(root)
    assert (len(train), len(val)) == (27, 3)
    assert not set(train.paths) & set(val.paths)
    assert train.num_classes is None and "label" not in train.batch([0])
    for row in (0, 13, 26):
        np.testing.assert_array_equal(train.images[np.array([row])][0], load_image(train.paths[row], size=8))


def test_classes_are_subfolders(picture_folder: Make) -> None:
    """Sorted names; images may lie deeper; other files and hidden ones do not count."""
    root = picture_folder({"cat": 8, "ant/deep/er": 9, "bee": 7})
    (root / "empty").mkdir()
    (root / ".hidden").mkdir()
    shutil.copy(root / "cat" / "000.png", root / ".hidden" / "a.png")
    (root / "cat" / "readme.txt").write_text("no image")
    train, val = both(root, val_fraction=0.25)
    assert train.class_names == class_names(root) == ("ant", "bee", "cat")
    assert count_classes(root) == train.num_classes == 3
    for dataset in (train, val):
        assert dataset.labels is not None
        assert [dataset.class_names[label] for label in dataset.labels] == [
            path.relative_to(root).parts[0] for path in dataset.paths
        ]
    assert len(train) + len(val) == 24


@pytest.mark.parametrize("counts", [{"": 6}, {"all": 6}])
def test_one_folder_is_no_class(picture_folder: Make, counts: dict) -> None:
    """A wrapping folder does not make a class."""
    root = picture_folder(counts)
    assert count_classes(root) is None
    assert both(root)[0].num_classes is None


def test_three_given_splits(picture_folder: Make) -> None:
    """`test` is a split of its own where val has another name; without it there is none."""
    root = picture_folder({"train": 5, "valid": 3, "test": 4})
    assert [len(ImageFolder(split=split, root=str(root), image_size=8)) for split in SPLITS] == [5, 3, 4]
    with pytest.raises(NoSplit, match="add a folder test"):
        ImageFolder(split="test", root=str(picture_folder({"train": 5, "test": 3}, name="two")), image_size=8)


def test_three_made_splits(picture_folder: Make) -> None:
    """A share of the images for test, apart from the others; none unless asked for."""
    root = picture_folder({"": 40})
    parts = [ImageFolder(split=split, root=str(root), image_size=8, test_fraction=0.25) for split in SPLITS]
    assert [len(part) for part in parts] == [26, 4, 10]
    assert len({path for part in parts for path in part.paths}) == 40
    with pytest.raises(NoSplit, match=r"data\.test_fraction"):
        ImageFolder(split="test", root=str(root), image_size=8)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_given_splits(picture_folder: Make, val: str) -> None:
    """Sub-folders named as splits are the splits, and classes lie below them."""
    root = picture_folder({"train/a": 4, "train/b": 5, f"{val}/b": 3})
    train, held = both(root)
    assert (len(train), len(held)) == (9, 3)
    assert train.class_names == held.class_names == ("a", "b")
    assert held.labels is not None and set(held.labels.tolist()) == {1}


def test_copies_stay_on_one_side(picture_folder: Make) -> None:
    """Every image twice under another name: no content is in both splits."""
    root = picture_folder({"": 40})
    for path in sorted(root.glob("*.png")):
        shutil.copy(path, root / f"copy of {path.name}")
    train, val = both(root, val_fraction=0.3)
    seen = [{image.tobytes() for image in dataset.images[np.arange(len(dataset))]} for dataset in (train, val)]
    assert not seen[0] & seen[1]
    assert len(val) == 24


def test_moving_the_folder_changes_nothing(picture_folder: Make, tmp_path: Path) -> None:
    """Split and fingerprint depend on content, not on where it lies or when it was written."""
    root = picture_folder({"a": 10, "b": 10})
    before = [dataset.fingerprint for dataset in both(root)]
    shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert [dataset.fingerprint for dataset in both(tmp_path / "elsewhere")] == before


def test_storage_is_a_matter_of_speed_alone(bare_machine: Path, picture_folder: Make) -> None:
    """Memory, memory map and lazy decoding give the same bytes and fingerprints, pickled or not."""
    root = picture_folder({"": 20})
    rows = [3, 0, 17, 3]
    reference = both(root, storage="memory")[0]
    for storage in ("mapped", "mapped", "lazy", "auto"):
        train = both(root, storage=storage)[0]
        for dataset in (train, pickle.loads(pickle.dumps(train))):
            assert (dataset.batch(rows)["image"] == reference.batch(rows)["image"]).all()
            assert dataset.fingerprint == reference.fingerprint
    # A memory map is pickled as its path: much less than the 18 * 192 bytes of its images.
    assert len(pickle.dumps(both(root, storage="mapped")[0].images)) < 500
    maps = list((bare_machine / "cache").rglob("*"))
    assert sorted(path.suffix for path in maps if path.is_file()) == [".npy", ".npy"]
    with pytest.raises(OrnsteinError, match="auto, memory, mapped, lazy, unchecked"):
        both(root, storage="ram")


def test_auto_storage_maps_what_is_large(
    bare_machine: Path, picture_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the limit, `auto` makes a memory map."""
    monkeypatch.setattr("ornstein.data.stored.MEMORY_LIMIT", 100)
    both(picture_folder({"": 5}))
    assert list((bare_machine / "cache").rglob("*.npy"))


def test_changed_file_is_decoded_anew(bare_machine: Path, picture_folder: Make) -> None:
    """A memory map made before a file changed is not used after it."""
    root = picture_folder({"": 6})
    train = both(root, storage="mapped")[0]
    before = train.batch([0])["image"]
    other = train.paths[1].read_bytes()
    train.paths[0].write_bytes(other)
    after = {image.tobytes() for d in both(root, storage="mapped") for image in d.images[np.arange(len(d))]}
    assert before.numpy()[0].tobytes() not in after


def test_no_room_for_the_map(bare_machine: Path, picture_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is said before decoding starts, with both ways out."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OrnsteinError, match=r"XDG_CACHE_HOME.*storage=lazy"):
        both(picture_folder({"": 5}), storage="mapped")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: root / "missing", "does not exist"),
        (lambda root: root / "a" / "000.png", "is a file"),
        (lambda root: (root / "void").mkdir() or root / "void", "holds no images"),
        (lambda root: (root / "pictures.png").mkdir() or root / "pictures.png", "holds no images"),
    ],
    ids=["missing", "file", "empty", "empty-and-named-like-a-file"],
)
def test_wrong_roots(picture_folder: Make, prepare: object, message: str) -> None:
    """One sentence with the folder in it."""
    root = prepare(picture_folder({"a": 3}))  # type: ignore[operator]
    with pytest.raises(OrnsteinError, match=message) as caught:
        both(root)
    assert str(root) in str(caught.value)


def test_no_root_says_how_to_name_one() -> None:
    """The default config has no folder."""
    with pytest.raises(OrnsteinError, match=r"data\.root="):
        ImageFolder(split="train", root=None)
    with pytest.raises(OrnsteinError, match=r"data\.root="):
        count_classes(None)


def test_loose_images_among_classes(picture_folder: Make) -> None:
    """An image outside the class folders has no label; without labels it is welcome."""
    root = picture_folder({"a": 5, "b": 5, "": 2})
    with pytest.raises(OrnsteinError, match=r"no class folder.*num_classes=null"):
        both(root)
    assert len(both(root, labels=False)[0]) == 11


def test_val_class_that_train_lacks(picture_folder: Make) -> None:
    """The classes are train's."""
    with pytest.raises(OrnsteinError, match="has not \\(c\\)"):
        both(picture_folder({"train/a": 3, "train/b": 3, "val/c": 2}))


def test_sigma_data_is_the_standard_deviation(picture_folder: Make) -> None:
    """Against numpy over all pixels; float64 sums agree to rounding."""
    train = both(picture_folder({"": 25}))[0]
    x = train.images[np.arange(len(train))] / 127.5 - 1
    assert measure_sigma_data(train) == pytest.approx(x.std(), rel=1e-10)


def test_keys_are_kept_for_as_long_as_a_file_stays(
    bare_machine: Path, picture_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes of files are read from the cache, and are those of the whole content, not of its beginning alone."""
    monkeypatch.setattr("ornstein.data.files.WORTH_KEEPING", 1)
    root = picture_folder({"train": 6, "val": 4})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    image.save(root / "train" / "long.bmp")
    image.putpixel((0, 0), (1, 2, 3))  # the last row of a BMP file is the first
    image.save(root / "val" / "long.bmp")
    before = [dataset.content_keys for dataset in both(root)]
    assert not {key.tobytes() for key in before[0]} & {key.tobytes() for key in before[1]}
    with monkeypatch.context() as patch:
        patch.setattr("ornstein.data.files._keys", lambda path: pytest.fail(f"{path} is read again"))
        for found, expected in zip(both(root), before, strict=True):
            np.testing.assert_array_equal(found.content_keys, expected)
    shutil.copy(root / "train" / "000.png", root / "val" / "copy.png")
    keys = [{key.tobytes() for key in dataset.content_keys} for dataset in both(root)]
    assert len(keys[0] & keys[1]) == 1


def test_crops(bare_machine: Path, picture_folder: Make) -> None:
    """Each has its pixels, fingerprint and memory map; "none" names what has another size."""
    root = picture_folder({"": 12})
    found = {}
    for crop in ("adm", "edm", "stretch"):
        train = both(root, crop=crop, storage="mapped")[0]
        expected = load_image(train.paths[2], size=8, crop=crop)
        np.testing.assert_array_equal(train.batch([2])["image"][0].numpy(), expected)
        found[train.fingerprint] = train.images.path
    assert len(found) == len(set(found.values())) == 3
    for number, path in enumerate(sorted(root.iterdir())):
        if number > 1:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    with pytest.raises(OrnsteinError, match=r"^2 images .*000\.png: it is \d+ x \d+ and data\.crop=none takes 8 x 8"):
        both(root, crop="none")
    with pytest.raises(OrnsteinError, match=r"data\.crop=middle"):
        both(root, crop="middle")
