"""Small copies of published data sets in their real layouts, and a network that is not there."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from ornstein.data import DataModule
from ornstein.data.published_cifar import SUPERCLASSES

CONF = Path(__file__).parents[2] / "conf" / "data"
TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HUNDRED = sorted(name for names in SUPERCLASSES.values() for name in names.split())


def picture(number: int, size: tuple[int, int] = (20, 20), kind: str = "PNG") -> bytes:
    """An image file, (width, height), of noise that is the number's own."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, kind)
    return packed.getvalue()


def put(path: Path, content: bytes) -> Path:
    """A file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ---- layouts: each makes a small copy of a data set below a folder, and returns the options that read it -------------


def cifar(folder: Path, monkeypatch: pytest.MonkeyPatch, reader: str) -> dict[str, Any]:
    """Pickled batches as torchvision reads them, which is told the md5 of these."""
    from torchvision import datasets

    ten = reader == "CIFAR10"
    own = getattr(datasets, reader)
    generator, label = np.random.default_rng(0), "labels" if ten else "fine_labels"
    classes = 10 if ten else 100
    listed: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for kind, entries in (("train_list", own.train_list), ("test_list", own.test_list)):
        for name, _ in entries:
            count = 2 * classes
            batch = {
                "data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
                label: [number % classes for number in range(count)],
                "filenames": [f"{number}.png" for number in range(count)],
            }
            content = pickle.dumps(batch, protocol=2)
            put(folder / own.base_folder / name, content)
            listed[kind].append([name, hashlib.md5(content).hexdigest()])
    meta = pickle.dumps({own.meta["key"]: TEN if ten else HUNDRED}, protocol=2)
    put(folder / own.base_folder / own.meta["filename"], meta)
    for kind, entries in listed.items():
        monkeypatch.setattr(own, kind, entries)
    monkeypatch.setattr(own, "meta", own.meta | {"md5": hashlib.md5(meta).hexdigest()})
    return {"root": str(folder)}


def celeba(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """30 aligned images, every third held out in turn, and three attributes."""
    names = [f"{number:06d}.jpg" for number in range(1, 31)]
    for number, name in enumerate(names):
        put(folder / "celeba" / "img_align_celeba" / name, picture(number, (178, 218), "JPEG"))
    lines = [f"{name} {number % 3}" for number, name in enumerate(names)]
    put(folder / "celeba" / "list_eval_partition.txt", "\n".join(lines).encode())
    rows = [f"{name} {1 if number % 2 else -1:2d} -1 {1 if number % 5 else -1:2d}" for number, name in enumerate(names)]
    head = [str(len(names)), "Male Bald Smiling "]
    put(folder / "celeba" / "list_attr_celeba.txt", "\n".join(head + rows).encode())
    return {"root": str(folder)}


def lsun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Databases of webp and jpeg files under 40-digit keys, val zipped as it is published."""
    import lmdb

    for part, count in (("bedroom_train_lmdb", 12), ("bedroom_val_lmdb", 3), ("cat", 10)):
        environment = lmdb.open(str(folder / part), map_size=1 << 24)
        with environment.begin(write=True) as write:
            for number in range(count):
                content = picture(number + 100 * count, (40, 30), "WEBP" if part == "cat" else "JPEG")
                write.put(hashlib.sha1(f"{part}{number}".encode()).hexdigest().encode(), content)
        environment.close()
    with zipfile.ZipFile(folder / "bedroom_val_lmdb.zip", "w") as archive:
        for path in sorted((folder / "bedroom_val_lmdb").iterdir()):
            archive.write(path, f"bedroom_val_lmdb/{path.name}")
            path.unlink()
    (folder / "bedroom_val_lmdb").rmdir()
    return {"root": str(folder)}


def ffhq(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A zip as EDM's tool writes it: the first numbers and the last."""
    with zipfile.ZipFile(folder / "ffhq-64x64.zip", "w") as archive:
        for number in (*range(8), 69998, 69999):
            archive.writestr(f"{number // 1000:05d}/img{number:08d}.png", picture(number, (64, 64)))
        archive.writestr("dataset.json", '{"labels": null}')
    return {"root": str(folder)}


def afhq(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Version 2's folders."""
    for place, (part, label) in enumerate((p, c) for p in ("train", "test") for c in ("cat", "dog", "wild")):
        for number in range(5):
            put(folder / "afhq_v2" / part / label / f"pixabay_{number:06d}.png", picture(100 * place + number))
    return {"root": str(folder)}


def imagenet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three synsets as Kaggle lays them out, sorted val and the table of names."""
    synsets = ("n01440764", "n01443537", "n02119789")
    below = folder / "ILSVRC" / "Data" / "CLS-LOC"
    for place, (part, synset) in enumerate((p, s) for p in ("train", "val") for s in synsets):
        for number in range(4):
            put(below / part / synset / f"{synset}_{number}.JPEG", picture(100 * place + number, (30, 24), "JPEG"))
    table = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn02119789 kit fox, Vulpes macrotis\n"
    put(folder / "LOC_synset_mapping.txt", table.encode())
    return {"root": str(folder), "num_classes": 3}


def butterflies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The hub's one parquet file, with the columns that matter."""
    import datasets

    rows = [
        {"image": {"bytes": picture(number, (30, 20)), "path": None}, "name": f"n {number}"} for number in range(20)
    ]
    features = datasets.Features({"image": datasets.Image(), "name": datasets.Value("string")})
    (folder / "data").mkdir()
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    return {"root": str(folder)}


LAYOUTS: dict[str, Callable[..., dict[str, Any]]] = {
    "cifar10": lambda folder, patch: cifar(folder, patch, "CIFAR10"),
    "cifar100": lambda folder, patch: cifar(folder, patch, "CIFAR100"),
    "celeba": celeba,
    "lsun": lsun,
    "ffhq": ffhq,
    "afhq": afhq,
    "imagenet": imagenet,
    "butterflies": butterflies,
}


# Numbers of train, val and test images in those, and of classes.
def module(name: str, **options: Any) -> DataModule:
    """The data module of `data=<name>`, its warning about noise's spread left out."""
    group = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), options, {"sigma_data": None})
    made = instantiate(OmegaConf.create({"seed": 3, "data": group}).data)
    assert isinstance(made, DataModule)
    return made


def refused(*arguments: Any, **options: Any) -> Any:
    """No network."""
    raise ConnectionRefusedError("no network here")
