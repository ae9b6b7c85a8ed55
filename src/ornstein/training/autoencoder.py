"""The LightningModule that trains an autoencoder, with or without a discriminator against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn

from ornstein.codecs import Autoencoder
from ornstein.training.autoencoder_losses import (
    AutoencoderLoss,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    reconstruction_error,
)
from ornstein.training.base import LRScheduleFactory, OptimizerFactory, TrainingModule


@dataclass(frozen=True)
class AutoencoderOutput:
    """What a step leaves.

    Attributes:
        loss: scalar; what is differentiated, the discriminator's own loss included.
        per_sample: (B,), what each image has of the autoencoder's loss, without the adversarial part.
        terms: scalars by name, to log.
    """

    loss: Tensor
    per_sample: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class _Pass:
    """``error`` (B,) is the reconstruction with its perceptual part, ``per_sample`` (B,) all but the adversarial."""

    per_sample: Tensor
    error: Tensor
    images: Tensor
    terms: dict[str, Tensor]


class AutoencoderModule(TrainingModule):
    """Trains ``network``, an autoencoder, by ``loss``.

    Both sides of the adversarial loss are one backward pass: the autoencoder's through a discriminator whose weights
    stand still, the discriminator's on reconstructions that do. One optimizer takes both as groups of their own, each
    with its own clipping (per-parameter optimizers, as all of ours are, are then two), so that steps, accumulation,
    mixed precision and checkpoints are those of any other training.

    Args:
        network: the autoencoder.
        loss: its losses and their weights.
        discriminator: needed where ``loss.adversarial`` is not None.
        perceptual: images (B, C, H, W) in [-1, 1] twice -> distances (B,); needed where ``loss.perceptual`` is not
            None; frozen.
        optimizer, lr_schedule, flip, seed, config: as for :class:`TrainingModule`.
        compile: torch.compile encoder and decoder in place.
    """

    last_output: AutoencoderOutput | None
    network: Autoencoder

    def __init__(
        self,
        network: Autoencoder,
        *,
        loss: AutoencoderLoss,
        discriminator: nn.Module | None = None,
        perceptual: nn.Module | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_schedule: LRScheduleFactory | None = None,
        flip: bool = False,
        seed: int = 0,
        compile: bool = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(network, optimizer=optimizer, lr_schedule=lr_schedule, flip=flip, seed=seed, config=config)
        self.loss = loss
        self.discriminator = discriminator
        # A frozen network of somebody else's has no place in our checkpoints.
        self.__dict__["perceptual"] = None if perceptual is None else perceptual.eval().requires_grad_(False)
        self._compile = compile

    def setup(self, stage: str) -> None:
        """Compiles encoder and decoder for training, after averages have been copied from them."""
        if stage == "fit" and self._compile:
            self.network.encoder.compile()
            self.network.decoder.compile()

    def on_fit_start(self) -> None:
        """Moves the perceptual network along."""
        if self.__dict__["perceptual"] is not None:
            self.__dict__["perceptual"].to(self.device)

    @property
    def adversarial(self) -> bool:
        """Whether the discriminator takes part in the running step."""
        step = self.trainer.global_step if self._trainer is not None else 0
        return self.discriminator is not None and step >= self.loss.start

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one micro-batch of images; see the BATCH contract in ``ornstein.data``."""
        generator = self._generator("train", self.micro_batches_seen)
        self._seed_dropout()
        x = _images(batch)
        if self.flip:
            flip = torch.rand(x.shape[0], 1, 1, 1, generator=generator, device=x.device) < 0.5
            x = torch.where(flip, x.flip(-1), x)
        # Counted before the loss: gradients of it are taken within.
        self.micro_batches_seen += 1
        self.images_seen += x.shape[0] * self._world_size()
        output = self._loss(x, generator)
        self.last_output = output
        return output.loss

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of the evaluation network on held-out images without its adversarial part, the same draws always."""
        network = self.evaluation_network()
        assert isinstance(network, Autoencoder)
        was_training = network.training
        network.eval()
        found = self._reconstruct(network, _images(batch), self._generator("val", batch_idx))
        network.train(was_training)
        return found.per_sample.mean()

    def _reconstruct(self, network: Autoencoder, x: Tensor, generator: torch.Generator) -> _Pass:
        coded = network.code(x, generator)
        error = reconstruction_error(x, coded.images, self.loss.reconstruction)
        terms = {"reconstruction": error}
        if self.__dict__["perceptual"] is not None:
            terms["perceptual"] = self.__dict__["perceptual"](x, coded.images.float())
            error = error + self.loss.perceptual_weight * terms["perceptual"]
        per_sample = error
        for name, value in coded.terms.items():
            per_sample = per_sample + self.loss.term_weights[name] * value
        logged = {name: value.detach().mean() for name, value in (terms | coded.terms).items()}
        return _Pass(per_sample, error, coded.images, logged | coded.facts)

    def _loss(self, x: Tensor, generator: torch.Generator) -> AutoencoderOutput:
        found = self._reconstruct(self.network, x, generator)
        loss, per_sample, images, terms = found.per_sample.mean(), found.per_sample.detach(), found.images, found.terms
        if self.discriminator is None:
            return AutoencoderOutput(loss, per_sample, terms)
        if not self.adversarial:
            # Gradients that are zero, for processes that wait for each other's: they are taken away before the step.
            idle = sum(p.sum() for p in self.discriminator.parameters())
            return AutoencoderOutput(loss + 0.0 * idle, per_sample, terms)
        adversarial = generator_loss(_frozen(self.discriminator, images))
        weight = torch.ones((), device=x.device)
        if self.loss.adaptive:
            weight = adaptive_weight(found.error.mean(), adversarial, self.network.last_layer)
        real, fake = self.discriminator(x), self.discriminator(images.detach())
        own = discriminator_loss(real, fake, self.loss.adversarial or "hinge")
        terms = terms | {
            "adversarial": adversarial.detach(),
            "adversarial_weight": weight,
            "discriminator": own.detach(),
            "logits_real": real.detach().float().mean(),
            "logits_fake": fake.detach().float().mean(),
        }
        loss = loss + self.loss.adversarial_weight * weight * adversarial + own
        return AutoencoderOutput(loss, per_sample, terms)

    # ---- optimization ---------------------------------------------------------------------------------------------

    def trained_parameters(self) -> Any:
        """The autoencoder's parameters, and the discriminator's as a group of their own."""
        ours = [p for p in self.network.parameters() if p.requires_grad]
        if self.discriminator is None:
            return ours
        rate = {} if self.loss.discriminator_lr is None else {"lr": self.loss.discriminator_lr}
        return [{"params": ours}, {"params": list(self.discriminator.parameters()), **rate}]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves a discriminator that has not begun as it is: no decay, no count of steps."""
        if self.discriminator is not None and not self.adversarial:
            self.discriminator.zero_grad(set_to_none=True)

    def clips_by_norm(self) -> bool:
        """As anywhere without a discriminator; beside one each is clipped by a norm of its own."""
        return self.discriminator is None and super().clips_by_norm()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | int | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradients of autoencoder and discriminator each by itself."""
        if self.discriminator is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        norm: Tensor | None = None
        if gradient_clip_val:
            by_value = GradClipAlgorithmType(gradient_clip_algorithm or "norm") == GradClipAlgorithmType.VALUE
            limit, groups = float(gradient_clip_val), [group["params"] for group in optimizer.param_groups]
            if by_value:
                for group in groups:
                    nn.utils.clip_grad_value_(group, limit)
            else:
                norm = torch.stack([nn.utils.clip_grad_norm_(group, limit) for group in groups]).norm()
        if self.watch_gradients is not None:
            self.watch_gradients(norm)


def _images(batch: dict[str, Any]) -> Tensor:
    """A batch's images, in [-1, 1]."""
    return batch["image"].to(torch.float32).div_(127.5).sub_(1.0)


def _frozen(discriminator: nn.Module, images: Tensor) -> Tensor:
    """Logits whose gradient goes to the images and not to the discriminator."""
    weights = {name: p.detach() for name, p in discriminator.named_parameters()}
    return torch.func.functional_call(discriminator, weights, (images,))
