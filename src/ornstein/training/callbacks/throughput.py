"""How fast training goes, without the time that pictures, figures and checkpoints take."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from ornstein.training.base import TrainingModule
from ornstein.training.callbacks.stopwatch import Stopwatch

_WINDOW_SECONDS = 0.5


@dataclass(frozen=True)
class Lap:
    """Speed since the last lap: images a second over all devices, and the share of time spent waiting for data."""

    images_per_s: float
    data_wait_share: float


class Throughput(pl.Callback):
    """Keeps the time of training steps. Put it behind the callbacks that work within a step.

    Times are the host's. On an accelerator, which runs behind the host, they are right over windows that end
    with a synchronisation (the training log's rows), and the wait for data is what the host waited.
    """

    def __init__(self) -> None:
        self._wall, self._clock = Stopwatch(), Stopwatch()
        self._earlier_wall = self._earlier_train = self._earlier_wait = 0.0
        self._wait = 0.0
        self._batch_ended: float | None = None
        self._rates: list[float] = []
        self._window = (0.0, 0)
        self._lap = (0.0, 0, 0.0)
        self._steps = self._images = 0

    def pause(self) -> None:
        """Stops the training clock, for something that is not a training step."""
        self._clock.pause()

    def resume(self) -> None:
        """Undoes one :meth:`pause`."""
        self._clock.resume()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clocks."""
        self._wall, self._clock = Stopwatch(), Stopwatch()
        self._batch_ended, self._wait, self._rates = None, 0.0, []
        self._images = _images_seen(pl_module)
        self._steps = trainer.global_step
        self._window = (0.0, self._images)
        self._lap = (0.0, self._images, 0.0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts the time since the last batch as waiting for this one."""
        if self._batch_ended is not None:
            self._wait += self._clock.seconds() - self._batch_ended

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Closes a window of half a second or more."""
        now = self._batch_ended = self._clock.seconds()
        self._steps, self._images = trainer.global_step, _images_seen(pl_module)
        if now - self._window[0] >= _WINDOW_SECONDS:
            self._rates.append((self._images - self._window[1]) / (now - self._window[0]))
            self._window = (now, self._images)

    def lap(self, module: TrainingModule) -> Lap:
        """Speed since the last call."""
        before, now = self._lap, (self._clock.seconds(), module.images_seen, self._wait)
        self._lap = now
        seconds = max(now[0] - before[0], 1e-9)
        return Lap((now[1] - before[1]) / seconds, (now[2] - before[2]) / seconds)

    def summary(self) -> dict[str, float | int]:
        """Figures of the run so far, earlier starts included: the median of images a second (of this start,
        without its first half second, which warms up), the share of training time that waited for data,
        steps, images seen, seconds in training steps and in all. A start without a step has no speed.
        """
        train = self._earlier_train + self._clock.seconds()
        rates = self._rates[1:] or self._rates
        if not rates and self._images > self._window[1] and self._clock.seconds() > 0:
            rates = [(self._images - self._window[1]) / self._clock.seconds()]
        return {
            **({"images_per_s": round(statistics.median(rates), 2)} if rates else {}),
            "data_wait_share": round((self._earlier_wait + self._wait) / max(train, 1e-9), 4),
            "steps": self._steps,
            "images_seen": self._images,
            "train_time_s": round(train, 3),
            "fit_time_s": round(self._earlier_wall + self._wall.seconds(), 3),
        }

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops both clocks."""
        self._clock.pause()
        self._wall.pause()

    def state_dict(self) -> dict[str, float]:
        """Seconds so far."""
        return {
            "wall": self._earlier_wall + self._wall.seconds(),
            "train": self._earlier_train + self._clock.seconds(),
            "wait": self._earlier_wait + self._wait,
        }

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Seconds of earlier starts."""
        self._earlier_wall = float(state_dict["wall"])
        self._earlier_train = float(state_dict["train"])
        self._earlier_wait = float(state_dict["wait"])


def _images_seen(module: pl.LightningModule) -> int:
    assert isinstance(module, TrainingModule)
    return module.images_seen
