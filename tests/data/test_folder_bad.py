"""Folders with images that cannot be read: named, left out up to a limit, and never met in training."""

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ornstein.data import DataModule, ImageFolder
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


def test_the_disk_fills_up_while_decoding(
    bare_machine: Path, picture_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room is taken before the map is written to: a sentence, and nothing half-written."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OrnsteinError, match=r"do not fit into the \d+ MB free at .*storage=lazy"):
        both(picture_folder({"": 5}), storage="mapped")
    assert not [path for path in (bare_machine / "cache").rglob("*") if path.is_file()]
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
    assert len(both(bare_machine.parent / "pictures", storage="mapped")[0].images[np.array([0])]) == 1


def test_damaged_images_are_counted_and_ten_named(picture_folder: Make) -> None:
    """12 broken of 60: the first ten by name, the rest by number; nothing is left in the cache."""
    root = picture_folder({"": 60})
    for path in sorted(root.glob("*.png"))[:12]:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(OrnsteinError) as caught:
        for dataset in both(root, val_fraction=0.01):
            len(dataset)
    message = str(caught.value)
    assert message.count(".png:") == 10 and "2 more" in message and message.startswith("12 images of data.root=")
    assert "data.max_bad=12" in message


def broken(root: Path, *numbers: int) -> None:
    """Cuts some of a folder's images off in the middle."""
    for number in numbers:
        path = sorted(root.rglob("*.png"))[number]
        path.write_bytes(path.read_bytes()[:200])


def test_empty_files_are_named(picture_folder: Make) -> None:
    """Whatever the storage, before anything is decoded."""
    root = picture_folder({"": 4})
    (root / "001.png").write_bytes(b"")
    with pytest.raises(OrnsteinError, match=r"1 image.*001\.png: the file is empty"):
        both(root, storage="lazy")


STORAGES = ["memory", "mapped", "lazy"]


@pytest.mark.parametrize("storage", STORAGES)
def test_bad_images_are_left_out_up_to_max_bad(bare_machine: Path, picture_folder: Make, storage: str) -> None:
    """Whole images keep their pixels, labels, captions, keys and files; the report lists the others, of all splits."""
    root = picture_folder({"a": 12, "b": 12})
    whole = both(root, caption_template="a {}", val_fraction=0.25, storage=storage)
    gone = [whole[0].paths[3], whole[0].paths[17], whole[1].paths[2]]
    kept = [[row for row, path in enumerate(dataset.paths) if path not in gone] for dataset in whole]
    expected = [dataset.batch(rows) for dataset, rows in zip(whole, kept, strict=True)]
    for path in gone:
        path.write_bytes(path.read_bytes()[: path.stat().st_size - 60])
    with pytest.raises(OrnsteinError, match=r"^3 images .*data\.max_bad=3$"):
        both(root, val_fraction=0.25, storage=storage, max_bad=2)
    # A second time as the first: what the cache kept says the same.
    for _ in range(2):
        with pytest.warns(UserWarning, match="3 images of data.root=") as caught:
            parts = both(root, caption_template="a {}", val_fraction=0.25, storage=storage, max_bad=3)
        (told,) = {str(warning.message) for warning in caught}
        report = Path(told.rpartition("All are listed in ")[2])
        assert report.is_relative_to(bare_machine / "cache")
        assert sorted(json.loads(report.read_text())["bad"]) == sorted(str(path.relative_to(root)) for path in gone)
        found = {path: part.batch([row]) for part in parts for row, path in enumerate(part.paths)}
        assert len(found) == 21
        for dataset, rows, batch in zip(whole, kept, expected, strict=True):
            for place, row in enumerate(rows):
                mine = found[dataset.paths[row]]
                assert (mine["image"][0] == batch["image"][place]).all()
                assert (mine["label"][0], mine["caption"][0]) == (batch["label"][place], batch["caption"][place])
        assert all(part.content_keys.shape == (len(part), 16) for part in parts)
        assert pickle.loads(pickle.dumps(parts[0])).batch([0])["image"].equal(parts[0].batch([0])["image"])


def place_every_kind(folder: Path) -> dict[str, str]:
    """One of each kind of file that is no image which can be used, and a word of what is said of it."""
    noise = np.random.default_rng(5).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    Image.fromarray(noise).save(folder / "cut.jpg")
    for name in ("cut.png", "cut.jpg"):
        (folder / name).write_bytes((folder / name).read_bytes()[:900])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404 not found</html>")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    Image.fromarray(np.ones((9, 9), dtype=np.float32)).save(folder / "float.tiff")
    os.mkfifo(folder / "pipe.png")
    return {
        "cut.png": "truncated", "cut.jpg": "truncated", "empty.png": "empty", "text.jpg": "no image",
        "link.png": "link", "float.tiff": "32-bit", "pipe.png": "regular",
    }  # fmt: skip


@pytest.mark.parametrize("storage", STORAGES)
def test_a_folder_with_every_kind_of_image(bare_machine: Path, picture_folder: Make, storage: str) -> None:
    """What can be decoded is, whatever its kind; the rest is named all at once, and training meets none of it."""
    root = picture_folder({"": 20})
    (root / "a folder.png").mkdir()
    Image.new("CMYK", (30, 20), (0, 255, 255, 0)).save(root / "cmyk.jpg")
    Image.new("LA", (30, 20), (9, 100)).save(root / "alpha.png")
    Image.fromarray(np.full((20, 30), 40_000, dtype=np.uint16)).save(root / "deep.png")
    Image.new("1", (30, 20), 1).save(root / "bits.png")
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    for name in ("film.gif", "film.webp"):
        frames[0].save(root / name, save_all=True, append_images=frames[1:])
    (root / "loop").symlink_to(root)
    words = place_every_kind(root)
    with pytest.raises(OrnsteinError, match=f"^{len(words)} images") as caught:
        both(root, storage=storage)
    for name, word in words.items():
        assert any(word in part for part in str(caught.value).split("; ") if name in part), (name, str(caught.value))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"{len(words)} images")
        module = DataModule(
            ImageFolder, batch_size=8, root=str(root), image_size=8, max_bad=len(words), storage=storage
        )
        module.setup()
        assert len(module.train) + len(module.val) == 26
        assert sum(len(batch["index"]) for batch in module.val_dataloader()) == len(module.val)
        for part in (module.train, module.val):
            assert part.batch(np.arange(len(part)))["image"].shape == (len(part), 3, 8, 8)


