"""What it takes to believe a figure, beside the figure."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "torchmetrics", "torch-fidelity"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


@dataclass(frozen=True, kw_only=True)
class MetricReport:
    """Figures, and all that decides them.

    Attributes:
        values: ``fid`` (``fid_1k`` of too few images to compare), ``kid``, ``kid_se``, ``inception_score``,
            ``label_accuracy``, ... as :meth:`GenerativeMetrics.compute` gives them, with the ends of their 95 %
            intervals, ``<name>_low`` and ``<name>_high``.
        num_samples: how many generated images they rest on.
        reference: the real images compared with: count, data fingerprint, split, image size.
        extractor: name of the feature space.
        fingerprint: of its weights and image preparation; figures of two fingerprints do not compare.
        label_protocol: how labels were asked for: ``balanced``, ``held_out`` (the conditions of held-out data, in
            order), ``none``, ...
        settings: of the metrics themselves: number of features, KID subsets, splits of the Inception Score, kept
            features, resamples, rounding of the images, number of samples from which figures compare, seed.
        spaces: of each further feature space, its fingerprint, width and reference.
        sampling: what made the images, as the caller knows it: sampler, steps, NFE, guidance, EMA and its length, seed.
        floor: real against real (:class:`RealFloor` as a dict), or None if not measured.
        memorisation: :class:`MemorisationReport` as a dict, or None if not measured.
        versions: of the packages that computed it.
    """

    values: Mapping[str, float]
    num_samples: int
    reference: Mapping[str, Any]
    extractor: str
    fingerprint: str
    label_protocol: str = "none"
    settings: Mapping[str, Any] = field(default_factory=dict)
    spaces: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    floor: Mapping[str, Any] | None = None
    memorisation: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=_versions)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; numbers that are not finite become None (JSON has no NaN)."""
        return _plain(asdict(self))

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as indented JSON; also written to ``path``, whole or not at all, if one is given."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.chmod(partial, 0o644)  # mkstemp's files are its owner's alone
            os.replace(partial, path)
        return text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
