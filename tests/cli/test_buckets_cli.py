"""What `data.buckets` becomes before anything is built, and which sizes a run samples at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ornstein.cli.buckets import check_kept_sizes, check_size, fill_buckets
from ornstein.cli.validate import validate
from ornstein.codecs import Identity, KLAutoencoder
from ornstein.conditioning import Image, NoConditioning
from ornstein.errors import OrnsteinError
from ornstein.networks import UNet


class Stubborn(nn.Module):
    """A user's network with a linear layer over all pixels."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.mix = nn.Linear(side * side, side * side)

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        return self.mix(x.flatten(2)).view(x.shape)


class Willing(nn.Module):
    """A user's network that says nothing of sizes and takes any."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        return self.mix(x)


def config(buckets: Any, **more: Any) -> Any:
    return OmegaConf.create({"data": {"image_size": 32, "buckets": buckets, **more}})


def unet() -> UNet:
    return UNet(1, image_size=32, base_channels=8, channel_mults=(1, 2), num_blocks=1, groups=4, patch_size=1)


def latents() -> KLAutoencoder:
    return KLAutoencoder(1, 32, channels=1, width=8, multipliers=[1, 2, 2], blocks=1, groups=4)


@pytest.mark.parametrize(
    ("codec", "step"), [(Identity(1, 32, sigma_data=0.5), 2), (latents(), 8)], ids=["pixels", "latents"]
)
def test_auto_becomes_a_list(codec: Any, step: int) -> None:
    """Steps are those of the network, times those of the codec; what was typed as a list stays what it is."""
    cfg = config("auto")
    fill_buckets(cfg, {}, unet(), codec=codec, conditioner=NoConditioning())
    shapes = [tuple(shape) for shape in cfg.data.buckets]
    assert (32, 32) in shapes and all(h % step == w % step == 0 for h, w in shapes)
    assert any(h % (2 * step) for h, _ in shapes)
    fill_buckets(cfg, {}, unet(), codec=codec, conditioner=NoConditioning())
    assert [tuple(shape) for shape in cfg.data.buckets] == shapes


def test_the_run_keeps_the_shapes(compose: Any) -> None:
    """The config that a run is known by, and sampled with, has no `auto` in it."""
    cfg = compose("model=pixel_unet", "data=image_folder", "data.root=.", "data.buckets={max_ratio:2,step:16}")
    validate(cfg)
    assert OmegaConf.to_container(cfg.data.buckets) == [[48, 96], [48, 80], [64, 64], [80, 48], [96, 48]]


def test_a_network_that_does_not_say_is_tried() -> None:
    """On the meta device, at each shape."""
    parts = {"codec": Identity(1, 32, sigma_data=0.5), "conditioner": NoConditioning()}
    fill_buckets(config([[16, 64], [31, 33]]), {}, Willing(), **parts)
    fill_buckets(config([[32, 32]]), {}, Stubborn(32), **parts)
    with pytest.raises(OrnsteinError) as refused:
        fill_buckets(config([[32, 32], [16, 65]]), {"model": "mine"}, Stubborn(32), **parts)
    assert all(word in str(refused.value) for word in ["model=mine", "16x65", "data.buckets", "U-Net", "DiT"])


@pytest.mark.parametrize(
    ("size", "expected"), [(16, (16, 16)), ([16, 24], (16, 24)), ((8, 64), (8, 64))], ids=["side", "pair", "tuple"]
)
def test_sizes(make: Any, size: Any, expected: tuple[int, int]) -> None:
    """A side or a pair."""
    assert check_size(make(), size) == expected


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("large", "size=large [height,width]"),
        ([16], "size=[16] [height,width]"),
        ([16, 0], "size=[16,0] [height,width]"),
        (True, "size=True [height,width]"),
        ([16.5, 8], "size=[16.5,8] [height,width]"),
        ([15, 24], "size=[15,24] multiples of 2 size=[16,24]"),
        (1, "size=1 multiples of 2 size=["),
    ],
)
def test_refused_sizes(make: Any, size: Any, words: str) -> None:
    """The option as typed, and one that would do."""
    with pytest.raises(OrnsteinError) as refused:
        check_size(make(), size)
    assert all(word in str(refused.value) for word in words.split())


def test_a_size_that_the_condition_cannot_shrink_to(make: Any) -> None:
    """Low resolution by a factor that does not divide."""
    module = make(conditioner=Image(channels=1, size=32, image_size=32, factor=4))
    with pytest.raises(OrnsteinError, match=r"conditioner\.factor=4 does not divide 16x22 of size=\[16,22\]"):
        check_size(module, [16, 22])


@pytest.fixture
def make() -> Any:
    """What `check_size` looks at of a module."""

    class Module:
        network, codec, conditioner = unet(), Identity(1, 32, sigma_data=0.5), NoConditioning()

    def made(**parts: Any) -> Any:
        module = Module()
        for name, part in parts.items():
            setattr(module, name, part)
        return module

    torch.manual_seed(0)
    return made


def test_one_array_does_not_hold_several_shapes() -> None:
    """`keep_samples=npz` needs `size=`; PNG files do not, nor does a run of squares."""
    asked = {"keep_samples": "npz", "size": None}
    with pytest.raises(OrnsteinError, match=r"keep_samples=npz .* data\.buckets .*png, or one size by size="):
        check_kept_sizes(OmegaConf.merge(config([[16, 64], [32, 32]]), asked))
    for fine in ({**asked, "size": 32}, {**asked, "keep_samples": "png"}, {**asked, "data": {"buckets": None}}):
        check_kept_sizes(OmegaConf.merge(config([[16, 64], [32, 32]]), fine))


def test_latents_are_not_kept_of_several_shapes() -> None:
    """`ornstein.cli.encode` with `data.buckets`."""
    from ornstein.cli.encode import _store

    with pytest.raises(OrnsteinError, match=r"data\.buckets .* train without data\.latents"):
        _store(config([[16, 64], [32, 32]]), latents())
