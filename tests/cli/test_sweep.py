"""What ``evaluate.py -m`` leaves: collected from files alone, failures named, W&B read back."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from ornstein.cli import launch
from ornstein.cli.sweep import SweepResults, check_logger, collect, finish, log_one, recorded, swept
from ornstein.errors import OrnsteinError
from ornstein.experiment.atomic import write_json

if TYPE_CHECKING:
    from omegaconf import DictConfig


def job(folder: Path, number: int, *words: str, fid: float | None = None, nfe: int = 10, **config: Any) -> Path:
    """What a job leaves; without a figure, one that was killed."""
    place = folder / str(number)
    (place / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(list(words)), place / ".hydra" / "overrides.yaml")
    OmegaConf.save(OmegaConf.create({"hydra": {"job": {"num": number}}}), place / ".hydra" / "hydra.yaml")
    if fid is not None:
        report = {
            "values": {"fid_1k": fid, "kid": None},
            "num_samples": 1000,
            "extractor": "digits",
            "fingerprint": "f" * 64,
            "reference": {"count": 1438, "split": "train"},
            "sampling": {"nfe": nfe, "sampler": "DDIM", "weights": "ema", "images_seen": 640, "seed": 0},
        }
        write_json(place / "evaluation.json", report)
        write_json(place / "summary.json", {"samples_per_s": 50.0})
        OmegaConf.save(OmegaConf.create({"name": "digits-class_unet", "run": "a_run", **config}), place / "config.yaml")
    return place


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    for number in range(11):  # 10 comes after 9, whatever their names' order
        job(
            folder,
            number,
            "run=a_run",
            "guidance=cfg",
            f"sampler.steps={5 + number}",
            fid=12.0 - number,
            nfe=5 + number,
        )
    failed = job(folder, 11, "run=a_run", "guidance=cfg", "sampler.steps=0")
    write_json(failed / "failed.json", {"error": "sampler.steps=0: a sampler needs at least 1 step"})
    job(folder, 12, "run=a_run", "guidance=cfg", "sampler.steps=99")
    return folder


def test_jobs_are_collected_from_their_files(grid: Path) -> None:
    cells = collect(grid)
    assert [cell.job for cell in cells] == list(range(13))
    assert cells[10].keys == {"guidance": "cfg", "sampler.steps": "15"} and cells[10].main == "fid_1k"
    assert (cells[10].nfe, cells[10].samples_per_s, cells[10].figures) == (15, 50.0, {"fid_1k": 2.0})
    assert cells[11].error == "sampler.steps=0: a sampler needs at least 1 step"
    assert "killed" in str(cells[12].error)


def test_the_results_lie_in_the_sweeps_folder(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(grid) == ["11", "12"]
    rows = list(csv.DictReader((grid / "results.csv").open(newline="")))
    assert [row["fid_1k"] for row in rows] == [f"{value:.1f}" for value in range(2, 13)] + ["", ""]
    assert set(rows[0]) == {"job", "guidance", "sampler.steps", "fid_1k", "nfe", "samples_per_s", "error"}
    results = json.loads((grid / "results.json").read_text())
    assert results["rows"][0]["sampler.steps"] == "15" and results["figure"] == "fid_1k"
    assert results["name"] == "digits-class_unet" and results["front"] == list(range(11))
    assert "1,000 samples against 1438 train images in the digits feature space" in results["notes"][0]
    assert (grid / "pareto.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert text.count("failed: ") == 2 and "13 evaluations, 2 failed" in text
    assert "results.csv, results.json, pareto.png, report.html in" in text
    page = (grid / "report.html").read_text()
    start = page.index('id="data">') + len('id="data">')
    data = json.loads(page[start : page.index("</script>", start)].replace("<\\/", "</"))
    assert [run["name"] for run in data["runs"]] == [str(number) for number in range(13)] and data["main"] == "fid_1k"
    assert [run["figures"].get("nfe") for run in data["runs"]] == [*range(5, 16), None, None]
    assert {run["name"]: run["status"] for run in data["runs"][10:]} == {
        "10": "unknown",
        "11": "failed",
        "12": "failed",
    }
    assert data["runs"][11]["reason"] == "sampler.steps=0: a sampler needs at least 1 step"


def test_the_command_fails_where_a_job_did(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_failed_jobs", [])
    SweepResults().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(grid)}}}))
    assert launch._failed_jobs == ["11", "12"]


def test_only_one_process_of_several_collects(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    SweepResults().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(grid)}}}))
    assert not (grid / "results.csv").exists()


@pytest.mark.parametrize(
    ("jobs", "names"),
    [
        ([{"run": "a", "seed": "0"}, {"run": "a", "seed": "1"}], ["seed"]),
        ([{"sampler": "ddim", "run": "a"}], ["sampler"]),
        ([{"x": "1"}, {"x": "1", "y": "2"}], ["y"]),
        ([], []),
    ],
)
def test_what_was_swept(jobs: list[dict[str, str]], names: list[str]) -> None:
    assert swept(jobs) == names


def test_a_sweep_of_autoencoders_has_a_table_and_no_picture(tmp_path: Path) -> None:
    for number in range(2):
        place = job(tmp_path, number, f"weights={number}", fid=1.0)
        write_json(place / "evaluation.json", {"values": {"psnr": 20.0 + number}, "num_images": 40})
    assert finish(tmp_path) == []
    assert (tmp_path / "results.csv").exists() and not (tmp_path / "pareto.png").exists()


WANDB = {
    "task": "evaluate",
    "logger": {"wandb": {"project": "a_project", "group": "evaluate", "tags": ["grid"], "mode": "offline"}},
}


def logged(folder: Path) -> Any:
    read_wandb = runpy.run_path(str(Path(__file__).parents[1] / "experiment" / "wandb_reader.py"))["read_wandb"]
    (segment,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 20
    while not (read := read_wandb(segment)).complete and time.monotonic() < deadline:
        time.sleep(0.01)
    return read, segment


def test_one_wandb_run_holds_the_sweep(tmp_path: Path) -> None:
    for number in range(3):
        job(tmp_path, number, f"sampler.steps={5 + number}", fid=3.0 - number, **WANDB)
    write_json(job(tmp_path, 3, "sampler.steps=0") / "failed.json", {"error": "no steps"})
    finish(tmp_path)
    read, segment = logged(tmp_path)
    assert (read.project, read.name) == ("a_project", "digits-class_unet sweep")
    assert group_of(segment) == "digits-class_unet", "beside the run itself"
    history = {key: value for row in read.history for key, value in row.items()}
    table = (
        history["results"] if "results" in history else {k: v for k, v in history.items() if k.startswith("results")}
    )
    assert "table" in str(table)
    (file,) = (segment.parent / "files" / "media" / "table").glob("results*.json")
    stored = json.loads(file.read_text())
    rows = [dict(zip(stored["columns"], row, strict=True)) for row in stored["data"]]
    assert [row["fid_1k"] for row in rows] == [1.0, 2.0, 3.0, None]
    assert [row["sampler.steps"] for row in rows] == ["7", "6", "5", "0"] and rows[3]["error"] == "no steps"
    (picture,) = (segment.parent / "files" / "media" / "images").glob("pareto*.png")
    assert picture.stat().st_size == pytest.approx((tmp_path / "pareto.png").stat().st_size, rel=0.5)
    assert (read.summary["best/fid_1k"], read.summary["best/nfe"]) == (1.0, 10)


def group_of(segment: Path) -> str:
    from wandb.proto.wandb_internal_pb2 import Record

    records = runpy.run_path(str(Path(__file__).parents[1] / "experiment" / "wandb_reader.py"))["records"]
    for body in records(segment):
        record = Record()
        record.ParseFromString(body)
        if record.WhichOneof("record_type") == "run":
            return str(record.run.run_group)
    raise AssertionError("the segment holds no run")


def test_a_single_evaluation_can_be_logged(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (20, 10)).save(tmp_path / "metric_card.png")
    wandb = {**WANDB["logger"]["wandb"], "group": "mine"}  # type: ignore[index]
    cfg = OmegaConf.create({"name": "a run", "run": "x", "task": "evaluate", "logger": {"wandb": wandb}})
    log_one(cfg, {"values": {"fid_1k": 2.0, "kid": None}, "sampling": {"nfe": 10}}, tmp_path)
    read, segment = logged(tmp_path)
    assert read.name == "a run evaluation" and group_of(segment) == "mine"
    assert read.history[0]["fid_1k"] == 2.0 and (read.summary["fid_1k"], read.summary["nfe"]) == (2.0, 10)
    assert any(key.startswith("metric_card") for row in read.history for key in row)


def test_nothing_is_logged_unless_asked_for(tmp_path: Path) -> None:
    log_one(OmegaConf.create({"name": "a run", "run": "x", "logger": {}}), {"values": {}, "sampling": {}}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("logger", "refused"), [({}, None), ({"wandb": {"mode": None}}, None), ({"csv": {"a": 1}}, "csv")]
)
def test_loggers(logger: dict[str, Any], refused: str | None) -> None:
    cfg = OmegaConf.create({"logger": logger})
    if refused is None:
        check_logger(cfg)
    else:
        with pytest.raises(OrnsteinError, match=f"logger.{refused}: .* choose logger=wandb or logger=none"):
            check_logger(cfg)


@pytest.fixture
def sweep_job(
    tmp_path: Path, compose: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], DictConfig]:
    """A composed config that believes to be a job of a multirun."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    def made() -> DictConfig:
        cfg = compose("hydra.mode=MULTIRUN", run_dir=tmp_path)
        with open_dict(cfg):
            cfg.traceback = False
        assert HydraConfig.get().mode is not None
        return cfg

    return made


