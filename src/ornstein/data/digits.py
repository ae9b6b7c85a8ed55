"""The 1,797 handwritten digits that scikit-learn carries: 8 x 8 scans, ten classes, no download."""

from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np

from ornstein.data.base import SPLITS, ImageDataset, Split, checked_split
from ornstein.data.captions import DIGIT_WORDS, from_classes
from ornstein.data.images import check_size, resize_array, to_channels
from ornstein.data.splits import content_key, split_mask
from ornstein.errors import OrnsteinError

NATIVE_SIZE = 8
VAL_FRACTION = 0.2


class Digits(ImageDataset):
    """Optical recognition of handwritten digits (Alpaydin and Kaynak 1998), the test part.

    The scans' values 0..16 become 0..255. Split 80/20 by content within each class (1,438 / 359), the same
    for ever; the scans hold no duplicate, so the split is disjoint in content too.

    Args:
        split: "train", "val" or "test".
        test_fraction: share that test takes of train; 0: there is no test split. Val stays the same.
        image_size: 8 is native; any other size is resized bicubically.
        channels: 1, or 3 for equal ones.
        labels: False leaves the labels out.
        caption_template: captions from the digits in words, `{}` being their place; None leaves captions out.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS

    def __init__(
        self,
        *,
        split: str,
        image_size: int = NATIVE_SIZE,
        channels: int = 1,
        labels: bool = True,
        caption_template: str | None = None,
        test_fraction: float = 0.0,
    ) -> None:
        chosen = checked_split(split, self.splits)
        check_size(image_size, name="digits")
        scans, digits = read_scans()
        keys = [content_key(scan.tobytes()) for scan in scans]
        fractions = {"val_fraction": VAL_FRACTION, "test_fraction": test_fraction}
        rows = np.flatnonzero(split_mask(keys, chosen, groups=digits.tolist(), **fractions))
        images = np.rint(scans[rows].astype(np.float64) * (255 / 16)).astype(np.uint8)
        super().__init__(
            to_channels(resize_array(images.reshape(-1, 1, NATIVE_SIZE, NATIVE_SIZE), image_size), channels),
            name="digits",
            split=chosen,
            labels=digits[rows] if labels else None,
            class_names=[str(digit) for digit in range(10)],
            captions=from_classes(caption_template, digits[rows], DIGIT_WORDS),
        )


def read_scans() -> tuple[np.ndarray, np.ndarray]:
    """The scans, uint8 (1797, 64) in [0, 16], and their digits, int64 (1797,)."""
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise OrnsteinError("data=digits reads the scans that scikit-learn carries: pip install scikit-learn")
    table = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if table.is_file():
        # Reading the table costs 0.05 s where importing scikit-learn for it costs a second.
        values = np.loadtxt(table, delimiter=",", dtype=np.uint8)
        return values[:, :64], values[:, 64].astype(np.int64)
    from sklearn.datasets import load_digits

    bundle = load_digits()
    return bundle.data.astype(np.uint8), bundle.target.astype(np.int64)
