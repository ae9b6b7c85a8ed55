from __future__ import annotations

import io
import re
import time

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from ornstein.diffusion.densities import LogNormalSigma
from ornstein.diffusion.objectives import Objective
from ornstein.diffusion.parameterizations import EDMPreconditioned
from ornstein.diffusion.samplers import DPMpp2M, Heun
from ornstein.diffusion.schedules import EDM, Flow
from ornstein.errors import OrnsteinError
from ornstein.training.callbacks import (
    Periodic,
    ProgressBar,
    SampleGrid,
    SchedulePlot,
    Throughput,
    TrainingLog,
    Trajectory,
    Validation,
    progress_task,
)
from ornstein.training.callbacks.stopwatch import Stopwatch
from ornstein.training.callbacks.trajectory import spread
from ornstein.training.ema import EMA


class Steps(Periodic):
    def __init__(self, **options):
        super().__init__(**options)
        self.acted = []

    def act(self, trainer, module):
        self.acted.append(trainer.global_step)


@pytest.mark.parametrize(
    ("every", "at_end", "accumulate", "expected"),
    [
        (3, True, 1, [3, 6, 7]),
        (3, False, 1, [3, 6]),
        (7, True, 1, [7]),
        (None, True, 1, [7]),
        (None, False, 1, []),
        (2, True, 3, [2, 4, 6, 7]),
    ],
)
def test_periods_count_optimizer_steps(fit, every, at_end, accumulate, expected):
    steps = Steps(every=every, at_end=at_end)
    fit([steps], steps=7, accumulate_grad_batches=accumulate)
    assert steps.acted == expected


def test_the_end_comes_also_where_training_stops_early(fit):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 4

    steps = Steps(every=3, at_end=True)
    fit([steps, Stop()], steps=9, min_epochs=0)
    assert steps.acted == [3, 4]


def test_refuses_a_period_of_nothing():
    with pytest.raises(OrnsteinError, match="every=0"):
        Steps(every=0, at_end=True)


@pytest.mark.parametrize("classes", [3, None])
def test_sample_grid(fit, make_module, make_data, rows, tmp_path, classes):
    logger = rows()
    grid = SampleGrid(tmp_path, every=2, samples_per_class=5, num_samples=7, seed=3, batch_size=4)
    trainer = fit(
        [EMA(), grid], steps=3, module=make_module(classes=classes), data=make_data(classes=classes), logger=logger
    )
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_000002.png", "step_000003.png"]
    assert logger.pictures == [("samples", 2), ("samples", 3)]
    columns, rows_ = (5, 3) if classes else (3, 3)
    picture = Image.open(tmp_path / "samples" / "step_000003.png")
    tile = 4 * 18  # 4 pixels wide, enlarged to 72
    assert picture.height == rows_ * (tile + 2) + 2
    margin = picture.width - (columns * (tile + 2) + 2)
    assert (margin > 0) == (classes is not None)
    module = trainer.lightning_module
    pixels = np.asarray(picture)[:, margin:]
    index = 1 if classes is None else 3 + 0  # second tile of the first row: sample 1, or the second of class 0
    (drawn,) = module.generate([index], seed=3)
    found = pixels[2 : 2 + tile : 18, 2 + tile + 2 : 2 + tile + 2 + tile : 18, 0]
    # of another batch size: images agree to rounding
    assert np.abs(found.astype(int) - drawn.images[0, 0].numpy().astype(int)).max() <= 1


def test_sample_grid_of_many_classes_shows_some(fit, make_module, tmp_path):
    fit([SampleGrid(tmp_path, every=None, samples_per_class=4, max_classes=2)], steps=1)
    picture = Image.open(tmp_path / "samples" / "step_000001.png")
    assert picture.height == 2 * 74 + 2


@pytest.mark.parametrize(
    ("options", "frames", "columns"),
    [
        ({"sampler": DPMpp2M(steps=6)}, 7, 5),
        ({"schedule": Flow(), "sampler": Heun(steps=3)}, 4, 4),
        ({"schedule": EDM(), "objective": Objective(EDMPreconditioned(), LogNormalSigma())}, 5, 5),
    ],
)
def test_trajectory(fit, make_module, rows, tmp_path, options, frames, columns):
    logger = rows()
    trajectory = Trajectory(tmp_path, samples_per_class=2, strip_samples=2, strip_steps=4)
    fit([trajectory], steps=1, module=make_module(**options), logger=logger)
    assert logger.pictures == [("trajectory", 1), ("denoising", 1)]
    picture = Image.open(tmp_path / "samples" / "trajectory_000001.png")
    assert picture.height == 2 * 2 * 74 + 2
    assert 0 < picture.width - (columns * 74 + 2) < 0.3 * picture.width  # columns, and the labels at their left
    film = Image.open(tmp_path / "samples" / "trajectory_000001.gif")
    assert film.n_frames == frames
    spreads = []
    for number in (0, frames - 1):
        film.seek(number)
        spreads.append(np.asarray(film.convert("L")).std())
    assert spreads[0] > 20  # it begins with noise, at a scale that can be seen


@pytest.mark.parametrize(("steps", "count"), [(1, 2), (2, 2), (10, 4), (50, 10), (3, 30)])
def test_spread(steps, count):
    chosen = spread(steps, count)
    assert len(chosen) == min(steps, count) and {0, steps - 1} <= chosen <= set(range(steps))


