"""Opening data sets through `datasets`: of the hub, of its local cache, or of files and folders on this machine."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ornstein.data.streaming_tar import needs_extra
from ornstein.errors import OrnsteinError

# Endings of files and the builders of `datasets` that read them.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
TIMEOUT_S = 10
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
IMAGE_NAMES = ("image", "img", "pixels", "pixel_values", "picture", "jpg", "png", "file_name", "file", "path")
LABEL_NAMES = ("label", "labels", "class", "category", "fine_label", "cls")
CAPTION_NAMES = ("caption", "text", "captions", "prompt", "description", "sentence", "txt")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; `classes` are the names of the labels where the features say them."""

    image: str
    label: str | None
    caption: str | None
    classes: tuple[str, ...] | None


def is_local(path: str) -> bool:
    """Whether a path means this machine rather than the hub. OrnsteinError: it looks so, and is not there."""
    place = Path(path).expanduser()
    if place.exists():
        return True
    if path.startswith(("/", "~", ".")) or place.suffix in BUILDERS or path.count("/") > 1:
        raise OrnsteinError(
            f"data.path={path}: there is no such file or folder, and no data set of the hub is so named"
        )
    return False


@cache
def open_split(path: str, split: str, *, config_name: str | None, revision: str | None, streaming: bool = False) -> Any:
    """A split as a `datasets.Dataset`, or `IterableDataset` under `streaming`.

    Raises:
        OrnsteinError: the package, the data set or the split is not there, or access to it has to be asked for.
    """
    try:
        import datasets
    except ImportError as error:
        raise needs_extra(error) from error
    place = Path(path).expanduser()
    options: dict[str, Any] = {"streaming": streaming}
    bars = datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():  # a log file has no use for bars
        datasets.disable_progress_bars()
    try:
        if is_local(path):
            if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
                return _saved(place, split, path=path, streaming=streaming)
            if place.is_file():
                if place.suffix not in BUILDERS:
                    raise OrnsteinError(f"data.path={path}: name a folder, or a file of {', '.join(BUILDERS)}")
                files = {"data_files": {"train": str(place)}}
                return datasets.load_dataset(BUILDERS[place.suffix], split=split, **files, **options)
            return datasets.load_dataset(str(place), config_name, split=split, **options)
        reason = unreachable()
        with _offline(reason is not None):
            return datasets.load_dataset(path, config_name, split=split, revision=revision, **options)
    except (OSError, ValueError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, OrnsteinError):
            raise
        raise OrnsteinError(_sentence(error, path, split, config_name, streaming=streaming)) from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _saved(place: Path, split: str, *, path: str, streaming: bool) -> Any:
    """A split of what `save_to_disk` wrote."""
    import datasets

    found = datasets.load_from_disk(str(place))
    if isinstance(found, datasets.Dataset):
        found = datasets.DatasetDict(train=found)
    if split not in found:
        raise OrnsteinError(f"data.path={path} has no split {split}: choose {', '.join(found)}")
    return found[split].to_iterable_dataset(num_shards=min(64, len(found[split]))) if streaming else found[split]


def _sentence(error: Exception, path: str, split: str, config_name: str | None, *, streaming: bool) -> str:
    """What went wrong, and what to do."""
    told = " ".join(str(error).split()) or type(error).__name__
    where = f"data.path={path}"
    if "Unknown split" in told or "Bad split" in told:
        return f"{where} has no split {split} ({told}): set data.train_split, data.val_split or data.test_split"
    if "Config name is missing" in told or "BuilderConfig" in told:
        return f"{where} has several configurations ({told[:300]}): choose one with data.config_name"
    if "gated" in told or "401" in told or "403" in told:
        return (
            f"{where} needs permission ({told[:200]}): ask for access on its page of the hub, then set HF_TOKEN or run "
            "`hf auth login`"
        )
    if "doesn't exist on the Hub" in told:
        return (
            f"{where} is no public data set of the hub: look at its name; a private or gated one needs HF_TOKEN, or "
            "`hf auth login`"
        )
    reason = None if is_local(path) else unreachable()
    if reason is not None:
        arguments = ", ".join(repr(each) for each in (path, config_name) if each is not None)
        command = f"python -c \"from datasets import load_dataset as load; load({arguments}).save_to_disk('FOLDER')\""
        cached = "streams are not cached" if streaming else "the cache of `datasets` does not hold it"
        return (
            f"{where} cannot be had: the hub cannot be reached ({reason}) and {cached}. On a connected machine "
            f"run {command}, bring the folder here and set data.path=FOLDER"
        )
    return f"{where} cannot be opened by `datasets`: {told[:400]}"


