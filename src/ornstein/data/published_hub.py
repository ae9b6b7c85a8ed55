"""The butterflies of many a first diffusion model, from the hub through `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ornstein.data.fetch import places
from ornstein.data.hf import HuggingFace
from ornstein.errors import OrnsteinError

BUTTERFLIES = "huggan/smithsonian_butterflies_subset"
FILE = "train-00000-of-00001.parquet"


class Butterflies(HuggingFace):
    """A thousand photographs of butterflies of the Smithsonian, which the hub keeps as one split without classes.

    Photographs of one specimen from several sides are separate images: a split by content does not hold them apart.

    Args:
        split, image_size, channels, crop, val_fraction, test_fraction, storage, max_bad: as of `HuggingFace`.
        root: a folder with the parquet file, or what `save_to_disk` wrote; None looks in
            `ornstein.data.fetch.places`, then asks the hub, or the cache of `datasets`.
        caption_column: "name", say; None: no captions.
        download: ask the hub where there is no folder.
        labels: ignored: there are no classes.

    Raises:
        OrnsteinError: neither a folder nor the hub; the sentence says which folder to fill, and from what.
    """

    def __init__(
        self,
        *,
        split: str,
        root: str | None = None,
        image_size: int = 64,
        channels: int = 3,
        crop: str = "adm",
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        caption_column: str | None = None,
        download: bool = True,
        labels: bool = True,
        storage: str = "auto",
        max_bad: int = 0,
    ) -> None:
        searched = places("butterflies", root)
        folder = next((place for place in searched if _holds(place)), None)
        reason = ""
        if folder is not None or download:
            try:
                super().__init__(
                    split=split,
                    path=BUTTERFLIES if folder is None else str(folder),
                    val_fraction=val_fraction,
                    test_fraction=test_fraction,
                    image_column="image",
                    caption_column=caption_column,
                    image_size=image_size,
                    channels=channels,
                    crop=crop,
                    labels=False,
                    storage=storage,
                    max_bad=max_bad,
                )
            except OrnsteinError as error:
                if folder is not None or "cannot be had" not in str(error):
                    raise
                reason = f", and fetching it failed: {str(error).split('. On a connected')[0]}"
            else:
                self.name = "butterflies"
                return
        listed = " or ".join(str(place) for place in searched)
        raise OrnsteinError(
            f"data=butterflies is not in {listed}{reason}. Put data/{FILE} of "
            f"https://huggingface.co/datasets/{BUTTERFLIES} into {searched[0]}, or name its folder with data.root=..."
        )

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Nothing can be told before the folder or the hub is looked at."""

    @classmethod
    def count_classes(cls, options: Mapping[str, Any]) -> int | None:
        """What `data.num_classes=auto` stands for: none."""
        return None


def _holds(folder: Path) -> bool:
    """Whether a folder holds the table."""
    saved = (folder / name for name in ("dataset_dict.json", "state.json"))
    return any(path.is_file() for path in saved) or next(folder.glob("**/*.parquet"), None) is not None
