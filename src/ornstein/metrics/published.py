"""Published references: the statistics and reference batches of ADM, EDM, pytorch-fid, clean-fid and torch-fidelity.

What a paper's FID was measured against, read without running anything that a file holds. They are all of the one
Inception network that FID papers use, so only the ``inception`` space can be compared with them.
"""

import codecs
import hashlib
import logging
import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureExtractor
from ornstein.metrics.reference import reference_statistics
from ornstein.metrics.statistics import KEPT_FEATURES, Moments, Statistics
from ornstein.metrics.subset import Subset

log = logging.getLogger(__name__)
IMAGES = "arr_0"
LAYOUTS = (
    "an ADM reference batch (arr_0, or mu, sigma, mu_s, sigma_s), EDM's, pytorch-fid's or clean-fid's .npz (mu, "
    "sigma), or a torch-fidelity cache file (.pt)"
)


def check_published(path: str | Path, space: str) -> None:
    """Refuses a reference file that cannot serve, before anything is computed.

    Args:
        path: ``metrics.reference``.
        space: name of the main feature space.

    Raises:
        OrnsteinError: no such file, another kind of file, or another space than ``inception``.
    """
    path = Path(path).expanduser()
    if space != "inception":
        raise OrnsteinError(
            f"metrics.reference={path}: published references are Inception features and compare with metrics=inception "
            f"alone, not with {space}; leave metrics.reference=null to measure against the training images."
        )
    if path.suffix == ".pkl":
        raise OrnsteinError(
            f"metrics.reference={path} is a pickle, which can run anything when it is opened: where you trust it, load "
            "it by hand and write np.savez(FILE, mu=..., sigma=...), then give that .npz."
        )
    if not path.is_file():
        raise OrnsteinError(f"metrics.reference={path} is no file; give {LAYOUTS}.")
    if path.suffix not in (".npz", ".pt"):
        raise OrnsteinError(f"metrics.reference={path} must be {LAYOUTS}.")


def read_published(
    path: str | Path,
    features: FeatureExtractor,
    *,
    batch_size: int = 256,
    max_features: int = KEPT_FEATURES,
    spatial: bool = False,
) -> Statistics:
    """Statistics from a published file.

    Moments (mu, sigma; mu_s, sigma_s) give FID and sFID alone, and hold no count. Images (``arr_0``, uint8 ``(N, H, W,
    C)``) have their features taken, streamed from the file and cached; where there are both, as in ADM's batches, the
    moments stand for FID and sFID and the images for the figures that compare images.

    Args:
        features: the ``inception`` space.
        batch_size, max_features, spatial: of the images' features; see :func:`ornstein.metrics.compute_statistics`.

    Raises:
        OrnsteinError: see :func:`check_published`; a damaged file, missing arrays, widths that do not fit.
    """
    path = Path(path).expanduser()
    check_published(path, features.name)
    if getattr(features, "official", True) is False:
        log.warning("Inception's weights are not the published ones: figures against %s compare with nobody's.", path)
    try:
        found = _read_pt(path) if path.suffix == ".pt" else _read_npz(path)
        _check_widths(path, found, features)
        source: dict[str, Any] = {"file": path.name, "sha256": _sha256(path), "extractor": features.name}
        if found.shape is None:
            return _without_images(found, source, max_features)
        images = reference_statistics(
            features,
            _npz_images(path, batch_size),
            data_fingerprint=source["sha256"],
            split=IMAGES,
            image_size=found.shape[1],
            batch_size=batch_size,
            max_features=max_features,
            spatial=spatial,
        )
        source |= {"images": images.count, "moments": "published" if found.moments else "of the images"}
        return replace(
            images,
            count=0 if found.moments else images.count,
            moments=found.moments or images.moments,
            spatial=found.spatial or (None if found.moments else images.spatial),
            source=source,
        )
    except (
        *(zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, ValueError, RuntimeError, TypeError),
        pickle.UnpicklingError,
    ) as error:
        if isinstance(error, OrnsteinError):
            raise
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise OrnsteinError(f"metrics.reference={path} is damaged, or not {LAYOUTS} ({line}).") from error


@dataclass(frozen=True)
class _Found:
    """What a file holds: moments, features, or the shape of its images (N, H, W, C)."""

    moments: Moments | None = None
    spatial: Moments | None = None
    features: Tensor | None = None
    shape: tuple[int, ...] | None = None


