"""``benchmarks/learning.py``: its bars, and (slow) a row through the real commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ornstein.cli.validate import validate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import learning

    yield learning
    for name in ("learning", "common"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("figures", "met"),
    [
        ({}, True),
        ({"accuracy": 0.0}, False),
        ({"fid": 1e9}, False),
        ({"fid": float("nan")}, False),
        ({"failed": "error: no such model"}, False),
    ],
    ids=str,
)
def test_a_row_is_held_to_both_bars(learning: ModuleType, figures: dict[str, object], met: bool) -> None:
    bars = learning.ROWS["dit"]
    given = {"accuracy": bars.accuracy, "fid": bars.fid, **figures}
    assert learning.Outcome(row="dit", command="", steps=1, **given).met is met


def test_every_row_is_a_run_that_can_train(learning: ModuleType, compose: Callable[..., object]) -> None:
    for name, row in learning.ROWS.items():
        assert 0.5 < row.accuracy < 1 and 0 < row.fid < 64, name  # 0.1 is chance; 64 is the distance to the mean image
        validate(compose(*row.words.split(), *learning.QUIET, f"trainer.max_steps={row.steps}"))


@pytest.mark.slow
def test_it_trains_scores_and_checks(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "figures.json"), "--markdown", str(tmp_path / "table.md")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/learning.py"), "--quick", "--check", "--rows", "dit", *files],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr[-2000:]  # twenty steps reach no bar
    assert "bars missed: dit" in done.stdout
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert row["failed"] is None and row["steps"] == 20 and row["met"] is False
    assert 0 <= row["accuracy"] <= 1 and row["fid"] > row["fid_floor"] > 0 and row["parameters"] > 1e5
    assert "python train.py model=dit trainer.max_steps=20" in (tmp_path / "table.md").read_text()
