"""The losses of autoencoders against their closed forms, and their numbers' ranges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ornstein.errors import OrnsteinError
from ornstein.metrics.paired import psnr, ssim
from ornstein.training.autoencoder_losses import (
    AutoencoderLoss,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    reconstruction_error,
)
from ornstein.training.autoencoder_perceptual import NETWORKS, Perceptual, check_perceptual, load_perceptual
from ornstein.training.autoencoder_scoring import paired_rows


def test_reconstruction_errors_are_means_over_an_image() -> None:
    x = torch.zeros(2, 3, 4, 5)
    images = torch.stack([torch.full((3, 4, 5), 0.5), torch.full((3, 4, 5), -2.0)])
    assert reconstruction_error(x, images, "l1").tolist() == [0.5, 2.0]
    assert reconstruction_error(x, images, "l2").tolist() == [0.25, 4.0]


def test_adversarial_losses_in_closed_form() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    # Hinge: (0 + 0.5) / 2 for the real, (0 + 1.25) / 2 for the fake ones, halved.
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.5 * (0.25 + 0.625))
    own = sum(math.log1p(math.exp(-r)) for r in (2.0, 0.5)) / 2 + sum(math.log1p(math.exp(f)) for f in (-3.0, 0.25)) / 2
    assert discriminator_loss(real, fake, "vanilla").item() == pytest.approx(0.5 * own)
    assert generator_loss(fake).item() == pytest.approx(1.375)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 3.0), (1e9, 1e4), (0.0, 0.0)])
def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_up_to_ten_thousand(factor: float, expected: float) -> None:
    last = nn.Parameter(torch.tensor([1.0, 2.0]))
    ours = factor * (torch.tensor([9.0, 12.0]) * last).sum()  # gradient norm 15
    theirs = (torch.tensor([3.0, 4.0]) * last).sum()  # 5
    weight = adaptive_weight(ours, theirs, last)
    # 1e-4 beside a norm of 5.
    assert weight.item() == pytest.approx(expected, rel=1e-4) and not weight.requires_grad
    (ours + theirs).backward()
    assert last.grad is not None, "both graphs are still there"


def test_psnr_is_its_closed_form_and_torchmetrics() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    # An error of 51 = 255 / 5 everywhere: 10 log10(25).
    assert psnr(images, images + 51).tolist() == pytest.approx([13.979400086720377] * 2)
    noisy = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = noisy.roll(1, -1)
    theirs = peak_signal_noise_ratio(noisy.float(), other.float(), data_range=255.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(noisy, other).float(), theirs, rtol=1e-5, atol=0)
    assert psnr(noisy, noisy).isfinite().all()


def test_ssim_of_equal_images_is_one_and_of_flat_ones_the_luminance_term() -> None:
    images = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim(images, images), torch.ones(2), rtol=0, atol=1e-5)
    a, b = torch.full((1, 1, 16, 16), 100, dtype=torch.uint8), torch.full((1, 1, 16, 16), 150, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    luminance = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    # Variances of flat images are roundings of 1e4-sized squares beside C2 = 58.5.
    assert ssim(a, b).item() == pytest.approx(luminance, rel=1e-3)


def test_rows_stand_in_pairs() -> None:
    originals = torch.arange(5).reshape(5, 1, 1, 1)
    assert paired_rows(originals, originals + 10, 2).flatten().tolist() == [0, 1, 10, 11, 2, 3, 12, 13, 4, 14]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reconstruction": "l3"}, r"model\.loss\.reconstruction=l3 is unknown: choose l1 or l2"),
        ({"adversarial": "wgan"}, r"model\.loss\.adversarial=wgan is unknown: choose hinge or vanilla or null"),
        ({"perceptual": "resnet"}, r"model\.loss\.perceptual=resnet is unknown"),
        ({"kl_weight": -1.0}, r"model\.loss\.kl_weight=-1\.0 must be a number, at least 0"),
        ({"adversarial_weight": math.inf}, r"model\.loss\.adversarial_weight=inf"),
        ({"start": -1}, r"model\.loss\.start=-1 counts optimizer steps"),
        ({"start": 1.5}, r"model\.loss\.start=1\.5"),
        ({"discriminator_lr": 0.0}, r"model\.loss\.discriminator_lr=0\.0 must be positive"),
    ],
)
def test_numbers_and_words_are_checked(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OrnsteinError, match=sentence):
        AutoencoderLoss(**options)


def random_weights(name: str, path: Path) -> Path:
    """A file in torchvision's layout, with random weights: there are no others here."""
    import torchvision

    torch.manual_seed(0)
    network = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[name](weights=None)
    torch.save({key: value for key, value in network.state_dict().items() if key.startswith("features.")}, path)
    return path


@pytest.mark.parametrize(("name", "side"), [("alex", 40), pytest.param("vgg", 24, marks=pytest.mark.slow)])
def test_the_perceptual_distance_is_lpips(name: str, side: int, tmp_path: Path) -> None:
    from torchmetrics.functional.image.lpips import _LPIPS

    weights = random_weights(name, tmp_path / "weights.pth")
    ours = Perceptual(name, weights=str(weights))
    theirs = _LPIPS(pretrained=True, net=name, pnet_rand=True)
    state = torch.load(weights, weights_only=True)
    # Their network is the same layers, cut into five.
    own = {f"features.{key.partition('.')[2]}": value for key, value in theirs.net.state_dict().items()}
    assert own.keys() == state.keys()
    theirs.net.load_state_dict({key: state[f"features.{key.partition('.')[2]}"] for key in theirs.net.state_dict()})
    x, y = torch.rand(2, 3, 3, side, side) * 2 - 1
    found = ours(x, y)
    # Their square root of (1e-8 + sum) and their order of sums, in float32.
    torch.testing.assert_close(found, theirs(x, y).flatten(), rtol=1e-4, atol=1e-6)
    assert ours(x, x).abs().max() == 0 and found.min() > 0
    grey = x[:, :1]
    torch.testing.assert_close(ours(grey, -grey), ours(grey.expand(-1, 3, -1, -1), -grey.expand(-1, 3, -1, -1)))


def test_weights_that_are_missing_or_of_another_network_are_told_of(tmp_path: Path) -> None:
    with pytest.raises(
        OrnsteinError, match=r"model\.loss\.perceptual=alex: torchvision's weights .* fetch https://.*perceptual=null"
    ):
        load_perceptual("alex", str(tmp_path / "nowhere.pth"))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(OrnsteinError, match=r"perceptual_weights=.*does not hold torchvision's weights of alex"):
        load_perceptual("alex", str(tmp_path / "other.pth"))


@pytest.mark.parametrize("name", NETWORKS)
def test_images_that_are_too_small_to_look_at_are_refused(name: str) -> None:
    smallest = NETWORKS[name][1]
    check_perceptual(name, (smallest, smallest), 3)
    with pytest.raises(OrnsteinError, match=rf"perceptual={name} needs images of {smallest} pixels or more"):
        check_perceptual(name, (smallest - 1, smallest), 3)
    with pytest.raises(OrnsteinError, match="not at 4 channels"):
        check_perceptual(name, (64, 64), 4)
