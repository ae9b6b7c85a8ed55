"""Checkpoints written beside training: the same files, waited for, and their failures told."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import safe_open
from safetensors.torch import load_file

from ornstein.errors import OrnsteinError
from ornstein.experiment import AtomicCheckpointIO
from ornstein.training.callbacks import Checkpoint, Preempted, Preemption
from ornstein.training.callbacks.checkpoint_files import arrange_best, best_name, steps_of_best
from ornstein.training.callbacks.checkpoint_writer import CheckpointWriter, host_copy
from ornstein.training.ema import EMA

from .test_checkpoint import Figures, Signal, steps_in


class SlowIO(AtomicCheckpointIO):
    """Takes its time, and may fail at one of its files."""

    def __init__(self, *, seconds=0.2, fail_at=None):
        self.seconds, self.fail_at, self.count, self.threads = seconds, fail_at, 0, []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.count += 1
        self.threads.append(threading.current_thread() is threading.main_thread())
        time.sleep(self.seconds)
        if self.count == self.fail_at:
            raise OrnsteinError(f"checkpoint {path} could not be written (No space left on device)")
        super().save_checkpoint(checkpoint, path, storage_options)


def contents(folder):
    """All files, tensors and what stands beside them."""
    found = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.ckpt")}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found[path.name] = (load_file(path), file.metadata())
    return found


def assert_same(ours, theirs, where=""):
    assert type(ours) is type(theirs), where
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.stride() == theirs.stride(), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, where)
    else:
        assert ours == theirs, where


def test_written_beside_training_they_are_the_same_files(fit, tmp_path):
    """Best, numbered, last and averages; the states are those of their steps though training went on while they were
    written.
    """
    inner = SlowIO(seconds=0.02)
    for name, asynchronous in (("beside", True), ("within", False)):
        options = {"every": 2, "keep_every": 3, "keep_last": 2, "keep_best": 2}
        checkpoint = Checkpoint(tmp_path / name, asynchronous=asynchronous, **options)
        plugins = [inner if asynchronous else AtomicCheckpointIO()]
        fit([EMA(), checkpoint, Figures({1: 3.0, 4: 2.0, 5: 1.0})], steps=10, plugins=plugins)
    assert inner.threads and not any(inner.threads)
    ours, theirs = (contents(tmp_path / name / "checkpoints") for name in ("beside", "within"))
    assert set(theirs) == {
        *("last.ckpt", "best.ckpt", "best_2.ckpt", "step_000006.ckpt", "step_000009.ckpt"),
        *("last.ema.safetensors", "best.ema.safetensors", "best_2.ema.safetensors"),
    }
    assert_same(ours, theirs)
    assert steps_in(tmp_path / "within" / "checkpoints")["best_2.ckpt"] == 4
    averaged, facts = theirs["best.ema.safetensors"]
    assert facts == {"step": "5", "images_seen": "20", "decay": "0.9999", "updates": "5"}
    assert_same(averaged, theirs["best.ckpt"]["callbacks"]["EMA"]["network"])


def test_the_averages_load_without_this_package(fit, make_module, tmp_path):
    trainer = fit([EMA(), Checkpoint(tmp_path)], steps=3)
    network = make_module().network
    network.load_state_dict(load_file(tmp_path / "checkpoints" / "last.ema.safetensors"))  # strict
    averaged = trainer.lightning_module.evaluation_network().state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in network.state_dict().items())


def test_no_averages_where_none_are_asked_for_or_kept(fit, tmp_path):
    fit([EMA(), Checkpoint(tmp_path / "off", ema_weights=False)], steps=1)
    fit([Checkpoint(tmp_path / "none")], steps=1)
    assert not list(tmp_path.glob("*/checkpoints/*.safetensors"))


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"every": 2, "keep_every": True, "keep_last": 2}, [4, 6]),
        ({"every": 5, "keep_every": 2}, [2, 4, 6]),
        ({"every": None, "keep_every_images": 8, "keep_last": 1}, [6]),  # 4 images a step
    ],
)
def test_numbered_ones_are_pruned(fit, tmp_path, options, numbers):
    fit([Checkpoint(tmp_path, monitor=None, **options)], steps=6)
    expected = {f"step_00000{number}.ckpt": number for number in numbers} | {"last.ckpt": 6}
    assert steps_in(tmp_path / "checkpoints") == expected


def test_a_failure_beside_training_stops_it_and_leaves_the_last_good_one(fit, tmp_path):
    with pytest.raises(OrnsteinError, match=r"could not be written \(No space left on device\)"):
        fit([Checkpoint(tmp_path, every=1, asynchronous=True)], steps=50, plugins=[SlowIO(seconds=0.01, fail_at=3)])
    assert steps_in(tmp_path / "checkpoints") == {"last.ckpt": 2}


def test_a_failure_of_the_last_one_is_not_overlooked(fit, tmp_path):
    with pytest.raises(OrnsteinError, match="could not be written"):
        fit([Checkpoint(tmp_path, every=None, asynchronous=True)], steps=2, plugins=[SlowIO(fail_at=1)])


@pytest.mark.parametrize(("number", "stop"), [(signal.SIGTERM, BaseException), (signal.SIGUSR1, Preempted)])
def test_a_notice_waits_for_it(fit, tmp_path, number, stop):
    callbacks = [Preemption(), Checkpoint(tmp_path, every=None, asynchronous=True), Signal(number, step=3)]
    with pytest.raises(stop):
        fit(callbacks, steps=6, plugins=[SlowIO()])
    assert steps_in(tmp_path / "checkpoints") == {"last.ckpt": 3}


def test_a_copy_keeps_what_was_and_what_is_shared():
    base = torch.arange(6.0)
    state = {"whole": base, "view": base.view(2, 3).t(), "more": [1, (base[2:], {"n": 2})], "none": torch.empty(0)}
    copied = host_copy(state)
    assert_same(copied, state)
    base.add_(1)
    state["more"].append(3)
    assert copied["whole"][0] == 0 and copied["view"][1, 1] == 4 and len(copied["more"]) == 2
    assert copied["view"].untyped_storage().data_ptr() == copied["whole"].untyped_storage().data_ptr()


def test_killed_in_the_middle_the_last_good_one_is_whole(tmp_path):
    """A fork writes 40 MB beside nothing at all and is killed when its temporary file grows."""
    folder = tmp_path / "checkpoints"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, folder / "last.ckpt")
    pid = os.fork()
    if pid == 0:
        writer = CheckpointWriter(AtomicCheckpointIO(), asynchronous=True)
        writer.save_checkpoint({"global_step": 2, "x": torch.zeros(10_000_000)}, folder / "last.ckpt")
        time.sleep(60)
    while not any(path.stat().st_size > 1000 for path in folder.glob(".*.tmp")):
        assert os.waitpid(pid, os.WNOHANG)[0] == 0
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert list(folder.glob(".*.tmp")) and steps_in(folder) == {"last.ckpt": 1}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_told_in_one_sentence(fit, tmp_path, asynchronous):
    """On a small file system of its own: the last good checkpoint is named, and whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here: that takes root")
    try:
        checkpoint = Checkpoint(disk, every=1, keep_every=True, asynchronous=asynchronous)
        with pytest.raises(OrnsteinError) as told:
            fit([EMA(), checkpoint, Filler(disk, step=4)], steps=50, plugins=[AtomicCheckpointIO()])
        last = disk / "checkpoints" / "last.ckpt"
        sentence = str(told.value)
        assert "No space left on device" in sentence and f"the last good checkpoint is {last}" in sentence
        assert "\n" not in sentence
        assert steps_in(disk / "checkpoints")["last.ckpt"] == 3
        assert not list(disk.glob("checkpoints/.*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class Filler(pl.Callback):
    """Somebody else fills the disk."""

    def __init__(self, disk, *, step):
        self.disk, self.step = disk, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step - 1:
            for writing in [callback._writer for callback in trainer.checkpoint_callbacks]:
                writing.wait()
            room = os.statvfs(self.disk)
            (self.disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize))


def test_what_a_kill_left_undone_is_done_when_the_run_goes_on(fit, tmp_path):
    """Killed after last.ckpt and before anything else: the other names and the averages come when it goes on."""
    options = {"every": 2, "keep_every": True, "keep_best": 2}
    figures = {2: 2.0, 4: 1.0, 6: 1.5}
    fit([EMA(), Checkpoint(tmp_path / "whole", **options), Figures(figures)], steps=8)
    folder = tmp_path / "cut" / "checkpoints"
    fit([EMA(), Checkpoint(tmp_path / "cut", **options), Figures(figures)], steps=6)
    before = {name: (folder / name).read_bytes() for name in ("last.ckpt",)}
    shutil_state = {4: folder / "best.ckpt", 2: folder / "step_000002.ckpt"}
    arrange_best(folder, [4, 2], shutil_state)  # as it was before step 6
    (folder / "step_000006.ckpt").unlink()
    (folder / "last.ema.safetensors").unlink()
    (folder / ".best.ckpt.partial").write_bytes(b"")
    assert steps_of_best(folder).keys() == {2, 4} and (folder / "last.ckpt").read_bytes() == before["last.ckpt"]
    fit([EMA(), Checkpoint(tmp_path / "cut", **options), Figures(figures)], steps=8, ckpt=folder / "last.ckpt")
    assert_same(contents(folder), contents(tmp_path / "whole" / "checkpoints"))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()
    )


@pytest.mark.parametrize("killed_after", range(4))
def test_killed_while_best_ones_change_places_none_is_lost(tmp_path, monkeypatch, killed_after):
    """Wherever it dies, each wanted state has a name, and doing it again ends right."""
    io = TorchCheckpointIO()
    for rank, step in enumerate((3, 2, 1)):
        io.save_checkpoint({"global_step": step}, tmp_path / best_name(rank))
    io.save_checkpoint({"global_step": 4}, tmp_path / "last.ckpt")
    replace, left = os.replace, [killed_after]

    def dying(source, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    try:
        arrange_best(tmp_path, [4, 3, 2], {4: tmp_path / "last.ckpt"} | steps_of_best(tmp_path))
    except KeyboardInterrupt:
        assert killed_after < 3
    monkeypatch.undo()
    arrange_best(tmp_path, [4, 3, 2], {4: tmp_path / "last.ckpt"} | steps_of_best(tmp_path))
    found = steps_in(Path(tmp_path))
    assert [found[best_name(rank)] for rank in range(3)] == [4, 3, 2]
