"""Published data sets: small files in each one's real layout, and a machine that has none of them and no network."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from ornstein.data import LSUN, hf_load
from ornstein.errors import OrnsteinError

from .published_layouts import LAYOUTS, module, refused


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory maps and what is remembered of files stay in the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


FACTS = {
    "cifar10": (100, 20, None, 10),
    "cifar100": (200, 200, None, 100),
    "celeba": (10, 10, 10, None),
    "lsun": (12, 3, None, None),
    "ffhq": (8, 2, None, None),
    "afhq": (15, 15, None, 3),
    "imagenet": (12, 12, None, 3),
    "butterflies": (18, 2, None, None),
}


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_small_copies_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the config: counts, classes, facts, batches; nothing is fetched for it."""
    monkeypatch.setattr(socket, "create_connection", refused)
    data = module(name, **LAYOUTS[name](tmp_path, monkeypatch))
    data.setup("fit")
    train, val, test, classes = FACTS[name]
    assert (len(data.train), len(data.val)) == (train, val)
    assert (None if data.test is None else len(data.test)) == test
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape[1:] == (3, data.image_size, data.image_size)
    assert data.train.num_classes == classes and ("label" in batch) == (classes is not None)
    if "val_from" in data.options:
        apart = module(name, **LAYOUTS[name](tmp_path, monkeypatch), val_from="train", val_fraction=0.25)
        assert apart.test is not None and len(apart.test) == val
        assert len(apart.train) + len(apart.val) == train and len(apart.val) >= classes
        assert not set(map(bytes, apart.train.content_keys)) & set(map(bytes, apart.val.content_keys))


OFFLINE = {
    "cifar10": ("cifar-10-python.tar.gz", "fetching it failed"),
    "cifar100": ("cifar-100-python.tar.gz", "fetching it failed"),
    "celeba": ("img_align_celeba.zip", "fetching it failed"),
    "lsun": ("http://dl.yf.io/lsun/scenes/bedroom_", "fetching it failed"),
    "ffhq": ("thumbnails128x128.zip", "fetching it failed"),
    "afhq": ("afhq_v2.zip", "fetching it failed"),
    "imagenet": ("after registration", "imagenet"),
    "butterflies": ("huggan/smithsonian_butterflies_subset", "train-00000-of-00001.parquet", "fetching it failed"),
}


@pytest.mark.parametrize("name", sorted(OFFLINE))
def test_offline_message(
    name: str, bare_machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing, why it could not be fetched, the folder to fill and the option that names another, at once."""
    import requests

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(requests.Session, "request", refused)
    hf_load.unreachable.cache_clear()
    monkeypatch.setattr("ornstein.data.published._check_room", lambda home, needed: None)
    started = time.monotonic()
    with pytest.raises(OrnsteinError) as told:
        module(name, num_classes=None).setup("fit")
    assert time.monotonic() - started < 5
    home = bare_machine / "cache" / "ornstein" / "data" / name
    for word in (f"data={name}", str(home), "data.root=", *OFFLINE[name]):
        assert word in str(told.value), told.value
    assert "\n" not in str(told.value)
    left = [path for path in home.rglob("*") if path.is_file()] if home.exists() else []
    assert left == [], "nothing half-fetched stays"


@pytest.mark.parametrize("name", sorted(OFFLINE))
def test_download_false_asks_nobody(name: str, bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a root that holds nothing."""
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("asked the network"))
    options = {} if name == "imagenet" else {"download": False}
    with pytest.raises(OrnsteinError, match=rf"data={name} is not in .*nowhere.*data\.root="):
        module(name, root=str(bare_machine / "nowhere"), num_classes=None, **options).setup("fit")


def test_a_disk_that_is_too_small_is_told_before_the_download(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 10**9})())
    with pytest.raises(OrnsteinError, match=r"takes 91\.8 GB and 1\.0 GB are free"):
        LSUN(split="train", category="bedroom")
