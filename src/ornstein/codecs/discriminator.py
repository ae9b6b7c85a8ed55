"""The patch discriminator that autoencoders are trained against."""

from __future__ import annotations

from torch import Tensor, nn

from ornstein.errors import OrnsteinError


class PatchDiscriminator(nn.Module):
    """One logit a patch: is it of an image, or of a reconstruction? Strided 4x4 convolutions and leaky ReLUs.

    Source: Isola et al. 2017 (arXiv 1611.07004), section 3.2 and appendix; as used by Esser et al. 2021
        (arXiv 2012.09841).

    Args:
        channels: of the images.
        width: channels after the first convolution, doubled by each further one up to eight times.
        layers: convolutions that halve the side: 3 sees 70x70 pixels, 2 sees 34x34, 1 sees 16x16.
        norm: batch (as published) or group (eight groups; does not mix images).

    Raises: OrnsteinError for a number out of its range or an unknown norm.
    """

    def __init__(self, channels: int, *, width: int = 64, layers: int = 3, norm: str = "batch") -> None:
        super().__init__()
        if channels < 1 or width < 8 or width % 8 or layers < 1:
            raise OrnsteinError(
                f"a discriminator needs width={width} as a multiple of 8 and layers={layers} of at least 1."
            )
        if norm not in ("batch", "group"):
            raise OrnsteinError(f"norm={norm} of the discriminator is unknown: choose batch or group.")
        self.layers = layers
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        before = width
        for i in range(1, layers + 1):
            after = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            parts += [nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False), _norm(norm, after)]
            parts.append(nn.LeakyReLU(0.2))
            before = after
        self.body = nn.Sequential(*parts, nn.Conv2d(before, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    @property
    def smallest(self) -> int:
        """The smallest side that it can judge: two rows must be left for the last convolutions to see one."""
        return 3 * 2**self.layers

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> logits (B, 1, h, w), higher for images that look real."""
        return self.body(x)


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(8, channels)
