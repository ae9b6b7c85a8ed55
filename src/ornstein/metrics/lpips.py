"""LPIPS: a distance between images in the features of an ImageNet network."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError
from ornstein.metrics.download import fetch
from ornstein.metrics.features import WeightsMissing

# Network -> layers of torchvision's `features` at which each of the five stages ends, the smallest side that leaves
# anything of an image at the last, and where torchvision has its ImageNet weights.
NETWORKS: dict[str, tuple[tuple[int, ...], int, str]] = {
    "alex": ((2, 5, 8, 10, 12), 32, "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
    "vgg": ((4, 9, 16, 23, 30), 16, "https://download.pytorch.org/models/vgg16-397923af.pth"),
}
_FLOOR = 1e-8  # below a squared norm of features


class Perceptual(nn.Module):
    r"""Weighted squared distance of unit-length features at five depths, averaged over positions.

    .. math:: d(x, y) = \sum_l \frac{1}{H_l W_l} \sum_{h, w} \| w_l \odot (\hat f_l(x) - \hat f_l(y)) \|^2

    The stages' weights (version 0.1, trained on human judgements) come with torchmetrics; the network's own, trained on
    ImageNet, do not.

    Source: Zhang et al. 2018 (arXiv 1801.03924), eq. 1.

    Args:
        name: vgg or alex.
        weights: a file of torchvision's weights for that network; None looks in the folder ``$ORNSTEIN_WEIGHTS`` and in
            torch's hub cache.
        download: fetch them where they are missing.

    Raises: WeightsMissing if the weights are not at hand; OrnsteinError if they are of another network.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, name: str, *, weights: str | Path | None = None, download: bool = True) -> None:
        super().__init__()
        ends, self.smallest, _ = NETWORKS[name]
        layers = _features(name, perceptual_weights(name, weights, download=download))
        self.stages = nn.ModuleList(layers[a:b] for a, b in zip((0, *ends), ends, strict=False))
        self.weights = nn.ParameterList(_stage_weights(name))
        # ImageNet's statistics for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images in [-1, 1], (B, 1 or 3, H, W) twice -> (B,), 0 for equal ones."""
        # Together: one pass over the network, and half the kernels.
        h = (torch.cat([x, y]).expand(-1, 3, -1, -1) - self.shift) / self.scale
        total = x.new_zeros(x.shape[0])
        for stage, weight in zip(self.stages, self.weights, strict=True):
            h = stage(h)
            unit = h / (h.square().sum(dim=1, keepdim=True) + _FLOOR).sqrt()
            a, b = unit.chunk(2)
            total = total + ((a - b).square() * weight).sum(dim=1).mean(dim=(1, 2))
        return total


def perceptual_weights(name: str, weights: str | Path | None = None, *, download: bool = True) -> Path:
    """The file of torchvision's ImageNet weights of ``name``; see :class:`Perceptual`.

    Raises: WeightsMissing, with the places looked in and the address.
    """
    url = NETWORKS[name][2]
    file = url.rpartition("/")[2]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    own = os.environ.get("ORNSTEIN_WEIGHTS")
    places = [Path(weights).expanduser()] if weights is not None else [cached]
    if weights is None and own:
        places.insert(0, Path(own).expanduser() / file)
    for place in places:
        if place.is_file():
            return place
    reason = "they are not fetched unasked"
    if weights is not None:
        reason = "that place alone is named"
    elif download:
        try:
            fetch(url, cached, checksum=Path(file).stem.rpartition("-")[2])
            return cached
        except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError is a wrong checksum
            reason = f"the download failed: {error}"
    raise WeightsMissing(
        f"torchvision's weights of {name} are not at {' or '.join(map(str, places))} ({reason}): fetch {url} on a "
        f"connected machine and put it into {cached.parent}, or into the folder that $ORNSTEIN_WEIGHTS names"
    )


def _features(name: str, weights: Path) -> nn.Sequential:
    import torchvision

    network = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[name](weights=None)
    try:
        state: dict[str, Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
        # The classifier's weights are of no use here.
        state = {
            key.removeprefix("features."): value for key, value in state.items() if not key.startswith("classifier.")
        }
        network.features.load_state_dict(state)
    except Exception as error:  # unpickling, or an unlike layout: both say that this is another file
        raise OrnsteinError(f"{weights} does not hold torchvision's weights of {name}: name their file.") from error
    for layer in network.features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # a stage's end is still needed as it was
    features: nn.Sequential = network.features
    return features


def _stage_weights(name: str) -> list[Tensor]:
    """What each channel counts at each stage, (1, C, 1, 1)."""
    import torchmetrics.functional.image as home

    path = Path(str(home.__file__)).parent / "lpips_models" / f"{name}.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{stage}.model.1.weight"] for stage in range(5)]
