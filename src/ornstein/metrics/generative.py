"""Streaming FID, KID, Inception Score, label accuracy and CLIP score of generated images.

The accumulators and formulas are torchmetrics'. Each image goes through the extractor once and the features are
handed to all of them (a module that returns what it is given stands where torchmetrics expects a network): the
figures are those of ``FrechetInceptionDistance(feature=extractor)`` and its kin at a third of the cost. Sums are
float64, so the batch size does not matter; the draws in KID and IS are seeded.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureExtractor, check_images
from ornstein.metrics.images import Source
from ornstein.metrics.reference import ReferenceStatistics, compute_statistics
from ornstein.metrics.report import MetricReport

if TYPE_CHECKING:
    from ornstein.metrics.clip_score import ClipScore


class _Given(nn.Module):
    """Stands for the extractor inside torchmetrics: takes features that are already there."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def check_metric_numbers(
    *,
    num_samples: int | None = None,
    kid_subsets: int = 1,
    kid_subset_size: int = 1,
    inception_splits: int | None = None,
    **others: Any,
) -> None:
    """Checks the numbers among the arguments of :class:`GenerativeMetrics`; ``others`` are none.

    Raises:
        ValueError: names the option as it is typed, its value and what it must be.
    """
    counts = {"kid_subsets": kid_subsets, "kid_subset_size": kid_subset_size}
    if inception_splits is not None:
        counts["inception_splits"] = inception_splits
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise OrnsteinError(f"metrics.{name}={value} must be a whole number, at least 1.")
    if num_samples is not None and (not isinstance(num_samples, int) or num_samples < 0 or num_samples == 1):
        raise OrnsteinError(
            f"metrics.num_samples={num_samples}: figures need at least 2 images; 0 is for none, null for the feature "
            "space's own number."
        )