def test_nothing_but_bad_images(picture_folder: Make) -> None:
    """Named as such, not as a folder that is too small to split, or allowed away."""
    root = picture_folder({"": 4})
    broken(root, 0, 1, 2, 3)
    with pytest.raises(OrnsteinError, match=r"^4 images"):
        both(root)
    with pytest.warns(UserWarning, match=r"^4 images"), pytest.raises(OrnsteinError, match="no train image"):
        both(root, max_bad=4)
    for path in root.iterdir():
        path.write_bytes(b"")
    with pytest.raises(OrnsteinError, match=r"^4 images .*empty"):
        both(root)


def test_a_map_with_holes_needs_its_list(bare_machine: Path, picture_folder: Make) -> None:
    """Refusing keeps the decoded map for the run that allows the bad ones; without its list it is made anew."""
    root = picture_folder({"": 20})
    broken(root, 7)
    with pytest.raises(OrnsteinError, match=r"^1 image "):
        both(root, storage="mapped")
    (listed,) = (bare_machine / "cache").rglob("*.holes.json")
    before = listed.with_suffix(".npy").stat().st_mtime_ns
    for damage in (None, "{}", "cut"):
        if damage is not None:
            listed.write_text(damage)
        with pytest.warns(UserWarning, match="1 image "):
            train, val = both(root, storage="mapped", max_bad=1)
        assert len(train) + len(val) == 19 and json.loads(listed.read_text())["holes"]
        assert train.batch(np.arange(len(train)))["image"].flatten(1).sum(1).min() > 0
        assert (listed.with_suffix(".npy").stat().st_mtime_ns == before) == (damage is None)
    assert not list((bare_machine / "cache").rglob("*.part"))


