"""Scores of generated images: feature spaces, FID, KID, IS, label accuracy, CLIP score, memorisation, the real floor.

Names load on first use: torchmetrics takes seconds to import.
"""

from ornstein.lazy import lazy_names

_HOME = {
    "Accumulator": "statistics",
    "ClassifierFeatures": "classifier",
    "ClipFeatures": "transformers_features",
    "ClipScore": "clip_score",
    "DigitsFeatures": "classifier",
    "DinoFeatures": "transformers_features",
    "EfficientNetFeatures": "efficientnet",
    "FeatureBatch": "features",
    "FeatureExtractor": "features",
    "GenerativeMetrics": "generative",
    "InceptionFeatures": "inception",
    "MemorisationReport": "memorisation",
    "MetricReport": "report",
    "ModuleFeatures": "module_features",
    "PairedScore": "paired",
    "RealFloor": "floor",
    "Statistics": "statistics",
    "TextAlignment": "text_alignment",
    "WeightsMissing": "features",
    "cached_floor": "floor",
    "check_feature_options": "features",
    "check_features_name": "features",
    "check_further_spaces": "spaces",
    "check_metric_numbers": "numbers",
    "check_published": "published",
    "clip_at_hand": "clip_score",
    "compute_statistics": "reference",
    "extract": "images",
    "features_by_name": "features",
    "frechet_distance": "frechet",
    "label_accuracy": "generative",
    "main_figure": "figures.naming",
    "memorisation_of_features": "memorisation",
    "memorisation_report": "memorisation",
    "nearest_neighbours": "memorisation",
    "neighbour_grid": "memorisation",
    "read_published": "published",
    "real_floor": "floor",
    "reference_statistics": "reference",
}
__all__ = list(_HOME)
__getattr__, __dir__ = lazy_names(__name__, _HOME)
