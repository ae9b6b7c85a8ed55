"""What a sweep of training runs says of itself at its end."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ornstein.cli.sweep import FAILED
from ornstein.cli.train_sweep import finish
from ornstein.experiment.atomic import write_json


def job(folder: Path, number: int, *words: str, error: str | None) -> None:
    place = folder / str(number)
    (place / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(list(words)), place / ".hydra" / "overrides.yaml")
    write_json(place / "summary.json", {"status": "finished" if error is None else "running"})
    if error is not None:
        write_json(place / FAILED, {"error": error})


def test_failed_jobs_are_named_in_order_with_what_is_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        model, rate = ("dit", "pixel_unet")[number % 2], ("1e-3", "${sweep_rate}")[number // 6]
        error = {2: "out of memory", 10: "a dead disk"}.get(number)
        job(tmp_path, number, f"model={model}", f"optimizer.lr={rate}", "+data.limit=64", "resume=sweep", error=error)
    assert finish(tmp_path) == {"2": "out of memory", "10": "a dead disk"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sweep      12 jobs, 10 finished, 2 failed")
    assert lines[1:5] == [
        "  job 2 failed: out of memory",
        "    asked: model=dit optimizer.lr=1e-3",
        "  job 10 failed: a dead disk",
        "    asked: model=dit optimizer.lr=${sweep_rate}",
    ]


def test_one_job_has_nothing_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(tmp_path, 0, "model=dit", error="a dead disk")
    assert finish(tmp_path) == {"0": "a dead disk"}
    told = capsys.readouterr().out
    assert "  job 0 failed: a dead disk\n" in told and "asked" not in told