def _without_images(found: _Found, source: Mapping[str, Any], max_features: int) -> Statistics:
    if found.features is not None:
        values = found.features.double()
        index = torch.arange(len(values))
        subset = Subset(max_features, {"features": values.shape[1]})
        subset.add(index, {"features": values})
        kept = subset.rows()
        moments = Moments(mean=values.mean(0), cov=values.T.cov())
        return Statistics(
            count=len(values), moments=moments, features=kept["features"], index=kept["index"], source=source
        )
    assert found.moments is not None
    width = len(found.moments.mean)
    none = torch.empty(0, dtype=torch.int64)
    return Statistics(
        count=0,
        moments=found.moments,
        features=torch.empty(0, width),
        index=none,
        spatial=found.spatial,
        source={**source, "moments": "published"},
    )


def _read_npz(path: Path) -> _Found:
    with np.load(path, allow_pickle=False) as file:
        names = set(file.files)
        moments = _moments(file, "mu", "sigma") if {"mu", "sigma"} <= names else None
        spatial = _moments(file, "mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= names else None
    if IMAGES in names:
        with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as member:
            shape = _header(member, path)
        return _Found(moments=moments, spatial=spatial, shape=shape)
    if moments is None:
        raise OrnsteinError(
            f"metrics.reference={path} holds {', '.join(sorted(names)) or 'nothing'}, and neither mu and sigma nor "
            f"images in {IMAGES}; give {LAYOUTS}."
        )
    return _Found(moments=moments, spatial=spatial)


def _read_pt(path: Path) -> _Found:
    reconstruct = np.zeros(1).__reduce__()[0]
    # What a pickled array of numbers is made of, under the names of both generations of numpy; nothing else is loaded.
    allowed: list[Any] = [
        np.ndarray,
        np.dtype,
        codecs.encode,
        *(type(np.dtype(kind)) for kind in ("float64", "float32")),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
    ]
    with torch.serialization.safe_globals(allowed):
        held = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(held, Tensor) and held.dim() == 2 and len(held) > 1:
        return _Found(features=held)
    if isinstance(held, Mapping) and {"mu", "sigma"} <= set(held):
        return _Found(moments=_moments(held, "mu", "sigma"))
    raise OrnsteinError(
        f"metrics.reference={path} holds neither torch-fidelity's statistics (mu, sigma) nor its features (N, 2048); "
        f"give {LAYOUTS}."
    )


def _moments(arrays: Any, mean: str, cov: str) -> Moments:
    return Moments(
        mean=torch.as_tensor(np.asarray(arrays[mean]), dtype=torch.float64),
        cov=torch.as_tensor(np.asarray(arrays[cov]), dtype=torch.float64),
    )


def _check_widths(path: Path, found: _Found, features: FeatureExtractor) -> None:
    shapes: list[tuple[str, Moments, int | None]] = []
    if found.moments is not None:
        shapes.append(("mu and sigma", found.moments, features.num_features))
    if found.spatial is not None:
        shapes.append(("mu_s and sigma_s", found.spatial, features.num_spatial))
    for name, moments, width in shapes:
        mean, cov = tuple(moments.mean.shape), tuple(moments.cov.shape)
        if width is not None and (mean, cov) != ((width,), (width, width)):
            raise OrnsteinError(
                f"metrics.reference={path} has {name} of shape {mean} and {cov}, the {features.name} space has {width} "
                "features: it was made with another network."
            )
        if not (moments.mean.isfinite().all() and moments.cov.isfinite().all()):
            raise OrnsteinError(f"metrics.reference={path} has NaN or infinity in {name}: fetch it again.")
    if found.features is not None and found.features.shape[1] != features.num_features:
        raise OrnsteinError(
            f"metrics.reference={path} has {found.features.shape[1]} features an image, the {features.name} space has "
            f"{features.num_features}: it was made with another network or layer."
        )
    if found.shape is not None and (len(found.shape) != 4 or found.shape[3] not in (1, 3) or found.shape[0] < 2):
        raise OrnsteinError(
            f"metrics.reference={path} has {IMAGES} of shape {found.shape}; images are (N, H, W, 1 or 3), two at least."
        )


def _header(member: IO[bytes], path: Path) -> tuple[int, ...]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if fortran or dtype != np.uint8:
        order = " in Fortran order" * fortran
        raise OrnsteinError(f"metrics.reference={path} has {IMAGES} of {dtype}{order}: uint8 in C order is needed.")
    return tuple(shape)


def _npz_images(path: Path, batch_size: int) -> Iterator[Tensor]:
    """uint8 batches ``(B, C, H, W)`` of the images in the file, which is never held whole."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as member:
        count, *shape = _header(member, path)
        size = int(np.prod(shape))
        for start in range(0, count, batch_size):
            length = min(batch_size, count - start)
            raw = member.read(length * size)
            if len(raw) < length * size:
                raise OrnsteinError(f"metrics.reference={path} ends in the middle of {IMAGES}: fetch it again.")
            images = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(length, *shape)
            yield images.permute(0, 3, 1, 2).contiguous()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
