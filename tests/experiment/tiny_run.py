"""Real Lightning runs, as small as can be: ``python tiny_run.py '[{"folder": ..., "steps": 18}, ...]'``.

Each run is a forked process of its own, so that it can be killed and Lightning is imported once; their exit
statuses are printed. A run logs both ways that the project knows: Lightning's ``self.log`` and a callback's
rows at ``global_step``. It goes on from the newest checkpoint of its folder.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger

from ornstein.experiment import (
    AtomicCheckpointIO,
    CSVLogger,
    ResumableLogs,
    RunDirectory,
    set_determinism,
    wandb_logger,
)

BATCHES = 8


class Data(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return BATCHES * 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(3, generator=torch.Generator().manual_seed(index))


class Position(torch.utils.data.Sampler[int]):
    """In order, once from a later batch on: Lightning itself begins a resumed epoch's data anew."""

    start = 0

    def __len__(self) -> int:
        return BATCHES * 4

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        return iter(range(start * 4, BATCHES * 4))


class Tiny(pl.LightningModule):
    def __init__(self, position: Position) -> None:
        super().__init__()
        self.position = position
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.net(batch) - batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", (self.net(batch) - batch).square().mean())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.position.start = checkpoint["global_step"] % BATCHES

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 1000)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Record(pl.Callback):
    """Logs at ``global_step``, as the project's own callbacks do."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step % 3 == 0:
            norm = sum(parameter.detach().square().sum().item() for parameter in module.parameters())
            for logger in trainer.loggers:
                logger.log_metrics({"norm": norm, "images_seen": trainer.global_step * 4}, step=trainer.global_step)


class Kill(pl.Callback):
    """Dies inside one chosen hook of one chosen step."""

    def __init__(self, where: str) -> None:
        self.hook, _, step = where.partition(":")
        self.step = int(step)

    def _maybe(self, hook: str, trainer: pl.Trainer) -> None:
        if hook == self.hook and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._maybe("start", trainer)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._maybe("validation", trainer)


class KillAfterSave(AtomicCheckpointIO):
    """Dies between a checkpoint and whatever Lightning does next."""

    step = -1

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        if checkpoint["global_step"] == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, steps: int, kill: str = "never:0", wandb: bool = False) -> None:
    """``kill``: ``<start|validation|saved>:<global step>``."""
    set_determinism(0, deterministic=True)
    run = RunDirectory(folder)
    plugin = KillAfterSave()
    if kill.startswith("saved:"):
        plugin.step = int(kill.split(":")[1])
    position = Position()
    loader = torch.utils.data.DataLoader(Data(), batch_size=4, sampler=position)
    held_out = torch.utils.data.DataLoader(Data(), batch_size=4)
    checkpoints = ModelCheckpoint(
        run.checkpoints,
        monitor="loss",
        save_top_k=2,
        save_last=True,
        every_n_train_steps=5,
        filename="best-{step:06d}",
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )
    loggers: list[Logger] = [CSVLogger(run.metrics_path)]
    if wandb:
        loggers.append(wandb_logger(folder, "ornstein", mode="online"))  # without a key, it must not ask for one
        assert "wandb" not in sys.modules, "imported before the first value is logged"
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=loggers,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        limit_val_batches=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[plugin],
        callbacks=[Record(), ResumableLogs(), Kill(kill), checkpoints],
    )
    with run.lock():
        trainer.fit(Tiny(position), loader, held_out, ckpt_path=run.last_checkpoint(), weights_only=True)
        trainer.save_checkpoint(folder / "end.ckpt")


def main() -> None:
    """Run one after the other."""
    for job in json.loads(sys.argv[1]):
        pid = os.fork()
        if pid == 0:
            train(Path(job.pop("folder")), **job)
            sys.exit()  # the ordinary way out, in which W&B finishes its run
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
