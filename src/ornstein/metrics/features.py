"""Feature extractors: frozen networks that turn uint8 images into the vectors that FID, KID and IS compare.

An extractor is always in eval mode and never learns; it takes uint8 images ``(B, C, H, W)`` with ``C`` 1 or 3, of
any size, and gives float32 features ``(B, num_features)`` and, where it has a classifier's head, logits. Its
``fingerprint`` (SHA-256 of the weights and of the way images are prepared) goes into every report and cache key:
figures of different fingerprints are not comparable.
"""

import hashlib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ornstein.errors import OrnsteinError

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601 weights of red, green and blue: the grey that Pillow's mode ``L`` and scanners give."""


class WeightsMissing(OrnsteinError):
    """Weights are not at hand and could not be fetched; the message says what to do."""


class FeatureBatch(NamedTuple):
    """All that an extractor says of B images, float32.

    Attributes:
        features: ``(B, num_features)``.
        logits: ``(B, num_logits)``, None where there is no classifier's head.
        spatial: ``(B, num_spatial)``, None where the space has no spatial features (sFID's).
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class FeatureExtractor(nn.Module):
    """Base of the extractors: frozen, always in eval mode, with a name and a fingerprint.

    Attributes:
        name: what reports call this feature space (``digits``, ``inception``, ...).
        num_features: width of the feature vector (torchmetrics reads it by this name).
        num_logits: width of the logits, or None where the network has no head.
        num_classes: how many classes of *the data* the logits tell apart, or None if they are another set's
            (Inception's 1,008 say nothing of the labels of the images judged).
        num_spatial: width of the spatial features that sFID compares, or None.
        suffix: ends the names of the figures of this space (``_dinov2``: ``fd_dinov2``, ``kid_dinov2``), so that they
            are not taken for others; empty where the bare names are the custom.
        agreed_samples: a Fréchet distance of fewer images bears their number in its name.
        default_samples: how many generated images a score in this space should rest on unless told otherwise.
        default_splits: parts over which the Inception Score is averaged unless told otherwise.
        fingerprint: hexadecimal SHA-256.
    """

    name: str
    num_features: int
    num_logits: int | None
    num_classes: int | None
    num_spatial: int | None = None
    suffix: str = ""
    agreed_samples: int = 50_000
    default_samples: int = 1000
    default_splits: int = 1
    fingerprint: str

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever the parent module is switched to: batch statistics would change the score."""
        del mode
        return super().train(False)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(B, num_features)`` and logits ``(B, num_logits)`` or None, float32, in one pass.

        Args:
            images: uint8 ``(B, 1 or 3, H, W)``.

        Raises: ValueError if ``images`` is not such a tensor.
        """
        raise NotImplementedError

    def all_features(self, images: Tensor) -> FeatureBatch:
        """Features, logits and spatial features of uint8 images ``(B, 1 or 3, H, W)``, in one pass.

        Raises: ValueError if ``images`` is not such a tensor.
        """
        return FeatureBatch(*self.features_and_logits(images))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, num_features)`` float32 of uint8 images ``(B, 1 or 3, H, W)``."""
        return self.features_and_logits(images)[0]

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits ``(B, num_logits)`` float32 of uint8 images ``(B, 1 or 3, H, W)``.

        Raises: ValueError if this extractor has no classifier's head.
        """
        logits = self.features_and_logits(images)[1]
        if logits is None:
            raise OrnsteinError(
                f"the feature extractor {self.name!r} has no logits; set metrics.inception_score=false or choose "
                "one that has (digits, mnist, fashion_mnist, inception)."
            )
        return logits


def check_images(images: Tensor) -> None:
    """Raise ValueError unless ``images`` is uint8 ``(B, 1 or 3, H, W)``.

    Scores are defined on what a user would save to disk, so float images are refused and not rounded silently.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise OrnsteinError(
            f"metrics take uint8 images in [0, 255], got {kind}; round generated images first: "
            "((x + 1) * 127.5).round().clamp(0, 255).byte() for x in [-1, 1]."
        )
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise OrnsteinError(
            f"metrics take images of shape (B, 1 or 3, H, W), got {tuple(images.shape)}; "
            "drop alpha channels and keep the batch dimension."
        )


def to_gray(images: Tensor, size: int) -> Tensor:
    """Gray float32 images ``(B, 1, size, size)`` in [-1, 1] from uint8 ``(B, 1 or 3, H, W)``.

    Colour becomes BT.601 luma. Shrinking averages areas where the factor is whole (an image enlarged by repeating
    its pixels comes back exactly) and is antialiased bilinear otherwise; enlarging is bilinear.
    """
    check_images(images)
    x = images.float()
    if x.shape[1] == 3:
        x = (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if x.shape[-2:] != (size, size):
        if x.shape[-2] % size == 0 and x.shape[-1] % size == 0:
            x = F.avg_pool2d(x, (x.shape[-2] // size, x.shape[-1] // size))
        else:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x / 127.5 - 1.0


def fingerprint_of(state: Mapping[str, Tensor], *, preparation: str) -> str:
    """Hexadecimal SHA-256 of named tensors (names, types, shapes, bytes) and of a line on how images are prepared."""
    digest = hashlib.sha256(preparation.encode())
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


FEATURE_SPACES = ("digits", "mnist", "fashion_mnist", "inception", "efficientnet", "dinov2", "clip", "none")


def check_features_name(name: str | None) -> None:
    """Refuses a name that :func:`features_by_name` does not know (None is ``none``).

    Raises:
        ValueError: for an unknown name.
    """
    if name not in (None, *FEATURE_SPACES):
        raise OrnsteinError(
            f"unknown metric features {name!r}; set data.features (or metrics=) to one of {', '.join(FEATURE_SPACES)}."
        )


def check_feature_options(features: Mapping[str, Any]) -> None:
    """Refuses options of the package's own extractors that cannot be met, before anything is loaded.

    Args:
        features: an extractor as configs name it, with its ``_target_``.

    Raises:
        ValueError: names the option, and what to give instead.
    """
    home, _, kind = str(features.get("_target_", "")).rpartition(".")
    if not f"{home}.".startswith("ornstein.metrics."):
        return
    if kind == "InceptionFeatures":
        from ornstein.metrics.inception import check_resize

        check_resize(features.get("resize", "tf1"))
    elif kind == "EfficientNetFeatures":
        from ornstein.metrics.efficientnet import check_image_size

        check_image_size(features.get("image_size", 128))
    elif kind == "ModuleFeatures" and (features.get("module") or {}).get("_target_") in (None, "???"):
        raise OrnsteinError(
            "metrics=module names no network: add metrics.features.module._target_=package.Class, and its arguments as "
            "+metrics.features.module.NAME=VALUE."
        )
    weights = features.get("weights")
    # Of the others a name on the hub is as good as a folder.
    local = kind in ("InceptionFeatures", "EfficientNetFeatures", "DigitsFeatures", "ClassifierFeatures")
    if local and weights is not None and not Path(weights).expanduser().exists():
        raise WeightsMissing(
            f"metrics.features.weights={weights}: there is no such file; name one that is there, or null for the "
            "feature space's own."
        )


def features_by_name(name: str | None, **options: Any) -> FeatureExtractor | None:
    """The extractor called ``name``, one of :data:`FEATURE_SPACES`; None for ``none`` (or None).

    What ``data.features`` names in the configs. Options go to the extractor's constructor (``weights=`` most of
    all).

    Raises:
        WeightsMissing: for a space whose weights are neither at hand nor can be downloaded.
        ValueError: for an unknown name.
    """
    check_features_name(name)
    if name is None or name == "none":
        return None
    if name == "digits":
        from ornstein.metrics.classifier import DigitsFeatures

        return DigitsFeatures(**options)
    if name in ("mnist", "fashion_mnist"):
        from ornstein.metrics.classifier import ClassifierFeatures

        return ClassifierFeatures(name, **options)
    module, kind = {
        "inception": ("inception", "InceptionFeatures"),
        "efficientnet": ("efficientnet", "EfficientNetFeatures"),
        "dinov2": ("transformers_features", "DinoFeatures"),
        "clip": ("transformers_features", "ClipFeatures"),
    }[name]
    found: FeatureExtractor = getattr(import_module(f"ornstein.metrics.{module}"), kind)(**options)
    return found