@cache
def unreachable() -> str | None:
    """Why the hub cannot be reached, found out at once, where its client would retry for a minute; None if it can."""
    for name in OFFLINE:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError:
        return None  # it answers
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def commit_of(path: str, revision: str | None) -> str | None:
    """The commit of the hub that a data set is read at; None where it does not say."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(path, revision=revision, timeout=TIMEOUT_S).sha
    except Exception:  # whatever its client raises: the name stands alone then
        return None


@contextmanager
def _offline(on: bool) -> Iterator[None]:
    """Within it `datasets` looks into its cache alone, as with HF_HUB_OFFLINE=1, which it reads at import."""
    import datasets.config
    import huggingface_hub.constants

    homes: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [home.HF_HUB_OFFLINE for home in homes]
    try:
        for home in homes:
            home.HF_HUB_OFFLINE = on or home.HF_HUB_OFFLINE
        yield
    finally:
        for home, value in zip(homes, before, strict=True):
            home.HF_HUB_OFFLINE = value


def find_columns(
    features: Mapping[str, Any] | None,
    *,
    path: str,
    image: str | None,
    label: str | None,
    caption: str | None,
    labels: bool,
) -> Columns:
    """The columns that are named, or those that the features' types and names speak for.

    Raises:
        OrnsteinError: a named column is not there, no image is found, or labels are asked for and none are found.
    """
    if features is None:
        raise OrnsteinError(f"data.path={path} does not say which columns it has: prepare it without data.streaming")
    names = list(features)
    for key, name in (("image_column", image), ("label_column", label), ("caption_column", caption)):
        if name is not None and name not in names:
            raise OrnsteinError(f"data.{key}={name}: data.path={path} has the columns {', '.join(names)}; name another")
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    if image is None:
        image = _first(names, lambda name: kinds[name] == "Image") or _by_name(names, IMAGE_NAMES)
    if image is None:
        raise OrnsteinError(
            f"data.path={path}: none of the columns {', '.join(names)} looks like images; name it: data.image_column"
        )
    if labels and label is None:
        label = _first(names, lambda name: kinds[name] == "ClassLabel") or _by_name(names, LABEL_NAMES)
        if label is None:
            raise OrnsteinError(
                f"data.path={path}: none of the columns {', '.join(names)} looks like classes; name one with "
                "data.label_column, or set data.num_classes=null"
            )
    if caption is None:
        caption = next((name for name in CAPTION_NAMES if name in names and name not in (image, label)), None)
        if caption is not None and not _is_text(features[caption]):
            caption = None
    label = label if labels else None
    classes = tuple(features[label].names) if label is not None and kinds[label] == "ClassLabel" else None
    return Columns(image, label, caption, classes)


@cache
def tell(path: str, columns: Columns) -> None:
    """Says once which columns are taken."""
    told = [f"images from column {columns.image}"]
    told += [f"classes from {columns.label}"] if columns.label is not None else []
    told += [f"captions from {columns.caption}"] if columns.caption is not None else []
    print(f"{path}: {', '.join(told)} (data.image_column, label_column, caption_column)", file=sys.stderr, flush=True)


def undecoded(table: Any, column: str) -> Any:
    """The data set with its images as the files that they are, for us to decode."""
    import datasets

    feature = (table.features or {}).get(column)
    return table.cast_column(column, datasets.Image(decode=False)) if isinstance(feature, datasets.Image) else table


def file_of(value: Any, *, base: Path | None) -> Path | bytes:
    """What `load_image` takes, of a cell: bytes, a path, {bytes, path}, or an array of 0 to 255 (as a PNG).

    Raises:
        OrnsteinError: the cell holds no image.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str):
        if "://" in value:
            import fsspec

            with fsspec.open(value, "rb") as file:
                return bytes(file.read())
        place = Path(value).expanduser()
        return place if base is None else base / place
    if isinstance(value, Sequence | np.ndarray):
        return _png(np.asarray(value))
    raise OrnsteinError("it holds no image" if value is None else f"it holds a {type(value).__name__}, no image")


def _png(pixels: np.ndarray) -> bytes:
    """An array (H, W), (H, W, C) or (C, H, W) with C of 1, 3, 4 as a PNG: exactly, and decoded as any other."""
    from PIL import Image

    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    shaped = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))
    if not shaped or pixels.dtype.kind not in "iu" or pixels.size == 0 or pixels.min() < 0 or pixels.max() > 255:
        raise OrnsteinError(f"it holds an array of {pixels.dtype} and shape {pixels.shape}, not pixels of 0 to 255")
    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8))).save(file, "PNG", compress_level=0)
    return file.getvalue()


def _first(names: Sequence[str], fits: Any) -> str | None:
    return next((name for name in names if fits(name)), None)


def _by_name(names: Sequence[str], known: Sequence[str]) -> str | None:
    return next((name for name in known if name in names), None)


def _is_text(feature: Any) -> bool:
    """A string, or a list of them."""
    inner = getattr(feature, "feature", feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")
