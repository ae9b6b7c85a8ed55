"""Splits held apart by content, the test split, limits and what metrics are held against."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ornstein.data import MNIST, DataModule, Digits, Emoji, ImageDataset, ImageFolder
from ornstein.data.base import SPLITS, NoSplit, RowsOf, Split
from ornstein.data.datamodule import declared_splits
from ornstein.errors import OrnsteinError

# Images by their one value: val holds two of train's, test two of train's and one of val's.
VALUES: dict[Split, list[int]] = {"train": list(range(20)), "val": [20, 3, 21, 22, 4], "test": [30, 3, 22, 31, 5]}


class Values(ImageDataset):
    """Grey 2 x 2 images of one value each, in two classes."""

    splits: ClassVar[tuple[Split, ...]] = SPLITS

    def __init__(
        self, *, split: Split, labels: bool = True, has_test: bool = True, given: bool = False, **_: Any
    ) -> None:
        if split == "test" and not has_test:
            raise NoSplit("none here")
        values = np.array(VALUES[split], dtype=np.uint8)
        images = np.broadcast_to(values[:, None, None, None], (len(values), 1, 2, 2)).copy()
        keys = np.zeros((len(values), 16), dtype=np.uint8)
        keys[:, 7] = values
        super().__init__(
            images,
            name="values",
            split=split,
            labels=(values >= 15).astype(np.int64) if labels else None,
            class_names=("low", "high"),
            keys=keys if given else None,
        )


def values(dataset: ImageDataset | None) -> list[int]:
    assert dataset is not None
    return dataset.images[np.arange(len(dataset))][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("given", [False, True], ids=["pixels", "keys"])
def test_drop(given: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Val gives way to train, test to both; train to nobody; one line for each pair."""
    data = DataModule(Values, batch_size=4, given=given)
    data.setup("fit")
    assert values(data.train) == VALUES["train"] and values(data.val) == [20, 21, 22]
    assert capsys.readouterr().err.splitlines() == [
        "2 of 5 val images of values are in train too: left out of val (data.overlap=allow keeps them)"
    ]
    assert values(data.test) == [30, 31]
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert sum(len(batch["index"]) for batch in data.val_dataloader()) == 3
    assert data.val.labels.tolist() == [1, 1, 1] and data.val.fingerprint != Values(split="val").fingerprint


def test_refuse_and_allow(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OrnsteinError, match=r"2 of 5 val images .*val image 1 is train image 3; .*data\.overlap=drop"):
        DataModule(Values, batch_size=4, overlap="refuse").setup("fit")
    data = DataModule(Values, batch_size=4, overlap="allow")
    data.setup("fit")
    assert values(data.val) == VALUES["val"] and values(data.test) == VALUES["test"]
    assert capsys.readouterr().err == ""
    with pytest.raises(OrnsteinError, match=r"data\.overlap=keep does not exist"):
        DataModule(Values, batch_size=4, overlap="keep")  # type: ignore[arg-type]


def test_refuse_looks_at_test_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """And names at most ten."""
    monkeypatch.setitem(VALUES, "val", [20, 21])
    monkeypatch.setitem(VALUES, "test", [*range(15), 33])
    with pytest.raises(OrnsteinError, match=r"15 of 16 test images .*test image 9 is train image 9, and 5 more"):
        DataModule(Values, batch_size=4, overlap="refuse").setup("fit")


def test_nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VALUES, "val", [1, 2])
    with pytest.raises(OrnsteinError, match=r"every val image of values is in train.*data\.overlap=allow"):
        DataModule(Values, batch_size=4).setup("fit")


