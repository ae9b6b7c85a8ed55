"""Runs that meet a full disk, too little memory and a dead service: real ones, as commands."""

from __future__ import annotations

import csv
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TROUBLE = '''
"""A user's own callback: after one step there is hardly room on the disk any more, and W&B's processes are gone."""
import os, pathlib
import lightning.pytorch as pl


class Trouble(pl.Callback):
    def __init__(self, ballast, step):
        self.ballast, self.step = ballast, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != self.step:
            return
        if self.ballast is None:
            import psutil

            for child in psutil.Process().children(recursive=True):
                child.kill()
            return
        file = os.open(self.ballast, os.O_WRONLY | os.O_CREAT)
        try:
            while True:
                os.write(file, bytes(4096))
        except OSError:
            os.ftruncate(file, os.fstat(file).st_size - 4 * 4096)
'''


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A user's folder with a class and a config option of theirs: ``callbacks=trouble``."""
    folder = tmp_path / "user"
    (folder / "conf" / "callbacks").mkdir(parents=True)
    (folder / "trouble_within_a_run.py").write_text(TROUBLE)
    (folder / "conf" / "callbacks" / "trouble.yaml").write_text(
        "defaults: [default]\ntrouble: {_target_: trouble_within_a_run.Trouble, ballast: null, step: 5}\n"
    )
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, where one can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_its_checkpoint(
    command: Callable[..., subprocess.CompletedProcess[str]],
    tiny: Callable[..., list[str]],
    user: Path,
    small_disk: Path,
    tmp_path: Path,
) -> None:
    """Pictures that no longer fit are told of once, and steps go on; the rows of metrics.csv that do not end the run in
    one sentence, and the checkpoint of before is whole."""
    run = small_disk / "run"
    done = command(
        "train.py",
        *tiny(),
        f"--config-dir={user / 'conf'}",
        "callbacks=trouble",
        f"callbacks.trouble.ballast={small_disk / 'ballast'}",
        "trainer.max_steps=400",
        "callbacks.checkpoint.every=100",
        "callbacks.trouble.step=101",
        "callbacks.validation.every=null",
        "callbacks.sample_grid.every=102",
        "callbacks.sample_grid.samples_per_class=8",
        f"hydra.run.dir={run}",
        cwd=tmp_path,
        path=[user],
    )
    told = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr
    assert sum("a picture could not be written" in line for line in told) == 1, done.stderr
    assert f"the disk of {small_disk}" in told[-1] or "could not be written (No space left" in told[-1], done.stderr
    assert "last.ckpt" in told[-1] and "Traceback" not in done.stderr
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 100
    with open(run / "metrics.csv", newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(set(steps)) and 100 < steps[-1] < 200
    assert not list(run.rglob("*.tmp")) and not list(run.rglob(".*.partial"))


@pytest.mark.slow
def test_too_little_memory_and_a_dead_service(tiny: Callable[..., list[str]], user: Path, tmp_path: Path) -> None:
    """On a CPU that may not have more memory: one sentence with what to turn, in the summary too. Where W&B's own
    processes are killed: one line, and the run comes to its end."""

    def start(folder: str, *overrides: str, limit: int | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *tiny(), *overrides, f"hydra.run.dir={tmp_path / folder}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{user}", "WANDB_MODE": "offline", "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )

    # What a batch of so many takes is beyond any limit, and the imports below it.
    hungry = start("hungry", "data.batch_size=200000", "trainer.max_steps=2", limit=4 * 10**9)
    _, told = hungry.communicate(timeout=300)
    assert hungry.returncode == 1 and told.strip().splitlines()[-1].startswith("error: out of memory on the CPU"), told
    for words in ("data.batch_size=100000 trainer.accumulate_grad_batches=2", "trainer.find_batch_size=true"):
        assert words in told.splitlines()[-1]
    assert "Traceback" not in told
    summary = json.loads((tmp_path / "hungry" / "summary.json").read_text())
    assert summary["status"] == "failed" and "out of memory on the CPU" in summary["error"]

    lonely = start(
        "lonely", f"--config-dir={user / 'conf'}", "callbacks=trouble", "logger=default", "trainer.max_steps=8"
    )
    _, told = lonely.communicate(timeout=300)
    assert lonely.returncode == 0, told
    assert told.count("W&B stopped working") == 1 and "Traceback" not in told, told
    assert json.loads((tmp_path / "lonely" / "summary.json").read_text())["steps"] == 8
