"""Real Lightning runs, killed and resumed: the processes under test are those of ``tiny_run.py``."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ornstein.experiment.metrics_file import read_metrics

SCRIPT = Path(__file__).with_name("tiny_run.py")
# the package first: its guard must run before Lightning, where torchvision's native library cannot load
START = "import ornstein, runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
STEPS = 18
KILLS = [
    "start:3",  # before the first checkpoint: it starts over in its folder
    "start:12",  # two steps after a checkpoint
    "saved:10",  # between the best checkpoint and the last one, and before the step's row is logged
    "validation:8",  # between the training of an epoch and its validation
    "start:16",  # at the beginning of an epoch
]
WITH_WANDB = "start:12"


def _train(jobs: list[dict[str, Any]], home: Path) -> list[int]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "NETRC"))}
    done = subprocess.run(
        [sys.executable, "-c", START, str(SCRIPT), json.dumps(jobs)],
        env={**environment, "OMP_NUM_THREADS": "1", "HOME": str(home)},
        stdin=subprocess.DEVNULL,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(line) for line in done.stdout.split("\n") if line.lstrip("-").isdigit()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undisturbed run and one for each kill, killed and resumed."""
    root = tmp_path_factory.mktemp("runs")
    jobs: list[dict[str, Any]] = [{"folder": str(root / "undisturbed"), "steps": STEPS}]
    for kill in KILLS:
        job = {"folder": str(root / kill), "steps": STEPS, "wandb": kill == WITH_WANDB}
        jobs += [{**job, "kill": kill}, job]
    (root / "home").mkdir()
    assert _train(jobs, root / "home") == [0] + [-signal.SIGKILL, 0] * len(KILLS)
    return root


@pytest.fixture(scope="module")
def undisturbed(runs: Path) -> Path:
    return runs / "undisturbed"


def test_every_checkpoint_loads_with_weights_only(undisturbed: Path) -> None:
    files = sorted((undisturbed / "checkpoints").iterdir())
    assert "last.ckpt" in [file.name for file in files] and len(files) == 3
    for file in files:
        assert "=" not in file.name
        loaded = torch.load(file, weights_only=True)
        assert set(loaded) >= {"state_dict", "optimizer_states", "lr_schedulers", "callbacks", "loops"}


def test_rows_of_an_undisturbed_run(undisturbed: Path) -> None:
    rows = {int(row["step"]): row for row in read_metrics(undisturbed / "metrics.csv")}
    assert [step for step, row in rows.items() if "loss" in row] == list(range(STEPS))
    assert [step for step, row in rows.items() if "norm" in row] == list(range(3, STEPS + 1, 3))
    assert [step for step, row in rows.items() if "val/loss" in row] == [7, 15]


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(runs: Path, undisturbed: Path, kill: str) -> None:
    assert read_metrics(runs / kill / "metrics.csv") == read_metrics(undisturbed / "metrics.csv")
    ours, theirs = (torch.load(each / "end.ckpt", weights_only=True) for each in (runs / kill, undisturbed))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert _equal(ours[part], theirs[part]), part


def test_wandb_beside_it_goes_on_under_its_id(runs: Path) -> None:
    read_wandb = runpy.run_path(str(Path(__file__).with_name("wandb_reader.py")))["read_wandb"]
    run = runs / WITH_WANDB
    # of the killed start W&B keeps what it had flushed, which may be nothing; the second logs the rest again
    segments = [read_wandb(path) for path in sorted(run.glob("wandb/offline-run-*/*.wandb"))]
    second = segments[-1]
    assert second.complete and second.run_id == (run / "wandb_id.txt").read_text().strip()
    steps = [row["trainer/global_step"] for segment in segments for row in segment.history]
    assert steps == sorted(set(steps))
    # Lightning's own rows count from 0, and one that comes after a callback's of the next step joins it.
    assert set(range(STEPS)) - set(steps) <= set(range(2, STEPS, 3))
    assert second.history[-1]["images_seen"] == STEPS * 4
    assert [path.name for path in (runs / "home").iterdir() if not path.name.startswith(".")] == []


def test_the_clock_goes_on_from_the_checkpoint() -> None:
    import ornstein  # noqa: F401  (first: its torchvision guard lets Lightning be imported)
    from ornstein.experiment.resume import ResumableLogs

    logs = ResumableLogs()
    assert 0 <= logs.elapsed() < 60
    logs.on_load_checkpoint(None, None, {"global_step": 3, "ornstein_logs": {"elapsed_s": 1000.0}})  # type: ignore[arg-type]
    assert 1000 <= logs.elapsed() < 1060


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(_equal, a, b))
    return a == b
