"""What is written of a run so that it can go on: the last state, the best, and every so many steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ornstein.data.workers import WorkersDied
from ornstein.errors import OrnsteinError
from ornstein.metrics.figures.naming import same_figure
from ornstein.training.base import TrainingModule
from ornstein.training.callbacks import checkpoint_files as files
from ornstein.training.callbacks.checkpoint_writer import CheckpointWriter
from ornstein.training.callbacks.lookup import callbacks_of
from ornstein.training.callbacks.nonfinite import NonFiniteGuard
from ornstein.training.callbacks.progress import progress_task
from ornstein.training.ema import EMA
from ornstein.training.limits import check_limits
from ornstein.training.record import due


class Checkpoint(pl.callbacks.Checkpoint):
    """Writes ``checkpoints/last.ckpt``, ``best.ckpt`` and, if asked, ``step_000400.ckpt``.

    Every checkpoint stands between two optimizer steps, after all other callbacks have handled the step
    (Lightning moves checkpoint callbacks to the end), so that a resumed run repeats nothing and misses
    nothing. One state is written once, as ``last.ckpt``: best and numbered files are hard links to it where the file
    system has them; a run that was killed in between makes them when it goes on. ``last`` and ``best`` have their
    averaged weights beside them (``last.ema.safetensors``), where the run averages.

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
        keep_every: keep checkpoints under their step's name: true each periodic one, a number those of every so many
            steps, which are then written whatever ``every`` is.
        keep_every_images: so many images seen between checkpoints that are kept under their step's name; null is never.
        keep_last: how many of those to keep, the newest; null is all.
        asynchronous: copy the state when it is due, and write the copy while training goes on; takes the state's size
            of the host's memory. The next checkpoint, and the end of training however it comes, wait for it.
        ema_weights: write the averaged weights beside ``last`` and ``best``.

    Attributes:
        last_path: the newest checkpoint that this process has written.

    Raises:
        OrnsteinError: an interval < 1, a negative ``keep_best``, or an unknown mode; and in training, a checkpoint that
            cannot be written.
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
        keep_every: bool | int = False,
        keep_every_images: int | None = None,
        keep_last: int | None = None,
        asynchronous: bool = False,
        ema_weights: bool = True,
    ) -> None:
        check_limits("Checkpoint", every=every, every_images=every_images, mode=mode, keep_best=keep_best)
        check_limits("Checkpoint", keep_every=keep_every, keep_every_images=keep_every_images, keep_last=keep_last)
        check_limits("Checkpoint", asynchronous=asynchronous, ema_weights=ema_weights)
        self.folder = Path(run_dir) / "checkpoints"
        self.every, self.every_images = every, every_images
        self.monitor, self.mode = monitor, mode
        self.keep_best, self.keep_every, self.keep_every_images = keep_best, keep_every, keep_every_images
        self.keep_last, self.asynchronous, self.ema_weights = keep_last, asynchronous, ema_weights
        self.last_path: Path | None = None
        self._writer: CheckpointWriter | None = None
        self._numbered = False  # whether the state that is written now is kept under its step's name
        self._best: list[tuple[float, int]] = []  # (figure, step), best first
        self._offered: float | None = None
        # How many figures there were, and which of them is the monitored one.
        self._names = -1
        self._name: str | None = None
        self._seen = self._saved = -1
        self._images = 0
        self._between_steps = False
        self._stop: BaseException | None = None
        self._previous_handler: Any = None

    @property
    def best_score(self) -> float | None:
        """The figure of ``best.ckpt``; None before there is one."""
        return self._best[0][0] if self._best else None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Puts the writer between the strategy and the plugin that writes."""
        if stage == "fit" and self._writer is None:
            self._writer = CheckpointWriter(trainer.strategy.checkpoint_io, asynchronous=self.asynchronous)
            trainer.strategy.checkpoint_io = self._writer

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes it out again, when it has written all."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            trainer.strategy.checkpoint_io = writer.inner
            writer.close()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes up the count where a checkpoint left it, and Ctrl-C into its own hands."""
        assert isinstance(pl_module, TrainingModule)
        self._seen = self._saved = trainer.global_step
        self._images = pl_module.images_seen
        self._stop = None
        if trainer.is_global_zero and self.folder.is_dir():
            files.sweep_up(self.folder)
            if trainer.ckpt_path is not None and Path(trainer.ckpt_path).parent.resolve() == self.folder.resolve():
                self._complete(trainer, Path(trainer.ckpt_path))
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
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        self._between_steps = True
        if self._writer is not None:
            self._writer.look()
        before, self._images = self._images, self._images_seen(pl_module)
        periodic = due(step, self.every) | _crossed(before, self._images, self.every_images)
        kept = periodic if self.keep_every is True else due(step, self.keep_every or None)
        kept |= _crossed(before, self._images, self.keep_every_images)
        rank = self._rank_of_new_figure(trainer)
        stopping = self._stop is not None or step == trainer.max_steps
        if periodic or kept or rank is not None or stopping:
            self._save(trainer, pl_module, rank=rank, numbered=kept)
        if self._stop is not None:
            self._wait()
            raise self._stop

    @staticmethod
    def _images_seen(module: pl.LightningModule) -> int:
        assert isinstance(module, TrainingModule)
        return module.images_seen

    def _rank_of_new_figure(self, trainer: pl.Trainer) -> int | None:
        """Place among the best (0 is best) of a monitored figure that was logged since the last look, if it has one."""
        if self.monitor is None or self.keep_best == 0:
            return None
        metrics = trainer.callback_metrics
        if len(metrics) != self._names:  # they only grow in number, and looking through them each step takes time
            self._names, self._name = len(metrics), same_figure(self.monitor, metrics)
        if self._name is None:
            return None
        figure = float(metrics[self._name])
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
        self._wait()  # one at a time
        step, places = trainer.global_step, {known: files.best_name(at) for at, (_, known) in enumerate(self._best)}
        if rank is not None:
            assert self._offered is not None
            self._best.insert(rank, (self._offered, step))
            del self._best[self.keep_best :]
        self._numbered = numbered
        # Best and numbered names follow: killed in between, the run goes on from the newest file, which has them.
        sources = {known: self.folder / name for known, name in places.items()} | {step: self.folder / files.LAST}
        wanted = [known for _, known in self._best] if rank is not None else []
        facts = self._facts(trainer, module)
        with progress_task(trainer, "checkpoint"):
            if self._writer is not None and trainer.is_global_zero:
                self._writer.then = partial(self._settle, facts=facts, wanted=wanted, sources=sources, kept=numbered)
            trainer.save_checkpoint(self.folder / files.LAST, weights_only=False)
        self._saved = step
        if not trainer.is_global_zero:
            self.last_path = self.folder / files.LAST

    def _settle(
        self,
        state: Mapping[str, Any],
        *,
        facts: dict[str, Any],
        wanted: list[int],
        sources: dict[int, Path],
        kept: bool,
    ) -> None:
        """What follows once ``last.ckpt`` is written, in the thread that wrote it: averages and the other names.

        Raises:
            OrnsteinError: a file cannot be written.
        """
        last = self.folder / files.LAST
        self.last_path = last
        averages = state.get("callbacks", {}).get(EMA.__qualname__, {})
        if self.ema_weights and averages.get("network"):
            files.write_averages(files.beside(last), averages, facts=facts)
        else:  # those of an earlier state, where a run goes on without
            files.beside(last).unlink(missing_ok=True)
        try:
            files.arrange_best(self.folder, wanted, sources)
            if kept:
                files.link(last, self.folder / files.numbered_name(facts["step"]))
                if self.keep_last is not None:
                    files.prune_numbered(self.folder, keep=self.keep_last)
        except OSError as error:  # where there are no hard links these are copies
            raise OrnsteinError(
                f"checkpoint {last} has no room for its other names ({error.strerror or error}): make room or choose "
                f"another folder; the last good checkpoint is {last}"
            ) from error

    def _complete(self, trainer: pl.Trainer, origin: Path) -> None:
        """What a run that was killed between ``last.ckpt`` and what follows had no time for."""
        step, last = trainer.global_step, self.folder / files.LAST
        if self.ema_weights and origin.name == last.name and files.step_of_averages(files.beside(last)) != step:
            # From the file: over several devices the averages themselves may be spread over them.
            averages = files.read_state(origin).get("callbacks", {}).get(EMA.__qualname__, {})
            if averages.get("network"):
                files.write_averages(files.beside(last), averages, facts=self._facts(trainer, trainer.lightning_module))
        wanted = [known for _, known in self._best]
        if step in wanted:
            files.arrange_best(self.folder, wanted, {step: origin} | files.steps_of_best(self.folder))
        numbered = self.folder / files.numbered_name(step)
        if self._numbered and not numbered.exists():
            files.link(origin, numbered)

    def _facts(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """What the header of a file of averages says."""
        facts: dict[str, Any] = {"step": trainer.global_step, "images_seen": self._images_seen(module)}
        for averaging in callbacks_of(trainer, EMA):
            facts |= averaging.facts()
        return facts

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.wait()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the final state, unless the last step has done so and nothing was logged since."""
        self._restore_handler()
        rank = self._rank_of_new_figure(trainer)
        if trainer.global_step > 0 and (rank is not None or self._saved != trainer.global_step):
            again = self._saved == trainer.global_step
            self._save(trainer, pl_module, rank=rank, numbered=again and self._numbered)
        self._wait()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Writes the state where the run was stopped between two steps: from outside, or as data workers died."""
        self._restore_handler()
        stopped = isinstance(exception, KeyboardInterrupt | SIGTERMException | WorkersDied)
        alone = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
        if stopped and alone and self._between_steps and self._saved != trainer.global_step:
            self._save(trainer, pl_module)
        try:
            self._wait()
        except OrnsteinError as fault:  # beside what training stopped for
            rank_zero_warn(str(fault))

    def state_dict(self) -> dict[str, Any]:
        """The best figures so far with their steps, and whether this state is kept under its step's name."""
        return {"best": [list(entry) for entry in self._best], "offered": self._offered, "numbered": self._numbered}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        self._best = [(float(figure), int(step)) for figure, step in state_dict["best"]]
        self._offered = state_dict["offered"]
        self._numbered = bool(state_dict.get("numbered", False))


def _crossed(before: int, now: int, interval: int | None) -> bool:
    """Whether a multiple of ``interval`` was reached on the way; null is never."""
    return interval is not None and now // interval > before // interval