class GenerativeMetrics:
    """Accumulates generated images batch by batch and scores them against real ones.

    Under torch.distributed every process updates with its own images, :meth:`compute` is collective and gives all
    of them the figures of all images.

    Args:
        features: the feature space; always evaluated in eval mode.
        kid: Kernel Inception Distance too.
        inception_score: Inception Score too, where the extractor has logits.
        label_accuracy: share of images that the extractor classifies as the label asked for, where its classes are
            the data's and :meth:`update` is given labels.
        num_samples: how many images to generate for a score, for whoever generates them (kept as an attribute);
            None takes the extractor's default.
        kid_subsets, kid_subset_size: draws of the KID; its mean does not depend on them in expectation, its standard
            deviation does. The size is lowered to the number of images where there are fewer.
        inception_splits: parts over which the Inception Score is averaged; None takes the extractor's custom:
            10 for Inception, as in papers, else 1.
        clip: scores images against captions given to :meth:`update`: a score, or the folder or hub name of a CLIP,
            which is loaded when captions first come; None looks at ``$ORNSTEIN_CLIP``. No model at hand costs the
            score and one logged line.
        seed: of the draws of KID and IS.

    Raises: ValueError if there is no extractor, or for numbers out of their range.
    """

    def __init__(
        self,
        features: FeatureExtractor | None,
        *,
        kid: bool = True,
        inception_score: bool = True,
        label_accuracy: bool = True,
        num_samples: int | None = None,
        kid_subsets: int = 100,
        kid_subset_size: int = 1000,
        inception_splits: int | None = None,
        clip: "ClipScore | str | Path | None" = None,
        seed: int = 0,
    ) -> None:
        if features is None:
            raise OrnsteinError(
                "generative metrics need a feature space; choose metrics=digits, mnist, fashion_mnist or inception, "
                "or switch the metrics callback off with metrics=none."
            )
        check_metric_numbers(
            num_samples=num_samples,
            kid_subsets=kid_subsets,
            kid_subset_size=kid_subset_size,
            inception_splits=inception_splits,
        )
        from torchmetrics import MeanMetric, Metric, SumMetric
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore
        from torchmetrics.image.kid import KernelInceptionDistance

        self.features = features.eval()
        self.num_samples = features.default_samples if num_samples is None else num_samples
        self.clip = None if clip is None or isinstance(clip, str | Path) else clip
        self._clip_model = clip if isinstance(clip, str | Path) else None
        self._clip_wanted = self.clip is None
        self.seed = seed
        self.reference: ReferenceStatistics | None = None
        self._kid_subset_size = kid_subset_size
        self._splits = features.default_splits if inception_splits is None else inception_splits
        self._metrics: dict[str, Metric] = {
            "count": SumMetric(compute_with_cache=False),
            "fid": FrechetInceptionDistance(
                feature=_Given(features.num_features), reset_real_features=False, compute_with_cache=False
            ),
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer.*")
            if kid:
                self._metrics["kid"] = KernelInceptionDistance(
                    feature=_Given(features.num_features),
                    subsets=kid_subsets,
                    subset_size=kid_subset_size,
                    reset_real_features=False,
                    compute_with_cache=False,
                )
            if inception_score and features.num_logits is not None:
                self._metrics["inception_score"] = InceptionScore(
                    feature=_Given(features.num_logits), splits=self._splits, compute_with_cache=False
                )
        if label_accuracy and features.num_classes is not None:
            self._metrics["label_accuracy"] = MeanMetric(compute_with_cache=False)
        self._settings = {
            "num_features": features.num_features,
            "kid_subsets": kid_subsets if kid else None,
            "kid_subset_size": kid_subset_size if kid else None,
            "inception_splits": self._splits if "inception_score" in self._metrics else None,
            "seed": seed,
        }
        self.to(next(features.parameters()).device)
        self.reset()

    @property
    def device(self) -> torch.device:
        """Where the extractor is."""
        return next(self.features.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move extractor and accumulators (these stay on the CPU where a device has no float64)."""
        self.features.to(device)
        if self.clip is not None:
            self.clip.to(device)
        self._state_device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        for metric in self._metrics.values():
            metric.to(self._state_device)
        return self

    def set_reference(self, reference: ReferenceStatistics | Source, *, batch_size: int = 256) -> None:
        """Say what the real images are: cached statistics, or the images themselves (uint8; see ``Source``)."""
        if not isinstance(reference, ReferenceStatistics):
            reference = compute_statistics(self.features, reference, batch_size=batch_size)
        if reference.feature_sum.shape != (self.features.num_features,):
            raise OrnsteinError(
                f"the reference statistics have {reference.feature_sum.shape[0]} features, the extractor "
                f"{self.features.name!r} has {self.features.num_features}; compute them with the same extractor."
            )
        made_with = reference.source.get("extractor_fingerprint", self.features.fingerprint)
        if made_with != self.features.fingerprint:
            raise OrnsteinError(
                f"the reference statistics were made with another extractor (fingerprint {made_with[:12]}) than "
                f"{self.features.name!r} ({self.features.fingerprint[:12]}); compute them with the same one."
            )
        self.reference = reference
        # torchmetrics sums and concatenates its states over processes: only the first may hold the real images.
        first = _rank() == 0
        fid, kid = self._metrics["fid"], self._metrics.get("kid")
        scale = 1 if first else 0
        fid.real_features_sum = reference.feature_sum.to(self._state_device) * scale
        fid.real_features_cov_sum = reference.feature_outer.to(self._state_device) * scale
        fid.real_features_num_samples = torch.tensor(reference.count * scale, device=self._state_device)
        if kid is not None:
            kid.real_features = [reference.features[: None if first else 0].to(self._state_device)]

    @torch.no_grad()
    def update(self, images: Tensor, labels: Tensor | None = None, *, captions: Sequence[str] | None = None) -> None:
        """Take in generated images.

        Args:
            images: uint8 ``(B, 1 or 3, H, W)``.
            labels: int64 ``(B,)``, the classes asked for.
            captions: the B texts asked for.

        Raises: ValueError if the images are not uint8 or the lengths differ.
        """
        check_images(images)
        for name, values in (("labels", labels), ("captions", captions)):
            if values is not None and len(values) != len(images):
                raise OrnsteinError(f"{len(images)} images came with {len(values)} {name}; give one for each image.")
        features, logits = self.features.features_and_logits(images.to(self.device, non_blocking=True))
        if not features.isfinite().all():
            raise OrnsteinError(f"the {self.features.name} features of a batch are not finite; look at its images.")
        self._feed(features, logits)
        if labels is not None and logits is not None and "label_accuracy" in self._metrics:
            hits = logits.argmax(dim=1) == labels.to(logits.device)
            self._metrics["label_accuracy"].update(hits.float().to(self._state_device))
        if captions is not None:
            self._update_clip(images, captions)

    @property
    def names_clip(self) -> bool:
        """Whether a CLIP is given or named; without one, captions that nobody asked for need not be scored."""
        return self.clip is not None or bool(self._clip_model or os.environ.get("ORNSTEIN_CLIP"))

    def _update_clip(self, images: Tensor, captions: Sequence[str]) -> None:
        if self._clip_wanted:
            from ornstein.metrics.clip_score import clip_at_hand

            self._clip_wanted = False  # looked for once
            self.clip = clip_at_hand(self._clip_model)
            if self.clip is not None:
                self.clip.to(self.device)
        if self.clip is not None:
            self.clip.update(images, captions)

    def _feed(self, features: Tensor, logits: Tensor | None) -> None:
        features = features.to(self._state_device)
        self._metrics["count"].update(torch.tensor(float(len(features)), device=self._state_device))
        self._metrics["fid"].update(features.double(), real=False)
        if "kid" in self._metrics:
            self._metrics["kid"].update(features.float(), real=False)
        if "inception_score" in self._metrics and logits is not None:
            # In float64: float32 probabilities of a sure classifier underflow, and 0 times log 0 is not a number.
            self._metrics["inception_score"].update(logits.to(self._state_device).double())

    def compute(self) -> dict[str, float]:
        """The figures of all images so far; under torch.distributed every process must call this.

        Returns: ``fid``; ``kid`` and ``kid_std``; ``inception_score`` (and ``inception_score_std`` with more than
        one split); ``label_accuracy`` in [0, 1]; ``clip_score`` in [0, 100]: those that there is something for.

        Raises: ValueError without a reference, or with fewer than two images.
        """
        if self.reference is None:
            raise OrnsteinError("there are no real images to compare with; call set_reference first.")
        total = self.count()
        if total < 2:
            raise OrnsteinError(f"generative metrics need two images at least, got {total}; raise metrics.num_samples.")
        values = {"fid": float(self._metrics["fid"].compute())}
        with torch.random.fork_rng(devices=[]):  # torchmetrics draws from the global generator
            torch.manual_seed(self.seed)
            if "kid" in self._metrics:
                kid = self._metrics["kid"]
                _merge(kid, "real_features", "fake_features")
                kid.subset_size = min(self._kid_subset_size, total, len(self.reference.features))
                mean, deviation = kid.compute()
                values |= {"kid": float(mean), "kid_std": float(deviation)}
            if "inception_score" in self._metrics:
                score = self._metrics["inception_score"]
                _merge(score, "features")
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*degrees of freedom.*")  # one split has no deviation
                    mean, deviation = score.compute()
                values["inception_score"] = float(mean)
                if self._splits > 1:
                    values["inception_score_std"] = float(deviation)
        if "label_accuracy" in self._metrics:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*before the ``update`` method.*")
                share = self._metrics["label_accuracy"].compute()
            if share.isfinite():  # 0/0 where no process was given labels
                values["label_accuracy"] = float(share)
        if self.clip is not None:
            clip = self.clip.compute()
            if clip is not None:
                values["clip_score"] = clip
        return values

    def count(self) -> int:
        """How many generated images have come in, over all processes (collective)."""
        return int(self._metrics["count"].compute())

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
        assert self.reference is not None
        return MetricReport(
            values=dict(values),
            num_samples=self.count(),
            reference={"count": self.reference.count, **self.reference.source},
            extractor=self.features.name,
            fingerprint=self.features.fingerprint,
            label_protocol=label_protocol,
            settings={**self._settings, "clip": None if self.clip is None else self.clip.name},
            sampling=sampling or {},
            floor=floor,
            memorisation=memorisation,
        )

    def reset(self) -> None:
        """Forget the generated images; the reference stays."""
        for metric in self._metrics.values():
            metric.reset()
        if self.clip is not None:
            self.clip.reset()
        # A process without a single image must still take part when the others gather.
        logits = None if self.features.num_logits is None else torch.empty(0, self.features.num_logits)
        self._feed(torch.empty(0, self.features.num_features), logits)


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


def _merge(metric: Any, *names: str) -> None:
    """Make each list state one tensor: processes with lists of different lengths would wait for each other forever."""
    for name in names:
        state = getattr(metric, name)
        if isinstance(state, list) and len(state) > 1:
            setattr(metric, name, [torch.cat(state)])


def _rank() -> int:
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
