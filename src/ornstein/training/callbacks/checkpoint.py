"""What is written of a run so that it can go on: the last state, the best, and every so many steps."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ornstein.metrics.figures.naming import same_figure
from ornstein.training.base import TrainingModule
from ornstein.training.callbacks.lookup import callbacks_of
from ornstein.training.callbacks.nonfinite import NonFiniteGuard
from ornstein.training.callbacks.progress import progress_task
from ornstein.training.limits import check_limits
from ornstein.training.record import due


class Checkpoint(pl.callbacks.Checkpoint):
    """Writes ``checkpoints/last.ckpt``, ``best.ckpt`` and, if asked, ``step_000400.ckpt``.

    Every checkpoint stands between two optimizer steps, after all other callbacks have handled the step
    (Lightning moves checkpoint callbacks to the end), so that a resumed run repeats nothing and misses
    nothing. One state is written once: best and numbered files are hard links to it where the file system has
    them.

    Ctrl-C is answered at the end of the running step, with a checkpoint; a second one at once, without.
    SIGTERM is Lightning's, which stops after the running step too.

    Args:
        run_dir: the run's folder.
        every: optimizer steps between checkpoints; null leaves them to ``every_images`` and the end.
        every_images: images seen between checkpoints; null is never.
        monitor: name of a logged figure that says which state is best; null keeps none. ``val/fid`` is also
            ``val/fid_1k``, as it is logged of too few samples to compare, and the Fréchet distance of another feature
            space where that is the run's own.
        mode: whether that figure is better when smaller (``min``) or larger (``max``).
        keep_best: how many to keep: ``best.ckpt``, ``best_2.ckpt``, ...
        keep_every: keep each periodic checkpoint under its step's name.

    Attributes:
        last_path: the newest checkpoint that this process has written.

    Raises:
        OrnsteinError: an interval < 1, a negative ``keep_best``, or an unknown mode.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        every: int | None = 200,
        every_images: int | None = None,
        monitor: str | None = "val/fid",
        mode: Literal["min", "max"] = "min",
        keep_best: int = 1,
        keep_every: bool = False,
    ) -> None:
        check_limits("Checkpoint", every=every, every_images=every_images, mode=mode, keep_best=keep_best)
        self.folder = Path(run_dir) / "checkpoints"
        self.every, self.every_images = every, every_images
        self.monitor, self.mode = monitor, mode
        self.keep_best, self.keep_every = keep_best, keep_every
        self.last_path: Path | None = None
        self._best: list[tuple[float, int]] = []  # (figure, step), best first
        self._offered: float | None = None
        self._seen = self._saved = -1
        self._images = 0
        self._between_steps = False
        self._stop: BaseException | None = None
        self._previous_handler: Any = None

    @property
    def best_score(self) -> float | None:
        """The figure of ``best.ckpt``; None before there is one."""
        return self._best[0][0] if self._best else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes up the count where a checkpoint left it, and Ctrl-C into its own hands."""
        assert isinstance(pl_module, TrainingModule)
        self._seen = self._saved = trainer.global_step
        self._images = pl_module.images_seen
        self._stop = None
        # Several processes get their signals at different steps, and a checkpoint needs them all at one.
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, number: int, frame: Any) -> None:
        self._restore_handler()
        self._stop = KeyboardInterrupt()
        rank_zero_warn("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once, without")

    def stop_with(self, reason: BaseException) -> None:
        """Ends training after the running step: with a checkpoint, and then by raising ``reason``."""
        self._stop = reason

    def _restore_handler(self) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes that a step has begun."""
        self._between_steps = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes what is due after the step."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        self._between_steps = True
        periodic = due(trainer, self.every) | self._images_due(pl_module)
        rank = self._rank_of_new_figure(trainer)
        if periodic or rank is not None or self._stop is not None or trainer.global_step == trainer.max_steps:
            self._save(trainer, pl_module, rank=rank, numbered=periodic and self.keep_every)
        if self._stop is not None:
            raise self._stop

    def _images_due(self, module: pl.LightningModule) -> bool:
        assert isinstance(module, TrainingModule)
        before, self._images = self._images, module.images_seen
        return self.every_images is not None and self._images // self.every_images > before // self.every_images

    def _rank_of_new_figure(self, trainer: pl.Trainer) -> int | None:
        """Place among the best (0 is best) of a monitored figure that was logged since the last look, if it has one."""
        if self.monitor is None or self.keep_best == 0:
            return None
        name = same_figure(self.monitor, trainer.callback_metrics)
        if name is None:
            return None
        figure = float(trainer.callback_metrics[name])
        if figure == self._offered or figure != figure:
            return None
        self._offered = figure
        sign = 1 if self.mode == "min" else -1
        rank = sum(sign * known <= sign * figure for known, _ in self._best)
        return rank if rank < self.keep_best else None

    def _save(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        *,
        rank: int | None = None,
        numbered: bool = False,
    ) -> None:
        for guard in callbacks_of(trainer, NonFiniteGuard):
            guard.check_before_checkpoint(trainer, module)
        names = ["last.ckpt"]
        if rank is not None:
            assert self._offered is not None
            self._best.insert(rank, (self._offered, trainer.global_step))
            del self._best[self.keep_best :]
            names.insert(0, self._best_name(rank))
        if numbered:
            names.insert(0, f"step_{trainer.global_step:06}.ckpt")
        with progress_task(trainer, "checkpoint"):
            if rank is not None and trainer.is_global_zero:
                self._make_room(rank)
            # last.ckpt comes last: a run killed in between goes on from the newest file, the same state.
            trainer.save_checkpoint(self.folder / names[0], weights_only=False)
            if trainer.is_global_zero:
                for name in names[1:]:
                    _link(self.folder / names[0], self.folder / name)
        self._saved = trainer.global_step
        self.last_path = self.folder / "last.ckpt"

    def _make_room(self, rank: int) -> None:
        for place in range(len(self._best) - 1, rank, -1):
            earlier = self.folder / self._best_name(place - 1)
            if earlier.exists():
                os.replace(earlier, self.folder / self._best_name(place))

    @staticmethod
    def _best_name(rank: int) -> str:
        return "best.ckpt" if rank == 0 else f"best_{rank + 1}.ckpt"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the final state, unless the last step has done so and nothing was logged since."""
        self._restore_handler()
        rank = self._rank_of_new_figure(trainer)
        if trainer.global_step > 0 and (rank is not None or self._saved != trainer.global_step):
            self._save(trainer, pl_module, rank=rank)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Writes the state where the run was stopped from outside between two steps."""
        self._restore_handler()
        stopped = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        alone = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
        if stopped and alone and self._between_steps and self._saved != trainer.global_step:
            self._save(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The best figures so far with their steps."""
        return {"best": [list(entry) for entry in self._best], "offered": self._offered}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        self._best = [(float(figure), int(step)) for figure, step in state_dict["best"]]
        self._offered = state_dict["offered"]


def _link(source: Path, target: Path) -> None:
    """Makes ``target`` the same file as ``source``, or a copy of it, in one step."""
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:  # no hard links here
        shutil.copyfile(source, partial)
    os.replace(partial, target)
