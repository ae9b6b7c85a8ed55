"""LSUN: rooms, churches and objects by the hundred thousand, one lmdb database a category."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ornstein.data.base import SPLITS, NoSplit, Split, checked_split
from ornstein.data.fetch import download as bring
from ornstein.data.fetch import unzip
from ornstein.data.published import PublishedImages, Some, find, key_list, source_keys
from ornstein.data.splits import split_mask
from ornstein.data.stored import stamps_of
from ornstein.errors import OrnsteinError

ADDRESS = "http://dl.yf.io/lsun"
# sha256 of the zips of train and val, as TensorFlow Datasets records them (url_checksums/lsun.txt), and bytes of train.
SCENES = {
    "bedroom": (
        "a15644c2e7153106867f0adb3491fc41224102d1f01b24494fb47d9f5d1f174e",
        "5d022e781b241c25ec2e1f1f769afcdb8091d7fd58362667aec03137b8114b12",
        45922737680,
    ),
    "bridge": (
        "2701b2d421bbc4d8a5e9b0652ff7c3b57cd6495da8e0e85c39533275b5a925a3",
        "83216a2974d6068c2e1d18086006e7380ff58540216f955ce87fe049b460cb0d",
        16478644518,
    ),
    "church_outdoor": (
        "91128ae026840ac0c5982b4445ab5fc4e092d6847cca76793b2b1a0815c2e74a",
        "34635b7547a3e51a15f942a4a4082dd6bc9cca381a953515cb2275c0eed50584",
        2448463466,
    ),
    "classroom": (
        "73a8a3e318819e1cc602f229673c3f51a68f3ece61e3764ce22df6abea4d0873",
        "5e0e9a375d94091dfe1fa3be87d4a92f41c03f1c0b8e376acc7e05651de512d7",
        3279497022,
    ),
    "conference_room": (
        "fa0a4cf72e7acfb103392eaf33640d5508a728e971f31877b01d64e1bde6068c",
        "927c94df52e10b9b374748c2b83b28b5860e946b3186dfd587985e274834650f",
        4048461633,
    ),
    "dining_room": (
        "e4ee24c7c309360c3bf019123ce5bbf17434b2ba33abec2b0b07cfae715a52cb",
        "bd604d4b91bb5a9611d4e0b85475efd20758390d1a4eb57b53973fcbb5aa8ab6",
        11592966936,
    ),
    "kitchen": (
        "b1993cf639aece5d207a27eb9ff872bcca9dff6472d8227a052c79d40ee753c4",
        "329165f35ec61c4cf49f809246de300b8baad3ffcbda1ac30c27bdd32c84369a",
        35791384987,
    ),
    "living_room": (
        "bd2c52b812c80f73ce3062a221396d13a52b5cce2f813b4cdf61937651281d7a",
        "30a23d9a3db5414e9c97865f60ffb2ee973bfa658a23dbca7188ea514c97c9fc",
        22792405188,
    ),
    "restaurant": (
        "11a0a924b960cd0900e9b7477d684fb338bd99cc5f72db1caac592e4f497e09a",
        "efaa7bcb898ad6cb73b07b89fec3a9c670f4622912eea22fab3986c2cf9a1c20",
        13489345463,
    ),
    "tower": (
        "440caec74c9641cb51fd235a5970c8e4931c3af875aeb044a8bcca956e106309",
        "7f5257847bc01f4e40d4a1b3e24dd8fcd37063f12ca8cf31e726c2ee0b1ae104",
        12010237081,
    ),
}
OBJECTS = {
    "car": ("e6bd5b23b461177b69a5abd1b301fc41dd1c8fd719f389daf2d10f8b1098ba43", 185788496846),
    "cat": ("cef7d1926d80f271ccfe2c55a610a1f9958eb2ac0bd188ddbe3cceb571eb9877", 44765061710),
    "horse": ("2ec7893f3308da7f68cc2bdb1e9a75cde7abf842628feea1c49c30006e9c3a1b", 73864289242),
}
# Databases by their paths, each with the process that opened it.
_OPEN: dict[str, tuple[int, Any]] = {}
_LOCK = threading.Lock()


class LSUN(PublishedImages):
    """One category of LSUN (Yu et al. 2015, arXiv 1506.03365), images with a shorter side of 256, JPEG quality 75.

    Scenes have a published val of only 300 images: enough for a loss, no reference for a FID, which is taken against
    train. Their published test set mixes the categories without labels and is not used. Objects (car, cat, horse) have
    no published splits: a share of train is held out by content. Read by lmdb itself: torchvision's reader leaves a
    pickle in the working folder and trusts what it finds there.

    Args:
        split: "train", "val" or "test".
        image_size, channels, crop, storage, max_bad: as of `PublishedImages`.
        root: the folder that holds `<category>_train_lmdb` and `<category>_val_lmdb` (objects: `<category>`), or their
            zips; None looks in `ornstein.data.fetch.places`.
        category: see `SCENES` and `OBJECTS`.
        val_fraction, test_fraction: shares of train that are held out where there is no published val, or always
            (test).
        download: fetch what is not found.
        labels: ignored: one category has no classes.

    Raises:
        OrnsteinError: no such category, no database, or a damaged one.
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
        category: str = "bedroom",
        val_fraction: float = 0.01,
        test_fraction: float = 0.0,
        download: bool = True,
        labels: bool = True,
        storage: str = "auto",
        max_bad: int = 0,
    ) -> None:
        chosen = checked_split(split, self.splits)
        if category not in SCENES and category not in OBJECTS:
            raise OrnsteinError(
                f"data.category={category} does not exist: choose one of {', '.join((*SCENES, *OBJECTS))}"
            )
        if chosen == "test" and test_fraction == 0:
            raise NoSplit("there is no test split: set data.test_fraction, to 0.01 say")
        own_val = category in SCENES
        part = "val" if chosen == "val" and own_val else "train"
        database = _database(category, part, root=root, fetch=download)
        sources: Database | Some = Database(database)
        keys = source_keys(sources)
        if part == "train" and (not own_val or test_fraction):
            mask = _mask(key_list(keys), chosen, val_fraction, test_fraction, own_val=own_val)
            sources, keys = Some(sources, np.flatnonzero(mask)), keys[mask]
        super().__init__(
            sources,
            keys=keys,
            name=f"lsun_{category}",
            split=chosen,
            labels=None,
            class_names=(),
            image_size=image_size,
            channels=channels,
            crop=crop,
            storage=storage,
            max_bad=max_bad,
        )


