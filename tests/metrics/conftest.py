import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ornstein.metrics.features import FeatureExtractor, check_images


class PixelFeatures(FeatureExtractor):
    """Features are the pixels themselves; logits are their first few. Counts the images that it is shown."""

    num_classes = None
    agreed_samples = 2  # so that figures of the tests' few images bear their bare names

    def __init__(self, num_features: int = 4, num_logits: int | None = 3, name: str = "pixels") -> None:
        super().__init__()
        self.name = name
        self.num_features, self.num_logits = num_features, num_logits
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.fingerprint = hashlib.sha256(f"{name} {num_features}".encode()).hexdigest()
        self.seen = 0

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        check_images(images)
        self.seen += len(images)
        features = images.flatten(1).float() * self.scale
        return features, None if self.num_logits is None else features[:, : self.num_logits] / 64


@pytest.fixture
def pixels() -> PixelFeatures:
    return PixelFeatures()


@pytest.fixture
def make_pixels() -> type[PixelFeatures]:
    return PixelFeatures


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's caches."""
    monkeypatch.setenv("ORNSTEIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ORNSTEIN_WEIGHTS", raising=False)
    monkeypatch.delenv("ORNSTEIN_CLIP", raising=False)


@pytest.fixture
def gaussian_images():
    """uint8 (n, 1, 1, 4) whose pixels are rounded draws of N(mean, std**2)."""

    def draw(n: int, mean: float, std: float, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (mean + std * torch.randn(n, 1, 1, 4, generator=generator)).round().clamp(0, 255).byte()

    return draw
