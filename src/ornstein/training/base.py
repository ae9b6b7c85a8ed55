"""What every module that trains here has in common: counters, draws, the optimizer, what a checkpoint holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn

from ornstein.diffusion.noise import derive_seed
from ornstein.errors import OrnsteinError
from ornstein.training.hooks import leave_out_empty_hooks, note_signature
from ornstein.training.sharding import ShardedStrategy

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
LRScheduleFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
CHECKPOINT_KEY = "ornstein"
# The name of the hook that runs, which Lightning notes at each, and what a module here notes of a step.
_OF_A_STEP = frozenset(("_current_fx_name", "micro_batches_seen", "images_seen", "last_output", "gradient_norm"))


class StepOutput(Protocol):
    """What a step leaves for callbacks: the loss, scalar, and what each image has of it, (B,)."""

    @property
    def loss(self) -> Tensor: ...

    @property
    def per_sample(self) -> Tensor: ...


class TrainingModule(pl.LightningModule, ABC):
    """A network that is trained, and what the callbacks need of whoever trains it.

    Args:
        network: what is trained, averaged and compared with a checkpoint.
        optimizer: partial; called with the trainable parameters.
        lr_schedule: partial; called with the optimizer; stepped once an optimizer step.
        flip: flip images left to right with probability 1/2.
        seed: of everything random in training.
        config: the run's resolved config in plain JSON types, stored in every checkpoint.

    All randomness of a training step is a function of (seed, micro-batches seen, rank), so that a resumed run draws
    what an undisturbed one would have drawn.
    """

    last_output: StepOutput | None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        note_signature(cls)

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: OptimizerFactory | None,
        lr_schedule: LRScheduleFactory | None,
        flip: bool,
        seed: int,
        config: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        self.network = network
        self._optimizer, self._lr_schedule = optimizer, lr_schedule
        self.flip, self.seed = flip, seed
        self.run_config = config if config is not None else {}
        self.micro_batches_seen = 0
        self.images_seen = 0
        self.last_output = None
        # Of the last optimizer step, before clipping; None where clipping did not take it.
        self.gradient_norm: Tensor | None = None
        # Told the gradients' norm before each optimizer step, or None where clipping has not taken it.
        self.watch_gradients: Callable[[Tensor | None], None] | None = None
        self._generators: dict[torch.device, torch.Generator] = {}
        # Kept out of the module's registry: averages are neither trained nor saved as the model's own weights.
        self.__dict__["averaged_network"] = None
        leave_out_empty_hooks(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; those that change with every step at once.

        A module otherwise looks first whether a parameter, a buffer or a module goes by that name.
        """
        if name in _OF_A_STEP:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @abstractmethod
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one micro-batch; see the BATCH contract in ``ornstein.data``."""

    @abstractmethod
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of the evaluation network on a held-out batch, at the same noise every time."""

    def evaluation_network(self) -> nn.Module:
        """The averaged weights where an EMA callback keeps them, else the network itself."""
        averaged = self.__dict__["averaged_network"]
        return averaged if averaged is not None else self.network

    def _generator(self, purpose: str, count: int) -> torch.Generator:
        if self.device not in self._generators:
            self._generators[self.device] = torch.Generator(self.device)
        return self._generators[self.device].manual_seed(derive_seed(self.seed, purpose, count, self.global_rank))

    def _seed_dropout(self) -> None:
        """Seeds the global generator that dropout draws from, for the micro-batch that begins.

        Of this device alone: `torch.manual_seed` reseeds every kind of device there may be, and for each kind that has
        not been used yet keeps the call with its stack of Python frames, at a millisecond a step.
        """
        seed = derive_seed(self.seed, "dropout", self.micro_batches_seen, self.global_rank)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.device.type != "cpu":
            torch.manual_seed(seed)

    def _world_size(self) -> int:
        return self.trainer.world_size if self._trainer is not None else 1

    def trained_parameters(self) -> Any:
        """What the optimizer is given: parameters, or groups of them."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        """The optimizer over what is trainable, with its learning-rate schedule stepped every optimizer step."""
        if self._optimizer is None:
            raise OrnsteinError("this module was built without an optimizer, for use: it cannot be trained.")
        optimizer = self._optimizer(self.trained_parameters())
        if self._lr_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_schedule(optimizer), "interval": "step"},
        }

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Forgets the gradients; at once where the optimizer would do no more than that.

        torch's own way asks for each parameter what is to be done with it.
        """
        if type(optimizer).zero_grad is not torch.optim.Optimizer.zero_grad:
            return super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

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
        self.gradient_norm = self._clip(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.watch_gradients is not None:
            self.watch_gradients(self.gradient_norm)

    def clips_by_norm(self) -> bool:
        """Whether clipping takes the gradients' norm, which :attr:`gradient_norm` then holds after each step."""
        trainer = self.trainer
        plugin, limit, algorithm = trainer.precision_plugin, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        unscaled = type(plugin) is Precision or (isinstance(plugin, MixedPrecision) and plugin.scaler is None)
        by_norm = algorithm is None or algorithm == GradClipAlgorithmType.NORM
        return bool(limit and limit > 0) and by_norm and unscaled and not isinstance(trainer.strategy, ShardedStrategy)

    def _clip(
        self, optimizer: torch.optim.Optimizer, limit: float | int | None, algorithm: str | None
    ) -> Tensor | None:
        """The gradients' norm before clipping, where that had to be taken."""
        plugin, strategy = self.trainer.precision_plugin, self.trainer.strategy
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if limit is not None and self.clips_by_norm():
            # What the plugin does, which keeps the norm to itself.
            return clip_by_norm(parameters, limit)
        if isinstance(strategy, ShardedStrategy):
            if limit is not None:
                strategy.clip_gradients(parameters, limit, by=str(algorithm or "norm"))
        elif limit is not None and isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            Precision.clip_gradients(plugin, optimizer, limit, GradClipAlgorithmType(algorithm or "norm"))
        else:
            self.clip_gradients(optimizer, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
        return None

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


def clip_by_norm(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """Scales the gradients of ``parameters`` so that their norm, over all of them, is at most ``limit``: torch's
    ``clip_grad_norm_`` to the bit.

    On the CPU gradients that are small enough are left alone, not multiplied by 1; elsewhere the host would have to
    wait to know that they are.

    Returns:
        The norm before, scalar.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients or gradients[0].device.type != "cpu":  # one device holds them all
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    # torch's own sorts them by device and dtype first, which takes longer than the norms of a small network.
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    # Not "limit < norm": torch divides by a little more than the norm, and nan must go through.
    if not limit / (norm.item() + 1e-6) >= 1:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
