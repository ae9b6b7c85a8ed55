"""Feature extractors: frozen networks that turn uint8 images into the vectors that FID, KID and IS compare.

An extractor is always in eval mode and never learns; it takes uint8 images ``(B, C, H, W)`` with ``C`` 1 or 3, of
any size, and gives float32 features ``(B, num_features)`` and, where it has a classifier's head, logits. Its
``fingerprint`` (SHA-256 of the weights and of the way images are prepared) goes into every report and cache key:
figures of different fingerprints are not comparable.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ornstein.errors import OrnsteinError

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601 weights of red, green and blue: the grey that Pillow's mode ``L`` and scanners give."""


class FeatureExtractor(nn.Module):
    """Base of the extractors: frozen, always in eval mode, with a name and a fingerprint.

    Attributes:
        name: what reports call this feature space (``digits``, ``inception``, ...).
        num_features: width of the feature vector (torchmetrics reads it by this name).
        num_logits: width of the logits, or None where the network has no head.
        num_classes: how many classes of *the data* the logits tell apart, or None if they are another set's
            (Inception's 1,008 say nothing of the labels of the images judged).
        default_samples: how many generated images a score in this space should rest on unless told otherwise.
        default_splits: parts over which the Inception Score is averaged unless told otherwise.
        fingerprint: hexadecimal SHA-256.
    """

    name: str
    num_features: int
    num_logits: int | None
    num_classes: int | None
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


FEATURE_SPACES = ("digits", "mnist", "fashion_mnist", "inception", "none")


def check_features_name(name: str | None) -> None:
    """Refuses a name that :func:`features_by_name` does not know (None is ``none``).

    Raises:
        ValueError: for an unknown name.
    """
    if name not in (None, *FEATURE_SPACES):
        raise OrnsteinError(
            f"unknown metric features {name!r}; set data.features (or metrics=) to one of {', '.join(FEATURE_SPACES)}."
        )


def features_by_name(name: str | None, **options: Any) -> FeatureExtractor | None:
    """The extractor called ``name``: digits, mnist, fashion_mnist or inception; None for ``none`` (or None).

    What ``data.features`` names in the configs. Options go to the extractor's constructor (``weights=`` most of
    all).

    Raises:
        WeightsMissing: for ``inception``, where its weights are neither at hand nor can be downloaded.
        ValueError: for an unknown name.
    """
    check_features_name(name)
    if name is None or name == "none":
        return None
    from ornstein.metrics.classifier import ClassifierFeatures, DigitsFeatures
    from ornstein.metrics.inception import InceptionFeatures

    if name == "digits":
        return DigitsFeatures(**options)
    if name in ("mnist", "fashion_mnist"):
        return ClassifierFeatures(name, **options)
    return InceptionFeatures(**options)
