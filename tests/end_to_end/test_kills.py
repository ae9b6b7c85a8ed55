"""A run killed at 20 random moments and gone on with each time is the run that was never stopped, to the bit."""

from __future__ import annotations

import csv
import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS = 200
KILLS = 20
SETTINGS = [
    "model.network.base_channels=8",
    "model.network.channel_mults=[1]",
    "model.network.num_blocks=1",
    "model.network.groups=4",
    "model.network.dropout=0.1",
    "objective/time=loss_adaptive",
    "objective.time.bins=8",
    "objective.time.history=3",
    "data.batch_size=4",
    "data.flip=true",
    f"trainer.max_steps={STEPS}",
    "trainer.accumulate_grad_batches=2",
    "trainer.enable_progress_bar=false",
    "sampler.steps=3",
    "metrics=none",
    "callbacks.log.every=1",
    "callbacks.log.levels_every=5",
    "callbacks.validation.every=20",
    "callbacks.validation.max_batches=2",
    "callbacks.sample_grid.every=20",
    "callbacks.sample_grid.samples_per_class=1",
    "callbacks.checkpoint.every=3",
    "callbacks.checkpoint.monitor=val/loss",
    "callbacks.checkpoint.keep_best=2",
    "callbacks.checkpoint.keep_every=40",
    "callbacks.checkpoint.keep_last=3",
    "~callbacks.trajectory",
    "~callbacks.schedule_plot",
]
# A frame of the dying process -> the kind of moment, the first that fits; a trace names the innermost frame first.
KINDS = [
    ("checkpoint", ("checkpoint_io.py", "checkpoint_files.py", "checkpoint_writer.py", "checkpoint.py")),
    ("rows", ("metrics_file.py", "csv_log.py")),
    ("evaluation", ("sample_grid.py", "validation.py")),
    ("logging", ("wandb_log.py", "wandb_segments.py", "log.py")),
    ("step", ("training_epoch_loop.py",)),
]


def plan(root: Path) -> dict[str, Any]:
    """Kills by the clock, on the way to the first step, and in moments that the run's folder shows; all seeded."""
    draw = random.Random(0)
    kills = [{"moment": "clock", "share": draw.uniform(0.1, 1.0), "delay": 0.0} for _ in range(4)]
    after = (("rows", 6, 0.4), ("checkpoint", 5, 0.004), ("pictures", 1, 0.3), ("evaluation", 2, 0.02))
    for moment, count, longest in after:
        kills += [{"moment": moment, "share": 0.0, "delay": draw.uniform(0, longest)} for _ in range(count)]
    kills += [{"moment": "rows", "share": 0.0, "delay": draw.uniform(0, 0.003)} for _ in range(KILLS - len(kills))]
    draw.shuffle(kills)
    return {"root": str(root), "settings": SETTINGS, "kills": kills}


def kind_of(trace: Path) -> str:
    frames = trace.read_text() if trace.exists() else ""
    for kind, names in KINDS:
        if any(f"/{name}" in frames for name in names):
            return kind
    return "start-up"


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if not k.startswith(("time/", "system/"))} for row in csv.DictReader(file)
        ]


def same(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            same(one, other, f"{where}[{number}]")
    else:
        assert ours == theirs, where


@pytest.mark.slow
def test_killed_twenty_times_equals_undisturbed(tmp_path: Path) -> None:
    """20 kills: 4 by the clock between start and first row, the others within moments after a row was written, after
    one that an evaluation follows, after a checkpoint's temporary file appeared, and after a picture.

    By each start's trace at its death, start-up, training steps, checkpoints and at least one of evaluation,
    metrics.csv and W&B's rows are hit, and most often all of them.

    Gone on with by ``resume=FOLDER`` and ``resume=auto`` in turn. Weights, averages, optimizer, what the objective
    remembers, counters, rows (but for times), pictures, best and numbered checkpoints equal those of the run that was
    never stopped, to the bit; the W&B segments hold every step of metrics.csv once, under one id.
    """
    (tmp_path / "plan.json").write_text(json.dumps(plan(tmp_path)))
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_starts.py"), str(tmp_path / "plan.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    logs = {path.stem: path.read_text()[-1500:] for path in sorted(tmp_path.glob("start_*.log"))}
    assert [start["status"] for start in told["starts"]] == [None] * KILLS, (told, logs)
    assert told["last"] == 0, (tmp_path / "last.log").read_text()[-3000:]
    kinds = [kind_of(tmp_path / f"start_{number:02}.trace") for number in range(KILLS)]
    assert {"start-up", "checkpoint", "step"} <= set(kinds) and len(set(kinds)) >= 4, kinds

    whole, cut = tmp_path / "whole", tmp_path / "runs" / "train" / "day" / "time"
    assert table(cut) == table(whole)
    steps = [int(row["step"]) for row in table(cut)]
    assert steps == sorted(set(steps)) and set(range(1, STEPS + 1)) <= set(steps)
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (cut / "checkpoints").iterdir())
    assert [name for name in names if name.startswith("step_")] == [f"step_000{step}.ckpt" for step in (120, 160, 200)]
    for name in names:
        ours, theirs = (folder / "checkpoints" / name for folder in (cut, whole))
        if name.endswith(".ckpt"):
            same_state(ours, theirs)
        else:
            same(load_file(ours), load_file(theirs), name)
            with safe_open(ours, "pt") as one, safe_open(theirs, "pt") as other:
                assert one.metadata() == other.metadata()
    for path in sorted((whole / "samples").glob("*.png")):
        assert (cut / "samples" / path.name).read_bytes() == path.read_bytes(), path.name
    check_wandb(cut, steps)


def same_state(ours: Path, theirs: Path) -> None:
    one, other = (torch.load(path, weights_only=True) for path in (ours, theirs))
    assert any("history" in name or "losses" in name for name in other["state_dict"]), sorted(other["state_dict"])
    for key in ("global_step", "epoch", "state_dict", "optimizer_states", "lr_schedulers", "loops"):
        same(one[key], other[key], f"{ours.name}: {key}")
    for name in ("EMA", "Checkpoint"):
        same(one["callbacks"][name], other["callbacks"][name], f"{ours.name}: {name}")
    for key in ("micro_batches_seen", "images_seen"):
        assert one["ornstein"][key] == other["ornstein"][key]


def check_wandb(folder: Path, steps: list[int]) -> None:
    """Every step of metrics.csv once over all segments, in order, under one id, pictures too."""
    read_wandb = runpy.run_path(str(HERE.parent / "experiment" / "wandb_reader.py"))["read_wandb"]
    segments = [read_wandb(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
    identity = (folder / "wandb_id.txt").read_text().strip()
    assert {segment.run_id for segment in segments} == {identity}
    rows = [row for segment in segments for row in segment.history]
    assert [row["trainer/global_step"] for row in rows] == steps
    trained = {int(row["step"]): row["train/loss"] for row in table(folder) if row.get("train/loss")}
    assert {row["trainer/global_step"]: row["train/loss"] for row in rows if "train/loss" in row} == {
        step: float(value) for step, value in trained.items()
    }
    pictured = [row["trainer/global_step"] for row in rows if any(key.startswith("samples") for key in row)]
    assert pictured == list(range(20, STEPS + 1, 20))
