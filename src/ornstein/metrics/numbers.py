"""What is checked of the metrics' numbers and switches before anything is loaded."""

from typing import Any

from ornstein.errors import OrnsteinError

_SWITCHES = {
    "kid",
    "kid_all_pairs",
    "inception_score",
    "label_accuracy",
    "sfid",
    "precision_recall",
    "density_coverage",
    "cmmd",
    "fid_infinity",
    "text_alignment",
}


def check_metric_numbers(
    *,
    num_samples: int | None = None,
    kid_subsets: int = 1,
    kid_subset_size: int = 1,
    inception_splits: int | None = None,
    neighbours: int = 1,
    density_neighbours: int = 1,
    keep_features: int = 2,
    bootstrap: int = 0,
    best_worst: int = 0,
    **others: Any,
) -> None:
    """Checks the numbers and switches among the arguments of :class:`ornstein.metrics.GenerativeMetrics`.

    Raises:
        ValueError: names the option as it is typed, its value and what it must be.
    """
    counts = {
        "kid_subsets": kid_subsets,
        "kid_subset_size": kid_subset_size,
        "neighbours": neighbours,
        "density_neighbours": density_neighbours,
    }
    if inception_splits is not None:
        counts["inception_splits"] = inception_splits
    for name, value in counts.items():
        if not _whole(value) or value < 1:
            raise OrnsteinError(f"metrics.{name}={value} must be a whole number, at least 1.")
    if num_samples is not None and (not _whole(num_samples) or num_samples < 0 or num_samples == 1):
        raise OrnsteinError(
            f"metrics.num_samples={num_samples}: figures need at least 2 images; 0 is for none, null for the feature "
            "space's own number."
        )
    if not _whole(keep_features) or keep_features < 2:
        raise OrnsteinError(
            f"metrics.keep_features={keep_features}: KID, precision and intervals need the features of at least 2 "
            "images; 10000 are the custom."
        )
    if not _whole(bootstrap) or bootstrap < 0 or 0 < bootstrap < 20:
        raise OrnsteinError(
            f"metrics.bootstrap={bootstrap}: a 95 % interval needs 20 resamples at least; 0 is for none."
        )
    if not _whole(best_worst) or best_worst < 0:
        raise OrnsteinError(f"metrics.best_worst={best_worst} must be a whole number; 0 shows no samples.")
    for name in _SWITCHES & others.keys():
        if not isinstance(others[name], bool):
            raise OrnsteinError(f"metrics.{name}={others[name]} must be true or false.")
    if others.get("precision_recall") and num_samples and num_samples <= neighbours:
        raise OrnsteinError(
            f"metrics.neighbours={neighbours} needs more samples than metrics.num_samples={num_samples}: lower it."
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
