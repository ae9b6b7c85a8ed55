"""A search of real trainings: one fails, one is pruned, one is killed with its command, and two others end the rest."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

optuna = pytest.importorskip("optuna")
from hydra_plugins.ornstein_optuna import _results  # noqa: E402
from ornstein.training.trials import open_storage, place_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # searches do so themselves
ROOT = Path(__file__).parents[2]

# A network of a few thousand weights; lr=1e-9 learns nothing, stays at 0.8548 and is pruned, lr=-1 is refused.
TINY = [
    *("model.network.base_channels=8", "model.network.channel_mults=[1]", "model.network.groups=4", "data.limit=16"),
    *("data.batch_size=8", "trainer.max_steps=12", "trainer.enable_progress_bar=false", "metrics=none", "logger=csv"),
    *("ema=none", "lr_schedule=constant", "callbacks.validation.every=4", "~callbacks.sample_grid"),
    *("~callbacks.trajectory", "~callbacks.schedule_plot", "callbacks.checkpoint.monitor=val/loss", "scheduler=cosine"),
    *("objective=v", "conditioner.dropout=0", "optimizer.lr=0.01,0.02,1e-9,-1", "seed=0"),
]
SEARCH = [
    "hparams_search=random",
    *("hydra.sweeper.sampler=grid", "hydra.sweeper.n_trials=null", "hydra.sweeper.monitor=val/loss"),
    "hydra.sweeper.pruner={_target_: optuna.pruners.ThresholdPruner, upper: 0.854, n_warmup_steps: 5}",
]


@pytest.mark.slow
def test_a_search_of_trainings_killed_and_gone_on_with_by_two(tmp_path: Path) -> None:
    """One trial fails, one is pruned, one is killed with the whole command; two others end what is left, each once."""
    sweep = tmp_path / "sweep"

    def start(*words: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "160"}
        command = [sys.executable, str(ROOT / "train.py"), "-m", *words]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)

    first = start(*SEARCH, *TINY, f"hydra.sweep.dir={sweep}")
    deadline = time.monotonic() + 240
    # Whichever trial first has a checkpoint of its own to go on from dies here, or just after its end.
    while not list(sweep.glob("*/checkpoints/*.ckpt")):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.02)
    first.kill()
    first.communicate()
    two = [start(f"sweep.resume={sweep}") for _ in range(2)]
    told = [each.communicate(timeout=240)[0] for each in two]
    assert not any("Traceback" in text for text in told), told
    study = optuna.load_study(study_name="search", storage=open_storage(place_of(None, sweep)))
    last = {trial.params["optimizer.lr"]: trial for trial in _results.ended(study)}
    assert len(_results.ended(study)) == 4
    assert {lr: trial.state.name for lr, trial in last.items()} == {
        **{0.01: "COMPLETE", 0.02: "COMPLETE"},
        **{1e-9: "PRUNED", -1: "FAIL"},
    }
    assert "Invalid learning rate" in last[-1].user_attrs["reason"]
    assert [each.returncode for each in two].count(1) >= 1, "one trial failed"
    for lr, trial in last.items():
        folder = Path(trial.user_attrs["folder"])
        if lr == -1:
            assert "Invalid learning rate" in json.loads((folder / "failed.json").read_text())["error"]
            continue
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["status"] == ("pruned" if lr == 1e-9 else "finished")
        import torch

        step = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
        assert step == summary["steps"] == (8 if lr == 1e-9 else 12)
        with (folder / "metrics.csv").open(newline="") as file:
            logged = [row["step"] for row in csv.DictReader(file) if row.get("val/loss")]
        assert logged == (["4", "8"] if lr == 1e-9 else ["4", "8", "12"]), "each step once"
        assert trial.intermediate_values[step] == pytest.approx(summary["val/loss"])
    folders = {trial.user_attrs["folder"] for trial in last.values()}
    assert {str(path) for path in sweep.iterdir() if path.name.isdigit()} == folders and len(folders) == 4
    best = json.loads((sweep / "best.json").read_text())
    assert best["best"]["trial"] == study.best_trial.number and best["trials"]["failed"] == 1
    assert f"optimizer.lr={study.best_trial.params['optimizer.lr']}" in best["best"]["command"]
    assert (sweep / "report.html").is_file() and (sweep / "search.png").is_file() and (sweep / "search.html").is_file()