def test_files_are_named(tmp_path: Path) -> None:
    """Copies between given folders, whatever they are called there."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, names in {"train": "abcdef", "val": "ghi", "test": "jkl"}.items():
        for name in names:
            path = tmp_path / part / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    (tmp_path / "val" / "copy.png").write_bytes((tmp_path / "train" / "c.png").read_bytes())
    (tmp_path / "test" / "other.png").write_bytes((tmp_path / "val" / "g.png").read_bytes())
    options = {"root": str(tmp_path), "image_size": 8}
    with pytest.raises(OrnsteinError, match=r"val/copy\.png is .*train/c\.png"):
        DataModule(ImageFolder, batch_size=2, overlap="refuse", **options).setup("fit")
    data = DataModule(ImageFolder, batch_size=2, **options)
    data.setup("fit")
    assert len(data.val) == 3 and data.test is not None and len(data.test) == 3


def test_test_is_built_when_it_is_asked_for() -> None:
    asked: list[str] = []

    def make(**arguments: Any) -> ImageDataset:
        asked.append(arguments["split"])
        return Values(**arguments)

    make.splits = SPLITS  # type: ignore[attr-defined]
    data = DataModule(make, batch_size=4)
    data.setup("fit")
    assert asked == ["train", "val"]
    assert data.test is data.test and asked == ["train", "val", "test"]


@pytest.mark.parametrize(
    ("dataset", "options"),
    [(Values, {"has_test": False}), (partial(Values, has_test=False), {}), (lambda **a: Values(**a), {})],
    ids=["not under these options", "partial", "undeclared"],
)
def test_no_test_split(dataset: Any, options: dict[str, Any]) -> None:
    """None, where the options or the class know of none."""
    assert DataModule(dataset, batch_size=4, **options).test is None


def test_declared_splits() -> None:
    assert declared_splits(partial(partial(Values), has_test=True)) == SPLITS
    assert declared_splits(lambda: None) == ("train", "val") == ImageDataset.splits


# ---- the data sets that we carry -------------------------------------------------------------------------------------


def sides(make: Any, **options: Any) -> dict[str, set[bytes]]:
    return {split: set(map(bytes, make(split=split, **options).content_keys)) for split in SPLITS}


def test_bundled_sets_have_three_disjoint_splits(idx_folder: Any, emoji_package: Path) -> None:
    """On request; val stays the same, and without it everything is as it always was."""
    mnist = {"root": str(idx_folder()), "val_from": "train", "val_fraction": 0.2}
    three = sides(MNIST, **mnist)
    assert [len(three[split]) for split in SPLITS] == [40, 10, 20]
    assert np.array_equal(MNIST(split="test", **mnist).images, MNIST(split="val", root=mnist["root"]).images)
    for make, options in ((Digits, {}), (Emoji, {"root": str(emoji_package), "skin_tones": True})):
        found = sides(make, **options, test_fraction=0.3)
        assert np.array_equal(
            make(split="val", **options, test_fraction=0.3).images, make(split="val", **options).images
        )
        assert not (found["train"] & found["val"] or found["train"] & found["test"] or found["val"] & found["test"])
        assert found["train"] | found["test"] == set(map(bytes, make(split="train", **options).content_keys))
        with pytest.raises(NoSplit):
            make(split="test", **options)
    assert len(Digits(split="test", test_fraction=0.2)) == 359
    with pytest.raises(NoSplit, match=r"data\.val_from=train"):
        MNIST(split="test", root=mnist["root"])


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "count"), [("whole", 20), ("limited", 6)])
def test_reference_under_a_limit(choice: Any, count: int) -> None:
    """Metrics are held against all of train unless asked otherwise; val does not depend on the limit."""
    data = DataModule(Values, batch_size=4, limit=6, limit_reference=choice)
    data.setup("fit")
    assert (len(data.train), len(data.reference)) == (6, count)
    assert values(data.val) == [20, 21, 22], "also the images of train that the limit leaves out"
    assert (
        DataModule(Values, batch_size=4, limit_reference=choice).reference.fingerprint
        == Values(split="train").fingerprint
    )
    with pytest.raises(OrnsteinError, match=r"data\.limit_reference=all"):
        DataModule(Values, batch_size=4, limit_reference="all")  # type: ignore[arg-type]


def test_balanced_limit_and_order() -> None:
    """15 low and 5 high images: as many of each in the limit, and in every two of the order."""
    data = DataModule(Values, batch_size=3, limit=8, balanced=True)
    assert np.bincount(data.train.labels).tolist() == [4, 4]
    whole = DataModule(Values, batch_size=4, balanced=True)
    batches = iter(whole.train_dataloader())
    for _ in range(12):
        assert next(batches)["label"].sum() == 2
    resumed = DataModule(Values, batch_size=4, balanced=True)
    resumed.start_batch = 12
    assert next(iter(resumed.train_dataloader()))["index"].equal(next(batches)["index"])
    with pytest.raises(OrnsteinError, match=r"data\.limit=12 .*'high' has 5: set data\.limit=10 or less"):
        _ = DataModule(Values, batch_size=3, limit=12, balanced=True).train


@pytest.mark.parametrize("num_classes", [None, "auto"])
def test_balanced_needs_classes(num_classes: Any) -> None:
    data = partial(Values, labels=False) if num_classes else Values
    with pytest.raises(OrnsteinError, match=r"data\.balanced=true needs classes"):
        module = DataModule(
            lambda **a: data(**{**a, "labels": False}), batch_size=4, balanced=True, num_classes=num_classes
        )
        module.train_dataloader()


def test_latents_of_the_whole_serve_a_balanced_limit() -> None:
    """`limit` takes rows of the whole train split, which latents were made of."""
    data = DataModule(Values, batch_size=3, limit=8, balanced=True, latents="unused")
    rows = data._rows(data._all("train"))
    assert values(data.train) == [VALUES["train"][row] for row in rows]


# ---- subsets and keys ------------------------------------------------------------------------------------------------


def test_large_subsets_are_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the bound nothing is copied, and the fingerprint is of the rows."""
    whole = Values(split="train")
    small = whole.subset([5, 2, 9])
    monkeypatch.setattr("ornstein.data.base.COPIED_BYTES", 4)
    view = whole.subset([5, 2, 9])
    assert isinstance(view.images, RowsOf) and not isinstance(small.images, RowsOf)
    assert values(view) == values(small) == [5, 2, 9] and view.fingerprint == small.fingerprint
    assert view.batch([-1])["image"].flatten().tolist() == [9] * 4
    assert np.array_equal(view.content_keys, small.content_keys)
    told = [
        ImageDataset(whole.images, name="x", split="train", content=content).subset(rows).fingerprint
        for content, rows in ((b"a", [0, 1]), (b"a", [0, 2]), (b"b", [0, 1]))
    ]
    assert len(set(told)) == 3


def test_keys_are_of_the_pixels_or_given() -> None:
    made, again = Values(split="train").content_keys, Values(split="val").content_keys
    assert made.shape == (20, 16) and made.dtype == np.uint8 and len(set(map(bytes, made))) == 20
    assert np.array_equal(made[3], again[1])
    with pytest.raises(OrnsteinError, match=r"content keys of shape \(3, 16\) for 20 train images"):
        ImageDataset(Values(split="train").images, name="x", split="train", keys=np.zeros((3, 16), dtype=np.uint8))


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "mnist"])
def test_defaults_drop_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures of before stand: the full sets hold no image twice."""
    conf = Path(__file__).parents[2] / "conf" / "data" / f"{name}.yaml"
    group = OmegaConf.merge(OmegaConf.load(conf), {} if name == "digits" else {"download": False})
    data = instantiate(OmegaConf.create({"seed": 0, "data": group}).data)
    try:
        data.setup("fit")
    except OrnsteinError as error:
        pytest.skip(f"not on this machine: {str(error)[:60]}")
    assert len(data.val) == (359 if name == "digits" else 10_000) and data.test is None
    assert capsys.readouterr().err == ""
