"""Classes by a dataset.json in EDM's style, and every way in which one can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ornstein.data import ImageFolder
from ornstein.data.describe import class_names, count_classes, read_class_names, read_labels
from ornstein.errors import OrnsteinError

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports and what is known of files stay in the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own-cache"))


def both(root: Path, **options: object) -> tuple[ImageFolder, ImageFolder]:
    """Train and val at 8 pixels."""
    return tuple(ImageFolder(split=split, root=str(root), image_size=8, **options) for split in ("train", "val"))


def broken(root: Path, *numbers: int) -> None:
    """Cuts some of a folder's images off in the middle."""
    for number in numbers:
        path = sorted(root.rglob("*.png"))[number]
        path.write_bytes(path.read_bytes()[:200])


def labelled(root: Path, labels: dict[str, Any] | None, folder: str = "", **more: Any) -> None:
    """Writes a dataset.json."""
    content = None if labels is None else [[name, label] for name, label in labels.items()]
    (root / folder / "dataset.json").write_text(json.dumps({"labels": content, **more}))


def names_of(root: Path, folder: str = "") -> list[str]:
    """The images below a folder, as a dataset.json there calls them."""
    return sorted(path.relative_to(root / folder).as_posix() for path in (root / folder).rglob("*.png"))


@pytest.mark.parametrize("where", ["root", "parts"])
@pytest.mark.parametrize("given", [True, False])
def test_classes_from_dataset_json(picture_folder: Make, where: str, given: bool) -> None:
    """In EDM's style, at the root or in each part; folders do not matter then; class_names are ours."""
    counts = {"train/00000": 7, "train/00001": 5, "val/00000": 6} if given else {"00000": 10, "00001": 8}
    root = picture_folder(counts)
    folders = ["train", "val"] if given and where == "parts" else [""]
    truth = {}
    for folder in folders:
        labels = {name: index % 3 for index, name in enumerate(names_of(root, folder))}
        labelled(root, labels, folder)
        truth |= {root / folder / name: label for name, label in labels.items()}
    for dataset in both(root):
        assert dataset.class_names == class_names(root) == ("0", "1", "2") and count_classes(root) == 3
        assert dataset.labels is not None
        assert dict(zip(dataset.paths, dataset.labels.tolist(), strict=True)).items() <= truth.items()
    labelled(root, labels, folders[-1], class_names=["cat", "dog", "elk"])
    if len(folders) == 1:
        assert both(root)[0].class_names == ("cat", "dog", "elk")
    assert both(root, labels=False)[0].labels is None


def test_the_command_line_counts_them(picture_folder: Make, compose: Callable[..., Any]) -> None:
    """`data.num_classes=auto` before anything is built."""
    from ornstein.cli.validate import validate

    root = picture_folder({"00000": 5, "00001": 5})
    labelled(root, {name: index % 4 for index, name in enumerate(names_of(root))})
    cfg = compose("data=image_folder", f"data.root={root}", "data.num_classes=auto")
    validate(cfg)
    assert cfg.data.num_classes == 4
    (root / "dataset.json").write_text("[]")
    with pytest.raises(OrnsteinError, match=r"dataset\.json does not look like"):
        validate(compose("data=image_folder", f"data.root={root}", "data.num_classes=auto"))


def test_null_labels_are_no_labels(picture_folder: Make) -> None:
    """EDM's tool writes null where there are none, into folders that are no classes."""
    root = picture_folder({"00000": 5, "00001": 5})
    labelled(root, None)
    assert count_classes(root) is None and both(root)[0].labels is None


def test_dataset_json_speaks_of_bad_images_too(picture_folder: Make) -> None:
    """Labels follow the images that are left."""
    root = picture_folder({"x": 12})
    labels = {name: index % 2 for index, name in enumerate(names_of(root))}
    labelled(root, labels)
    broken(root, 1, 6)
    with pytest.warns(UserWarning, match=r"^2 images"):
        found = both(root, max_bad=2)
    assert sum(map(len, found)) == 10
    for dataset in found:
        assert dataset.labels is not None
        expected = [labels[path.relative_to(root).as_posix()] for path in dataset.paths]
        assert dataset.labels.tolist() == expected


