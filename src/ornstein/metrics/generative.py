"""Streaming figures of generated images in one or several feature spaces.

Each image goes through each extractor once; what is kept of it is bounded (:mod:`ornstein.metrics.statistics`), so
memory does not grow with the number of images, and the figures depend on neither batch size nor number of processes.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureExtractor, check_images
from ornstein.metrics.figures.scores import Choice, figure_ticks, figures_of
from ornstein.metrics.images import Source
from ornstein.metrics.numbers import check_metric_numbers
from ornstein.metrics.reference import compute_statistics
from ornstein.metrics.report import MetricReport
from ornstein.metrics.spaces import Space, further_spaces, space_facts
from ornstein.metrics.statistics import KEPT_FEATURES, Accumulator, Statistics, from_first, rank, summed

if TYPE_CHECKING:
    from ornstein.metrics.clip_score import ClipScore
    from ornstein.metrics.text_alignment import TextAlignment

log = logging.getLogger(__name__)
ROUNDING = "uint8: rounded to the nearest of 256 levels before any feature is taken"


class GenerativeMetrics:
    """Accumulates generated images batch by batch and scores them against real ones.

    Under torch.distributed every process updates with its own images, :meth:`compute` is collective and gives all
    of them the figures of all images.

    Args:
        features: the main feature space; always evaluated in eval mode.
        also: further spaces, whose figures bear their names: extractors, or as configs name them (efficientnet: true;
            dinov2, clip: a folder or hub name; a space that is false or null is left out).
        num_samples: how many images to generate for a score, for whoever generates them (kept as an attribute);
            None takes the extractor's default.
        kid: Kernel Inception Distance too, with its standard error.
        kid_subsets, kid_subset_size: draws of the KID; its mean does not depend on them in expectation, its standard
            deviation does. The size is lowered to the number of images where there are fewer.
        kid_all_pairs: KID over all pairs of kept images, without draws.
        inception_score: Inception Score too, where the extractor has logits.
        inception_splits: parts over which the Inception Score is averaged; None takes the extractor's custom:
            10 for Inception, as in papers, else 1.
        label_accuracy: share of images that the extractor classifies as the label asked for, where its classes are
            the data's and :meth:`update` is given labels.
        sfid: sFID too, where the space has spatial features (Inception).
        precision_recall: improved precision and recall too, with ``neighbours`` neighbours.
        density_coverage: density and coverage too, with ``density_neighbours`` neighbours.
        cmmd: CMMD in every space; in CLIP's it is always taken.
        fid_infinity: FID extrapolated to infinitely many samples too.
        bootstrap: resamples of each figure's 95 % interval; 0 takes none.
        keep_features: of how many images (generated, real) features are kept for KID, CMMD, precision, recall,
            density, coverage, intervals and FID-infinity: a uniform subset chosen by image number.
        best_worst: how many of the most and of the least realistic samples to show, for whoever shows them (kept as an
            attribute; :mod:`ornstein.metrics.realism`); 0 shows none.
        reference: a file of published statistics or images to compare with, for whoever sets the references (kept as
            ``published``; see :func:`ornstein.metrics.read_published`).
        clip: scores images against captions given to :meth:`update`: a score, or the folder or hub name of a CLIP,
            which is loaded when captions first come; None looks at ``$ORNSTEIN_CLIP``. No model at hand costs the
            score and one logged line.
        text_alignment: retrieval of captions by images too (:class:`ornstein.metrics.TextAlignment`), once captions
            come.
        seed: of the draws of KID, subsets and intervals.

    Raises: ValueError if there is no extractor, or for numbers out of their range.
    """

    def __init__(
        self,
        features: FeatureExtractor | None,
        *,
        also: Mapping[str, Any] | Sequence[FeatureExtractor] | None = None,
        num_samples: int | None = None,
        kid: bool = True,
        kid_subsets: int = 100,
        kid_subset_size: int = 1000,
        kid_all_pairs: bool = False,
        inception_score: bool = True,
        inception_splits: int | None = None,
        label_accuracy: bool = True,
        sfid: bool = False,
        precision_recall: bool = False,
        neighbours: int = 3,
        density_coverage: bool = False,
        density_neighbours: int = 5,
        cmmd: bool = False,
        fid_infinity: bool = False,
        bootstrap: int = 200,
        keep_features: int = KEPT_FEATURES,
        best_worst: int = 16,
        reference: str | Path | None = None,
        clip: "ClipScore | str | Path | None" = None,
        text_alignment: bool = False,
        seed: int = 0,
    ) -> None:
        if features is None:
            raise OrnsteinError(
                "generative metrics need a feature space; choose metrics=digits, mnist, fashion_mnist or inception, "
                "or switch the metrics callback off with metrics=none."
            )
        self.choice = Choice(
            kid=kid,
            kid_subsets=kid_subsets,
            kid_subset_size=kid_subset_size,
            kid_all_pairs=kid_all_pairs,
            inception_score=inception_score,
            sfid=sfid,
            precision_recall=precision_recall,
            neighbours=neighbours,
            density_coverage=density_coverage,
            density_neighbours=density_neighbours,
            cmmd=cmmd,
            fid_infinity=fid_infinity,
            bootstrap=bootstrap,
            seed=seed,
        )
        check_metric_numbers(
            num_samples=num_samples,
            inception_splits=inception_splits,
            keep_features=keep_features,
            best_worst=best_worst,
            label_accuracy=label_accuracy,
            text_alignment=text_alignment,
            **vars(self.choice),
        )
        self.num_samples = features.default_samples if num_samples is None else num_samples
        self.keep_features, self.best_worst = keep_features, best_worst
        self.published = None if reference is None else Path(reference).expanduser()
        self.clip = None if clip is None or isinstance(clip, str | Path) else clip
        self._clip_model = clip if isinstance(clip, str | Path) else None
        self._clip_wanted = self.clip is None
        self.text_alignment: TextAlignment | None = None
        self._alignment_wanted = text_alignment
        self._told_of_captions = False
        self._wants_accuracy = label_accuracy and features.num_classes is not None
        self.spaces: list[Space] = []
        for number, each in enumerate([features, *further_spaces(also)]):
            splits = each.default_splits if inception_splits is None or number else inception_splits
            accumulator = Accumulator(
                each.eval(), keep=keep_features, splits=splits, spatial=sfid, rows=bootstrap > 0, seed=seed
            )
            self.spaces.append(Space(each, accumulator))
        self.reset()

    @property
    def features(self) -> FeatureExtractor:
        """The main feature space."""
        return self.spaces[0].features

    @property
    def reference(self) -> Statistics | None:
        """What the main space's figures are measured against."""
        return self.spaces[0].reference

    @property
    def device(self) -> torch.device:
        """Where the extractors are."""
        return self.spaces[0].accumulator.device

    def to(self, device: torch.device | str) -> Self:
        """Move extractors and accumulators (these stay on the CPU where a device has no float64)."""
        for space in self.spaces:
            space.accumulator.to(device)
        for judge in (self.clip, self.text_alignment):
            if judge is not None:
                judge.to(device)
        return self

    def set_reference(
        self, reference: Statistics | Source, *, space: FeatureExtractor | None = None, batch_size: int = 256
    ) -> None:
        """Say what the real images of a space are: statistics, or the images themselves (uint8; see ``Source``).

        Args:
            space: one of :attr:`spaces`' extractors; None is the main one.

        Raises: ValueError if the statistics are those of another extractor.
        """
        of = self.spaces[0] if space is None else next(each for each in self.spaces if each.features is space)
        features = of.features
        if not isinstance(reference, Statistics):
            reference = compute_statistics(
                features, reference, batch_size=batch_size, max_features=self.keep_features, spatial=self.choice.sfid
            )
        if reference.mean.shape != (features.num_features,):
            raise OrnsteinError(
                f"the reference statistics have {reference.mean.shape[0]} features, the extractor "
                f"{features.name!r} has {features.num_features}; compute them with the same extractor."
            )
        made_with = reference.source.get("extractor_fingerprint", features.fingerprint)
        if made_with != features.fingerprint:
            raise OrnsteinError(
                f"the reference statistics were made with another extractor (fingerprint {made_with[:12]}) than "
                f"{features.name!r} ({features.fingerprint[:12]}); compute them with the same one."
            )
        of.reference = reference

    @torch.no_grad()
    def update(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        captions: Sequence[str] | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Take in generated images; returns their features in the main space, ``(B, D)``.

        Args:
            images: uint8 ``(B, 1 or 3, H, W)``.
            labels: int64 ``(B,)``, the classes asked for.
            captions: the B texts asked for.
            index: int64 ``(B,)``, the images' numbers, which decide whose features are kept; None counts on.

        Raises: ValueError if the images are not uint8 or the lengths differ.
        """
        check_images(images)
        for name, values in (("labels", labels), ("captions", captions), ("numbers", index)):
            if values is not None and len(values) != len(images):
                raise OrnsteinError(f"{len(images)} images came with {len(values)} {name}; give one for each image.")
        logits = None
        for number, space in enumerate(self.spaces):
            batch = space.accumulator.update(images, index)
            if number == 0:
                features, logits = batch.features, batch.logits
        if labels is not None and logits is not None and self._wants_accuracy:
            self._hits += (logits.argmax(dim=1) == labels.to(logits.device)).sum().cpu()
            self._judged += len(labels)
        if captions is not None:
            self._update_texts(images, captions)
        return features

    @property
    def names_clip(self) -> bool:
        """Whether a CLIP is given or named; without one, captions that nobody asked for need not be scored."""
        return self.clip is not None or bool(self._clip_model or os.environ.get("ORNSTEIN_CLIP"))

    def _update_texts(self, images: Tensor, captions: Sequence[str]) -> None:
        self._make_judges(clip=True, alignment=True)
        for judge in (self.clip, self.text_alignment):
            if judge is not None:
                judge.update(images, captions)

    def _make_judges(self, *, clip: bool, alignment: bool) -> None:
        """Loads what judges captions, which is looked for once."""
        if clip and self._clip_wanted:
            from ornstein.metrics.clip_score import clip_at_hand

            self._clip_wanted = False
            self.clip = clip_at_hand(self._clip_model)
            if self.clip is not None:
                self.clip.to(self.device)
        if alignment and self._alignment_wanted:
            from ornstein.metrics.text_alignment import text_alignment_at_hand

            self._alignment_wanted = False
            self.text_alignment = text_alignment_at_hand()
            if self.text_alignment is not None:
                self.text_alignment.to(self.device)

    def _judged_texts(self) -> dict[str, float]:
        """What captions and images have to do with each other; a process that had none takes part all the same."""
        others = summed(torch.tensor([self.clip is not None, self.text_alignment is not None]).long())
        self._make_judges(clip=bool(others[0]), alignment=bool(others[1]))
        if rank() == 0 and not self._told_of_captions:
            wanted = {"clip": self._clip_wanted and self._clip_model, "text_alignment": self._alignment_wanted}
            for name in (name for name, asked in wanted.items() if asked):
                log.warning("metrics.%s is left out: the samples have no captions to be judged by.", name)
                self._told_of_captions = True
        values = {}
        if self.clip is not None and (clip := self.clip.compute()) is not None:
            values["clip_score"] = clip
        return values | ({} if self.text_alignment is None else self.text_alignment.compute())

    def ticks(self, *, intervals: bool = True) -> int:
        """How often :meth:`compute` calls ``advance`` at most: for a progress bar's length."""
        return figure_ticks(self._choice(intervals), len(self.spaces))

    def compute(self, *, intervals: bool = True, advance: Callable[[], None] | None = None) -> dict[str, float]:
        """The figures of all images so far; under torch.distributed every process must call this.

        Args:
            intervals: also the figures' 95 % intervals, where ``bootstrap`` asks for them.
            advance: called as the slow ones go on.

        Returns: figures by name (:mod:`ornstein.metrics.figures.naming`): ``fid``, or with too few images to compare
        ``fid_1k``; ``kid``, ``kid_std``, ``kid_se``; ``sfid``; ``inception_score`` (and ``inception_score_std`` with
        more than one split); ``precision``, ``recall``, ``density``, ``coverage``; ``label_accuracy`` in [0, 1];
        ``clip_score`` in [0, 100]: those that there is something for. Ends of intervals are ``<name>_low`` and
        ``<name>_high``.

        Raises: ValueError without a reference, or with fewer than two images.
        """
        if any(space.reference is None for space in self.spaces):
            raise OrnsteinError("there are no real images to compare with; call set_reference first.")
        total = self.count()
        if total < 2:
            raise OrnsteinError(f"generative metrics need two images at least, got {total}; raise metrics.num_samples.")
        generated = [space.accumulator.statistics() for space in self.spaces]
        values = from_first(lambda: self._figures(generated, self._choice(intervals), advance))
        values |= self._accuracy(intervals)
        return values | self._judged_texts()

    def _choice(self, intervals: bool) -> Choice:
        return self.choice if intervals else replace(self.choice, bootstrap=0)

    def _figures(
        self, generated: list[Statistics], choice: Choice, advance: Callable[[], None] | None
    ) -> dict[str, float]:
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        values: dict[str, float] = {}
        for space, images in zip(self.spaces, generated, strict=True):
            assert space.reference is not None
            values |= figures_of(space.features, images.on(device), space.reference, choice, advance=advance)
        return values

    def _accuracy(self, intervals: bool) -> dict[str, float]:
        hits, judged = summed(self._hits), summed(torch.tensor(self._judged))
        if not judged:  # no process was given labels
            return {}
        from ornstein.metrics.figures.intervals import share_interval

        found = {"label_accuracy": int(hits) / int(judged)}
        if intervals and self.choice.bootstrap:
            low, high = share_interval(int(hits), int(judged), resamples=self.choice.bootstrap, seed=self.choice.seed)
            found |= {"label_accuracy_low": low, "label_accuracy_high": high}
        return found

    def count(self) -> int:
        """How many generated images have come in, over all processes (collective)."""
        return self.spaces[0].accumulator.count()

    def report(
        self,
        values: Mapping[str, float] | None = None,
        *,
        label_protocol: str = "none",
        sampling: Mapping[str, Any] | None = None,
        floor: Mapping[str, Any] | None = None,
        memorisation: Mapping[str, Any] | None = None,
    ) -> MetricReport:
        """The figures (:meth:`compute`'s, unless given) with all that decides them; see :class:`MetricReport`."""
        values = self.compute() if values is None else values
        spaces = {space.features.name: space_facts(space) for space in self.spaces}
        main = spaces[self.features.name]
        return MetricReport(
            values=dict(values),
            num_samples=self.count(),
            reference=main["reference"],
            extractor=self.features.name,
            fingerprint=self.features.fingerprint,
            label_protocol=label_protocol,
            settings={
                **self.choice.facts(),
                "num_features": self.features.num_features,
                "inception_splits": main["inception_splits"] if self.choice.inception_score else None,
                "keep_features": self.keep_features,
                "agreed_samples": self.features.agreed_samples,
                "images": ROUNDING,
                "clip": None if self.clip is None else self.clip.name,
            },
            spaces={name: facts for name, facts in spaces.items() if name != self.features.name},
            sampling=sampling or {},
            floor=floor,
            memorisation=memorisation,
        )

    def reset(self) -> None:
        """Forget the generated images; the references stay."""
        for space in self.spaces:
            space.accumulator.reset()
        self._hits, self._judged = torch.tensor(0), 0
        for judge in (self.clip, self.text_alignment):
            if judge is not None:
                judge.reset()


def label_accuracy(features: FeatureExtractor, images: Tensor, labels: Tensor) -> float:
    """Share in [0, 1] of uint8 ``images (B, C, H, W)`` that the extractor classifies as ``labels (B,)``.

    Raises: ValueError if the extractor's classes are not those of the data.
    """
    if features.num_classes is None:
        raise OrnsteinError(
            f"the classes of {features.name!r} are not the data's, so it cannot tell label accuracy; use the data's "
            "own feature space (digits, mnist, fashion_mnist)."
        )
    found = features.logits(images.to(next(features.parameters()).device)).argmax(dim=1)
    return float((found.cpu() == labels.cpu()).float().mean())
