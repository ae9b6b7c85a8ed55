"""One bar over the whole training, and what happens beside it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from ornstein.training.base import TrainingModule
from ornstein.training.callbacks.lookup import callbacks_of
from ornstein.training.callbacks.stopwatch import Stopwatch
from ornstein.training.callbacks.throughput import Throughput

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_REFRESH_SECONDS = 0.25
_LINE_SECONDS, _LONGEST_LINE_SECONDS = 10.0, 300.0
_RECENT = 20  # refreshes that speed and loss are taken over: 5 s on a terminal


class ProgressBar(pl.callbacks.ProgressBar):
    """Steps done of ``max_steps``, recent images a second, recent loss and time left, by rich.

    Where the output is no terminal, a plain line every ten seconds, later every tenth of the time passed so
    far (at most five minutes). Between refreshes a step costs one look at the clock; the loss is read (which
    waits for the device) once a refresh, four times a second at most. The text goes to standard error.

    Args:
        console: where to write.
    """

    def __init__(self, *, console: Console | None = None) -> None:
        super().__init__()
        self._console = console
        self._enabled = True
        self._progress: Progress | None = None
        self._main: TaskID | None = None
        self._clock = Stopwatch()
        self._next = 0.0
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=_RECENT)
        self._losses: deque[float] = deque(maxlen=_RECENT)
        self._began = 0.0

    def enable(self) -> None:
        """Shows something again."""
        self._enabled = True

    def disable(self) -> None:
        """Shows nothing, as on every rank but the first."""
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        if self._enabled:
            self._out().print(*args, markup=False, highlight=False, **kwargs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar."""
        if not self._enabled:
            return
        assert isinstance(pl_module, TrainingModule)
        self._clock, self._began = Stopwatch(), time.perf_counter()
        self._recent.clear()
        self._recent.append((0.0, trainer.global_step, pl_module.images_seen))
        self._next = 0.0 if self._out().is_terminal else self._began + _LINE_SECONDS
        if self._out().is_terminal:
            self._open(trainer)

    def _open(self, trainer: pl.Trainer) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[info]}"),
            console=self._out(),
            # No thread of its own: it would compete with training for the interpreter.
            auto_refresh=False,
            expand=True,
        )
        self._main = self._progress.add_task(
            "training", total=max(trainer.max_steps, 1), completed=trainer.global_step, count="", info=""
        )
        self._progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refreshes at most four times a second."""
        if not self._enabled or (time.perf_counter() < self._next and trainer.global_step != trainer.max_steps):
            return
        assert isinstance(pl_module, TrainingModule)
        self._measure(trainer, pl_module)
        step, total = trainer.global_step, trainer.max_steps
        if self._progress is not None and self._main is not None:
            self._progress.update(self._main, completed=step, count=f"{step}/{total}", info=self._info(trainer))
            self._progress.refresh()
            self._next = time.perf_counter() + _REFRESH_SECONDS
        else:
            share = f" ({100 * step / total:.0f} %)" if total > 0 else ""
            self.print(f"step {step}/{total}{share}  {self._info(trainer)}")
            self._next = self._next_line()

    def _measure(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self._recent.append((self._clock.seconds(), trainer.global_step, module.images_seen))
        if module.last_output is not None:
            self._losses.append(float(module.last_output.per_sample.mean()))

    def _info(self, trainer: pl.Trainer) -> str:
        first, last = self._recent[0], self._recent[-1]
        seconds = max(last[0] - first[0], 1e-9)
        steps_per_s = (last[1] - first[1]) / seconds
        parts = [f"loss {sum(self._losses) / len(self._losses):.4f}"] if self._losses else []
        parts.append(f"{(last[2] - first[2]) / seconds:,.0f} images/s")
        if steps_per_s > 0 and trainer.max_steps > 0:
            parts.append(f"{_duration((trainer.max_steps - trainer.global_step) / steps_per_s)} left")
        return "  ".join(parts)

    def _next_line(self) -> float:
        now = time.perf_counter()
        return now + min(max(_LINE_SECONDS, 0.1 * (now - self._began)), _LONGEST_LINE_SECONDS)

    @contextmanager
    def task(self, name: str, total: int | None) -> Iterator[Callable[[], None]]:
        """A second line for what training waits for; the given function counts one of ``total``."""
        self._clock.pause()
        line = None
        if self._progress is not None:
            line = self._progress.add_task(name, total=total, count="", info="")
            self._progress.refresh()
        done, following = 0, time.perf_counter() + (_REFRESH_SECONDS if line is not None else _LINE_SECONDS)

        def advance() -> None:
            nonlocal done, following
            done += 1
            if time.perf_counter() < following or not self._enabled:
                return
            if self._progress is not None and line is not None:
                self._progress.update(line, completed=done, count=f"{done}/{total}" if total else str(done))
                self._progress.refresh()
                following = time.perf_counter() + _REFRESH_SECONDS
            else:
                self.print(f"{name} {done}/{total}" if total else f"{name} {done}")
                following = self._next_line()

        try:
            yield advance
        finally:
            if self._progress is not None and line is not None:
                self._progress.remove_task(line)
                self._progress.refresh()
            self._clock.resume()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the bar, which stays on the screen as it stands."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the message stands below it."""
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _out(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        return self._console


@contextmanager
def progress_task(trainer: pl.Trainer, name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Does something beside training: shown in the progress bar, left out of the speed of training.

    ``with progress_task(trainer, "sampling", 50) as advance:`` and ``advance()`` after each of the 50.
    """
    clocks = callbacks_of(trainer, Throughput)
    for clock in clocks:
        clock.pause()
    try:
        bar = trainer.progress_bar_callback
        if isinstance(bar, ProgressBar):
            with bar.task(name, total) as advance:
                yield advance
        else:
            yield lambda: None
    finally:
        for clock in clocks:
            clock.resume()


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
