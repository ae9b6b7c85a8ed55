"""The LightningModule around a denoiser: pixel or latent, conditional or not, of any network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn

from ornstein.codecs import Codec
from ornstein.conditioning import Conditioner
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.guidance import Guidance, NoGuidance
from ornstein.diffusion.noise import derive_seed
from ornstein.diffusion.objectives import LossOutput, Objective, TrainingNoise
from ornstein.diffusion.samplers import Sampler
from ornstein.diffusion.samplers.base import State
from ornstein.diffusion.schedules import NoiseSchedule
from ornstein.errors import OrnsteinError
from ornstein.training.generate import Generated, Watch, generate

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
LRScheduleFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
CHECKPOINT_KEY = "ornstein"


class DiffusionModule(pl.LightningModule):
    """Trains ``network`` to denoise what ``codec`` encodes, under ``schedule`` and ``objective``.

    The pieces are the run's config groups, already built; pixel or latent is the codec's choice, class-conditional or
    not the conditioner's, U-Net or DiT the network's.

    Args:
        network: the NETWORK contract of DESIGN section 3.
        schedule: noise schedule.
        objective: training loss, which knows the parameterization.
        codec: data to latents and back; frozen.
        conditioner: batch to the network's keyword tensors.
        sampler: the run's own sampler, for pictures and figures.
        guidance: the run's own guidance.
        optimizer: partial; called with the trainable parameters.
        lr_schedule: partial; called with the optimizer; stepped once an optimizer step.
        flip: flip images left to right with probability 1/2.
        seed: of everything random in training.
        clip_x0: option of the denoiser in sampling.
        compile: torch.compile the network in place.
        config: the run's resolved config in plain JSON types, stored in every checkpoint.

    All randomness of a training step is a function of (seed, micro-batches seen, rank), so that a resumed run draws
    what an undisturbed one would have drawn.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        schedule: NoiseSchedule,
        objective: Objective,
        codec: Codec,
        conditioner: Conditioner,
        sampler: Sampler,
        guidance: Guidance | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_schedule: LRScheduleFactory | None = None,
        flip: bool = False,
        seed: int = 0,
        clip_x0: float | None = None,
        dynamic_threshold: float | None = None,
        compile: bool = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.schedule, self.objective = network, schedule, objective
        self.codec, self.conditioner = codec.eval().requires_grad_(False), conditioner
        self.sampler, self.guidance = sampler, guidance if guidance is not None else NoGuidance()
        self._optimizer, self._lr_schedule = optimizer, lr_schedule
        self.flip, self.seed = flip, seed
        self.clip_x0, self.dynamic_threshold = clip_x0, dynamic_threshold
        self.run_config = config if config is not None else {}
        self.micro_batches_seen = 0
        self.images_seen = 0
        self.last_output: LossOutput | None = None
        self._generators: dict[torch.device, torch.Generator] = {}
        # Kept out of the module's registry: averages are neither trained nor saved as the model's own weights.
        self.__dict__["averaged_network"] = self.__dict__["averaged_schedule"] = None
        self._compile = compile

    def setup(self, stage: str) -> None:
        """Compiles the network for training, after averages have been copied from it (a compiled one cannot be)."""
        if stage == "fit" and self._compile:
            self.network.compile()

    # ---- training -------------------------------------------------------------------------------------------------

    def denoiser(self, *, evaluation: bool = False) -> Denoiser:
        """The denoiser being trained, or with ``evaluation`` that of the averaged weights; without conditioning."""
        return Denoiser(
            self.evaluation_network() if evaluation else self.network,
            self.evaluation_schedule() if evaluation else self.schedule,
            self.objective.parameterization,
            clip_x0=self.clip_x0,
            dynamic_threshold=self.dynamic_threshold,
        )

    def evaluation_network(self) -> nn.Module:
        """The averaged weights where an EMA callback keeps them, else the network itself."""
        averaged = self.__dict__["averaged_network"]
        return averaged if averaged is not None else self.network

    def evaluation_schedule(self) -> NoiseSchedule:
        """The averaged schedule where it is learned and an EMA callback averages it, else the schedule itself."""
        averaged: NoiseSchedule | None = self.__dict__["averaged_schedule"]
        return averaged if averaged is not None else self.schedule

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one micro-batch; see the BATCH contract in ``ornstein.data``."""
        generator = self._generator("train", self.micro_batches_seen)
        # Dropout draws from the global generator.
        torch.manual_seed(derive_seed(self.seed, "dropout", self.micro_batches_seen, self.global_rank))
        output = self._loss(batch, generator, self.denoiser(), augment=self.flip)
        self.last_output = output
        self.micro_batches_seen += 1
        self.images_seen += batch["image"].shape[0] * self._world_size()
        return output.loss

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of the evaluation network on a held-out batch, at the same noise every time."""
        generator = self._generator("val", batch_idx)
        # The objective too: what it learns of the losses, held-out images have no say in.
        parts = (self.evaluation_network(), self.objective)
        were_training = [part.training for part in parts]
        for part in parts:
            part.eval()
        output = self._loss(batch, generator, self.denoiser(evaluation=True), augment=False)
        for part, was_training in zip(parts, were_training, strict=True):
            part.train(was_training)
        return output.loss

    def _loss(
        self, batch: dict[str, Any], generator: torch.Generator, denoiser: Denoiser, *, augment: bool
    ) -> LossOutput:
        x = batch["image"].to(torch.float32).div_(127.5).sub_(1.0)
        noise = TrainingNoise(generator, rank=self.global_rank, world_size=self._world_size())
        if augment:
            flip = noise.uniform(x.shape[0], x.device) < 0.5
            x = torch.where(flip.reshape(-1, 1, 1, 1), x.flip(-1), x)
        with torch.no_grad():
            x0 = self.codec.encode(x, generator=generator)
        cond = self.conditioner.training_cond(batch, generator=generator)
        return self.objective(denoiser, x0, cond, noise)

    def _generator(self, purpose: str, count: int) -> torch.Generator:
        if self.device not in self._generators:
            self._generators[self.device] = torch.Generator(self.device)
        return self._generators[self.device].manual_seed(derive_seed(self.seed, purpose, count, self.global_rank))

    def _world_size(self) -> int:
        return self.trainer.world_size if self._trainer is not None else 1

    def configure_optimizers(self) -> Any:
        """The optimizer over what is trainable, with its learning-rate schedule stepped every optimizer step."""
        if self._optimizer is None:
            raise OrnsteinError("this module was built without an optimizer, for sampling: it cannot be trained.")
        optimizer = self._optimizer([p for p in self.parameters() if p.requires_grad])
        if self._lr_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_schedule(optimizer), "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | int | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips gradients under mixed precision too, where Lightning refuses every fused optimizer.

        Its refusal is meant for a gradient scaler, which a fused optimizer undoes within its step, after the clipping;
        bf16 has none, so there the gradients are what they seem.
        """
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None and gradient_clip_val is not None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
            return
        self.clip_gradients(
            optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm
        )

    # ---- sampling -------------------------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (channels, height, width) of one sample in the space being diffused."""
        size = self.codec.size
        height, width = (size, size) if isinstance(size, int) else size
        return (self.codec.channels, height, width)

    def generate(
        self,
        indices: Sequence[int] | range,
        *,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        labels: Sequence[int] | None = None,
        seed: int | None = None,
        batch_size: int = 256,
        watch: Callable[[int, State], None] | None = None,
    ) -> Iterator[Generated]:
        """Samples number ``indices`` with the evaluation network; see :func:`ornstein.training.generate.generate`."""
        return generate(
            self.denoiser(evaluation=True),
            indices,
            codec=self.codec,
            conditioner=self.conditioner,
            sampler=sampler if sampler is not None else self.sampler,
            guidance=guidance if guidance is not None else self.guidance,
            shape=self.latent_shape,
            device=self.device,
            labels=labels,
            seed=self.seed if seed is None else seed,
            batch_size=batch_size,
            watch=watch,
        )

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what training needs beside weights: counters and the run's config, in plain JSON types."""
        checkpoint[CHECKPOINT_KEY] = {
            "micro_batches_seen": self.micro_batches_seen,
            "images_seen": self.images_seen,
            "config": self.run_config,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the counters back, and tells the data where to go on."""
        state = checkpoint[CHECKPOINT_KEY]
        self.micro_batches_seen = int(state["micro_batches_seen"])
        self.images_seen = int(state["images_seen"])
        if self._trainer is not None and getattr(self.trainer, "datamodule", None) is not None:
            self.trainer.datamodule.start_batch = self.micro_batches_seen  # type: ignore[attr-defined]


__all__ = ["CHECKPOINT_KEY", "DiffusionModule", "Watch"]
