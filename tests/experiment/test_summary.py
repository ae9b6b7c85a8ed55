from pathlib import Path

import pytest

import ornstein  # isort: skip  # noqa: F401  (its guard comes before Lightning imports torchvision)
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ornstein.experiment.run_dir import RunDirectory
from ornstein.experiment.summary import Summary


def test_figures_time_and_status(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with Summary(run) as summary:
        assert run.status == "running"
        summary.update(fid=torch.tensor(3.0), nfe=50, flops=1e9, metrics={"kid": float("nan")})
    written = run.summary()
    assert run.finished
    assert (written["fid"], written["nfe"], written["metrics"]) == (3.0, 50, {"kid": None})
    # this process has loaded torch: anything under 50 MB would be a wrong unit, and so would 1 TB
    assert 50 < written["peak_memory_mb"]["host"] < 1e6
    assert written["wall_time_s"] >= 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(143), "interrupted"),
        (SystemExit(0), "finished"),
        (SIGTERMException(), "interrupted"),
        (ValueError("loss is nan"), "failed"),
    ],
)
def test_status_by_how_it_ended(tmp_path: Path, error: BaseException, status: str) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(type(error)), Summary(run):
        raise error
    assert run.status == status
    if status == "failed":
        assert run.summary()["error"] == "ValueError: loss is nan"


def test_a_second_start_adds_up(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_json("summary.json", {"status": "running", "fid": 2.0, "wall_time_s": 100.0})
    with Summary(run):
        pass
    written = run.summary()
    assert written["fid"] == 2.0 and 100 <= written["wall_time_s"] < 160


def test_a_value_without_a_place_in_json_changes_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with Summary(run) as summary:
        summary.update(fid=1.0)
        before = run.summary()
        with pytest.raises(TypeError, match="no place in JSON"):
            summary.update(fid=object())
        assert run.summary() == before
