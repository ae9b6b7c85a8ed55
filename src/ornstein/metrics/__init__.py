"""Scores of generated images: feature spaces, FID, KID, IS, label accuracy, CLIP score, memorisation, the real floor.

Names load on first use: torchmetrics takes seconds to import.
"""

from ornstein.lazy import lazy_names

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
    "check_features_name": "features",
    "check_metric_numbers": "generative",
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
__getattr__, __dir__ = lazy_names(__name__, _HOME)
