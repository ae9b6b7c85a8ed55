"""Notices of a cluster: the step is ended, the state written, and whoever answers for the job is asked to go on."""

from __future__ import annotations

import signal
import stat

import pytest

from ornstein.errors import OrnsteinError
from ornstein.training.callbacks import Checkpoint, Preempted, Preemption
from ornstein.training.callbacks.preemption import requeue

from .test_checkpoint import Signal, steps_in


@pytest.mark.parametrize("notice", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_notice_ends_the_step_writes_it_and_is_handed_on(fit, tmp_path, notice):
    answered = []
    before = signal.signal(notice, lambda number, frame: answered.append(number))
    try:
        with pytest.raises(Preempted) as stopped:
            fit([Preemption(), Checkpoint(tmp_path, every=None), Signal(notice, step=3)], steps=6)
        assert steps_in(tmp_path / "checkpoints") == {"last.ckpt": 3}
        assert stopped.value.code == 75 and stopped.value.notice == notice.name and not answered
        stopped.value.hand_over()
        assert answered == [notice], "whoever answered the signal before, submitit say, takes over"
        signal.raise_signal(notice)
        assert answered == [notice, notice], "and answers it again"
    finally:
        signal.signal(notice, before)


def test_without_checkpoints_training_stops_all_the_same(fit):
    with pytest.raises(Preempted):
        fit([Preemption(), Signal(signal.SIGUSR1, step=2)], steps=6)


def test_training_that_nobody_interrupts_gives_the_signals_back(fit, tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    fit([Preemption(), Checkpoint(tmp_path, every=None)], steps=2)
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({"SLURM_JOB_ID": "7"}, "requeue 7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "2"}, "requeue 8_2"),
        ({}, ""),
    ],
)
def test_slurm_is_asked_by_its_own_command(tmp_path, monkeypatch, variables, asked):
    script = tmp_path / "scontrol"
    script.write_text(f'#!/bin/sh\nprintf "%s" "$*" >{tmp_path}/asked\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    requeue()
    assert ((tmp_path / "asked").read_text() if asked else "") == asked and (tmp_path / "asked").is_file() == bool(
        asked
    )


def test_a_requeue_that_fails_is_told_in_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    requeue()
    assert "job 7 could not be queued again" in caplog.text and "goes on where it stopped" in caplog.text


def test_numbers_are_checked():
    with pytest.raises(OrnsteinError, match=r"callbacks\.preemption\.every=0"):
        Preemption(every=0)
