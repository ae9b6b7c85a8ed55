"""Data sets through `datasets`: files of every kind, columns, splits, bad cells, streams, and no way to the hub."""

from __future__ import annotations

import io
import json
import pickle
import socket
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ornstein.data import DataModule, HuggingFace, ImageFolder, StreamModule, hf_load, hub_data
from ornstein.data.base import NoSplit
from ornstein.data.images import load_image
from ornstein.errors import OrnsteinError

datasets = pytest.importorskip("datasets")
Make = Callable[..., Path]
COUNT = 24


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of each test's own, no bars, and a machine that knows it is offline."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()
    for each in (hf_load.open_split, hf_load.unreachable, hf_load.tell):
        each.cache_clear()


def png(number: int) -> bytes:
    """A picture of its own."""
    pixels = np.random.default_rng(number).integers(0, 256, (11, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def table(**columns: Any) -> Any:
    """Pictures with a class and a caption, and further columns."""
    features = {
        "pic": datasets.Image(),
        "kind": datasets.ClassLabel(names=["c", "a", "b"]),
        "text": datasets.Value("string"),
    }
    rows = {
        "pic": [{"bytes": png(number), "path": None} for number in range(COUNT)],
        "kind": [number % 3 for number in range(COUNT)],
        "text": [f"picture {number}" for number in range(COUNT)],
    }
    found = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    for name, values in columns.items():
        found = found.add_column(name, values)
    return found


def _files(folder: Path) -> Path:
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number:02d}.png").write_bytes(png(number))
    return folder


def parquet_folder(folder: Path) -> Path:
    table().to_parquet(folder / "data" / "train-0.parquet")
    return folder / "data"


def parquet_file(folder: Path) -> Path:
    return parquet_folder(folder) / "train-0.parquet"


def saved(folder: Path) -> Path:
    table().save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    datasets.DatasetDict(train=table()).save_to_disk(folder / "saved")
    return folder / "saved"


def arrow_file(folder: Path) -> Path:
    return next(saved(folder).glob("*.arrow"))


def csv_of_paths(folder: Path) -> Path:
    _files(folder / "pictures")
    lines = [f"pictures/{number:02d}.png,{'cab'[number % 3]},picture {number}" for number in range(COUNT)]
    (folder / "list.csv").write_text("\n".join(["file_name,label,caption", *lines]))
    return folder / "list.csv"


def json_of_paths(folder: Path) -> Path:
    files = _files(folder / "pictures")
    rows = [
        {"image": str(files / f"{number:02d}.png"), "label": number % 3, "captions": [f"picture {number}", "other"]}
        for number in range(COUNT)
    ]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "list.jsonl"


def image_folder(folder: Path) -> Path:
    for number in range(COUNT):
        place = folder / "tree" / "cab"[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02d}.png").write_bytes(png(number))
    return folder / "tree"


KINDS: list[tuple[Callable[[Path], Path], tuple[str, ...], bool]] = [
    # how it lies there, names of its classes, whether it has captions
    (parquet_folder, ("c", "a", "b"), True),
    (parquet_file, ("c", "a", "b"), True),
    (saved, ("c", "a", "b"), True),
    (saved_splits, ("c", "a", "b"), True),
    (arrow_file, ("c", "a", "b"), True),
    (csv_of_paths, ("a", "b", "c"), True),
    (json_of_paths, ("0", "1", "2"), True),
    (image_folder, ("a", "b", "c"), False),
]


@pytest.mark.parametrize(("write", "names", "captions"), KINDS, ids=[row[0].__name__ for row in KINDS])
def test_every_kind(tmp_path: Path, write: Callable[[Path], Path], names: tuple[str, ...], captions: bool) -> None:
    """The same pictures, classes and captions however they lie there, each decoded as a file of a folder is."""
    module = hub_data(HuggingFace, path=str(write(tmp_path)), batch_size=4, image_size=8, num_classes="auto")
    module.setup()
    assert module.train.class_names == names and len(module.train) + len(module.val) == COUNT
    expected = {load_image(png(number), size=8).tobytes(): number for number in range(COUNT)}
    met = set()
    for split in (module.train, module.val):
        batch = split.batch(range(len(split)))
        for row, image in enumerate(batch["image"].numpy()):
            number = expected[image.tobytes()]
            met.add(number)
            assert names[int(batch["label"][row])] in ("cab"[number % 3], str(number % 3))
            assert not captions or batch["caption"][row] == f"picture {number}"
    assert met == set(range(COUNT)) and ("caption" in module.train.batch([0])) == captions


def test_as_the_folder_itself(tmp_path: Path) -> None:
    """Through `datasets` a folder of images gives the pixels, labels and content keys that `ImageFolder` gives."""
    root = image_folder(tmp_path)
    ours = HuggingFace(split="train", path=str(root), image_size=8, val_fraction=0.25)
    theirs = ImageFolder(split="train", root=str(root), image_size=8, val_fraction=0.25)
    both = [{key.tobytes(): row for row, key in enumerate(found.content_keys)} for found in (ours, theirs)]
    shared = both[0].keys() & both[1].keys()
    assert len(shared) > 8
    rows = [[each[key] for key in sorted(shared)] for each in both]
    first, second = ours.batch(rows[0]), theirs.batch(rows[1])
    assert torch.equal(first["image"], second["image"]) and torch.equal(first["label"], second["label"])


@pytest.mark.parametrize(("overrides", "kind"), [({}, DataModule), ({"streaming": True}, StreamModule)])
def test_the_config(tmp_path: Path, overrides: dict[str, Any], kind: type) -> None:
    """conf/data/hf.yaml builds a data module, or of a stream, of what data.path names."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    table().to_parquet(tmp_path / "t.parquet")
    for number in range(2):
        table().shard(2, number).to_parquet(tmp_path / "data" / f"train-{number}.parquet")
    group = OmegaConf.load(Path(__file__).parents[2] / "conf" / "data" / "hf.yaml")
    own = {"path": str(tmp_path / "data"), "image_size": 8, "num_classes": 3, "batch_size": 4, "sigma_data": None}
    config = OmegaConf.create({"seed": 7, "data": OmegaConf.merge(group, own, overrides)})
    module = instantiate(config.data)
    assert type(module) is kind and module.seed == 7
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (4, 3, 8, 8) and batch["label"].shape == (4,) and len(batch["caption"]) == 4


@pytest.mark.parametrize("storage", ["memory", "mapped", "lazy"])
def test_storage(tmp_path: Path, storage: str) -> None:
    """One content and one fingerprint, in memory, mapped and lazy; a worker's copy reads on."""
    path = str(parquet_folder(tmp_path))
    plain = HuggingFace(split="train", path=path, image_size=8)
    other = pickle.loads(pickle.dumps(HuggingFace(split="train", path=path, image_size=8, storage=storage)))
    assert torch.equal(plain.batch(range(5))["image"], other.batch(range(5))["image"])
    assert plain.fingerprint == other.fingerprint
    assert plain.fingerprint != HuggingFace(split="train", path=path, image_size=8, crop="stretch").fingerprint


ARRAYS = [
    ([[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 255]]], (2, 2)),  # H, W, 3
    ([[[0, 1], [2, 255]]], (2, 2)),  # 1, H, W
    ([[0, 90, 255], [3, 4, 5]], (2, 3)),  # H, W
]


