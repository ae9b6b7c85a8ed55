"""Exponential moving average of the weights, as a second network (and learned schedule) that training never touches."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from ornstein.diffusion.schedules import NoiseSchedule
from ornstein.errors import OrnsteinError
from ornstein.training.base import TrainingModule
from ornstein.training.limits import check_limits
from ornstein.training.module import DiffusionModule
from ornstein.training.sharding import local


class EMA(pl.Callback):
    r"""Keeps :math:`\bar\theta \leftarrow d_n \bar\theta + (1 - d_n)\theta` after every optimizer step.

    The rate warms up, :math:`d_n = \min(\text{decay}, (1 + n)/(10 + n))`, so that the first weights are forgotten soon
    (TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``, which Ho et al. 2020's code uses with 0.9999).
    The averages live in a copy of the network: nothing is swapped, so no checkpoint can hold them as the model's. A
    schedule that has parameters of its own (VDM's) is averaged beside the network that learned under it.

    Args:
        decay: in [0, 1).
        warmup: use the warm-up above.
        every: optimizer steps between updates.

    Raises:
        OrnsteinError: decay outside [0, 1) or every < 1.
    """

    def __init__(self, *, decay: float = 0.9999, warmup: bool = True, every: int = 1) -> None:
        check_limits("EMA", decay=decay, every=every)
        self.decay, self.warmup, self.every = decay, warmup, every
        self.updates = 0
        self.network: nn.Module | None = None
        self.schedule: NoiseSchedule | None = None
        self._last_step = -1
        self._averaged: list[Tensor] = []
        self._current: list[Tensor] = []
        self._names: list[str] = []
        # What each of the averaged is the local part of, where devices have shards; the same tensors elsewhere.
        self._placed: list[Tensor] = []

    def current_decay(self) -> float:
        """The rate that the next update uses."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    def facts(self) -> dict[str, Any]:
        """What a file of the averages says of them in its header."""
        return {"decay": self.decay, "updates": self.updates}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copies what is averaged before any checkpoint is loaded into the copies."""
        if stage != "fit" or self.network is not None:
            return
        if not isinstance(pl_module, TrainingModule):
            raise OrnsteinError("EMA averages the network of a module of this package.")
        self.network = copy.deepcopy(pl_module.network).requires_grad_(False).eval()
        pl_module.__dict__["averaged_network"] = self.network
        if isinstance(pl_module, DiffusionModule) and next(pl_module.schedule.parameters(), None) is not None:
            self.schedule = copy.deepcopy(pl_module.schedule).requires_grad_(False).eval()
            pl_module.__dict__["averaged_schedule"] = self.schedule

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Moves the averages to the device and pairs each with its weight, once."""
        assert self.network is not None and isinstance(pl_module, TrainingModule)
        copies: list[tuple[str, nn.Module, nn.Module]] = [("network", self.network, pl_module.network)]
        if self.schedule is not None and isinstance(pl_module, DiffusionModule):
            copies.append(("schedule", self.schedule, pl_module.schedule))
        self._averaged, self._current, self._names, self._placed = [], [], [], []
        for part, average, trained in copies:
            average.to(pl_module.device)
            for (name, own), (_, current) in zip(_tensors(average), _tensors(trained), strict=True):
                if own.is_floating_point():
                    self._names.append(f"{part}.{name}")
                    self._placed.append(own.detach())
                    self._averaged.append(local(own.detach()))
                    self._current.append(local(current.detach()))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes up the count where a checkpoint left it, which ``on_fit_start`` does not know yet."""
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates once per ``every`` optimizer steps; micro-batches of an accumulated step count once."""
        step = trainer.global_step
        if step == self._last_step or step % self.every:
            return
        self._last_step = step
        torch._foreach_lerp_(self._averaged, self._current, 1 - self.current_decay())
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Averages and their counter; ``schedule`` only where there is one to average."""
        averages = {"network": {} if self.network is None else self.network.state_dict()}
        if self.schedule is not None:
            averages["schedule"] = self.schedule.state_dict()
        return {"updates": self.updates, **averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes averages and counter back; ``setup`` has made the copies by then."""
        self.updates = int(state_dict["updates"])
        if self.network is not None:
            self.network.load_state_dict(state_dict["network"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state_dict["schedule"])


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
