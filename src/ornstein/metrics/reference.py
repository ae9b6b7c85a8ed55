"""Reference statistics of real images: computed once, kept on disk, never trusted blindly.

A file is named after the data, the split, the size and the feature space, and by the SHA-256 of everything that
decides its content (data fingerprint, extractor fingerprint, how many features are kept, ...), which stands in full
inside. It is written whole or not at all, by one process while others wait, and carries a checksum of its tensors. One
that is damaged is computed again, with one line that says so.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureExtractor
from ornstein.metrics.images import Source, numbered_batches
from ornstein.metrics.statistics import KEPT_FEATURES, Accumulator, Moments, Predictions, Statistics

log = logging.getLogger(__name__)
FORMAT = "ornstein.reference_statistics.2"


@torch.no_grad()
def compute_statistics(
    features: FeatureExtractor,
    images: Source,
    *,
    batch_size: int = 256,
    max_features: int = KEPT_FEATURES,
    spatial: bool = False,
    source: Mapping[str, Any] | None = None,
) -> Statistics:
    """Statistics of all ``images`` (see :data:`ornstein.metrics.images.Source`), in one pass, by this process alone.

    Args:
        max_features: keep at most this many feature vectors: a uniform subset, the same on every call.
        spatial: also moments of spatial features, where the space has them (sFID).

    Raises: ValueError if there are fewer than two images.
    """
    accumulator = Accumulator(features, keep=max_features, spatial=spatial)
    count = 0
    for index, batch in numbered_batches(images, batch_size=batch_size):
        accumulator.update(batch, index)
        count += len(batch)
    if count < 2:
        raise OrnsteinError(f"reference statistics need two real images at least, got {count}; look at data.root.")
    return accumulator.own_statistics(source)


def cache_folder() -> Path:
    """``$ORNSTEIN_CACHE/statistics``, or ``~/.cache/ornstein/statistics``."""
    root = os.environ.get("ORNSTEIN_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "ornstein") / "statistics"


@dataclass(frozen=True, kw_only=True)
class _Key:
    data: str
    split: str
    image_size: int
    channels: int | None
    extractor: str
    extractor_fingerprint: str
    max_features: int
    spatial: bool
    format: str = FORMAT

    def path(self, folder: Path, name: str) -> Path:
        """The file; the same content under another ``name`` is found by its hash."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]
        words = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{name}-{self.split}-{self.image_size}px-{self.extractor}")[:100]
        own = folder / f"{words}-{digest}.safetensors"
        return own if own.exists() else next(iter(sorted(folder.glob(f"*-{digest}.safetensors"))), own)


def reference_statistics(
    features: FeatureExtractor,
    dataset: Source,
    *,
    data_fingerprint: str | None = None,
    split: str | None = None,
    image_size: int | None = None,
    folder: str | Path | None = None,
    batch_size: int = 256,
    max_features: int = KEPT_FEATURES,
    spatial: bool = False,
) -> Statistics:
    """Statistics of a data set's images from the cache, or computed and put there.

    Of several processes that need the same, one computes and the others wait and read.

    Args:
        features: the extractor.
        dataset: the real images; a data set of :mod:`ornstein.data` says its fingerprint, split and size itself.
        data_fingerprint, split, image_size: for other sources; they make the cache key.
        folder: of the cache; None is :func:`cache_folder`.
        batch_size: of the extraction; does not change the result beyond rounding.
        max_features: how many feature vectors are kept for the figures that compare images one by one.
        spatial: also spatial features' moments (sFID), where the space has them.

    Raises: ValueError if nothing says which data these are, or there are fewer than two images.
    """
    fingerprint = data_fingerprint or getattr(dataset, "fingerprint", None)
    size = image_size if image_size is not None else getattr(dataset, "image_size", None)
    if fingerprint is None or size is None:
        raise OrnsteinError(
            "statistics are cached by the data's fingerprint and image size: give a data set of ornstein.data, or "
            "data_fingerprint= and image_size=, or call compute_statistics, which caches nothing."
        )
    key = _Key(
        data=fingerprint,
        split=split or (dataset.split if isinstance(getattr(dataset, "split", None), str) else "all"),
        image_size=int(size),
        channels=getattr(dataset, "channels", None),
        extractor=features.name,
        extractor_fingerprint=features.fingerprint,
        max_features=max_features,
        spatial=spatial and features.num_spatial is not None,
    )
    named = getattr(dataset, "name", None)  # a tensor has a name, which is None
    name = named if isinstance(named, str) else "data"
    path = key.path(cache_folder() if folder is None else Path(folder), name)
    if (found := _cached(path)) is not None:
        return found
    with _turn(path):
        if (found := _cached(path, quiet=True)) is not None:  # another process was first
            return found
        statistics = compute_statistics(
            features,
            dataset,
            batch_size=batch_size,
            max_features=max_features,
            spatial=spatial,
            source={"name": name} | asdict(key),
        )
        try:
            _save(statistics, path)
        except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in its own way
            log.warning(
                "statistics are not cached, %s cannot be written (%s): the figures come all the same, and the next run "
                "tries again; free some space or set $ORNSTEIN_CACHE.",
                path.parent,
                _line(error),
            )
    return statistics


