"""How well an autoencoder gives images back: PSNR, SSIM, LPIPS, and the Fréchet distance between the two sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ornstein.codecs import Codec
from ornstein.errors import OrnsteinError
from ornstein.metrics.paired import PairedScore
from ornstein.training.generate import to_uint8

if TYPE_CHECKING:
    from ornstein.metrics.features import FeatureExtractor


@dataclass(frozen=True)
class ReconstructionScore:
    """Figures of reconstructions of held-out images.

    Attributes:
        values: ``psnr`` in dB (higher is better), ``ssim`` up to 1 where images are large enough, ``lpips`` (lower is
            better) where its weights are at hand, and ``rfid`` (lower is better) where there is a feature space.
        num_images: how many images they rest on.
        originals, reconstructions: the first of them, uint8 (N, C, H, W), on the CPU.
    """

    values: dict[str, float]
    num_images: int
    originals: Tensor
    reconstructions: Tensor


def image_batches(dataset: Any, *, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
    """The images of a data set, uint8 (B, C, H, W), on the CPU; with ``limit`` so many, evenly spaced over all."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    rows = [i * len(dataset) // count for i in range(count)]
    for piece in dataset.pieces(size=batch_size, rows=rows):
        yield dataset.batch(piece)["image"]


def to_model(images: Tensor) -> Tensor:
    """Images, uint8 -> float in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1.0


@torch.no_grad()
def reconstruct(codec: Codec, images: Tensor, device: torch.device) -> Tensor:
    """What encode and decode make of uint8 images, uint8 (B, C, H, W), on the device; the codec is in eval mode."""
    return to_uint8(codec.decode(codec.encode(to_model(images.to(device)))))


@torch.no_grad()
def score_reconstructions(
    codec: Codec,
    dataset: Any,
    *,
    device: torch.device,
    features: FeatureExtractor | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    shown: int = 64,
    advance: Callable[[], None] | None = None,
) -> ReconstructionScore:
    """Scores ``codec`` on images of ``dataset``.

    Args:
        codec: put into eval mode and back.
        dataset: held-out images.
        device: where the codec is.
        features: the feature space of rFID, on the device; None leaves it out.
        limit: images, evenly spaced over all; None is all.
        batch_size: images at once.
        shown: images to keep.
        advance: called after each batch.

    Raises:
        OrnsteinError: fewer than two images.
    """
    if len(dataset) < 2 or (limit is not None and limit < 2):
        raise OrnsteinError("reconstructions are scored on two images or more.")
    was_training = codec.training
    codec.eval()
    figures = PairedScore(device=device)
    spaces: tuple[list[Tensor], list[Tensor]] = ([], [])
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    count = 0
    try:
        for images in image_batches(dataset, batch_size=batch_size, limit=limit):
            pair = images.to(device), reconstruct(codec, images, device)
            figures.update(pair[1], pair[0])
            for space, keep, own in zip(spaces, kept, pair, strict=True):
                if features is not None:
                    space.append(features.features_and_logits(own)[0].double())
                if count < shown:
                    keep.append(own.cpu())
            count += len(images)
            if advance is not None:
                advance()
    finally:
        codec.train(was_training)
    values = figures.compute()
    if features is not None:
        values["rfid"] = _frechet(torch.cat(spaces[0]), torch.cat(spaces[1]))
    return ReconstructionScore(values, count, torch.cat(kept[0])[:shown], torch.cat(kept[1])[:shown])


def _frechet(real: Tensor, copied: Tensor) -> float:
    from ornstein.metrics import frechet_distance

    return frechet_distance(real.mean(0), real.T.cov(), mean2=copied.mean(0), cov2=copied.T.cov())


def paired_rows(originals: Tensor, reconstructions: Tensor, columns: int) -> Tensor:
    """Rows of ``columns`` originals, each above the row of its reconstructions, (2 N, C, H, W) in reading order."""
    pairs = zip(originals.split(columns), reconstructions.split(columns), strict=True)
    return torch.cat([row for pair in pairs for row in pair])
