"""Launchers of sweeps: jobs that are refused or killed are named and the others go on; notices reach every rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ornstein.cli.train_sweep import reason_of

ROOT = Path(__file__).parents[2]
KILLER = "import os, signal\n\n\ndef kill(*_, **__):\n    os.kill(os.getpid(), signal.SIGKILL)\n"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["parallel", "submitit_local"])
def test_a_killed_job_is_one_failed_job_of_a_sweep(command, tiny, tmp_path, launcher):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs pip install 'ornstein[sweeps]'")
    (tmp_path / "killer_of_jobs.py").write_text(KILLER)
    sweep = tmp_path / "sweep"
    # 0 trains, 1 and 3 are refused, 2 is killed while it is validated.
    grid = ["optimizer=sgd", "optimizer._target_=torch.optim.SGD,killer_of_jobs.kill", "objective=v,eps"]
    words = [*tiny(), "scheduler=flow", f"hydra/launcher={launcher}", f"hydra.sweep.dir={sweep}", *grid]
    done = command("train.py", "-m", *words, cwd=tmp_path, path=[tmp_path])
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    reasons = [reason_of(sweep / str(job)) for job in range(4)]
    assert [str(reasons[job]).startswith("objective=eps cannot give x0") for job in (1, 3)] == [True, True]
    if launcher == "parallel":  # joblib ends what runs beside a killed job; what has not begun goes on
        assert reasons[2].startswith("its process was killed, or ended with another's")
        assert reasons[0] in (None, reasons[2])
    else:
        assert reasons[0] is None and reasons[2].startswith("it left no result")
    failed = sum(reason is not None for reason in reasons)
    assert f"4 jobs, {4 - failed} finished, {failed} failed" in done.stdout and f"sweep.resume={sweep}" in done.stdout
    for job, reason in enumerate(reasons):
        assert reason is None or f"job {job} failed: {reason}" in done.stdout
    if failed == 3:
        assert (sweep / "report.html").is_file()


@pytest.mark.slow
def test_a_notice_to_a_job_of_several_processes_reaches_its_ranks(tiny, tmp_path):
    """In a SLURM job of one task that task hears of the end of its time: a checkpoint, then back into the queue."""
    tools, sweep = tmp_path / "tools", tmp_path / "sweep"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\n')
    (tools / "scontrol").chmod(0o755)
    several = ["trainer.accelerator=cpu", "trainer.strategy=ddp", "trainer.devices=2", "seed=0"]
    own = ["trainer.max_steps=100000", "callbacks.checkpoint.every=null", "callbacks.validation.every=null"]
    replaced = {word.partition("=")[0] for word in own}
    words = [*(word for word in tiny() if word.partition("=")[0] not in replaced), *several, *own]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
    }
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "-m", *words, f"hydra.sweep.dir={sweep}"],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + 200
        while not (sweep / "0" / ".rank1").is_file():  # a notice that comes before training does is kept, too
            assert time.monotonic() < until and running.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
        running.send_signal(signal.SIGUSR1)
        assert running.wait(timeout=200) == 75, (tmp_path / "log").read_text()[-3000:]
    finally:
        running.kill()
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    state = torch.load(sweep / "0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] > 0 and state["global_step"] % 10 == 0
    assert json.loads((sweep / "0" / "summary.json").read_text())["status"] == "interrupted"
    left = [path.name for path in (sweep / "0").iterdir() if path.name.startswith((".rank", ".noticed"))]
    assert left == []


@pytest.mark.slow
def test_a_sweep_on_ray(command, tiny, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs ornstein[ray], in an environment of its own")
    sweep = tmp_path / "sweep"
    own = ["hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2", f"hydra.sweep.dir={sweep}"]
    done = command("train.py", "-m", *tiny(), "scheduler=flow", "objective=v,eps", *own, cwd=tmp_path)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "2 jobs, 1 finished, 1 failed" in done.stdout and "job 1 failed: objective=eps cannot" in done.stdout
    assert (sweep / "report.html").is_file()