def _cached(path: Path, *, quiet: bool = False) -> Statistics | None:
    if not path.exists():
        return None
    try:
        return _load(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if not quiet:
            log.warning("cached statistics %s are damaged (%s): computing them again.", path, _line(error))
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """One process at a time in here, of all that ask for ``path``; where files cannot be locked, all at once."""
    try:
        import fcntl
    except ImportError:  # no POSIX: at worst two processes compute the same, and each replaces the file whole
        yield
        return
    lock = path.with_name(f".{path.stem}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process computes %s: waiting for it.", path.name)
                fcntl.flock(handle, fcntl.LOCK_EX)
            # Whoever had it before took the file away: then this lock is one that nobody else will meet.
            if lock.exists() and os.path.samestat(os.fstat(handle), os.stat(lock)):
                break
            os.close(handle)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _tensors(statistics: Statistics) -> dict[str, Tensor]:
    found = {
        "mean": statistics.mean,
        "cov": statistics.cov,
        "features": statistics.features,
        "index": statistics.index,
    }
    if statistics.predictions is not None:
        predictions = statistics.predictions
        found |= {"class_total": predictions.total, "class_entropy": predictions.entropy}
        found |= {"class_count": predictions.count}
    if statistics.spatial is not None:
        found |= {"spatial_mean": statistics.spatial.mean, "spatial_cov": statistics.spatial.cov}
    return {name: value.contiguous() for name, value in found.items()}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _save(statistics: Statistics, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(statistics)
    facts = {
        "count": statistics.count,
        "inception_score": statistics.inception_score,
        "source": dict(statistics.source),
        "checksum": _checksum(tensors),
    }
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    os.close(handle)
    try:
        save_file(tensors, partial, metadata={"format": FORMAT, "facts": json.dumps(facts)})
        os.chmod(partial, 0o644)  # mkstemp's files are its owner's alone, and a cache may be shared
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _load(path: Path) -> Statistics:
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(header["facts"])
    if header.get("format") != FORMAT or facts["checksum"] != _checksum(tensors):
        raise OrnsteinError("its checksum does not fit")
    predictions = spatial = None
    if "class_total" in tensors:
        predictions = Predictions(
            total=tensors["class_total"], entropy=tensors["class_entropy"], count=tensors["class_count"]
        )
    if "spatial_mean" in tensors:
        spatial = Moments(mean=tensors["spatial_mean"], cov=tensors["spatial_cov"])
    return Statistics(
        count=facts["count"],
        moments=Moments(mean=tensors["mean"], cov=tensors["cov"]),
        features=tensors["features"],
        index=tensors["index"],
        predictions=predictions,
        spatial=spatial,
        source=facts["source"],
    )