def test_lazy_images_are_looked_at_once(
    bare_machine: Path, picture_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict is kept by path, size and time: a changed file is looked at again, and all under a damaged table."""
    monkeypatch.setattr("ornstein.data.stored.WORTH_KEEPING", 1)
    looked: list[str] = []

    def load(source: Path, **options: Any) -> np.ndarray:
        looked.append(source.name)
        return load_image(source, **options)

    monkeypatch.setattr("ornstein.data.stored.load_image", load)
    root = picture_folder({"": 12})
    both(root, storage="lazy")
    assert len(looked) == 12
    both(root, storage="lazy")
    assert len(looked) == 12
    both(root, storage="lazy", crop="stretch")
    assert len(looked) == 24
    Image.new("RGB", (9, 9)).save(root / "003.png")
    both(root, storage="lazy")
    assert looked[24:] == ["003.png"]
    for table in (bare_machine / "cache").rglob("readable-*.npy"):
        table.write_bytes(table.read_bytes()[:-20])
    both(root, storage="lazy")
    assert len(looked) == 25 + 12
    ImageFolder(split="train", root=str(root), image_size=8, storage="unchecked")
    assert len(looked) == 25 + 12


def test_a_bad_file_met_in_training_says_how_to_find_all(picture_folder: Make) -> None:
    root = picture_folder({"": 12})
    (root / "003.png").write_bytes(b"no image")
    data = ImageFolder(split="train", root=str(root), image_size=8, storage="unchecked", val_fraction=0.01)
    with pytest.raises(OrnsteinError) as caught:
        data.batch(np.arange(len(data)))
    told = str(caught.value)
    assert told.startswith(f"003.png of {root} cannot be used (") and "\n" not in told, told
    assert "data.storage=lazy" in told and "resume" in told, told


# After an error torch waits five seconds for a worker to end.
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_file_that_turns_bad_later(picture_folder: Make, workers: int) -> None:
    """One sentence with the file, the reason and what to do, from here or from a worker."""
    root = picture_folder({"": 12})
    module = DataModule(
        ImageFolder, batch_size=4, num_workers=workers, root=str(root), image_size=8, storage="lazy", val_fraction=0.3
    )
    module.setup()
    path = module.val.paths[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OrnsteinError) as caught:
        list(module.val_dataloader())
    told = str(caught.value)
    assert told.startswith(f"{path.name} of {root} can no longer be read (") and "\n" not in told, told
    assert "restore it and resume" in told


def test_files_that_may_not_be_read(picture_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad image like others, with the system's own words; the tests may run as one who may read everything."""
    root = picture_folder({"": 12})
    opened = Path.open

    def refuse(path: Path, *options: Any, **more: Any) -> Any:
        if path.name == "004.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *options, **more)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OrnsteinError, match=r"^1 image .*004\.png: Permission denied\. Repair"):
        both(root)
    with pytest.warns(UserWarning, match=r"^1 image "):
        assert sum(map(len, both(root, max_bad=1))) == 11


def test_a_folder_that_may_not_be_read(picture_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images would be missing without a word."""
    root = picture_folder({"a": 5, "b": 5})
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OrnsteinError, match=r"b cannot be read .Permission denied"):
        both(root, labels=False)


def test_bad_conditions_take_their_images_along(picture_folder: Make, tmp_path: Path) -> None:
    """A pair is whole or left out; the message names the condition."""
    root = picture_folder({"": 12})
    other = tmp_path / "depth"
    shutil.copytree(root, other)
    broken(other, 4)
    broken(root, 9)
    with pytest.warns(UserWarning, match=r"^2 images .*depth.004\.png"):
        found = both(root, condition_root=str(other), max_bad=2, val_fraction=0.5)
    assert sum(map(len, found)) == 10
    for dataset in found:
        batch = dataset.batch(np.arange(len(dataset)))
        for row, path in enumerate(dataset.paths):
            expected = load_image(other / path.name, size=8, channels=1)
            np.testing.assert_array_equal(batch["condition"][row].numpy(), expected)
