"""LPIPS as a term of an autoencoder's loss: what is checked of it, and where its weights come from."""

from __future__ import annotations

from collections.abc import Sequence

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import WeightsMissing
from ornstein.metrics.lpips import NETWORKS, Perceptual


def load_perceptual(name: str, weights: str | None = None) -> Perceptual:
    """The distance ``model.loss.perceptual``, frozen.

    Args:
        name: vgg or alex.
        weights: a file of torchvision's weights for that network; None looks for them, and fetches them.

    Raises:
        OrnsteinError: the weights are not at hand, or are of another network; names the options.
    """
    try:
        return Perceptual(name, weights=weights)
    except WeightsMissing as error:
        raise WeightsMissing(
            f"model.loss.perceptual={name}: {error}; or name the file by model.loss.perceptual_weights=FILE, or choose "
            "model.loss.perceptual=null."
        ) from error
    except OrnsteinError as error:
        raise OrnsteinError(f"model.loss.perceptual_weights={weights}: {error}") from error


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
