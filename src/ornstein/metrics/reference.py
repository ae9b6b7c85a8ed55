"""Reference statistics of real images: computed once, kept on disk, never trusted blindly.

A file is named by the SHA-256 of everything that decides its content (data fingerprint, split, image size, extractor
fingerprint, how many images and features), is written whole or not at all, and carries a checksum of its tensors. One
that is damaged is computed again, with one line that says so.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureExtractor
from ornstein.metrics.images import Source, batches

log = logging.getLogger(__name__)
FORMAT = "ornstein.reference_statistics.1"
KEPT_FEATURES = 10_000


@dataclass(frozen=True, kw_only=True)
class ReferenceStatistics:
    """What FID, KID and IS need to know of the real images.

    Attributes:
        feature_sum: float64 ``(D,)``, sum of the features.
        feature_outer: float64 ``(D, D)``, sum of their outer products.
        count: how many images.
        features: float32 ``(M, D)``, those that KID compares with: all, or a fixed random subset of them.
        inception_score: of the real images (no splits), or None without logits.
        source: what was measured: the parts of the cache key, for the report.
    """

    feature_sum: Tensor
    feature_outer: Tensor
    count: int
    features: Tensor
    inception_score: float | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """Mean feature, float64 ``(D,)``."""
        return self.feature_sum / self.count

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance of the features, float64 ``(D, D)``."""
        return covariance(self.feature_sum, self.feature_outer, self.count)


def covariance(feature_sum: Tensor, feature_outer: Tensor, count: int) -> Tensor:
    """Unbiased covariance ``(D, D)`` from the sums of ``count`` features and of their outer products, float64."""
    if count < 2:
        raise OrnsteinError(f"a covariance needs two images at least, got {count}; raise metrics.num_samples.")
    mean = feature_sum / count
    return (feature_outer - count * torch.outer(mean, mean)) / (count - 1)


def inception_score(logits: Tensor) -> float:
    r"""Inception Score of all images at once, without splits: exp of the mean KL from the marginal.

    .. math:: \mathrm{IS} = \exp \mathbb{E}_x\, \mathrm{KL}\bigl(p(y \mid x) \,\|\, p(y)\bigr)

    Between 1 and the number of classes. Source: Salimans et al. 2016 (arXiv 1606.03498), section 4. ``logits (N, K)``.
    """
    logp = logits.double().log_softmax(dim=1)
    p = logp.exp()
    marginal = p.mean(dim=0, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return float((p * (logp - marginal.log())).sum(dim=1).mean().exp())


@torch.no_grad()
def compute_statistics(
    features: FeatureExtractor,
    images: Source,
    *,
    batch_size: int = 256,
    max_features: int = KEPT_FEATURES,
    source: Mapping[str, Any] | None = None,
) -> ReferenceStatistics:
    """Statistics of all ``images`` (see :data:`ornstein.metrics.images.Source`), in one pass.

    Args:
        max_features: keep at most this many feature vectors for KID: a random subset, the same on every call.

    Raises: ValueError if there are fewer than two images.
    """
    device = next(features.parameters()).device
    total = torch.zeros(features.num_features, dtype=torch.float64)
    outer = torch.zeros(features.num_features, features.num_features, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    kept, ranks = torch.empty(0, features.num_features), torch.empty(0, dtype=torch.float64)
    logits: list[Tensor] = []
    count = 0
    for batch in batches(images, batch_size=batch_size):
        values, heads = features.features_and_logits(batch.to(device, non_blocking=True))
        values = values.float().cpu()
        wide = values.double()
        total += wide.sum(0)
        outer += wide.T @ wide
        count += len(values)
        if heads is not None:
            logits.append(heads.float().cpu())
        # Every image draws a rank and the lowest stay: a uniform subset in one pass, whatever the batch size.
        kept = torch.cat([kept, values])
        ranks = torch.cat([ranks, torch.rand(len(values), generator=generator, dtype=torch.float64)])
        if len(kept) > max_features:
            rows = ranks.topk(max_features, largest=False).indices.sort().values
            kept, ranks = kept[rows], ranks[rows]
    if count < 2:
        raise OrnsteinError(f"reference statistics need two real images at least, got {count}; look at data.root.")
    score = inception_score(torch.cat(logits)) if logits else None
    return ReferenceStatistics(
        feature_sum=total, feature_outer=outer, count=count, features=kept, inception_score=score, source=source or {}
    )


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
    format: str = FORMAT

    def file_name(self) -> str:
        line = json.dumps(asdict(self), sort_keys=True)
        return f"{self.extractor}-{hashlib.sha256(line.encode()).hexdigest()[:32]}.safetensors"


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
) -> ReferenceStatistics:
    """Statistics of a data set's images from the cache, or computed and put there.

    Args:
        features: the extractor.
        dataset: the real images; a data set of :mod:`ornstein.data` says its fingerprint, split and size itself.
        data_fingerprint, split, image_size: for other sources; they make the cache key.
        folder: of the cache; None is :func:`cache_folder`.
        batch_size: of the extraction; does not change the result beyond rounding.
        max_features: how many feature vectors are kept for KID.

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
    )
    path = (cache_folder() if folder is None else Path(folder)) / key.file_name()
    if path.exists():
        try:
            return _load(path)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            log.warning("cached statistics %s are damaged (%s): computing them again.", path, error)
    statistics = compute_statistics(
        features, dataset, batch_size=batch_size, max_features=max_features, source=asdict(key)
    )
    try:
        _save(statistics, path)
    except OSError as error:
        log.warning("statistics are not cached, %s cannot be written (%s); set $ORNSTEIN_CACHE.", path.parent, error)
    return statistics


def _tensors(statistics: ReferenceStatistics) -> dict[str, Tensor]:
    return {
        "feature_sum": statistics.feature_sum.contiguous(),
        "feature_outer": statistics.feature_outer.contiguous(),
        "features": statistics.features.contiguous(),
    }


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _save(statistics: ReferenceStatistics, path: Path) -> None:
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
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _load(path: Path) -> ReferenceStatistics:
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(header["facts"])
    if header.get("format") != FORMAT or facts["checksum"] != _checksum(tensors):
        raise OrnsteinError("its checksum does not fit")
    return ReferenceStatistics(
        count=facts["count"], inception_score=facts["inception_score"], source=facts["source"], **tensors
    )
