"""Sweeps: jobs that fail, jobs of several processes, what a sweep leaves, and taking it up again."""

from __future__ import annotations

import json

import pytest
import torch

from ornstein.cli.train_sweep import prepare_sweep, reason_of
from ornstein.errors import OrnsteinError


@pytest.mark.slow
def test_a_sweep_with_failures_of_jobs_in_several_processes(command, tiny, tmp_path):
    sweep = tmp_path / "sweep"
    words = [
        *(*tiny(), "trainer.accelerator=cpu", "trainer.strategy=ddp", "trainer.devices=1,2", "seed=0"),
        *("objective=v,eps", "scheduler=flow", f"hydra.sweep.dir={sweep}"),
    ]
    done = command("train.py", "-m", *words, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "4 jobs, 2 finished, 2 failed" in done.stdout and f"sweep.resume={sweep}" in done.stdout
    for job, fine in enumerate((True, False, True, False)):
        folder = sweep / str(job)
        assert (reason_of(folder) is None) == fine
        if fine:
            assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
        else:
            assert json.loads((folder / "failed.json").read_text())["error"].startswith("objective=eps cannot give x0")
    # The ranks of a job know nothing of the sweep: one folder a job, and no second Hydra in them.
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1", "2", "3", "multirun.yaml", "report.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    assert (sweep / "2" / "ranks.log").is_file() and not (sweep / "0" / "ranks.log").exists()
    effective = [json.loads((sweep / job / "summary.json").read_text())["effective_batch"] for job in ("0", "2")]
    assert effective == [4, 8]
    page = (sweep / "report.html").read_text()
    assert page.count("objective=eps cannot give x0") == 2

    before = torch.load(sweep / "0" / "checkpoints" / "last.ckpt", weights_only=True)
    stamps = {path: path.stat().st_mtime_ns for path in (sweep / "0").rglob("*.ckpt")}
    (sweep / "2" / "checkpoints" / "last.ckpt").unlink()
    (sweep / "2" / "summary.json").unlink()
    again = command("train.py", f"sweep.resume={sweep}", cwd=tmp_path)
    assert again.returncode == 1 and "4 jobs, 2 finished, 2 failed" in again.stdout
    assert again.stdout.count("nothing to do") == 1 and (sweep / "2" / "checkpoints" / "last.ckpt").is_file()
    assert {path: path.stat().st_mtime_ns for path in (sweep / "0").rglob("*.ckpt")} == stamps
    assert before["global_step"] == 3


@pytest.mark.slow
def test_a_run_of_two_devices_goes_on(command, tiny, tmp_path):
    folder, several = tmp_path / "run", ["trainer.accelerator=cpu", "trainer.strategy=ddp", "trainer.devices=2"]
    done = command("train.py", *tiny(), *several, f"hydra.run.dir={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = command("train.py", f"resume={folder}", "trainer.max_steps=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    assert json.loads((folder / "summary.json").read_text())["effective_batch"] == 8
    done = command("train.py", f"resume={folder}", "trainer.max_steps=0", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: trainer.max_steps=0")


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("parallel", ["hydra_plugins.ornstein_local.launcher.ParallelLauncher", "n_jobs: 3"]),
        ("joblib", ["hydra_plugins.ornstein_local.launcher.ParallelLauncher", "n_jobs: 3"]),
        ("local", ["hydra_plugins.ornstein_local.launcher.LocalLauncher", "n_jobs: 3"]),
        ("submitit_local", ["hydra_plugins.ornstein_local.launcher.LocalLauncher", "timeout_min: 7"]),
        ("ray", ["hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher", "max_retries: 0"]),
        ("slurm", ["hydra_plugins.ornstein_slurm.launcher.SlurmLauncher", "n_jobs: null", "max_num_timeout: 100"]),
        ("submitit_slurm", ["hydra_plugins.ornstein_slurm.launcher.SlurmLauncher", "max_num_timeout: 100"]),
    ],
)
def test_launchers_of_ours_compose(command, tmp_path, launcher, words):
    number = {
        "slurm": "+hydra.launcher.additional_parameters.n_jobs=null",
        "submitit_slurm": "hydra.launcher.partition=gpu",
        "submitit_local": "hydra.launcher.timeout_min=7",
        "ray": "hydra.launcher.ray.remote.num_cpus=2",
    }.get(launcher, "hydra.launcher.n_jobs=3")
    shown = command("train.py", f"hydra/launcher={launcher}", number, "--cfg", "hydra", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert [word for word in words if word not in shown.stdout] == []


def test_the_command_line_of_a_sweep_comes_back_from_its_folder(tmp_path):
    (tmp_path / "multirun.yaml").write_text(
        "hydra:\n  overrides:\n    hydra: [hydra/launcher=slurm, hydra.launcher.timeout_min=5, hydra.sweep.dir=x, "
        "hydra.mode=MULTIRUN]\n    task: ['seed=0,1', resume=null]\n"
    )
    argv = ["train.py", "-m", f"sweep.resume={tmp_path}", "trainer.enable_progress_bar=false"]
    prepare_sweep(argv)
    own = [f"hydra.sweep.dir='{tmp_path}'", "resume=sweep"]
    kept = ["hydra/launcher=slurm", "hydra.launcher.timeout_min=5", "seed=0,1"]
    assert argv == ["train.py", "-m", *kept, "trainer.enable_progress_bar=false", *own]
    argv = ["train.py", f"sweep.resume={tmp_path}", "hydra/launcher=basic"]
    prepare_sweep(argv)
    assert argv == ["train.py", "-m", "seed=0,1", "hydra/launcher=basic", *own]
    with pytest.raises(OrnsteinError, match="is no folder of a sweep"):
        prepare_sweep(["train.py", f"sweep.resume={tmp_path / 'other'}"])
    untouched = ["train.py", "seed=3"]
    prepare_sweep(untouched)
    assert untouched == ["train.py", "seed=3"]
