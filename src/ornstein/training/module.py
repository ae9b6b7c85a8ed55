"""The LightningModule around a denoiser: pixel or latent, conditional or not, of any network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ornstein.codecs import Codec
from ornstein.conditioning import Conditioner
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.guidance import Guidance, NoGuidance
from ornstein.diffusion.objectives import LossOutput, Objective, TrainingNoise
from ornstein.diffusion.samplers import Sampler
from ornstein.diffusion.samplers.base import State
from ornstein.diffusion.schedules import NoiseSchedule
from ornstein.networks import Experts
from ornstein.training.base import CHECKPOINT_KEY, LRScheduleFactory, OptimizerFactory, TrainingModule
from ornstein.training.conditions import HeldOut, mirrored, prepare_conditions
from ornstein.training.generate import Generated, Watch, generate
from ornstein.training.latents import batch_device, batch_images, clean_latents, prepare_latents
from ornstein.training.shapes import Shape, compile_for, grouped, taken


class DiffusionModule(TrainingModule):
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

    last_output: LossOutput | None

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
        super().__init__(network, optimizer=optimizer, lr_schedule=lr_schedule, flip=flip, seed=seed, config=config)
        self.schedule, self.objective = schedule, objective
        if isinstance(network, Experts):
            network.place_boundaries(lambda t: float(objective.parameterization.noise_cond(schedule.level(t))))
        self.codec, self.conditioner = codec.eval().requires_grad_(False), conditioner
        self.codec.any_size = True  # the data's sizes have been checked, and samples may have others
        self.sampler, self.guidance = sampler, guidance if guidance is not None else NoGuidance()
        self.clip_x0, self.dynamic_threshold = clip_x0, dynamic_threshold
        # As the averaged network: no part of the module's own weights.
        self.__dict__["averaged_schedule"] = None
        # Held-out data, for conditions that nobody gives when sampling; opened when they are first asked for.
        self.held_out: HeldOut | None = None
        self._compile = compile

    def setup(self, stage: str) -> None:
        """Looks at the latents that it is given in the place of images, and compiles the network for training, after
        averages have been copied from it (a compiled one cannot be).

        Raises:
            OrnsteinError: latents that are not those of the codec.
        """
        if stage != "fit":
            return
        data = getattr(self.trainer, "datamodule", None)
        prepare_latents(self, data)
        if data is not None:
            prepare_conditions(self, data, device=self.device)
            self.held_out = lambda: data.val
        if self._compile:
            shapes = getattr(getattr(data, "train", None), "shapes", ()) if data is not None else ()
            compile_for(self.network, len(shapes))

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

    def evaluation_schedule(self) -> NoiseSchedule:
        """The averaged schedule where it is learned and an EMA callback averages it, else the schedule itself."""
        averaged: NoiseSchedule | None = self.__dict__["averaged_schedule"]
        return averaged if averaged is not None else self.schedule

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one micro-batch; see the BATCH contract in ``ornstein.data``."""
        generator = self._generator("train", self.micro_batches_seen)
        self._seed_dropout()
        output = self._loss(batch, generator, self.denoiser(), augment=self.flip)
        self.last_output = output
        self.micro_batches_seen += 1
        self.images_seen += batch_images(batch) * self._world_size()
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
        noise = TrainingNoise(generator, rank=self.global_rank, world_size=self._world_size())
        flip = noise.uniform(batch_images(batch), batch_device(batch)) < 0.5 if augment else None
        x0 = clean_latents(batch, self.codec, flip=flip, generator=generator)
        cond = self.conditioner.training_cond(mirrored(batch, flip, self.conditioner), generator=generator)
        return self.objective(denoiser, x0, cond, noise)

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
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        images: Tensor | None = None,
        size: Shape | Sequence[Shape] | None = None,
        seed: int | None = None,
        batch_size: int = 256,
        watch: Callable[[int, State], None] | None = None,
    ) -> Iterator[Generated]:
        """Samples number ``indices`` with the evaluation network; see :func:`ornstein.training.generate.generate`.

        ``size`` is (height, width) in pixels of all of them, or of each: those of one size then come together, in the
        order in which their sizes first stand there, and each batch has one size. The codec's own unless given.
        """
        for own, places in grouped(size, len(indices)):
            yield from generate(
                self.denoiser(evaluation=True),
                indices if places is None else [indices[place] for place in places],
                codec=self.codec,
                conditioner=self.conditioner,
                sampler=sampler if sampler is not None else self.sampler,
                guidance=guidance if guidance is not None else self.guidance,
                shape=self.latent_shape if own is None else self.codec.latent_shape(*own),
                size=own,
                device=self.device,
                labels=taken(labels, places),
                prompts=taken(prompts, places),
                negative_prompt=negative_prompt,
                images=images if images is None or places is None else images[places],
                held_out=self.held_out,
                seed=self.seed if seed is None else seed,
                batch_size=batch_size,
                watch=watch,
            )


__all__ = ["CHECKPOINT_KEY", "DiffusionModule", "Watch"]
