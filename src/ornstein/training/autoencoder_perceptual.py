"""LPIPS: a distance between images in the features of an ImageNet network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError

# Network -> layers of torchvision's `features` at which each of the five stages ends, the smallest side that leaves
# anything of an image at the last, and the name of its weights.
NETWORKS: dict[str, tuple[tuple[int, ...], int, str]] = {
    "alex": ((2, 5, 8, 10, 12), 32, "AlexNet_Weights"),
    "vgg": ((4, 9, 16, 23, 30), 16, "VGG16_Weights"),
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
        weights: a file of torchvision's weights for that network; None looks in torch's hub cache, and fetches them.

    Raises: OrnsteinError if the weights are not at hand, or are of another network.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, name: str, *, weights: str | None = None) -> None:
        super().__init__()
        ends, self.smallest, _ = NETWORKS[name]
        layers = _features(name, weights)
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


def check_perceptual(name: str, sides: Sequence[int], channels: int) -> None:
    """Whether that network can look at such images.

    Raises: OrnsteinError: names the size or channels and a way out.
    """
    smallest = NETWORKS[name][1]
    if min(sides) < smallest:
        others = [other for other, (_, side, _) in NETWORKS.items() if side <= min(sides)]
        raise OrnsteinError(
            f"model.loss.perceptual={name} needs images of {smallest} pixels or more and data.image_size is "
            f"{min(sides)}: choose {''.join(f'{other}, ' for other in others)}null, or larger images."
        )
    if channels not in (1, 3):
        raise OrnsteinError(f"model.loss.perceptual={name} looks at grey or RGB images, not at {channels} channels.")


def _features(name: str, weights: str | None) -> nn.Sequential:
    import torchvision

    network = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[name](weights=None)
    state = _state(name, weights)
    # The classifier's weights are of no use here.
    state = {key.removeprefix("features."): value for key, value in state.items() if not key.startswith("classifier.")}
    try:
        network.features.load_state_dict(state)
    except RuntimeError as error:
        raise OrnsteinError(
            f"model.loss.perceptual_weights={weights} are not torchvision's weights of {name}: name their file."
        ) from error
    for layer in network.features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # a stage's end is still needed as it was
    features: nn.Sequential = network.features
    return features


def _state(name: str, weights: str | None) -> dict[str, Tensor]:
    import torchvision

    url = getattr(torchvision.models, NETWORKS[name][2]).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if weights is not None:
        path = Path(weights).expanduser()
    try:
        if weights is None and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=False)
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError is a wrong checksum
        raise OrnsteinError(
            f"model.loss.perceptual={name} needs torchvision's weights, which are not at {path} and could not be "
            f"fetched: fetch {url} on a connected machine and name it by model.loss.perceptual_weights=FILE, or choose "
            "model.loss.perceptual=null."
        ) from error
    return state


def _stage_weights(name: str) -> list[Tensor]:
    """What each channel counts at each stage, (1, C, 1, 1)."""
    import torchmetrics.functional.image as home

    path = Path(str(home.__file__)).parent / "lpips_models" / f"{name}.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{stage}.model.1.weight"] for stage in range(5)]
