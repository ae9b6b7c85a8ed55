"""The losses of autoencoders, each in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ornstein.errors import OrnsteinError

Reconstruction = Literal["l1", "l2"]
Adversarial = Literal["hinge", "vanilla"]
MAX_ADAPTIVE_WEIGHT = 1e4
_NORM_FLOOR = 1e-4  # of the adversarial gradient's norm


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    r"""What an autoencoder is trained by; means over the numbers of an image throughout.

    .. math:: |x - \hat x|^p + w_{perc}\, d(x, \hat x) + w_{KL}\, \mathrm{KL} / D + w_{com} \|h - sg[e]\|^2
        + \|sg[h] - e\|^2 + w_{adv}\, \lambda\, g(\hat x)

    With D numbers an image and :math:`\lambda = \|\nabla_L \text{first two}\| / (\|\nabla_L g\| + 10^{-4})` at the
    decoder's last layer L, in [0, 10^4], where ``adaptive``, else 1. Sources: Esser et al. 2021 (arXiv 2012.09841),
    eq. 4 to 7; Rombach et al. 2022 (arXiv 2112.10752), section 3.1, whose losses are sums over the numbers instead.

    Args:
        reconstruction: l1 or l2.
        kl_weight: of KLAutoencoder's KL to N(0, I), in nats.
        commitment_weight: of VQAutoencoder's commitment (beta in van den Oord et al. 2017).
        codebook_weight: of what moves its codes, where gradients do.
        perceptual: vgg or alex (LPIPS; needs that network's weights), or null for none.
        perceptual_weight: of it.
        perceptual_weights: a local file of that network's ImageNet weights; null: torchvision's, fetched once.
        adversarial: hinge or vanilla (logistic), or null for no discriminator.
        adversarial_weight: of it.
        adaptive: weigh it by the norms of gradients.
        start: optimizer steps before it begins, for either side.
        discriminator_lr: learning rate of the discriminator; null: the optimizer's.

    Raises: OrnsteinError for an unknown word or a number out of its range.
    """

    reconstruction: Reconstruction = "l1"
    kl_weight: float = 1e-6
    commitment_weight: float = 0.25
    codebook_weight: float = 1.0
    perceptual: str | None = None
    perceptual_weight: float = 1.0
    perceptual_weights: str | None = None
    adversarial: Adversarial | None = None
    adversarial_weight: float = 0.5
    adaptive: bool = True
    start: int = 0
    discriminator_lr: float | None = None

    def __post_init__(self) -> None:
        words = {
            "reconstruction": get_args(Reconstruction),
            "adversarial": (*get_args(Adversarial), None),
            "perceptual": ("vgg", "alex", None),
        }
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                told = " or ".join("null" if word is None else word for word in allowed)
                raise OrnsteinError(f"model.loss.{name}={getattr(self, name)} is unknown: choose {told}.")
        for name in ("kl_weight", "commitment_weight", "codebook_weight", "perceptual_weight", "adversarial_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise OrnsteinError(f"model.loss.{name}={value} must be a number, at least 0.")
        if isinstance(self.start, bool) or not isinstance(self.start, int) or self.start < 0:
            raise OrnsteinError(f"model.loss.start={self.start} counts optimizer steps: a whole number, at least 0.")
        if self.discriminator_lr is not None and not self.discriminator_lr > 0:
            raise OrnsteinError(f"model.loss.discriminator_lr={self.discriminator_lr} must be positive, or null.")

    @property
    def term_weights(self) -> dict[str, float]:
        """Weight of each term that an autoencoder may name."""
        return {"kl": self.kl_weight, "commitment": self.commitment_weight, "codebook": self.codebook_weight}


def reconstruction_error(x: Tensor, images: Tensor, kind: Reconstruction) -> Tensor:
    """Mean absolute or squared difference of each image, (B, C, H, W) twice -> (B,)."""
    difference = images.float() - x.float()
    return (difference.abs() if kind == "l1" else difference.square()).mean(dim=(1, 2, 3))


def discriminator_loss(real: Tensor, fake: Tensor, kind: Adversarial) -> Tensor:
    r"""Loss of a discriminator from its logits on images and reconstructions, any shapes -> scalar.

    Hinge: :math:`\tfrac12 (E[\max(0, 1 - r)] + E[\max(0, 1 + f)])`; vanilla: the same with softplus of -r and f.
    Source: Lim & Ye 2017 (arXiv 1705.02894) for hinge; Goodfellow et al. 2014 (arXiv 1406.2661).
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """What the autoencoder pays for logits on its reconstructions, in (-inf, inf): ``-mean(fake)``, for both kinds.

    Source: Esser et al. 2021's code takes this for either loss of the discriminator, as Rombach et al. 2022's does.
    """
    return -fake.float().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the two losses' gradient norms at ``last_layer``, in [0, 10^4], without gradient; keeps both graphs."""
    (ours,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (theirs,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = ours.float().norm() / (theirs.float().norm() + _NORM_FLOOR)
    return ratio.clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()
