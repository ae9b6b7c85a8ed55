"""CIFAR-10 and CIFAR-100 through torchvision, which fetches them and checks every file."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ornstein.data.base import SPLITS, ImageDataset, Split, checked_split
from ornstein.data.captions import from_classes
from ornstein.data.images import check_size, resize_array
from ornstein.data.published import find
from ornstein.data.splits import content_key, official_part, official_rows
from ornstein.errors import OrnsteinError

NATIVE_SIZE = 32


class CIFAR10(ImageDataset):
    """CIFAR-10 (Krizhevsky 2009): 50,000 train and 10,000 test colour images of 32 x 32, ten classes.

    About 3 % of the test images have a near-duplicate in train (Barz and Denzler 2019, arXiv 1902.00423), which
    content hashes do not find. Published FIDs are against the 50,000 of train.

    Args:
        split: "train", "val" or "test".
        image_size: 32 is native; any other size is resized bicubically.
        channels: 3.
        root: the folder that holds `cifar-10-batches-py`, or its archive; None looks in `ornstein.data.fetch.places`.
        download: fetch the archive (170 MB) where it is not found (into `root` if given).
        labels: False leaves the labels out.
        caption_template: captions from the classes' names, `{}` being their place; None leaves captions out.
        val_from: "test": val is the official test set, and there is no test split. "train": val is a share of the
            official train set, by content within each class, and test is the official one.
        val_fraction: that share.

    Raises:
        OrnsteinError: no files, or damaged ones; the sentence says which folder to fill, and from what.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS
    NAME: ClassVar[str] = "cifar10"
    READER: ClassVar[str] = "CIFAR10"

    def __init__(
        self,
        *,
        split: str,
        image_size: int = NATIVE_SIZE,
        channels: int = 3,
        root: str | None = None,
        download: bool = True,
        labels: bool = True,
        caption_template: str | None = None,
        val_from: str = "test",
        val_fraction: float = 0.1,
    ) -> None:
        chosen = checked_split(split, self.splits)
        check_size(image_size, name=self.NAME)
        if channels != 3:
            raise OrnsteinError(f"data.channels={channels}: the images of {self.NAME} have 3")
        part = official_part(chosen, val_from, name=self.NAME)
        images, classes, names = self.read(part, root=root, download=download)
        rows = official_rows(
            lambda: [content_key(image.tobytes()) for image in images],
            chosen,
            val_from,
            val_fraction=val_fraction,
            groups=classes.tolist(),
        )
        if rows is not None:
            images, classes = images[rows], classes[rows]
        super().__init__(
            resize_array(images, image_size),
            name=self.NAME,
            split=chosen,
            labels=classes if labels else None,
            class_names=names,
            captions=from_classes(caption_template, classes, [name.replace("_", " ") for name in names]),
        )

    def read(self, part: str, *, root: str | None, download: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        """Images uint8 (N, 3, 32, 32), labels int64 (N,) and the names of the classes of "train" or "test"."""
        from torchvision import datasets
        from torchvision.datasets.utils import check_integrity

        reader: Any = getattr(datasets, self.READER)

        def seek(folder: Path) -> Any:
            above = folder.parent if folder.name == reader.base_folder else folder
            archive = above / reader.filename
            if (above / reader.base_folder).is_dir():
                try:
                    return reader(str(above), train=part == "train")
                except (RuntimeError, OSError, EOFError) as error:
                    if not check_integrity(archive, reader.tgz_md5):
                        raise OrnsteinError(
                            f"{above / reader.base_folder} is not what was published as {self.NAME} ({error}): remove "
                            f"it, and unpack {reader.url} there again"
                        ) from error
            # A whole archive is unpacked, without asking the network; one that was cut off is as good as none.
            elif not check_integrity(archive, reader.tgz_md5):
                return None
            return reader(str(above), train=part == "train", download=True)

        found = find(
            self.NAME,
            root,
            seek=seek,
            fetch=(lambda home: reader(str(home), download=True)) if download else None,
            what=f"{self.NAME} (170 MB) from {reader.url}",
            how=f"Unpack {reader.filename} ({reader.url}) into {{home}}, so that it holds {reader.base_folder}",
            needed=600_000_000,
        )
        images = np.ascontiguousarray(found.data.transpose(0, 3, 1, 2))
        return images, np.asarray(found.targets, dtype=np.int64), tuple(found.classes)


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky 2009): as CIFAR-10, with 100 classes of 600 images, or the 20 superclasses of these.

    About 10 % of the test images have a near-duplicate in train (arXiv 1902.00423); the overlap check leaves out those
    that are exact copies.

    Args: those of `CIFAR10`, and
        coarse: labels are the superclasses.
    """

    NAME: ClassVar[str] = "cifar100"
    READER: ClassVar[str] = "CIFAR100"

    def __init__(
        self,
        *,
        split: str,
        image_size: int = NATIVE_SIZE,
        channels: int = 3,
        root: str | None = None,
        download: bool = True,
        labels: bool = True,
        caption_template: str | None = None,
        val_from: str = "test",
        val_fraction: float = 0.1,
        coarse: bool = False,
    ) -> None:
        self.coarse = coarse
        super().__init__(
            split=split,
            image_size=image_size,
            channels=channels,
            root=root,
            download=download,
            labels=labels,
            caption_template=caption_template,
            val_from=val_from,
            val_fraction=val_fraction,
        )

    def read(self, part: str, *, root: str | None, download: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        """As `CIFAR10.read`, with the labels that were asked for."""
        images, fine, names = super().read(part, root=root, download=download)
        if not self.coarse:
            return images, fine, names
        above = {below: number for number, members in enumerate(SUPERCLASSES.values()) for below in members.split()}
        return images, np.array([above[name] for name in names], dtype=np.int64)[fine], tuple(SUPERCLASSES)


# The superclasses in the order of their labels, each with its five classes.
SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