@pytest.mark.parametrize(
    ("error", "words", "trace"),
    [
        (OrnsteinError("sampler=x\n  cannot: choose y."), "sampler=x cannot: choose y.", False),
        (RuntimeError("CUDA out of memory"), "RuntimeError: CUDA out of memory", True),
    ],
)
def test_a_job_that_fails_leaves_its_reason_and_the_others_go_on(
    tmp_path: Path,
    sweep_job: Callable[[], DictConfig],
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    words: str,
    trace: bool,
) -> None:
    def body(cfg: DictConfig) -> None:
        raise error

    assert recorded(body)(sweep_job()) is None
    assert json.loads((tmp_path / "failed.json").read_text()) == {"error": words}
    told = capsys.readouterr().err
    assert f"error: {words}" in told and ("Traceback" in told) == trace


def test_outside_a_sweep_errors_are_errors(tmp_path: Path, compose: Callable[..., DictConfig]) -> None:
    def body(cfg: DictConfig) -> None:
        raise OrnsteinError("no")

    with pytest.raises(OrnsteinError):
        recorded(body)(compose(run_dir=tmp_path))
    assert not list(tmp_path.iterdir())


LAUNCHERS = {
    "basic": ["hydra/launcher=basic"],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
}


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of a few thousand weights after three steps, without figures of its own."""
    import ornstein

    words = [
        "model.network.base_channels=8",
        "model.network.channel_mults=[1]",
        "model.network.groups=4",
        "data.limit=16",
        "data.batch_size=8",
        "trainer.max_steps=3",
        "trainer.enable_progress_bar=false",
        "logger=none",
        "callbacks=none",
        "+callbacks.checkpoint._target_=ornstein.training.callbacks.Checkpoint",
        "+callbacks.checkpoint.run_dir=${paths.run_dir}",
    ]
    folder = tmp_path_factory.mktemp("trained") / "run"
    ornstein.train(words, run_dir=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_grid_over_a_finished_run(tmp_path: Path, trained_run: Path, launcher: str) -> None:
    """Jobs in this command's own process and in others leave the same; one that cannot work stops no other."""
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    words = ["num_samples=24", "metrics.bootstrap=20", "sampler=ddim,heun", "sampler.steps=2,0", "keep_samples=npz"]
    script = Path(__file__).parents[2] / "evaluate.py"
    result = subprocess.run(
        [sys.executable, str(script), "-m", *LAUNCHERS[launcher], f"run={trained_run}", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent / "src"), *sys.path]), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1, "two of the four cannot work" + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    (folder,) = (path.parent for path in tmp_path.rglob("results.csv"))
    rows = list(csv.DictReader((folder / "results.csv").open(newline="")))
    assert [(row["sampler"], row["sampler.steps"]) for row in sorted(rows, key=lambda row: row["job"])] == [
        ("ddim", "2"), ("ddim", "0"), ("heun", "2"), ("heun", "0")
    ]  # fmt: skip
    assert {row["nfe"] for row in rows} == {"2", "3", ""}
    assert [row["error"] for row in rows][2:] == ["sampler.steps=0: a sampler needs at least 1 step."] * 2
    assert float(rows[0]["fid_24"]) <= float(rows[1]["fid_24"]) and (folder / "pareto.png").is_file()
    assert "4 evaluations, 2 failed" in result.stdout
    # What differs only in the sampler shares labels, and by test_invariance.py noise.
    stored = [np.load(folder / number / "samples.npz") for number in "02"]
    assert np.array_equal(*(each["arr_1"] for each in stored))
    assert not np.array_equal(*(each["arr_0"] for each in stored))
    reports = [json.loads((folder / number / "evaluation.json").read_text()) for number in "02"]
    assert reports[0]["values"]["fid_floor"] == reports[1]["values"]["fid_floor"]
    assert (folder / "0" / "metric_card.png").is_file() and not (folder / "1" / "evaluation.json").exists()
