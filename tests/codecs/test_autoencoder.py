"""The autoencoder as a module: shapes, posterior, scaling, refusals. No trained weights."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ornstein.codecs import DiagonalGaussian, KLAutoencoder


def small(**kwargs: object) -> KLAutoencoder:
    torch.manual_seed(0)
    arguments = {"channels": 4, "width": 8, "multipliers": (1, 2, 2), "groups": 4} | kwargs
    return KLAutoencoder(arguments.pop("image_channels", 1), arguments.pop("image_size", 16), **arguments)


@pytest.mark.parametrize(
    ("kwargs", "latent"),
    [
        ({}, (4, 4, 4)),
        ({"image_channels": 3, "image_size": (16, 24), "channels": 2}, (2, 4, 6)),
        ({"multipliers": (1, 1), "blocks": 2, "attention": False}, (4, 8, 8)),
        ({"multipliers": (1,)}, (4, 16, 16)),
    ],
)
def test_shapes(kwargs: dict[str, object], latent: tuple[int, int, int]) -> None:
    codec = small(**kwargs)
    height, width = (codec.image_size,) * 2 if isinstance(codec.image_size, int) else codec.image_size
    x = torch.randn(2, codec.image_channels, height, width)
    z = codec.encode(x)
    assert z.shape == (2, *latent)
    assert codec.decode(z).shape == x.shape
    assert codec.channels == latent[0]
    assert codec.size == (latent[1] if latent[1] == latent[2] else latent[1:])


def test_config_rebuilds_the_same_architecture() -> None:
    codec = small(image_size=(16, 24), attention=False)
    twin = KLAutoencoder(**codec.config)
    twin.load_state_dict(codec.state_dict())
    x = torch.randn(1, 1, 16, 24)
    assert twin.encode(x).equal(codec.encode(x))


def test_kl_is_that_of_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    logvar = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    # Both are the same closed form in float64: rounding of a sum of 32 terms.
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), expected, rtol=1e-12, atol=1e-12)


def test_the_standard_normal_has_no_kl() -> None:
    zeros = torch.zeros(2, 4, 3, 3)
    assert DiagonalGaussian(zeros, zeros).kl().tolist() == [0.0, 0.0]


def test_logvar_is_clamped_and_stays_finite() -> None:
    wild = DiagonalGaussian(torch.zeros(1, 1, 1, 2), torch.tensor([[[[-1e6, 1e6]]]]))
    assert wild.logvar.flatten().tolist() == [-30.0, 20.0]
    assert torch.isfinite(wild.kl()).all() and torch.isfinite(wild.sample()).all()


def test_samples_have_the_posterior_moments() -> None:
    mean, logvar = torch.full((1, 1, 300, 300), 0.7), torch.full((1, 1, 300, 300), -1.0)
    draw = DiagonalGaussian(mean, logvar).sample(torch.Generator().manual_seed(0)).double()
    std = float(torch.tensor(-0.5).exp())
    # Five standard errors of 90,000 draws.
    assert abs(draw.mean().item() - 0.7) < 5 * std / 300
    assert abs(draw.std().item() - std) < 5 * std / (300 * 2**0.5)


def test_encode_takes_the_mean_unless_asked_to_draw() -> None:
    x = torch.randn(2, 1, 16, 16)
    codec = small()
    assert codec.stochastic is False
    assert codec.encode(x).equal(codec.encode(x))
    assert codec.encode(x).equal(codec.posterior(x).mean)


def test_a_drawn_code_is_decided_by_the_generator() -> None:
    x = torch.randn(2, 1, 16, 16)
    codec = small(sample_posterior=True)
    assert codec.stochastic is True

    def draw(seed: int) -> torch.Tensor:
        return codec.encode(x, torch.Generator().manual_seed(seed))

    assert draw(1).equal(draw(1))
    assert not draw(1).equal(draw(2))


def test_set_scale_gives_zero_mean_and_unit_variance_a_channel_and_decode_undoes_it() -> None:
    codec = small()
    x = torch.randn(64, 1, 16, 16)
    with torch.no_grad():
        raw = codec.posterior(x).mean
        codec.set_scale(raw)
        z = codec.encode(x)
        # float32 rounding of about 1,000 numbers a channel.
        torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
        torch.testing.assert_close(z.var(dim=(0, 2, 3), correction=0), torch.ones(4), rtol=1e-4, atol=0)
        # z / scale + shift differs from raw by a rounding, which the decoder may magnify a little.
        torch.testing.assert_close(codec.decode(z), codec.reconstruct(raw), rtol=1e-4, atol=1e-4)
    assert {"scale", "shift"} <= codec.state_dict().keys()


def test_a_dead_channel_is_refused() -> None:
    raw = torch.randn(8, 4, 4, 4)
    raw[:, 2] = 0.3
    with pytest.raises(ValueError, match="carries nothing"):
        small().set_scale(raw)


def test_gradients_reach_the_latents_through_decode_and_the_image_through_encode() -> None:
    codec = small().requires_grad_(False)
    z = torch.randn(2, 4, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(codec.decode(z).square().sum(), z)
    assert grad.abs().sum(dim=(1, 2, 3)).gt(0).all()
    x = torch.randn(2, 1, 16, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(codec.encode(x).square().sum(), x)
    assert grad.abs().sum(dim=(1, 2, 3)).gt(0).all()


def test_every_weight_is_trained() -> None:
    codec = small()
    # The residual branches start at zero: one step away from there, every weight must matter.
    optimizer = torch.optim.SGD(codec.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        posterior = codec.posterior(torch.randn(4, 1, 16, 16))
        loss = codec.reconstruct(posterior.sample()).square().mean() + 1e-3 * posterior.kl().mean()
        loss.backward()
        optimizer.step()
    still = [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"image_size": 18}, r"shrinks images by 4, which does not divide 18x18"),
        ({"image_size": (16, 18)}, "does not divide 16x18"),
        ({"channels": 0}, "channels=0"),
        ({"width": 6}, "multiple of groups=4"),
        ({"multipliers": ()}, "multiple of groups"),
    ],
)
def test_settings_that_cannot_work_are_refused(kwargs: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small(**kwargs)


def test_images_and_latents_of_another_shape_are_refused() -> None:
    codec = small()
    with pytest.raises(ValueError, match=r"images as \(B, 1, 16, 16\) but got"):
        codec.encode(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"latents as \(B, 4, 4, 4\) but got"):
        codec.decode(torch.zeros(2, 4, 8, 8))