@pytest.mark.parametrize(("cell", "size"), ARRAYS)
def test_arrays(cell: list[Any], size: tuple[int, int]) -> None:
    """Arrays of 0 to 255 come out as they are."""
    pixels = load_image(hf_load.file_of(cell, base=None), size=None, channels=3)
    assert pixels.shape == (3, *size)
    flat = np.array(cell)
    expected = flat.transpose(2, 0, 1) if flat.shape[-1] == 3 and flat.ndim == 3 else np.broadcast_to(flat, (3, *size))
    assert np.array_equal(pixels, expected)


def test_splits(tmp_path: Path) -> None:
    """Those of the data set by name, slices of them, or shares by content that hold no image in common."""
    whole = table()
    found = datasets.DatasetDict(
        train=whole.select(range(16)), dev=whole.select(range(16, 20)), rest=whole.select(range(20, 24))
    )
    found.save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    module = hub_data(HuggingFace, path=path, val_split="dev", test_split="rest", batch_size=4, num_classes=3)
    assert [len(split) for split in (module.train, module.val, module.test)] == [16, 4, 4]
    for name, options in (
        ("val", {}),
        ("test", {"test_fraction": 0.25}),
        ("test", {"test_fraction": 0.25, "val_split": "dev"}),
    ):
        parts = [HuggingFace(split=split, path=path, val_fraction=0.25, **options) for split in ("train", name)]
        keys = [{key.tobytes() for key in part.content_keys} for part in parts]
        assert not keys[0] & keys[1] and min(map(len, keys)) > 0
    with pytest.raises(NoSplit):
        HuggingFace(split="test", path=path)
    files = str(parquet_folder(tmp_path))
    assert len(HuggingFace(split="val", path=files, train_split="train[:10]", val_split="train[10:]")) == 14


