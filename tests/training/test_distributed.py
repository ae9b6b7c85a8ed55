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
    figures = {name[4:]: value for name, value in first["figures"].items() if name.startswith("val/")}
    assert {"loss", "fid_41", "fid_41_low", "kid", "kid_se", "precision", "memorised_share"} <= set(figures)
    # Two processes' figures, subset of kept features and intervals included, are one's of the same weights.
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert {name: figures[name] for name in alone} == pytest.approx(alone, rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if "best" not in path.name) == [
        "last.ckpt",
        "last.ema.safetensors",
        "step_000002.ckpt",
        "step_000004.ckpt",
        "step_000006.ckpt",
    ]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "best_and_worst.png",
        "nearest_training_images.png",
        "step_000003.png",
        "step_000006.png",
        "trajectory_000006.gif",
        "trajectory_000006.png",
    ]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "0", "2", "3", "4", "6"]
    assert json.loads((tmp_path / "evaluation.json").read_text())["num_samples"] == 41


@pytest.mark.slow
def test_two_processes_see_one_shape_a_step(tmp_path):
    """Both ranks have images of one shape at every step, other ones each, together those of one process; weights and
    validation agree.
    """
    script, environment = Path(__file__).with_name("bucketed_processes.py"), os.environ | {"PYTHONPATH": str(SOURCE)}
    for devices, batch_size in ((2, 3), (1, 6)):
        run = subprocess.run(
            [sys.executable, str(script), str(tmp_path), str(devices), str(batch_size)],
            env=environment | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr[-2000:]
    names = ("rank0of2", "rank1of2", "rank0of1")
    first, second, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in names)
    assert first["weights"] == second["weights"] and first["val"] == second["val"]
    for one, other, both in zip(first["steps"], second["steps"], whole["steps"], strict=True):
        assert one["shape"] == other["shape"] == both["shape"]
        assert one["index"] + other["index"] == both["index"]
    assert len({tuple(step["shape"]) for step in whole["steps"]}) == 3
    assert (tmp_path / "samples" / "step_000012.png").is_file()