@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": Flow()}, {"schedule": EDM(), "objective": Objective(EDMPreconditioned(), LogNormalSigma())}],
)
def test_schedule_plot_is_there_before_the_first_step(fit, make_module, rows, tmp_path, options):
    seen, logger = [], rows()

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((tmp_path / "schedule.png").is_file())

    fit([SchedulePlot(tmp_path), Look()], steps=1, module=make_module(**options), logger=logger)
    assert seen == [True] and logger.pictures == [("schedule", 0)]
    picture = Image.open(tmp_path / "schedule.png")
    assert picture.size == (1000, 640) and len(picture.convert("L").getcolors()) > 20


def test_validation_is_the_mean_over_the_held_out_images(fit, make_data, rows):
    logger, data = rows(), make_data(batch_size=7)  # 24 images: 7, 7, 7, 3
    trainer = fit([EMA(decay=0.5), Validation(every=2)], steps=3, data=data, logger=logger)
    assert [step for step, row in logger.rows.items() if "val/loss" in row] == [2, 3]
    module = trainer.lightning_module
    total = sum(
        float(module.validation_step(batch, index)) * len(batch["image"])
        for index, batch in enumerate(data.val_dataloader())
    )
    assert logger.rows[3]["val/loss"] == pytest.approx(total / 24, rel=1e-6)  # float32 sums of four losses


def test_validation_of_some_batches_and_never(fit, rows):
    some, never = rows(), rows()
    fit([Validation(every=1, max_batches=1)], steps=1, logger=some)
    fit([Validation(every=None)], steps=1, logger=never)
    assert "val/loss" in some.rows[1] and never.rows == {}


class Slow(pl.Callback):
    """Spends time inside a task, or as part of the step."""

    def __init__(self, seconds, *, task):
        self.seconds, self.task = seconds, task

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.task:
            with progress_task(trainer, "dawdling"):
                time.sleep(self.seconds)
        else:
            time.sleep(self.seconds)


def test_throughput_leaves_out_what_is_not_training(fit, rows):
    logger, throughput = rows(), Throughput()
    fit([Slow(0.1, task=True), Slow(0.02, task=False), TrainingLog(every=2), throughput], steps=8, logger=logger)
    summary = throughput.summary()
    assert summary["steps"] == 8 and summary["images_seen"] == 32
    assert 0.16 <= summary["train_time_s"] < 0.8 <= summary["fit_time_s"]
    assert 32 / 0.8 < summary["images_per_s"] <= 4 / 0.02
    assert 0 <= summary["data_wait_share"] < 1
    assert all(5 < logger.rows[step]["time/images_per_s"] <= 4 / 0.02 for step in (2, 4, 6, 8))


def test_throughput_adds_up_over_starts():
    first = Throughput()
    first.load_state_dict({"wall": 100.0, "train": 80.0, "wait": 8.0})
    assert first.summary()["fit_time_s"] == pytest.approx(100, abs=1)
    assert first.summary()["data_wait_share"] == pytest.approx(0.1, abs=0.01)
    assert first.state_dict()["train"] == pytest.approx(80, abs=1)


def test_stopwatch_pauses_nest():
    watch = Stopwatch()
    watch.pause()
    watch.pause()
    before = watch.seconds()
    time.sleep(0.02)
    watch.resume()
    assert watch.seconds() == before
    watch.resume()
    time.sleep(0.02)
    assert 0.02 <= watch.seconds() - before < 0.04 + 0.5  # a loaded machine wakes late


def test_progress_without_a_terminal_prints_plain_lines(fit, monkeypatch):
    from ornstein.training.callbacks import progress

    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.05)
    out = io.StringIO()
    bar = ProgressBar(console=Console(file=out, width=120))
    fit([bar, Slow(0.02, task=False)], steps=10)
    lines = out.getvalue().splitlines()
    assert 2 <= len(lines) <= 6
    assert all(re.match(r"step \d+/10 \(\d+ %\)  loss [\d.]+  [\d,]+ images/s", line) for line in lines)
    assert lines[-1].startswith("step 10/10 (100 %)")


def test_progress_on_a_terminal_shows_training_and_tasks(fit):
    out = io.StringIO()
    bar = ProgressBar(console=Console(file=out, width=120, force_terminal=True))
    shown = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                with progress_task(trainer, "sampling", 3) as advance:
                    advance()
                    shown.extend(task.description for task in bar._progress.tasks)

    fit([bar, Look()], steps=5)
    assert shown == ["training", "sampling"]
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "sampling" in text and "5/5" in text and "images/s" in text and re.search(r"loss \d", text)


def test_progress_costs_next_to_nothing_a_step(fit):
    bar = ProgressBar(console=Console(file=io.StringIO(), force_terminal=True))
    trainer = fit([bar], steps=2)
    bar._next = time.perf_counter() + 60
    trainer.fit_loop.epoch_loop.max_steps = 10**9
    started = time.perf_counter()
    for batch in range(2000):
        bar.on_train_batch_end(trainer, trainer.lightning_module, None, None, batch)
    # 50 microseconds asked for; about 1 measured, on a machine shared by many
    assert (time.perf_counter() - started) / 2000 < 50e-6


def test_pictures_do_not_disturb_training(fit, tmp_path):
    plain = fit([EMA()], steps=6)
    callbacks = [EMA(), SampleGrid(tmp_path, every=1), Trajectory(tmp_path, every=2), Validation(every=1)]
    busy = fit([*callbacks, SchedulePlot(tmp_path), TrainingLog(every=1)], steps=6)
    for name, value in plain.lightning_module.state_dict().items():
        assert torch.equal(busy.lightning_module.state_dict()[name], value)