def test_columns_are_named_or_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is taken is told, once; what is named is taken."""
    path = tmp_path / "t.parquet"
    table(style=[f"s{number % 2}" for number in range(COUNT)], title=["one"] * COUNT).to_parquet(path)
    guessed = HuggingFace(split="train", path=str(path))
    HuggingFace(split="val", path=str(path))
    assert capsys.readouterr().err.count("images from column pic, classes from kind, captions from text") == 1
    assert guessed.class_names == ("c", "a", "b")
    named = HuggingFace(split="train", path=str(path), label_column="style", caption_column="title")
    assert named.class_names == ("s0", "s1") and named.captions is not None and set(named.captions) == {"one"}
    without = HuggingFace(split="train", path=str(path), labels=False)
    assert without.labels is None
    assert HuggingFace.count_classes({"path": str(path)}) == 3
    assert HuggingFace.count_classes({"path": str(path), "label_column": "style"}) == 2


def test_bad_cells(tmp_path: Path) -> None:
    """Cells that hold no image are named by split and row, and left out up to max_bad."""
    cells = [{"bytes": png(number), "path": None} for number in range(10)]
    cells[3], cells[5], cells[7] = {"bytes": b"no image", "path": None}, None, {"bytes": b"", "path": None}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(tmp_path / "t.parquet")
    options = {"split": "train", "path": str(tmp_path / "t.parquet"), "labels": False, "val_split": "train[:1]"}
    with pytest.raises(OrnsteinError, match=r"3 images.*train\[3\].*train\[5\].*train\[7\].*data\.max_bad=3"):
        HuggingFace(**options)
    with pytest.warns(UserWarning, match=r"3 images of data\.path=.* left out"):
        assert len(HuggingFace(**options, max_bad=3)) == 7
    (tmp_path / "list.csv").write_text("image\ngone.png\ngone_too.png\n")
    with pytest.raises(OrnsteinError, match=r"2 images.*train\[0\].*no such file.*data\.max_bad=2"):
        HuggingFace(**options | {"path": str(tmp_path / "list.csv"), "val_split": "train"})


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_goes_on_to_the_bit(tmp_path: Path, workers: int) -> None:
    """Streamed files have the face of a data module, share out over workers, and go on where they stopped."""
    for number in range(4):
        table().shard(4, number).to_parquet(tmp_path / "data" / f"train-{number}.parquet")

    def made() -> StreamModule:
        module = hub_data(
            HuggingFace,
            path=str(tmp_path / "data"),
            streaming=True,
            batch_size=3,
            image_size=8,
            num_classes="auto",
            num_workers=workers,
            shuffle_buffer=4,
            val_fraction=0.3,
            storage="auto",
            balanced=False,
        )
        assert isinstance(module, StreamModule)
        return module

    module = made()
    module.setup()
    assert module.train.class_names == ("c", "a", "b") and (len(module.train), len(module.val)) == (18, 6)
    loader = module.train_dataloader()
    whole = list(islice(loader, 16))
    assert {int(index) for batch in whole for index in batch["index"]} == {
        (s << 32) + n for s in range(3) for n in range(6)
    }
    resumed = made()
    resumed.start_batch = 7
    state = {"batches": 7, "shape": loader.shape, "ranks": [loader.behind(7)]}
    resumed.load_state_dict(json.loads(json.dumps(state)))
    for ours, theirs in zip(islice(resumed.train_dataloader(), 9), whole[7:], strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("image", "label", "index"))
        assert ours["caption"] == theirs["caption"]


def test_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of the hub on a machine that cannot reach it is one sentence, at once, that says what to bring where."""
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def unknown(*arguments: Any, **options: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    started = time.perf_counter()
    with pytest.raises(OrnsteinError) as caught:
        HuggingFace(split="train", path="someone/butterflies")
    assert time.perf_counter() - started < 5
    sentence = str(caught.value)
    for words in (
        "data.path=someone/butterflies",
        "cannot be reached",
        "Name or service",
        "save_to_disk('FOLDER')",
        "data.path=FOLDER",
    ):
        assert words in sentence


ERRORS: list[tuple[Exception, str]] = [
    (
        datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."),
        "HF_TOKEN hf auth login permission",
    ),
    (
        datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
        "no public data set HF_TOKEN",
    ),
    (ValueError("Config name is missing. Please pick one among: ['x', 'y']"), "data.config_name 'x'"),
    (ValueError("Unknown split \"train\". Should be one of ['test']."), "no split train data.train_split 'test'"),
]


@pytest.mark.parametrize(("error", "words"), ERRORS)
def test_what_the_hub_says(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    """Gated, unknown, ambiguous: told with the way out."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(OrnsteinError) as caught:
        HuggingFace(split="train", path="a/b")
    assert all(word in str(caught.value) for word in words.split())


@pytest.mark.parametrize("option", [{"balanced": True}, {"buckets": "auto"}, {"test_fraction": 0.1}])
def test_what_a_stream_cannot_do(option: dict[str, Any]) -> None:
    """Refused by name, when validated and when built."""
    (key,) = option
    for attempt in (HuggingFace.check, lambda given: hub_data(HuggingFace, batch_size=4, **given)):
        with pytest.raises(OrnsteinError, match=rf"data\.{key}=.*data\.streaming=false"):
            attempt({"path": ".", "streaming": True, **option})


def test_buckets(tmp_path: Path) -> None:
    """Images of several shapes by size."""
    cells = []
    for number, size in enumerate([(8, 16), (16, 8), (8, 16), (12, 12)] * 3):
        file = io.BytesIO()
        Image.fromarray(np.full((*size, 3), number, dtype=np.uint8)).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(tmp_path / "t.parquet")
    options = {"path": str(tmp_path / "t.parquet"), "image_size": 8, "num_classes": None, "overlap": "allow"}
    module = hub_data(HuggingFace, batch_size=2, buckets=[[4, 8], [8, 4], [8, 8]], **options)
    shapes = {tuple(batch["image"].shape[2:]) for batch in islice(module.train_dataloader(), 12)}
    assert shapes <= {(4, 8), (8, 4), (8, 8)} and len(shapes) > 1


REFUSED = [
    ({"path": None}, "data.path="),
    ({"path": "/nowhere/at/all"}, "data.path=/nowhere/at/all no such"),
    ({"path": "./missing.parquet"}, "missing.parquet no such"),
    ({"train_split": "trian"}, "no split trian data.train_split"),
    ({"image_column": "img"}, "data.image_column=img pic, kind, text"),
    ({"label_column": "cls"}, "data.label_column=cls"),
    ({"caption_column": "no"}, "data.caption_column=no"),
    ({"label_column": "text", "val_split": "train[:3]", "train_split": "train[3:]"}, "have no class in text"),
    ({"storage": "disk"}, "data.storage=disk"),
    ({"crop": "middle"}, "data.crop=middle"),
    ({"max_bad": -1}, "data.max_bad=-1"),
    ({"val_fraction": 2}, "val_fraction 2"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[row[1] for row in REFUSED])
def test_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    """What cannot work, in one sentence that names the option."""
    given = {"path": str(parquet_folder(tmp_path)), "image_size": 8} | options
    split = "val" if "val_split" in options else "train"
    with pytest.raises(OrnsteinError) as caught:
        HuggingFace(split=split, **given)
    assert all(word in str(caught.value) for word in words.split())


def test_missing_package_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is named with its command; rows without a class with the way out."""
    rows = {"image": [{"bytes": png(number), "path": None} for number in range(6)], "label": [0, 1, -1, 0, 1, -1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(OrnsteinError, match=r"have no class in label.*data\.num_classes=null"):
        HuggingFace(split="train", path=str(tmp_path / "t.parquet"), val_split="train[:1]")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    hf_load.open_split.cache_clear()
    with pytest.raises(OrnsteinError, match=r"datasets is not installed.*pip install 'ornstein\[data\]'"):
        HuggingFace(split="train", path=str(tmp_path / "t.parquet"))
