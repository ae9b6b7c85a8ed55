"""A feature space of anybody's network: any ``nn.Module``, by ``_target_``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureExtractor, check_images, fingerprint_of
from ornstein.metrics.resizing import bicubic, normalised

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ModuleFeatures(FeatureExtractor):
    """What ``module`` makes of images, as features.

    Images come to it as float32 ``(B, 3, image_size, image_size)``: resized by Pillow's antialiased bicubic rule and
    scaled to ``(x / 255 - mean) / std``. Its output is a tensor, or holds one under ``output``; maps
    ``(B, C, H, W)`` are averaged over positions, more of other shapes is flattened.

    Args:
        module: the network; frozen and put into eval mode here.
        name: what reports call the space.
        image_size: side in pixels; None leaves images as they are.
        mean, std: of three channels, in [0, 1]; ImageNet's unless given.
        output: key (of a mapping), attribute, or place (of a tuple) of the features; None where the output is they.
        logits: likewise for a classifier's head, whose classes are not taken for the data's; None for none.

    Raises: ValueError if ``module`` is no ``nn.Module``, or gives no such output for a black image.
    """

    num_classes = None

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str = "module",
        image_size: int | None = 224,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
        output: str | int | None = None,
        logits: str | int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise OrnsteinError(
                f"metrics.features.module must be a torch.nn.Module, not {type(module).__name__}: name one by "
                "metrics.features.module._target_=package.Class, with its arguments beside it."
            )
        for option, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise OrnsteinError(f"metrics.features.{option}={list(values)} must name three channels.")
        if image_size is not None and image_size < 1:
            raise OrnsteinError(f"metrics.features.image_size={image_size} must be at least 1, or null.")
        self.module = module
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # a device, for modules without weights
        self.name, self.image_size, self.mean, self.std = name, image_size, tuple(mean), tuple(std)
        self.output, self.head = output, logits
        self.eval().requires_grad_(False)
        line = f"bicubic to {image_size}, mean {self.mean}, std {self.std}, {type(module).__qualname__} {output}"
        self.fingerprint = fingerprint_of(module.state_dict(), preparation=line)
        size = image_size or 64
        features, head = self.features_and_logits(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        self.num_features = features.shape[1]
        self.num_logits = None if head is None else head.shape[1]

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(B, num_features)`` and logits or None of uint8 images ``(B, 1 or 3, H, W)``."""
        check_images(images)
        size = (self.image_size,) * 2 if self.image_size is not None else (images.shape[-2], images.shape[-1])
        found = self.module(normalised(bicubic(images.expand(-1, 3, -1, -1), size), self.mean, self.std))
        logits = None if self.head is None else self._pick(found, self.head, option="logits")
        return self._pick(found, self.output, option="output"), logits

    def _pick(self, found: Any, key: str | int | None, *, option: str) -> Tensor:
        """The tensor that ``key`` names in the network's output, float32 ``(B, D)``."""
        value = found
        try:
            if isinstance(key, str):
                value = found[key] if isinstance(found, Mapping) else getattr(found, key)
            elif key is not None:
                value = found[key]
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise OrnsteinError(
                f"metrics.features.{option}={key}: the output of {type(self.module).__name__}, a "
                f"{type(found).__name__}{_keys(found)}, holds nothing of that name."
            ) from error
        if not isinstance(value, Tensor) or value.dim() < 2:
            shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else _keys(value)
            raise OrnsteinError(
                f"{type(self.module).__name__} gives a {type(value).__name__}{shape} where a tensor (B, ...) is "
                f"needed: say by metrics.features.{option}=KEY which part of it holds the features."
            )
        return (value.mean(dim=(2, 3)) if value.dim() == 4 else value.flatten(1)).float()


def _keys(found: Any) -> str:
    """What a mapping or a tuple holds, for a message."""
    if isinstance(found, Mapping):
        return f" of {', '.join(map(str, found))}"
    return f" of {len(found)}" if isinstance(found, list | tuple) else ""
