from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from ornstein.networks import AnnotatedUNet, DiT, EDM2UNet, LucidrainsUNet, UNet

SMALL_UNET = {"base_channels": 16, "channel_mults": (1, 2), "num_blocks": 1, "groups": 4}
SMALL_DIT = {"patch_size": 2, "hidden_size": 32, "depth": 2, "heads": 2}
SMALL_EDM2 = {"base_channels": 16, "channel_mults": (1, 2), "num_blocks": 1, "attention": (False, True), "head_dim": 16}

# name -> (constructor of a network from in_channels and keywords, a size that divides)
NETWORKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "unet": (lambda c, **kw: UNet(c, **{**SMALL_UNET, **kw}), 8),
    "unet_convnext": (lambda c, **kw: UNet(c, block="convnext", **{**SMALL_UNET, **kw}), 8),
    "unet_attention": (
        lambda c, **kw: UNet(c, attention=("linear", "full"), heads=2, **{**SMALL_UNET, **kw}),
        8,
    ),
    "unet_patches": (
        lambda c, **kw: UNet(c, patch_size=2, resampling="shuffle", scale_shift=False, **{**SMALL_UNET, **kw}),
        8,
    ),
    "unet_ddpmpp": (
        lambda c, **kw: UNet(
            c,
            resampling="residual_projected",
            resample_filter=(1, 3, 3, 1),
            progressive_input=True,
            skip_scale=0.5**0.5,
            label_embedding="mapped",
            init="edm",
            **{**SMALL_UNET, **kw},
        ),
        8,
    ),
    "unet_label_channels": (lambda c, **kw: UNet(c, label_mode="concat", **{**SMALL_UNET, **kw}), 8),
    "unet_label_token": (lambda c, **kw: UNet(c, label_mode="cross_attention", **{**SMALL_UNET, **kw}), 8),
    "annotated": (lambda c, **kw: AnnotatedUNet(c, base_channels=16, channel_mults=(1, 2), heads=2, **kw), 8),
    "annotated_convnext": (
        lambda c, **kw: AnnotatedUNet(c, base_channels=16, channel_mults=(1, 2), block="convnext", **kw),
        8,
    ),
    "lucidrains": (lambda c, **kw: LucidrainsUNet(c, base_channels=16, channel_mults=(1, 2), heads=2, **kw), 8),
    "dit": (lambda c, **kw: DiT(c, **{**SMALL_DIT, **kw}), 8),
    "dit_single": (lambda c, **kw: DiT(c, conditioning="adaln_single", **{**SMALL_DIT, **kw}), 8),
    "dit_context": (lambda c, **kw: DiT(c, conditioning="in_context", **{**SMALL_DIT, **kw}), 8),
    "dit_cross": (lambda c, **kw: DiT(c, conditioning="cross_attention", **{**SMALL_DIT, **kw}), 8),
    "dit_modern": (
        lambda c, **kw: DiT(
            c, positions="rope", norm="rms", qk_norm="rms", mlp="swiglu", registers=2, **{**SMALL_DIT, **kw}
        ),
        8,
    ),
    "dit_uvit": (
        lambda c, **kw: DiT(
            c, conditioning="in_context", positions="sincos_rope", long_skips=True, **{**SMALL_DIT, "depth": 3, **kw}
        ),
        8,
    ),
    "edm2": (lambda c, **kw: EDM2UNet(c, **{**SMALL_EDM2, **kw}), 8),
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=NETWORKS)
def named_network(request: pytest.FixtureRequest) -> tuple[Callable[..., nn.Module], int]:
    return NETWORKS[request.param]


def perturb(network: nn.Module, *, scale: float = 0.2) -> nn.Module:
    """Move every parameter off its initial value, so that nothing hides behind zeros."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return network.eval()


def batch(
    channels: int, height: int, width: int | None = None, *, size: int = 3, classes: int | None = 10
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Inputs of a network: `((x, noise_cond), {"label": ...})`."""
    x = torch.randn(size, channels, height, height if width is None else width)
    noise_cond = 1000 * torch.rand(size)
    return (x, noise_cond), {} if classes is None else {"label": torch.arange(size) % (classes + 1)}
