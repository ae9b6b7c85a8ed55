"""The bundled digits, and the batch contract that every data set shares."""

import pickle

import numpy as np
import pytest
import torch

from ornstein.data import Digits
from ornstein.errors import OrnsteinError


def contents(dataset: Digits) -> set[bytes]:
    """The distinct images of a data set."""
    return {dataset.images[row].tobytes() for row in range(len(dataset))}


def test_split_is_disjoint_and_stratified() -> None:
    """1,797 distinct scans; 80/20 within every class; no scan on both sides."""
    train, val = Digits(split="train"), Digits(split="val")
    assert (len(train), len(val)) == (1438, 359)
    assert len(contents(train) | contents(val)) == 1797
    assert train.labels is not None and val.labels is not None
    per_class = np.bincount(train.labels) + np.bincount(val.labels)
    # Rounding to whole scans moves a class by at most half a scan.
    assert (np.abs(np.bincount(val.labels) - 0.2 * per_class) <= 0.5).all()


def test_same_as_scikit_learn() -> None:
    """Both splits together are scikit-learn's scans, 0..16 brought to 0..255."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    expected = {
        (np.rint(scan * 255 / 16).astype(np.uint8).tobytes(), int(d))
        for scan, d in zip(bundle.data, bundle.target, strict=True)
    }
    found = set()
    for split in ("train", "val"):
        digits = Digits(split=split)
        assert digits.labels is not None
        found |= {(digits.images[row].tobytes(), int(digits.labels[row])) for row in range(len(digits))}
    assert found == expected


def test_read_without_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scikit-learn that keeps its table elsewhere is asked through its own function, to the same end."""
    direct = Digits(split="val").fingerprint
    monkeypatch.setattr("ornstein.data.digits.Path.is_file", lambda _: False)
    assert Digits(split="val").fingerprint == direct


@pytest.mark.parametrize("size", [8, 16, 32])
def test_upscaled_digits_stay_the_digits(size: int) -> None:
    """Averaging blocks of the upscaled scan gives the scan back, near enough to be that one and no other."""
    native, scaled = Digits(split="val"), Digits(split="val", image_size=size)
    assert scaled.images.shape[2:] == (size, size)
    block = size // 8
    averaged = np.asarray(scaled.images).reshape(-1, 8, block, 8, block).mean((2, 4)).reshape(len(scaled), -1)
    distance = ((averaged[:, None] - native.images.reshape(1, len(native), -1).astype(np.float64)) ** 2).sum(-1)
    assert (distance.argmin(1) == np.arange(len(native))).all()


def test_batch_contract() -> None:
    """uint8 images, int64 labels and indices, whatever the indices come as; fresh memory every time."""
    digits = Digits(split="train")
    for indices in ([3, 1, 3], np.array([3, 1, 3]), torch.tensor([3, 1, 3])):
        batch = digits.batch(indices)
        assert set(batch) == {"image", "index", "label"}
        assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (3, 1, 8, 8)
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        assert batch["index"].tolist() == [3, 1, 3]
        assert torch.equal(batch["image"][0], batch["image"][2])
    before = digits.batch([3])["image"].clone()
    batch["image"].zero_()
    assert torch.equal(digits.batch([3])["image"], before)


def test_single_example() -> None:
    """One integer gives one example, without the batch axis; out of range ends a plain loop."""
    digits = Digits(split="val")
    example = digits[5]
    assert example["image"].shape == (1, 8, 8) and example["label"].shape == ()
    assert digits.batch([-1])["index"].tolist() == [len(digits) - 1]
    with pytest.raises(IndexError):
        digits[len(digits)]


def test_without_labels() -> None:
    """No labels, no classes, nothing in the batch."""
    digits = Digits(split="val", labels=False)
    assert digits.num_classes is None and digits.class_names == ()
    assert set(digits.batch([0])) == {"image", "index"}


def test_fingerprint_tells_data_apart() -> None:
    """Equal for equal data, different for every difference that reference statistics would feel."""
    variants = [
        Digits(split="train"),
        Digits(split="val"),
        Digits(split="train", image_size=16),
        Digits(split="train", channels=3),
        Digits(split="train", labels=False),
        Digits(split="train").subset([0, 1, 2]),
        Digits(split="train").subset([0, 1, 3]),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)
    assert Digits(split="train").fingerprint == variants[0].fingerprint


def test_pickles() -> None:
    """Workers get a copy of the data set."""
    digits = Digits(split="val")
    again = pickle.loads(pickle.dumps(digits))
    assert again.fingerprint == digits.fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "no test split: set data.test_fraction"),
        ({"split": "val", "image_size": 0}, "image_size=0"),
        ({"split": "val", "channels": 2}, "channels=2"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    """Wrong options are named."""
    with pytest.raises(OrnsteinError, match=message):
        Digits(**arguments)
