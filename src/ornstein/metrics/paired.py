"""Figures of images beside the very images that they should be: reconstructions, restorations."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import WeightsMissing, check_images
from ornstein.metrics.lpips import NETWORKS, Perceptual, perceptual_weights

log = logging.getLogger(__name__)
SSIM_SIDE = 11  # pixels that its window covers; smaller images have none
LPIPS_NETWORK = "alex"  # the one that its authors measure with


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of 8-bit images, (N,) in dB: ``10 log10(255**2 / max(MSE, 1e-3))``."""
    mse = (images.double() - others.double()).square().mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(255.0**2 / mse.clamp(min=1e-3))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of 8-bit images of 11 pixels or more, (N,), with the paper's Gaussian window.

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(others.float(), images.float(), data_range=255.0, reduction="none")
    assert isinstance(found, Tensor)
    return found.reshape(-1)


def lpips_at_hand() -> Perceptual | None:
    """LPIPS by AlexNet, or None with one logged line where its weights are not at hand: they are never fetched here."""
    try:
        return _loaded(perceptual_weights(LPIPS_NETWORK, download=False))
    except WeightsMissing as error:
        _say_once(logging.INFO, f"no LPIPS: {error}.")
    except OrnsteinError as error:
        _say_once(logging.WARNING, f"no LPIPS: {error}")
    return None


@lru_cache(maxsize=1)
def _loaded(weights: Path) -> Perceptual:
    """Read once a process, however often reconstructions are scored."""
    return Perceptual(LPIPS_NETWORK, weights=weights)


@lru_cache(maxsize=8)
def _say_once(level: int, line: str) -> None:
    log.log(level, line)


class PairedScore:
    """Means of PSNR, SSIM and LPIPS over pairs of images, taken in batch by batch.

    Each image counts alike, whatever the batches. SSIM needs images of 11 pixels or more, LPIPS of 32 and its weights
    (looked for once, when images first come); without them the figure is left out.

    Args:
        device: where figures are computed; None is where the images are.
        lpips: False leaves LPIPS out.
    """

    def __init__(self, *, device: torch.device | str | None = None, lpips: bool = True) -> None:
        self.device = device
        self._wants_lpips = lpips
        self._network: Perceptual | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all pairs."""
        self._sums: dict[str, float] = dict.fromkeys(("psnr", "ssim", "lpips"), 0.0)
        self._counts: dict[str, int] = dict.fromkeys(self._sums, 0)

    @torch.no_grad()
    def update(self, images: Tensor, originals: Tensor) -> None:
        """Take in uint8 images ``(B, 1 or 3, H, W)`` and what they should be, of the same shape.

        Raises: OrnsteinError if they are not uint8 or of different shapes.
        """
        check_images(images)
        check_images(originals)
        if images.shape != originals.shape:
            raise OrnsteinError(
                f"images {tuple(images.shape)} are compared with originals {tuple(originals.shape)}: both must have "
                "one shape."
            )
        device = images.device if self.device is None else torch.device(self.device)
        pair = images.to(device), originals.to(device)
        self._add("psnr", psnr(*pair))
        if min(images.shape[-2:]) >= SSIM_SIDE:
            self._add("ssim", ssim(*pair))
        if min(images.shape[-2:]) >= NETWORKS[LPIPS_NETWORK][1]:
            self._update_lpips(*pair)

    def _update_lpips(self, images: Tensor, originals: Tensor) -> None:
        if self._wants_lpips and self._network is None:
            self._network = lpips_at_hand()
            self._wants_lpips = self._network is not None
        if self._network is not None:
            self._network.to(images.device)
            self._add("lpips", self._network(images.float() / 127.5 - 1, originals.float() / 127.5 - 1))

    def _add(self, name: str, found: Tensor) -> None:
        self._sums[name] += float(found.double().sum())
        self._counts[name] += len(found)

    def compute(self, *, collective: bool = False) -> dict[str, float]:
        """``psnr`` in dB, ``ssim``, ``lpips``: those that there is something for.

        Args:
            collective: over all processes, each of which must call this.
        """
        table = torch.tensor([[self._sums[name], self._counts[name]] for name in self._sums], dtype=torch.float64)
        if collective:
            from ornstein.metrics.statistics import summed

            table = summed(table)
        return {name: float(total / count) for name, (total, count) in zip(self._sums, table, strict=True) if count}