ENTRY = ["a.png", 0]
WRONG_LABELS = [
    ("no json", "{", "is no JSON"),
    ("no object", json.dumps([ENTRY]), "does not look like"),
    ("no labels", json.dumps({"classes": [ENTRY]}), "does not look like"),
    ("a dict", json.dumps({"labels": {"a.png": 0}}), "label 0 is"),
    ("no pair", json.dumps({"labels": [["a.png"]]}), r"label 0 is \['a\.png'\]"),
    ("no name", json.dumps({"labels": [[7, 0]]}), r"label 0 is \[7, 0\]"),
    ("missing", json.dumps({"labels": [ENTRY]}), r"no label for 1 of 2 \(b\.png\)"),
    ("extra", json.dumps({"labels": [ENTRY, ["b.png", 1], ["c.png", 0]]}), r"not there, 1 of 3 \(c\.png\)"),
    ("negative", json.dumps({"labels": [ENTRY, ["b.png", -1]]}), "label of b.png is -1"),
    ("a vector", json.dumps({"labels": [ENTRY, ["b.png", [0.5, 1]]]}), "whole numbers from 0"),
    ("true", json.dumps({"labels": [ENTRY, ["b.png", True]]}), "label of b.png is True"),
    ("null", json.dumps({"labels": [ENTRY, ["b.png", None]]}), "label of b.png is None"),
    ("skipped", json.dumps({"labels": [ENTRY, ["b.png", 2]]}), "a label 2 and none of 1"),
    ("from one", json.dumps({"labels": [["a.png", 1], ["b.png", 2]]}), "a label 2 and none of 0"),
    ("twice", json.dumps({"labels": [ENTRY, ["b.png", 1], ["./a.png", 1]]}), "labels a.png twice, 0 and 1"),
    ("few names", json.dumps({"labels": [ENTRY, ["b.png", 1]], "class_names": ["x"]}), "1 class_names and a label 1"),
    ("odd names", json.dumps({"labels": [ENTRY, ["b.png", 1]], "class_names": [1, 2]}), "a list of names"),
]


@pytest.mark.parametrize(("text", "message"), [row[1:] for row in WRONG_LABELS], ids=[row[0] for row in WRONG_LABELS])
def test_wrong_label_files(tmp_path: Path, text: str, message: str) -> None:
    """Each fault in one sentence with the file's name, from the parser and from a folder alike."""
    with pytest.raises(OrnsteinError, match=rf"^set\.zip.*{message}"):
        read_labels(text, ["a.png", "b.png"], where="set.zip")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 9), (len(text) % 200, ord(name[0]), 0)).save(tmp_path / name)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(OrnsteinError, match=rf"dataset\.json.*{message}"):
        both(tmp_path, val_fraction=0.5)


def test_right_label_files() -> None:
    """In the images' order, whatever the file's; gaps where names say how many; other systems' slashes."""
    text = json.dumps({"labels": [["x\\b.png", 4], ["x/a.png", 0]], "class_names": list("vwxyz")})
    assert read_labels(text, ["x/a.png", "x/b.png"], where="here").tolist() == [0, 4]
    assert read_class_names(text, where="here") == tuple("vwxyz")
    assert read_labels('{"labels": null}', ["a.png"], where="here") is None
    assert read_class_names('{"labels": null}', where="here") == ()


@pytest.mark.parametrize(
    ("lacking", "message"), [("val", "has no dataset.json"), ("null", "has no labels"), ("more", "has a label 2 and")]
)
def test_label_files_of_parts_agree(picture_folder: Make, lacking: str, message: str) -> None:
    """Train's says what the classes are."""
    root = picture_folder({"train": 6, "val": 4})
    labelled(root, {name: index % 2 for index, name in enumerate(names_of(root, "train"))}, "train")
    if lacking == "null":
        labelled(root, None, "val")
    elif lacking == "more":
        labelled(root, {name: index % 3 for index, name in enumerate(names_of(root, "val"))}, "val")
    with pytest.raises(OrnsteinError, match=message):
        both(root)


def test_label_files_in_utf_16_are_named(picture_folder: Make) -> None:
    root = picture_folder({"": 3})
    (root / "dataset.json").write_bytes(json.dumps({"labels": None}).encode("utf-16"))
    with pytest.raises(OrnsteinError, match=r"dataset\.json is not text in UTF-8"):
        both(root)
