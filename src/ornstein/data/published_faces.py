"""CelebA: faces with forty attributes, from the files that torchvision keeps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ornstein.data.base import SPLITS, Split, checked_split
from ornstein.data.published import PublishedImages, find, source_keys
from ornstein.data.stored import Files
from ornstein.errors import OrnsteinError

IMAGES, PARTITION, ATTRIBUTES = "img_align_celeba", "list_eval_partition.txt", "list_attr_celeba.txt"
PARTS: dict[Split, str] = {"train": "0", "val": "1", "test": "2"}
# Boxes (left, top, right, bottom) of the aligned images, 178 wide and 218 high.
REGIONS = {"ddim": (25, 57, 153, 185), "score_sde": (19, 39, 159, 179), "square": None}
MOST_ATTRIBUTES = 6


class CelebA(PublishedImages):
    """CelebFaces Attributes (Liu et al. 2015, arXiv 1411.7766): 202,599 aligned faces of 178 x 218.

    The published partition is train 162,770, val 19,867 and test 19,962; no person is in two of them. Some people
    appear in many images. The licence is for research only.

    Args:
        split: "train", "val" or "test".
        image_size, channels, crop, storage, max_bad: as of `PublishedImages`.
        root: the folder that holds `img_align_celeba` with its images and `list_eval_partition.txt` (and, for
            `attribute`, `list_attr_celeba.txt`), or the folder `celeba` that does; None looks in
            `ornstein.data.fetch.places`.
        region: what of an image is used: "ddim", the 128 x 128 around the face that DDIM's figures are of (Song et al.
            2020, arXiv 2010.02502); "score_sde", the centre 140 x 140 (Song et al. 2021, arXiv 2011.13456); "square",
            the largest centre square. Both codes then resize bilinearly, ours as `crop` says.
        attribute: one of the forty attributes, whose labels are 0 (no) and 1 (yes), or several, whose combinations are
            the classes; None: no labels.
        download: fetch it where it is not found, from its makers' Google Drive through torchvision and gdown, which
            has a daily limit.
        labels: False together with an attribute is refused.

    Raises:
        OrnsteinError: no files, damaged lists, or an attribute that there is not.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS

    def __init__(
        self,
        *,
        split: str,
        image_size: int = 64,
        channels: int = 3,
        crop: str = "adm",
        root: str | None = None,
        region: str = "ddim",
        attribute: str | Sequence[str] | None = None,
        download: bool = True,
        labels: bool = True,
        storage: str = "auto",
        max_bad: int = 0,
    ) -> None:
        chosen = checked_split(split, self.splits)
        if region not in REGIONS:
            raise OrnsteinError(f"data.region={region} does not exist: choose one of {', '.join(REGIONS)}")
        wanted = _wanted(attribute)
        if wanted and not labels:
            raise OrnsteinError(
                f"data.attribute={','.join(wanted)} makes {2 ** len(wanted)} classes and data.num_classes is null: say "
                f"data.num_classes={2 ** len(wanted)}, or leave data.attribute out"
            )
        folder = find(
            "celeba",
            root,
            seek=_seek,
            fetch=_fetch if download else None,
            what="CelebA (1.4 GB) from its Google Drive",
            how=(
                f"Fetch {IMAGES}.zip, {PARTITION} and {ATTRIBUTES} from "
                f"https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and unpack them into {{home}}, so that "
                f"{{home}}/{IMAGES}/000001.jpg is there"
            ),
            needed=3_500_000_000,
        )
        files = [name for name, part in _rows(folder / PARTITION, skip=0).items() if part[:1] == [PARTS[chosen]]]
        classes, names = _classes(folder / ATTRIBUTES, files, wanted) if wanted else (None, ())
        whole = Files([folder / IMAGES / name for name in files], base=folder)
        box = REGIONS[region]
        sources = whole if box is None else Region(whole, box)
        super().__init__(
            sources,
            keys=source_keys(whole),
            name="celeba",
            split=chosen,
            labels=classes,
            class_names=names,
            image_size=image_size,
            channels=channels,
            crop=crop,
            storage=storage,
            max_bad=max_bad,
        )

    @classmethod
    def count_classes(cls, options: Mapping[str, Any]) -> int | None:
        """What `data.num_classes=auto` stands for: two for each attribute, multiplied."""
        wanted = _wanted(options.get("attribute"))
        return 2 ** len(wanted) if wanted else None


class Region:
    """A box of every image file, as an uncompressed file of its own."""

    def __init__(self, files: Files, box: tuple[int, int, int, int]) -> None:
        self.files, self.box = files, box
        self.home, self.names = files.home, files.names

    def __len__(self) -> int:
        """How many there are."""
        return len(self.files)

    def __getitem__(self, row: int) -> bytes:
        """The box as a PPM. Raises OrnsteinError for an image that does not hold it."""
        with Image.open(self.files[row]) as opened:
            if opened.width < self.box[2] or opened.height < self.box[3]:
                raise OrnsteinError(
                    f"it is {opened.height} x {opened.width} and not CelebA's 218 x 178: for images of another size "
                    "set data.region=square"
                )
            packed = io.BytesIO()
            opened.convert("RGB").crop(self.box).save(packed, "PPM")
        return packed.getvalue()

    def stamps(self) -> list[bytes]:
        """Those of the files, and the box."""
        return [stamp + repr(self.box).encode() for stamp in self.files.stamps()]


def _wanted(attribute: str | Sequence[str] | None) -> list[str]:
    """The attributes asked for, as a list."""
    if attribute is None:
        return []
    wanted = [attribute] if isinstance(attribute, str) else list(attribute)
    if len(wanted) > MOST_ATTRIBUTES:
        raise OrnsteinError(f"data.attribute names {len(wanted)} attributes: {MOST_ATTRIBUTES} make 64 classes already")
    return wanted


def _seek(folder: Path) -> Path | None:
    """The folder that holds images and lists."""
    for place in (folder, folder / "celeba"):
        if (place / IMAGES).is_dir() and (place / PARTITION).is_file():
            return place
    return None


def _fetch(home: Path) -> None:
    """Through torchvision, which checks the lists."""
    from torchvision.datasets import CelebA as Reader

    home.mkdir(parents=True, exist_ok=True)
    Reader(str(home), download=True)


def _rows(path: Path, *, skip: int) -> dict[str, list[str]]:
    """The words of each line of a list, by its first."""
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()[skip:]]
        return {words[0]: words[1:] for words in lines if words}
    except (OSError, UnicodeDecodeError) as error:
        raise OrnsteinError(f"{path} cannot be read ({error}): fetch it from CelebA's page again") from error


def _classes(path: Path, files: Sequence[str], wanted: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class of each file by the attributes, int64 (N,), and the classes' names, "no" before "yes"."""
    table = _rows(path, skip=2)
    try:
        header = path.read_text(encoding="utf-8").splitlines()[1].split()
        unknown = [name for name in wanted if name not in header]
        if unknown:
            raise OrnsteinError(f"data.attribute={unknown[0]} does not exist: choose of {', '.join(header)}")
        columns = [header.index(name) for name in wanted]
        bits = np.array([[table[file][column] == "1" for column in columns] for file in files], dtype=np.int64)
    except (IndexError, KeyError) as error:
        raise OrnsteinError(f"{path} is not CelebA's list of attributes ({error!r}): fetch it again") from error
    names = [", ".join(words) for words in product(*((f"not {name}", name) for name in wanted))]
    return bits.reshape(len(files), len(wanted)) @ (2 ** np.arange(len(wanted))[::-1]), tuple(names)
