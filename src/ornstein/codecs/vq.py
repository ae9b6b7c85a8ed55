"""The autoencoder with a codebook between encoder and decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ornstein.codecs.autoencoder import Autoencoder, Coded
from ornstein.codecs.quantiser import VectorQuantiser


class VQAutoencoder(Autoencoder):
    r"""VQGAN's autoencoder: every position of the latents is replaced by the nearest of ``codes`` vectors.

    The same function of images and weights as diffusers' ``VQModel``. What is diffused are the vectors before they are
    replaced; ``decode`` replaces them, so that samples need not hit the codes (LDM's VQ-regularised first stages).

    Sources: Esser et al. 2021 (arXiv 2012.09841); Rombach et al. 2022 (arXiv 2112.10752), section 3.1.

    Args as for :class:`Autoencoder`, and:
        channels: of each code, and so of the latents.
        codes: entries of the codebook.
        encoded_channels: between encoder and codebook, and codebook and decoder; those of the codes unless given.
        update: how the codebook learns: gradient or ema.
        decay: of the averages of a code's use, and with ema of the codes.
        revive_below: part of an equal share below which a code counts as dead and is moved.
        quantise_latents: ``encode`` gives the codes themselves instead of the vectors before.

    Raises: OrnsteinError for sizes that do not divide, and numbers out of their range.
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int | Sequence[int],
        *,
        channels: int = 4,
        codes: int = 256,
        encoded_channels: int | None = None,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 1,
        groups: int = 8,
        attention: bool = True,
        update: str = "gradient",
        decay: float = 0.99,
        revive_below: float = 0.1,
        quantise_latents: bool = False,
    ) -> None:
        between = channels if encoded_channels is None else encoded_channels
        super().__init__(
            image_channels,
            image_size,
            channels=channels,
            width=width,
            multipliers=multipliers,
            blocks=blocks,
            groups=groups,
            attention=attention,
            encoded=between,
            decoded=between,
        )
        self._config |= {"codes": int(codes), "encoded_channels": int(between), "update": update}
        self._config |= {"decay": float(decay), "revive_below": float(revive_below)}
        self.quant = nn.Conv2d(between, channels, 1)
        self.quantiser = VectorQuantiser(codes, channels, update=update, decay=decay, revive_below=revive_below)
        self.post_quant = nn.Conv2d(channels, between, 1)
        self.quantise_latents = quantise_latents

    def encoding(self) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """Also whether the latents are the codes; without what only training keeps beside them."""
        config, weights = super().encoding()
        kept = {name: value for name, value in weights.items() if name not in ("quantiser.share", "quantiser.sums")}
        return config | {"quantise_latents": self.quantise_latents}, kept

    def latents(self, x: Tensor) -> Tensor:
        """What comes before the codes, or with ``quantise_latents`` the codes: (B, channels, \\*size)."""
        self.check_images(x, self.image_channels, self.image_size, what="images")
        h = self.quant(self.encoder(x)).float()
        return self.quantiser(h).straight if self.quantise_latents else h

    def reconstruct(self, h: Tensor) -> Tensor:
        """Unscaled latents h (B, channels, \\*size), replaced by their codes -> images (B, C, H, W)."""
        self.check_latents(h, what="latents")
        return self.decoder(self.post_quant(self.quantiser(h).straight))

    def code(self, x: Tensor, generator: torch.Generator | None = None) -> Coded:
        """One pass; in training the codebook's averages learn from it. Facts: ``perplexity``.

        Terms: ``codebook`` (how far codes are from vectors, whose gradient moves the codes) and ``commitment`` (the
        same number, whose gradient moves the vectors).
        """
        self.check_images(x, self.image_channels, self.image_size, what="images")
        h = self.quant(self.encoder(x)).float()
        found = self.quantiser(h)
        images = self.decoder(self.post_quant(found.straight))
        terms = {"commitment": (found.codes.detach() - h).square().mean(dim=(1, 2, 3))}
        if self.quantiser.update_by == "gradient":
            terms["codebook"] = (found.codes - h.detach()).square().mean(dim=(1, 2, 3))
        facts = {"perplexity": self.quantiser.perplexity(found.indices)}
        if self.training:
            self.quantiser.learn(h, found.indices, generator)
        return Coded(images, terms, facts)
