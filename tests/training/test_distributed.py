from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.slow
def test_two_processes_agree_and_one_writes(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(SOURCE),
        "OMP_NUM_THREADS": "1",
        "ORNSTEIN_CACHE": str(tmp_path / "cache"),
    }
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["images_seen"] == 6 * 16 * 2
    assert {"train/loss", "val/loss", "val/fid", "val/memorised_share"} <= set(first["figures"])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if "best" not in path.name) == [
        "last.ckpt",
        "step_000002.ckpt",
        "step_000004.ckpt",
        "step_000006.ckpt",
    ]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step_000003.png",
        "step_000006.png",
        "trajectory_000006.gif",
        "trajectory_000006.png",
    ]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "0", "2", "3", "4", "6"]
    assert json.loads((tmp_path / "evaluation.json").read_text())["num_samples"] == 41
