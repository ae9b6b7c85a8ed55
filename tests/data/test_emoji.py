"""Emoji: classes, captions, and skin tones that stay with their base."""

from pathlib import Path

import numpy as np
import pytest

from ornstein.data import Emoji
from ornstein.errors import OrnsteinError


def both(package: Path, **options: object) -> tuple[Emoji, Emoji]:
    """Train and val at 16 pixels."""
    return tuple(
        Emoji(split=split, root=str(package), image_size=16, download=False, **options) for split in ("train", "val")
    )


def bases(dataset: Emoji) -> set[str]:
    """The base names behind the captions."""
    assert dataset.captions is not None
    return {caption.split(",")[0] for caption in dataset.captions}


def test_content(emoji_package: Path) -> None:
    """30 of 40 rows: Component is left out (number 39, the one without an image, is in it)."""
    train, val = both(emoji_package.parent)
    assert len(train) + len(val) == 30
    assert train.num_classes == 9 and train.channels == 3
    for dataset in (train, val):
        batch = dataset.batch(np.arange(len(dataset)))
        names = {"Activities": 0, "Flags": 1, "People & Body": 2}
        for label, caption in zip(batch["label"].tolist(), batch["caption"], strict=True):
            assert names[dataset.class_names[label]] == int(caption.split()[1]) % 4
        # The left half of every made image is transparent: white.
        assert (batch["image"][:, :, :, :7] == 255).all()


def test_skin_tones_stay_with_their_base(emoji_package: Path) -> None:
    """No base on both sides, with tones or without, and the same bases held out either way."""
    plain, toned = both(emoji_package), both(emoji_package, skin_tones=True)
    assert len(toned[0]) + len(toned[1]) == 3 * 30
    for train, val in (plain, toned):
        assert not bases(train) & bases(val)
    assert bases(plain[1]) == bases(toned[1])
    assert "thing 2, light and dark skin tone" in [*toned[0].captions, *toned[1].captions]


def test_equal_images_stay_on_one_side(emoji_package: Path) -> None:
    """Numbers 5 and 9 look the same (as flags do): wherever one is, so is the other."""
    for fraction in np.linspace(0.1, 0.9, 9):
        train, _ = both(emoji_package, val_fraction=float(fraction))
        assert ("thing 5" in bases(train)) == ("thing 9" in bases(train)), fraction


def test_missing_says_what_to_do(bare_machine: Path) -> None:
    """The folder to fill and the package to fill it from."""
    with pytest.raises(OrnsteinError, match=r"npm pack emoji-datasource-google@16\.0\.0.*data\.root="):
        Emoji(split="train", download=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("table", "is not the table"), ("keys", "is not the table"), ("image", "unpack it again")],
)
def test_damaged_package(emoji_package: Path, damage: str, message: str) -> None:
    """Each damage is named."""
    if damage == "table":
        (emoji_package / "emoji.json").write_text("{")
    elif damage == "keys":
        (emoji_package / "emoji.json").write_text('[{"sort_order": 1}]')
    else:
        (emoji_package / "img/google/64/0001.png").unlink()
    with pytest.raises(OrnsteinError, match=message):
        both(emoji_package)
