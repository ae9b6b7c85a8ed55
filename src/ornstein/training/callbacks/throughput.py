"""How fast training goes, without the time that pictures, figures and checkpoints take."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from ornstein.training.base import TrainingModule
from ornstein.training.callbacks.device_stats import peak_tflops
from ornstein.training.callbacks.stopwatch import Stopwatch
from ornstein.training.limits import check_limits

_WINDOW_SECONDS = 0.5
_FORWARD_PASSES = 3  # that a training step costs


@dataclass(frozen=True)
class Lap:
    """Speed since the last lap, over all devices.

    Attributes:
        images_per_s: images a second.
        data_wait_share: of the time, what was spent waiting for data.
        tflops: 10**12 floating-point operations a second of the network's training steps; None where their number is
            not known.
        mfu: model FLOPs utilisation, ``tflops`` over what the devices could do at best; None where that is not known.
    """

    images_per_s: float
    data_wait_share: float
    tflops: float | None = None
    mfu: float | None = None

    def row(self) -> dict[str, float]:
        """What is known, by the names that it is logged under."""
        figures = {
            "time/images_per_s": self.images_per_s,
            "time/data_wait_share": self.data_wait_share,
            "time/tflops": self.tflops,
            "time/mfu": self.mfu,
        }
        return {name: value for name, value in figures.items() if value is not None}


class Throughput(pl.Callback):
    """Keeps the time of training steps. Put it behind the callbacks that work within a step.

    Times are the host's. On an accelerator, which runs behind the host, they are right over windows that end
    with a synchronisation (the training log's rows), and the wait for data is what the host waited.

    A training step counts as three forward passes, one forward and two of work backward (Kaplan et al. 2020, arXiv
    2001.08361, section 2.1; Chowdhery et al. 2022, arXiv 2204.02311, appendix B, for the name MFU), recomputed
    activations, frozen codecs and text encoders not counted.

    Args:
        peak_tflops: of one device at the run's precision, dense; null takes it from a table of known GPUs, and leaves
            MFU out on others and on CPUs.

    Attributes:
        forward_flops: of one forward pass of one sample; whoever has counted them says so here, before training.

    Raises:
        OrnsteinError: a peak that is not positive.
    """

    def __init__(self, *, peak_tflops: float | None = None) -> None:
        check_limits("Throughput", peak_tflops=peak_tflops)
        self.peak_tflops = peak_tflops
        self.forward_flops: float | None = None
        self._peak: float | None = None
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
        self._peak = _peak_of(trainer, self.peak_tflops)
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
        rate = (now[1] - before[1]) / seconds
        tflops = None if self.forward_flops is None else _FORWARD_PASSES * self.forward_flops * rate / 1e12
        mfu = None if tflops is None or self._peak is None else tflops / self._peak
        return Lap(rate, (now[2] - before[2]) / seconds, tflops, mfu)

    def wall_seconds(self) -> float:
        """Seconds since training began, with pictures, figures and checkpoints, earlier starts included."""
        return self._earlier_wall + self._wall.seconds()

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
            "fit_time_s": round(self.wall_seconds(), 3),
        }

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops both clocks."""
        self._clock.pause()
        self._wall.pause()

    def state_dict(self) -> dict[str, float]:
        """Seconds so far."""
        return {
            "wall": self.wall_seconds(),
            "train": self._earlier_train + self._clock.seconds(),
            "wait": self._earlier_wait + self._wait,
        }

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Seconds of earlier starts."""
        self._earlier_wall = float(state_dict["wall"])
        self._earlier_train = float(state_dict["train"])
        self._earlier_wait = float(state_dict["wait"])


def _peak_of(trainer: pl.Trainer, given: float | None) -> float | None:
    """TFLOP/s of all devices together at best, where that is known."""
    device = trainer.strategy.root_device
    one = given
    if one is None and device.type == "cuda":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        one = peak_tflops(torch.cuda.get_device_name(device), str(trainer.precision), tf32=tf32)
    return None if one is None else one * trainer.world_size


def _images_seen(module: pl.LightningModule) -> int:
    assert isinstance(module, TrainingModule)
    return module.images_seen
