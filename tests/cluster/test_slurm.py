"""A sweep on a real SLURM: notices, requeues, cancellations, and weights equal to the bit.

Needs a running cluster (``.ci/slurm start FOLDER`` makes one on this machine). CI sets ORNSTEIN_REQUIRE_SLURM, and
then a missing one is a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STEPS = 120
JOBS = ("left_alone", "noticed", "requeued", "cancelled")


def slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


@pytest.fixture
def cluster():
    try:
        idle = slurm("sinfo", "--noheader", "--format=%t")
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        told = f"no SLURM answers here ({error}): .ci/slurm start FOLDER"
        if os.environ.get("ORNSTEIN_REQUIRE_SLURM"):
            pytest.fail(told)
        pytest.skip(told)
    assert idle


def until(true, seconds: float, what: str):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return
        time.sleep(0.3)
    pytest.fail(f"not within {seconds:.0f} s: {what}")


def steps_of(folder: Path) -> int:
    rows = folder.joinpath("metrics.csv").read_text().splitlines() if folder.joinpath("metrics.csv").is_file() else []
    return max((int(row.split(",")[0]) for row in rows[1:] if row.split(",")[0].isdecimal()), default=0)


def state(folder: Path):
    return torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)


def array_of(sweep: Path) -> str:
    """The number of the array job that a sweep was submitted as."""
    folders = (path.name for path in (sweep / ".submitit").iterdir())  # beside the submitted script
    return next(name.partition("_")[0] for name in folders if name[0].isdigit() and "_" in name)


@pytest.mark.slow
def test_a_sweep_survives_what_a_cluster_does_to_it(cluster, tmp_path):
    sweep = tmp_path / "sweep"
    command = [sys.executable, str(ROOT / "train.py")]
    settings = [
        *(f"name={','.join(JOBS)}", f"trainer.max_steps={STEPS}", "callbacks.checkpoint.every=1000", "metrics=none"),
        *("callbacks.sample_grid.every=null", "callbacks.sample_grid.samples_per_class=1", "~callbacks.trajectory"),
        *("sampler.steps=2", "logger=csv", "callbacks.log.every=1", "callbacks.validation.every=null"),
    ]
    launcher = [
        *("hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=30"),
        f"hydra.sweep.dir={sweep}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    log = (tmp_path / "sweep.log").open("w+")
    running = subprocess.Popen(
        [*command, "-m", *settings, *launcher], cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        # Job 3 is cancelled while it trains, job 1 is told that its time is up, job 2 is taken off its machine.
        until(lambda: steps_of(sweep / "3") >= 3, 150, "the last job trains")
        array = array_of(sweep)
        slurm("scancel", f"{array}_3")
        cancelled = time.monotonic()
        until(lambda: steps_of(sweep / "1") >= 3 and steps_of(sweep / "2") >= 3, 90, "the others train")
        slurm("scancel", "--signal=USR2", f"{array}_1")
        slurm("scontrol", "requeue", f"{array}_2")
        for job in (1, 2):
            until(
                lambda job=job: "PENDING" in slurm("squeue", "--array", "-h", "-o%T", f"-j{array}_{job}"), 60, "queued"
            )
            slurm("scontrol", "update", f"JobId={array}_{job}", "StartTime=now")
        until(
            lambda: f"job {array}_3 left no result" in (tmp_path / "sweep.log").read_text(), 60, "told within a minute"
        )
        assert time.monotonic() - cancelled < 60 + 90
        assert running.wait(timeout=240) == 1
    finally:
        running.kill()
        log.close()
    told = (tmp_path / "sweep.log").read_text()
    assert "4 jobs, 3 finished, 1 failed" in told and "job 3 failed: SLURM job" in told

    first = state(sweep / "0")
    assert first["global_step"] == STEPS
    for job in (1, 2):
        summary = json.loads((sweep / str(job) / "summary.json").read_text())
        assert summary["status"] == "finished"
        assert steps_of(sweep / str(job)) == STEPS
        for name, value in state(sweep / str(job))["state_dict"].items():
            assert torch.equal(value, first["state_dict"][name]), (JOBS[job], name)
    out = "".join(path.read_text() for path in (sweep / ".submitit").glob(f"{array}_1/*.out"))
    assert "resuming" in out, "it went on from its checkpoint, it did not start over"

    # Here and now, without the cluster: what is missing, and nothing else.
    again = subprocess.run(
        [*command, f"sweep.resume={sweep}", "hydra/launcher=basic"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("nothing to do") == 3 and "4 jobs, 4 finished, 0 failed" in again.stdout
    assert all(
        torch.equal(value, first["state_dict"][name]) for name, value in state(sweep / "3")["state_dict"].items()
    )
