import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ornstein.experiment.run_dir import RunDirectory
from ornstein.experiment.run_identity import find_unfinished, identity

CONFIG: dict[str, Any] = {
    "task": "train",
    "name": "digits-dit",
    "seed": 0,
    "resume": None,
    "paths": {"output_root": "outputs", "run_dir": "/home/a/outputs/train/2026-01-01/10-00-00"},
    "data": {"_target_": "ornstein.data.Digits", "image_size": 8, "num_workers": 0, "root": "/data/digits"},
    "sampler": {"steps": 50, "eta": 1.0},
    "logger": {"csv": {"path": "/home/a/outputs/train/2026-01-01/10-00-00/metrics.csv"}},
    "callbacks": {
        "checkpoint": {"dirpath": "/home/a/outputs/train/2026-01-01/10-00-00/checkpoints", "every": 100},
        "progress": {"_target_": "x"},
    },
    "trainer": {"max_steps": 100, "accelerator": "cpu", "devices": 1, "enable_progress_bar": True},
}


def _changed(**places: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    for place, value in places.items():
        *groups, key = place.split("__")
        target = config
        for group in groups:
            target = target[group]
        target[key] = value
    return config


@pytest.mark.parametrize(
    "config",
    [
        _changed(
            paths__run_dir="/b/later",
            logger__csv__path="/b/later/metrics.csv",
            callbacks__checkpoint__dirpath="/b/later/checkpoints",
        ),
        _changed(logger={}),
        _changed(resume="auto"),
        _changed(trainer__accelerator="gpu", trainer__devices=4),
        _changed(trainer__enable_progress_bar=False),
        _changed(data__num_workers=8),
        _changed(callbacks__progress=None),
        _changed(sampler__eta=1),
        dict(reversed(CONFIG.items())),
    ],
    ids=lambda config: "",
)
def test_the_same_run(config: dict[str, Any]) -> None:
    assert identity(config) == identity(CONFIG)


@pytest.mark.parametrize(
    "config",
    [
        _changed(seed=1),
        _changed(task="tune"),
        _changed(name="other"),
        _changed(trainer__max_steps=200),
        _changed(sampler__eta=0.5),
        _changed(data__root="/data/cats"),
        _changed(callbacks__checkpoint__every=50),
        _changed(sampler__new=None),
    ],
    ids=lambda config: "",
)
def test_another_run(config: dict[str, Any]) -> None:
    assert identity(config) != identity(CONFIG)


def test_identity_survives_the_yaml_and_reads_well(tmp_path: Path) -> None:
    config = _changed(sampler__eta=1e-7, data__mean=[0.1, (2, 3)])
    run = RunDirectory(tmp_path)
    run.write_config({**config, "data": {**config["data"], "mean": [0.1, [2, 3]]}})
    assert identity(run.read_config()) == identity(config)
    assert identity(config).startswith("digits-dit-") and len(identity(config)) == len("digits-dit-") + 12
    assert identity({"name": "a b/../c=ü"}).startswith("a-b-..-c-")


def _run(root: Path, place: str, *, status: str | None, age: float, change: Callable[..., Any] = _changed) -> Path:
    run = RunDirectory(root / place)
    run.write_config(change())
    if status:
        run.mark(status)  # type: ignore[arg-type]
    os.utime(run.config_path, (age, age))
    return run.path


def test_find_unfinished(tmp_path: Path) -> None:
    me = identity(CONFIG)
    assert find_unfinished(tmp_path / "absent", me) is None
    old = _run(tmp_path, "2026-01-01/10-00-00", status="running", age=1)
    sweep = _run(tmp_path, "multirun/2026-01-02/10-00-00/3", status="failed", age=2)
    _run(tmp_path, "2026-01-03/10-00-00", status="finished", age=3)
    _run(tmp_path, "2026-01-04/10-00-00", status="running", age=4, change=lambda: _changed(seed=1))
    broken = RunDirectory(tmp_path / "2026-01-05/10-00-00")
    broken.write_text("config.yaml", "a: [")
    found = find_unfinished(tmp_path, me)
    assert found is not None and found.path == sweep
    found.mark("finished")
    again = find_unfinished(tmp_path, me)
    assert again is not None and again.path == old
    again.mark("finished")
    assert find_unfinished(tmp_path, me) is None
