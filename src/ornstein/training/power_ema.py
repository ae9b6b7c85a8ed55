"""Power-function averages of several lengths, with snapshots that any other length is made of after training."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors import SafetensorError
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.training.ema import EMA
from ornstein.training.limits import check_limits
from ornstein.training.posthoc import FOLDER, gamma_of, power_decay, snapshot_name
from ornstein.training.record import due
from ornstein.training.sharding import as_shard, local, shared_out, whole

log = logging.getLogger(__name__)


class PowerEMA(EMA):
    r"""Keeps power-function averages of the weights, one for each of ``stds``, and writes them down now and then.

    Update number t moves each by :math:`\hat\theta \leftarrow \beta \hat\theta + (1 - \beta)\theta` with
    :math:`\beta = (1 - 1/t)^{\gamma + 1}`: the share of training that an average covers stays the same as training
    goes on. Pictures and figures of the run are made with the first. From the snapshots, ``ornstein ema`` and
    ``weights=0.15`` (of sample and evaluate) make averages of other lengths.

    Source: Karras et al. 2024 (arXiv 2312.02696), section 3.1 and appendix C.2.

    Args:
        run_dir: the run's folder; snapshots go into its ``ema``.
        stds: relative lengths, each in (0, 0.28]; two are needed to make others of.
        every: optimizer steps between updates.
        snapshot_every: optimizer steps between snapshots; the last step has one too. Two networks on the disk each.

    Raises:
        OrnsteinError: fewer than two lengths, equal ones, one out of its range, or a number < 1.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        stds: Sequence[float] = (0.05, 0.1),
        every: int = 1,
        snapshot_every: int = 500,
    ) -> None:
        super().__init__(decay=0.0, warmup=False, every=every)
        check_limits("PowerEMA", every=every, snapshot_every=snapshot_every, stds=stds)
        self.stds = tuple(float(std) for std in stds)
        self.gammas = tuple(gamma_of(std) for std in stds)
        self.folder = Path(run_dir) / FOLDER
        self.snapshot_every = snapshot_every
        # Of the lengths after the first, which is the network that samples are drawn with.
        self._longer: list[list[Tensor]] = []
        self._loaded: list[list[Tensor]] | None = None
        self._last_written = -1

    @property
    def state_key(self) -> str:
        """That of its parent: who reads a checkpoint finds the averages that the run was judged by in one place."""
        return EMA.__qualname__

    def current_decay(self) -> float:
        """The rate that the next update of the first average uses."""
        return power_decay(self.updates + 1, self.gammas[0])

    def facts(self) -> dict[str, Any]:
        """What a file of the averages says of them in its header: the length in place of a decay."""
        return {"std": self.stds[0], "updates": self.updates}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Moves the averages to the device and pairs each with its weight, once."""
        super().on_fit_start(trainer, pl_module)
        # Copies of the first, which the first update makes forget what they were copied from.
        self._longer = [[value.clone() for value in self._averaged] for _ in self.stds[1:]]
        if self._loaded is not None:
            self._fill(self._loaded)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates every average once per ``every`` optimizer steps, and writes snapshots when they are due."""
        before, stepped = self.updates, trainer.global_step != self._last_written
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.updates != before:
            for averages, gamma in zip(self._longer, self.gammas[1:], strict=True):
                torch._foreach_lerp_(averages, self._current, 1 - power_decay(self.updates, gamma))
        if stepped and due(trainer.global_step, self.snapshot_every):
            self._snapshot(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A snapshot of the last state."""
        if trainer.global_step != self._last_written:
            self._snapshot(trainer, pl_module)

    def _snapshot(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._last_written = trainer.global_step
        if not self.updates:
            return
        for std, tensors in zip(self.stds, [self._averaged, *self._longer], strict=True):
            averages = whole(self._as_shards(tensors))  # by all ranks
            if not trainer.is_global_zero:
                continue
            facts = {"step": trainer.global_step, "updates": self.updates, "std": std}
            state = {name: value.cpu() for name, value in zip(self._names, averages, strict=True)}
            path = self.folder / snapshot_name(trainer.global_step, std)
            try:
                write_snapshot(state, path, facts=facts)
            except OSError as error:
                log.warning("no snapshot %s (%s): make room; training goes on without it.", path, error.strerror)

    def state_dict(self) -> dict[str, Any]:
        """Averages and their counter."""
        return super().state_dict() | {
            "longer": [self._as_shards(tensors) for tensors in self._longer],
            "stds": list(self.stds),
        }

    def _as_shards(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [as_shard(tensor, like) for tensor, like in zip(tensors, self._placed, strict=True)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes averages and counter back.

        Raises:
            OrnsteinError: the checkpoint was averaged over other lengths, or by another rule.
        """
        if list(state_dict.get("stds", [])) != list(self.stds):
            raise OrnsteinError(
                f"ema.stds={list(self.stds)}, and the checkpoint holds averages of "
                f"{state_dict.get('stds', 'another kind')}: go on with the same ema= and ema.stds="
            )
        super().load_state_dict(state_dict)
        self._loaded = state_dict["longer"]
        if self._longer:
            self._fill(self._loaded)

    def _fill(self, stored: list[list[Tensor]]) -> None:
        for own, values in zip(self._longer, stored, strict=True):
            for value, kept, like in zip(own, values, self._placed, strict=True):
                value.copy_(local(shared_out(kept, like)))
        self._loaded = None


def write_snapshot(state: Mapping[str, Tensor], path: Path, *, facts: Mapping[str, Any]) -> None:
    """Writes tensors and what they are as safetensors, whole or not at all (OSError from the file system)."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            save_file(
                {name: value.contiguous() for name, value in state.items()},
                partial,
                metadata={name: str(value) for name, value in facts.items()},
            )
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(28, str(error)) from error
        partial.chmod(0o644)  # safetensors' own files are nobody else's to read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
