"""The feature spaces that images are judged in: the main one, and further ones as configs name them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureExtractor
from ornstein.metrics.statistics import Accumulator, Statistics

FURTHER = ("efficientnet", "dinov2", "clip")


@dataclass
class Space:
    """A feature space, the generated images seen in it, and the real ones."""

    features: FeatureExtractor
    accumulator: Accumulator
    reference: Statistics | None = None


def space_facts(space: Space) -> dict[str, Any]:
    """What decides a space's figures."""
    features, reference = space.features, space.reference
    assert reference is not None
    return {
        "fingerprint": features.fingerprint,
        "num_features": features.num_features,
        "agreed_samples": features.agreed_samples,
        "inception_splits": None if features.num_logits is None else space.accumulator.splits,
        "reference": {"count": reference.count or None, **reference.source},
    }


def further_spaces(also: Mapping[str, Any] | Sequence[FeatureExtractor] | None) -> list[FeatureExtractor]:
    """The extractors that ``metrics.also`` asks for: those given, or those named, in that order.

    Raises:
        OrnsteinError: for an unknown space, or a value that names none; two spaces of one name.
    """
    if also is None:
        return []
    if not isinstance(also, Mapping):
        return list(also)
    check_further_spaces(also)
    from ornstein.metrics.features import features_by_name

    made = (
        features_by_name(name) if where is True else features_by_name(name, weights=where)
        for name, where in also.items()
        if where
    )
    return [features for features in made if features is not None]


def check_further_spaces(also: Mapping[str, Any]) -> None:
    """Refuses names and values that :func:`further_spaces` cannot make anything of, before anything is loaded.

    Raises:
        OrnsteinError: says which, and what to write.
    """
    for name, where in also.items():
        if name not in FURTHER:
            raise OrnsteinError(f"metrics.also.{name} is unknown: choose among {', '.join(FURTHER)}.")
        if name == "efficientnet":
            if not isinstance(where, bool) and where is not None:
                raise OrnsteinError(
                    f"metrics.also.efficientnet={where} must be true or false: its package has weights."
                )
        elif where is not None and not isinstance(where, str):
            raise OrnsteinError(
                f"metrics.also.{name}={where} must be a folder or hub name of such a model, or null for none."
            )