class Database:
    """The images of an lmdb database in the order of their keys; each process opens it anew."""

    def __init__(self, path: Path) -> None:
        self.path, self.home = path, str(path)
        with _opened(path).begin() as look:
            self._keys = [bytes(key) for key in look.cursor().iternext(keys=True, values=False)]
        self.names = [key.decode("utf-8", "replace") for key in self._keys]

    def __len__(self) -> int:
        """How many there are."""
        return len(self._keys)

    def __getitem__(self, row: int) -> bytes:
        """An image's file."""
        with _opened(self.path).begin() as look:
            return bytes(look.get(self._keys[row]))

    def stamps(self) -> list[bytes]:
        """The database's path, size and time, and the image's key."""
        (whole,) = stamps_of([self.path / "data.mdb"])
        return [whole + key for key in self._keys]


def _opened(path: Path) -> Any:
    """A database as this process has it open: lmdb opens no path twice, and one that a fork brought along is closed
    and opened anew.
    """
    place = os.path.realpath(path)
    with _LOCK:
        owner, environment = _OPEN.get(place, (0, None))
        if owner != os.getpid():
            import lmdb

            if environment is not None:
                environment.close()
            try:
                environment = lmdb.open(place, readonly=True, lock=False, readahead=False)
            except lmdb.Error as error:
                raise OrnsteinError(f"{path} is no lmdb database ({error}): remove it, and fetch it again") from error
            _OPEN[place] = (os.getpid(), environment)
        return environment


def _mask(keys: list[bytes], split: Split, val_fraction: float, test_fraction: float, *, own_val: bool) -> np.ndarray:
    """Which images of the train database a split holds; where val is published, only test is taken from it."""
    if own_val:
        # The first of the ordered keys, which are nobody's here.
        held_out = split_mask(keys, "val", val_fraction=test_fraction)
        return held_out if split == "test" else ~held_out
    return split_mask(keys, split, val_fraction=val_fraction, test_fraction=test_fraction)


def _database(category: str, part: str, *, root: str | None, fetch: bool) -> Path:
    """The folder of a database, unpacked or fetched first where need be."""
    stem = f"{category}_{part}_lmdb" if category in SCENES else category
    kind = "scenes" if category in SCENES else "objects"
    url = f"{ADDRESS}/{kind}/{stem}.zip"
    if category in SCENES:
        digest, size = SCENES[category][part == "val"], SCENES[category][2] if part == "train" else 7_000_000
    else:
        digest, size = OBJECTS[category]

    def seek(folder: Path) -> Path | None:
        for place in (folder / stem, folder):
            if (place / "data.mdb").is_file() and place.name == stem:
                return place
        if (folder / f"{stem}.zip").is_file():
            unzip(folder / f"{stem}.zip", folder)
            return folder / stem
        return None

    def bring_here(home: Path) -> None:
        archive = home / f"{stem}.zip"
        bring([url], archive, sha256=str(digest))
        unzip(archive, home)
        archive.unlink()

    return find(
        "lsun",
        root,
        seek=seek,
        fetch=bring_here if fetch else None,
        what=f"LSUN's {stem} ({int(size) / 1e9:.1f} GB) from {url}",
        how=f"Fetch {url} and unpack it in {{home}}, so that {{home}}/{stem}/data.mdb is there",
        needed=2 * int(size),
    )
