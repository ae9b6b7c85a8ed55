"""The variational autoencoder of latent diffusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ornstein.codecs.autoencoder import Autoencoder, Coded
from ornstein.codecs.posterior import DiagonalGaussian


class KLAutoencoder(Autoencoder):
    r"""Autoencoder with a Gaussian posterior :math:`q(h|x)` (:class:`DiagonalGaussian`), pulled towards N(0, I).

    The same function of images and weights as diffusers' ``AutoencoderKL`` with ``DownEncoderBlock2D`` and
    ``UpDecoderBlock2D``, and so as the first stage of LDM and Stable Diffusion.

    Sources: Kingma & Welling 2014 (arXiv 1312.6114); encoder and decoder after Esser et al. 2021 (arXiv 2012.09841);
        the scaling after Rombach et al. 2022 (arXiv 2112.10752).

    Args as for :class:`Autoencoder`, and:
        quant_conv, post_quant_conv: a 1x1 convolution on either side of the latents (Stable Diffusion 3 has none).
        sample_posterior: ``encode`` draws from the posterior instead of taking its mean.

    Raises: OrnsteinError for sizes that do not divide.
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int | Sequence[int],
        *,
        channels: int = 4,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 1,
        groups: int = 8,
        attention: bool = True,
        quant_conv: bool = True,
        post_quant_conv: bool = True,
        sample_posterior: bool = False,
    ) -> None:
        super().__init__(
            image_channels,
            image_size,
            channels=channels,
            width=width,
            multipliers=multipliers,
            blocks=blocks,
            groups=groups,
            attention=attention,
            encoded=2 * channels,
            decoded=channels,
        )
        self._config |= {"quant_conv": bool(quant_conv), "post_quant_conv": bool(post_quant_conv)}
        self.quant: nn.Module = nn.Conv2d(2 * channels, 2 * channels, 1) if quant_conv else nn.Identity()
        self.post_quant: nn.Module = nn.Conv2d(channels, channels, 1) if post_quant_conv else nn.Identity()
        self.sample_posterior = self.stochastic = sample_posterior

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """q(h | x) for images (B, C, H, W) in [-1, 1]; unscaled, as the autoencoder is trained."""
        self.check_images(x, self.image_channels, self.image_size, what="images")
        mean, logvar = self.quant(self.encoder(x)).float().chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar)

    def latents(self, x: Tensor) -> Tensor:
        """The posterior's mean, (B, channels, \\*size)."""
        return self.posterior(x).mean

    def reconstruct(self, h: Tensor) -> Tensor:
        """Unscaled latents h (B, channels, \\*size) -> images (B, C, H, W)."""
        self.check_latents(h, what="latents")
        return self.decoder(self.post_quant(h))

    def code(self, x: Tensor, generator: torch.Generator | None = None) -> Coded:
        """One draw of the posterior, decoded. Terms: ``kl``, nats per number of the image. Facts: ``kl_nats``."""
        posterior = self.posterior(x)
        kl = posterior.kl()
        images = self.reconstruct(posterior.sample(generator))
        return Coded(images, {"kl": kl / x[0].numel()}, {"kl_nats": kl.detach().mean()})

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> unit-variance z (B, channels, \\*size).

        The posterior's mean, or with ``sample_posterior`` a draw of it by ``generator`` (on the device of x).
        """
        posterior = self.posterior(x)
        h = posterior.sample(generator) if self.sample_posterior else posterior.mean
        return (h - self.shift) * self.scale
