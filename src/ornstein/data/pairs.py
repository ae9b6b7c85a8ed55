"""Images with captions: of a table, of a folder in Hugging Face's imagefolder layout, or with text files beside."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ornstein.data.bad import Bad
from ornstein.data.base import KEY_BYTES, SPLITS, ImageDataset, Images, RowsOf, Split, checked_split
from ornstein.data.bucket_files import stored_somehow
from ornstein.data.bucketed import BucketedImages
from ornstein.data.buckets import bucket_shapes
from ornstein.data.captions import from_files
from ornstein.data.files import content_of, split_files
from ornstein.data.images import check_channels, check_size, checked_crop
from ornstein.data.pair_tables import Columns, check_tables, class_names_of, find_tables, label_numbers
from ornstein.data.stored import Files, checked_storage, report_path, verify
from ornstein.errors import OrnsteinError

_WAY_OUT = "name the table that has the captions (data.table=FILE), or train without captions (data=image_folder)"


class Pairs(ImageDataset):
    """Images with captions.

    Which images there are and what is said of them comes from `table`; without one from `metadata.jsonl`,
    `metadata.csv` or `metadata.parquet` in the root, or in its `train` and `val` (and `test`) folders, which are then
    the splits; without any of those from the images below the root with a text file beside each, `cat.txt` for
    `cat.png`. A single table whose images all lie in the root's `train` and `val` folders is split by them, any other
    by the images' content, so that copies stay on one side.

    Args:
        split: "train", "val" or "test".
        root: the folder that the images' names start from; default: the table's.
        table: csv, tsv, jsonl or parquet, in UTF-8; looked for in the root, too.
        val_table: one more of the kind, whose images are val; the first is then train alone.
        image_column: holds the files' names.
        caption_column: holds text, or in jsonl and parquet a list of texts: several captions of one image.
        label_column: holds classes, numbers or names; None: no classes. `labels` asks for them.
        every_caption: False takes the first of several captions. True makes each caption of a train image a pair of
            its own, so that an epoch meets the image once with each: what is seen when stays a function of the seed.
        image_size, channels, crop, val_fraction, test_fraction, storage, max_bad, buckets: as of
            `ornstein.data.ImageFolder`. Images that the table names and that are not there count as bad ones.

    Raises:
        OrnsteinError: no folder or table, a column that it has not, a line that cannot be read, an image named twice,
            or more than `max_bad` images that cannot be read.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS

    def __init__(
        self,
        *,
        split: str,
        root: str | None = None,
        table: str | None = None,
        val_table: str | None = None,
        image_column: str = "file_name",
        caption_column: str = "text",
        label_column: str | None = None,
        every_caption: bool = False,
        image_size: int = 64,
        channels: int = 3,
        crop: str = "adm",
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        labels: bool = False,
        storage: str = "auto",
        max_bad: int = 0,
        buckets: Any = None,
    ) -> None:
        chosen = checked_split(split, self.splits)
        check_size(image_size, name="pairs")
        check_channels(channels)
        cut, way = checked_crop(crop), checked_storage(storage)
        several = bucket_shapes(buckets, image_size=image_size)
        tables = find_tables(root, table, val_table)
        folder = tables.root
        pairs = tables.read(Columns(image=image_column, caption=caption_column, label=label_column))
        by_path = {pair.path: pair for own in pairs.values() for pair in own}
        names = class_names_of(pairs["train"]) if labels and label_column is not None and pairs else ()

        bad = Bad(max_bad, where=f"data.root={folder}")
        shares = {"val_fraction": val_fraction, "test_fraction": test_fraction}
        found = split_files(tables.listed(pairs), chosen, root=folder, bad=bad, **shares)
        shape = (len(found.paths), channels, image_size, image_size)
        images, kept = stored_somehow(way, Files(found.paths, base=folder), shape, buckets=several, crop=cut, bad=bad)
        if bad.count and way != "unchecked":
            # The limit counts over all splits, and one message names them all.
            others = Files(found.others, base=folder)
            verify(others, (len(others), *shape[1:]), crop=cut, bad=bad)
        bad.settle(report_path(folder))
        if not len(kept):
            raise OrnsteinError(f"no {chosen} image of data.root={folder} is left: name other data")

        paths = [found.paths[row] for row in kept.tolist()]
        beside = [] if pairs else from_files(paths, way_out=_WAY_OUT)
        texts = [by_path[path].captions for path in paths] if pairs else [(text,) for text in beside]
        rows, captions = _visits(texts, every=every_caption and chosen == "train")
        self.paths = [paths[row] for row in rows.tolist()]
        keys = found.keys[kept[rows]]
        super().__init__(
            _repeated(images, rows),
            name="pairs",
            split=chosen,
            labels=np.array(label_numbers([by_path[path] for path in self.paths], names)) if names else None,
            class_names=names,
            captions=captions,
            content=content_of(cut, keys),
            keys=keys[:, KEY_BYTES:],
        )

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Refuse the options of a config whose tables or columns are not there (OrnsteinError); reads no rows."""
        check_tables(options)

    @classmethod
    def count_classes(cls, options: Mapping[str, Any]) -> int | None:
        """How many classes the table's label column names: what `data.num_classes=auto` stands for."""
        if options.get("label_column") is None:
            return None
        tables, columns = check_tables(options)
        return len(class_names_of(tables.read(columns)["train"])) or None


def _visits(texts: Sequence[tuple[str, ...]], *, every: bool) -> tuple[np.ndarray, list[str]]:
    """The image of each visit of an epoch, int64 (M,), and its caption: the first of each image, or all of them."""
    told = [some[: None if every else 1] or ("",) for some in texts]
    counts = np.array([len(some) for some in told], dtype=np.int64)
    return np.repeat(np.arange(len(told), dtype=np.int64), counts), [text for some in told for text in some]


def _repeated(images: Images, rows: np.ndarray) -> Images:
    """The images of the visits, none of them copied."""
    if len(rows) == images.shape[0]:
        return images
    return images.subset(rows, RowsOf) if isinstance(images, BucketedImages) else RowsOf(images, rows)
