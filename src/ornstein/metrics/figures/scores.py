"""All figures of one feature space, by name, with the intervals of those that depend on the samples drawn."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ornstein.metrics.features import FeatureExtractor
from ornstein.metrics.figures import frechet, inception_score, intervals, kernel, manifold
from ornstein.metrics.figures.naming import figure_name
from ornstein.metrics.statistics import Statistics

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which figures are taken, and how; see :class:`ornstein.metrics.GenerativeMetrics` for each."""

    kid: bool = True
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    kid_all_pairs: bool = False
    inception_score: bool = True
    sfid: bool = False
    precision_recall: bool = False
    neighbours: int = 3
    density_coverage: bool = False
    density_neighbours: int = 5
    cmmd: bool = False
    fid_infinity: bool = False
    bootstrap: int = 200
    seed: int = 0

    def facts(self) -> dict[str, Any]:
        """The numbers behind those figures that are taken, for the report; None for those that are not."""
        subsets = self.kid and not self.kid_all_pairs
        return {
            "seed": self.seed,
            "bootstrap": self.bootstrap or None,
            "kid_all_pairs": self.kid_all_pairs if self.kid else None,
            "kid_subsets": self.kid_subsets if subsets else None,
            "kid_subset_size": self.kid_subset_size if subsets else None,
            "neighbours": self.neighbours if self.precision_recall else None,
            "density_neighbours": self.density_neighbours if self.density_coverage else None,
        }


def figure_ticks(choice: Choice, spaces: int) -> int:
    """How often :func:`figures_of` ticks over all ``spaces`` at most: for a progress bar's length."""
    of_each = choice.bootstrap * (1 + choice.sfid) + choice.fid_infinity * frechet.INFINITY_POINTS
    return spaces * of_each


def figures_of(
    space: FeatureExtractor,
    generated: Statistics,
    reference: Statistics,
    choice: Choice,
    *,
    advance: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Figures of ``generated`` against ``reference`` under their full names; intervals as ``<name>_low``, ``_high``.

    A figure that the reference (published moments alone) or too few images do not allow is left out, with one line.

    Args:
        advance: called after each Fréchet distance that takes time; :func:`figure_ticks` says how often at most.
    """
    found = _Figures(space, generated, reference, choice, advance)
    found.distances()
    if found.can_compare_images(1, choice.kid or choice.cmmd or space.suffix == "_clip", "KID and CMMD"):
        found.discrepancies()
    if choice.inception_score:
        found.score()
    if found.can_compare_images(choice.neighbours, choice.precision_recall, "precision and recall"):
        found.shares(manifold.precision_recall(generated, reference, k=choice.neighbours))
    if found.can_compare_images(choice.density_neighbours, choice.density_coverage, "density and coverage"):
        found.shares(manifold.density_coverage(generated, reference, k=choice.density_neighbours))
    return found.values | found.ends


class _Figures:
    def __init__(
        self,
        space: FeatureExtractor,
        generated: Statistics,
        reference: Statistics,
        choice: Choice,
        advance: Callable[[], None] | None,
    ) -> None:
        self.space, self.generated, self.reference = space, generated, reference
        self.choice, self.advance = choice, advance
        self.values: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        self.share = len(generated.features) / generated.count
        kept = len(generated.features)
        self.weights: Tensor | None = None
        if choice.bootstrap and kept > 1:
            self.weights = intervals.resample_weights(kept, choice.bootstrap, seed=choice.seed)

    def add(self, figures: dict[str, float]) -> None:
        self.values |= {figure_name(base, self.space, self.generated.count): value for base, value in figures.items()}

    def add_interval(self, base: str, figure: float, resampled: Tensor, *, share: float = 1.0) -> None:
        name = figure_name(base, self.space, self.generated.count)
        ends = intervals.interval(figure, resampled, share=share, base=base)
        self.ends |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}

    def can_compare_images(self, k: int, wanted: bool, what: str) -> bool:
        if not wanted:
            return False
        mine, theirs = len(self.generated.features), len(self.reference.features)
        if min(mine, theirs) > k:
            return True
        why = (
            "the reference holds moments alone, no features"
            if not theirs
            else f"they need more than {k} images on each side, and there are {mine} samples and {theirs} real ones"
        )
        log.warning("%s in the %s space are left out: %s.", what, self.space.name, why)
        return False

    def distances(self) -> None:
        figures = frechet.fid(self.generated, self.reference)
        self.add(figures)
        if self.choice.sfid and self.space.num_spatial is not None:
            found = frechet.sfid(self.generated, self.reference)
            if not found:
                log.warning("sFID is left out: the reference holds no spatial moments (mu_s, sigma_s).")
            self.add(found)
            figures |= found
        if self.choice.fid_infinity:
            self._infinity()
        if self.weights is None:
            return
        sides = {
            "fid": (self.generated.features, self.reference.moments),
            "sfid": (self.generated.spatial_features, self.reference.spatial),
        }
        for base, figure in figures.items():
            rows, moments = sides[base]
            if rows is not None and moments is not None:
                values = frechet.resampled(rows, moments, self.weights, advance=self.advance)
                self.add_interval(base, figure, values, share=self.share)

    def _infinity(self) -> None:
        if len(self.generated.features) < frechet.INFINITY_LEAST:
            log.warning(
                "FID-infinity is left out: it needs %d samples at least, and there are %d.",
                frechet.INFINITY_LEAST,
                len(self.generated.features),
            )
            return
        self.add(frechet.fid_infinity(self.generated, self.reference, seed=self.choice.seed, advance=self.advance))

    def discrepancies(self) -> None:
        choice, generated, reference = self.choice, self.generated, self.reference
        if choice.kid:
            real = reference.features.to(generated.features.device)
            sums = kernel.pair_sums(generated.features, real, kernel.polynomial, weights=self.weights)
            figures = kernel.kid(
                generated,
                reference,
                subsets=choice.kid_subsets,
                subset_size=choice.kid_subset_size,
                all_pairs=choice.kid_all_pairs,
                seed=choice.seed,
                sums=sums,
            )
            self.add(figures)
            if self.weights is not None:
                self.add_interval("kid", figures["kid"], kernel.resampled_unbiased(sums, self.weights))
        if choice.cmmd or self.space.suffix == "_clip":
            sums = kernel.cmmd_sums(generated, reference, weights=self.weights)
            figures = kernel.cmmd(generated, reference, sums=sums)
            self.add(figures)
            if self.weights is not None:
                values = kernel.CMMD_SCALE * kernel.resampled_unbiased(sums, self.weights)
                self.add_interval("cmmd", figures["cmmd"], values)

    def score(self) -> None:
        figures = inception_score.inception_score(self.generated)
        self.add(figures)
        if figures and self.weights is not None and self.generated.logits is not None:
            values = inception_score.resampled_scores(self.generated.logits, self.weights)
            self.add_interval("inception_score", figures["inception_score"], values, share=self.share)

    def shares(self, membership: manifold.Membership) -> None:
        means = membership.means()
        self.add(means)
        if not self.choice.bootstrap:
            return
        for base, values in membership.values.items():
            # Recall and coverage are shares of the real images: those are drawn again, the samples' balls stay.
            resampled = intervals.resampled_means(values, resamples=self.choice.bootstrap, seed=self.choice.seed)
            self.add_interval(base, means[base], resampled)
