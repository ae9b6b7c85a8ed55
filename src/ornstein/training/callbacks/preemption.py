"""A cluster takes the machine back: a last checkpoint, then out, and back into the queue where it was asked for."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from ornstein.training.callbacks.checkpoint import Checkpoint
from ornstein.training.callbacks.lookup import callbacks_of
from ornstein.training.limits import check_limits

log = logging.getLogger(__name__)
# Time limits and preemption are announced by one of these (sbatch --signal=USR1@120; submitit's is USR2).
NOTICES = ("SIGUSR1", "SIGUSR2")
_EXIT_CODE = 75  # sysexits' EX_TEMPFAIL: try again later


class Preempted(SystemExit):
    """Training was stopped by a notice, after a checkpoint; :meth:`hand_over` asks for the job to be queued again."""

    def __init__(self, notice: str, hand_over: Callable[[], None]) -> None:
        super().__init__(_EXIT_CODE)
        self.notice = notice
        self.hand_over = hand_over

    def __str__(self) -> str:
        return f"stopped by {self.notice}, with a checkpoint"


class Preemption(pl.Callback):
    """Answers SIGUSR1 and SIGUSR2 at the end of the running step: checkpoint, then :class:`Preempted`.

    Whoever runs the training closes its logs and calls :meth:`Preempted.hand_over`. That is whatever answered the
    signal before training began (submitit's handler, which queues its job again), or ``scontrol requeue`` within a
    SLURM job that nobody else looks after, or nothing elsewhere. Lightning's own handling of requeues must be off.

    SIGTERM stops training after a checkpoint too (Lightning's doing), and asks for nothing: SLURM itself queues a job
    again that it took the machine from, and ``scancel`` means the end.

    Args:
        every: steps between agreements where there are several processes, which get the signal at different steps and
            have to stop at one. One process looks at each step.

    Raises:
        OrnsteinError: every < 1.
    """

    def __init__(self, *, every: int = 10) -> None:
        check_limits("Preemption", every=every)
        self.every = every
        self._notice: int | None = None
        self._before: dict[int, Any] = {}
        self._seen = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the signals into its own hands, until training ends."""
        self._notice, self._seen = None, trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            return
        for name in NOTICES:
            number = getattr(signal, name, None)
            if number is not None:
                self._before[number] = signal.signal(number, self._on_notice)

    def _on_notice(self, number: int, frame: Any) -> None:
        self._notice = number
        log.warning("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Has the checkpoint callback, which comes last, stop training where a notice has come."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        noticed = self._notice is not None
        if trainer.world_size > 1:
            if trainer.global_step % self.every:
                return
            noticed = trainer.strategy.reduce_boolean_decision(noticed, all=False)
        if not noticed:
            return
        number = self._notice if self._notice is not None else int(signal.SIGUSR1)
        stop = Preempted(signal.Signals(number).name, self._successor(number, first=trainer.is_global_zero))
        for checkpoint in callbacks_of(trainer, Checkpoint):
            checkpoint.stop_with(stop)
            return
        raise stop

    def _successor(self, number: int, *, first: bool) -> Callable[[], None]:
        """What has the job queued again: the handler of before, or SLURM's own command, by one process."""
        before = self._before.get(number)
        if callable(before):
            return lambda: before(number, None)
        return requeue if first else _nothing

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the signals back."""
        self._give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _nothing() -> None:
    """Another process asks."""


def requeue() -> None:
    """``scontrol requeue`` of the SLURM job that this is; one line where that fails, nothing outside a job."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        fault = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        fault = str(error)
    if fault:
        log.warning(
            "job %s could not be queued again (%s): submit it by hand, it goes on where it stopped.", job, fault
        )
