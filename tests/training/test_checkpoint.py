from __future__ import annotations

import os
import signal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ornstein.errors import OrnsteinError
from ornstein.training.callbacks import Checkpoint, TrainingLog
from ornstein.training.record import record


class Figures(pl.Callback):
    """Logs given figures at given steps; at step None, when training has ended."""

    def __init__(self, figures):
        self.figures = figures

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.figures:
            record(trainer, {"val/fid": self.figures[trainer.global_step]})

    def on_train_end(self, trainer, pl_module):
        if None in self.figures:
            record(trainer, {"val/fid": self.figures[None]})


def steps_in(folder):
    """File name -> optimizer step of the state in it."""
    return {path.name: torch.load(path, weights_only=True)["global_step"] for path in sorted(folder.glob("*.ckpt"))}


@pytest.mark.parametrize(
    ("options", "figures", "expected"),
    [
        ({"every": 4}, {}, {"last.ckpt": 6}),
        ({"every": None}, {}, {"last.ckpt": 6}),
        (
            {"every": 2, "keep_every": True},
            {},
            {"step_000002.ckpt": 2, "step_000004.ckpt": 4, "step_000006.ckpt": 6, "last.ckpt": 6},
        ),
        ({"every": 4, "keep_every": True}, {}, {"step_000004.ckpt": 4, "last.ckpt": 6}),
        # 4 images a step: 10, 20 are crossed in steps 3 and 5
        (
            {"every": None, "every_images": 10, "keep_every": True},
            {},
            {"step_000003.ckpt": 3, "step_000005.ckpt": 5, "last.ckpt": 6},
        ),
        ({"every": 5}, {1: 3.0, 2: 2.0, 4: 2.5}, {"best.ckpt": 2, "last.ckpt": 6}),
        ({"every": 5, "mode": "max"}, {1: 3.0, 2: 2.0, 4: 2.5}, {"best.ckpt": 1, "last.ckpt": 6}),
        ({"every": 5, "keep_best": 2}, {1: 3.0, 2: 2.0, 4: 2.5}, {"best.ckpt": 2, "best_2.ckpt": 4, "last.ckpt": 6}),
        (
            {"every": 5, "keep_best": 3},
            {1: 3.0, 2: 2.0, 4: 1.0},
            {"best.ckpt": 4, "best_2.ckpt": 2, "best_3.ckpt": 1, "last.ckpt": 6},
        ),
        ({"every": 5, "keep_best": 0}, {1: 3.0}, {"last.ckpt": 6}),
        ({"every": 5, "monitor": None}, {1: 3.0}, {"last.ckpt": 6}),
        ({"every": 5}, {1: float("nan"), 3: 1.0, 4: float("nan")}, {"best.ckpt": 3, "last.ckpt": 6}),
        ({"every": 5}, {1: 3.0, None: 1.0}, {"best.ckpt": 6, "last.ckpt": 6}),
        ({"every": 5}, {1: 3.0, 2: 3.0}, {"best.ckpt": 1, "last.ckpt": 6}),
    ],
)
def test_policy(fit, tmp_path, options, figures, expected):
    checkpoint = Checkpoint(tmp_path, **options)
    fit([checkpoint, Figures(figures)], steps=6)
    assert steps_in(tmp_path / "checkpoints") == expected
    assert not any("=" in name for name in expected)
    assert checkpoint.last_path == tmp_path / "checkpoints" / "last.ckpt"


def test_state_is_complete_for_the_step(fit, tmp_path):
    """The checkpoint of step 4 holds what callbacks did after step 4, though it was listed before them."""
    fit([Checkpoint(tmp_path, every=4, keep_every=True, monitor=None), TrainingLog(every=3)], steps=5)
    state = torch.load(tmp_path / "checkpoints" / "step_000004.ckpt", weights_only=True)
    assert state["callbacks"]["TrainingLog"]["losses"]["count"] == 1
    assert state["ornstein"]["micro_batches_seen"] == 4


def test_one_state_is_stored_once(fit, tmp_path):
    fit([Checkpoint(tmp_path, every=6, keep_every=True), Figures({6: 1.0})], steps=6)
    files = [path.stat() for path in (tmp_path / "checkpoints").iterdir()]
    assert len(files) == 3 and len({file.st_ino for file in files}) == 1


@pytest.mark.parametrize(("later", "best"), [(2.5, 2), (1.0, 5)])
def test_best_is_right_after_a_resume(fit, tmp_path, later, best):
    checkpoints = tmp_path / "checkpoints"
    fit([Checkpoint(tmp_path, every=3), Figures({2: 2.0})], steps=3)
    assert steps_in(checkpoints) == {"best.ckpt": 2, "last.ckpt": 3}
    resumed = Checkpoint(tmp_path, every=3)
    fit([resumed, Figures({5: later})], steps=7, ckpt=checkpoints / "last.ckpt")
    assert steps_in(checkpoints) == {"best.ckpt": best, "last.ckpt": 7}
    assert resumed.best_score == min(2.0, later)


class Signal(pl.Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number, *, step):
        self.number, self.step = number, step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


def test_ctrl_c_ends_the_step_and_writes_it(fit, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        fit([Checkpoint(tmp_path, every=None), Signal(signal.SIGINT, step=3)], steps=6)
    assert steps_in(tmp_path / "checkpoints") == {"last.ckpt": 3}
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored


def test_a_second_ctrl_c_stops_at_once_without_writing(fit, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it is ignored
    twice = [Signal(signal.SIGINT, step=3), Signal(signal.SIGINT, step=3)]
    with pytest.raises(SystemExit):
        fit([Checkpoint(tmp_path, every=2), *twice], steps=6)
    assert steps_in(tmp_path / "checkpoints") == {"last.ckpt": 2}
    signal.signal(signal.SIGINT, before)


def test_sigterm_ends_the_step_and_writes_it(fit, tmp_path):
    with pytest.raises(SIGTERMException):
        fit([Checkpoint(tmp_path, every=None), Signal(signal.SIGTERM, step=3)], steps=6)
    assert steps_in(tmp_path / "checkpoints") == {"last.ckpt": 3}


def test_ctrl_c_is_given_back_after_training(fit, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    fit([Checkpoint(tmp_path)], steps=1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("options", [{"every": 0}, {"every_images": 0}, {"keep_best": -1}, {"mode": "best"}])
def test_refuses(tmp_path, options):
    with pytest.raises(OrnsteinError, match=r"callbacks\.checkpoint"):
        Checkpoint(tmp_path, **options)
