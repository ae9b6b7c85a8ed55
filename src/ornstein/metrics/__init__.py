"""Scores of generated images: feature spaces, FID, KID, IS, label accuracy, CLIP score, memorisation, the real floor.

Names load on first use: torchmetrics takes seconds to import.
"""

import importlib
from typing import Any

_HOME = {
    "ClassifierFeatures": "classifier",
    "ClipScore": "clip_score",
    "DigitsFeatures": "classifier",
    "FeatureExtractor": "features",
    "GenerativeMetrics": "generative",
    "InceptionFeatures": "inception",
    "MemorisationReport": "memorisation",
    "MetricReport": "report",
    "RealFloor": "floor",
    "ReferenceStatistics": "reference",
    "WeightsMissing": "inception",
    "clip_at_hand": "clip_score",
    "compute_statistics": "reference",
    "extract": "images",
    "features_by_name": "features",
    "frechet_distance": "frechet",
    "label_accuracy": "generative",
    "memorisation_of_features": "memorisation",
    "memorisation_report": "memorisation",
    "nearest_neighbours": "memorisation",
    "neighbour_grid": "memorisation",
    "real_floor": "floor",
    "reference_statistics": "reference",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import the module that a public name lives in, and give the name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
