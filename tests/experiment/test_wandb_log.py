import builtins
import os
import runpy
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

import ornstein  # noqa: F401  (first: its torchvision guard lets Lightning be imported)
from ornstein.errors import OrnsteinError
from ornstein.experiment.run_dir import RunDirectory
from ornstein.experiment.wandb_log import RunWandbLogger, has_credentials, run_id, wandb_logger

_read_wandb = runpy.run_path(str(Path(__file__).with_name("wandb_reader.py")))["read_wandb"]


def read_wandb(segment: Path) -> Any:
    """The segment once it is whole: W&B's own process writes the last records a moment after ``close``."""
    deadline = time.monotonic() + 20
    while not (read := _read_wandb(segment)).complete and time.monotonic() < deadline:
        time.sleep(0.01)
    return read


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home without credentials and an environment that says nothing about W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def _segments(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/offline-run-*/*.wandb"))


def test_an_offline_run_can_be_read_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    run = RunDirectory(tmp_path / "run")
    run.write_config({"seed": 3, "sampler": {"steps": 50}})
    logger = wandb_logger(run.path, "ornstein", name="digits", group="train", tags=["a"])
    assert capfd.readouterr().out == (
        f"W&B logs offline; to upload this run: wandb sync {run.path}/wandb/offline-run-*\n"
    )
    assert not (run.path / "wandb").exists(), "nothing begins before the first value"
    logger.log_metrics({"loss": 0.5, "train/images_seen": 128}, step=1)
    logger.log_metrics({"loss": 0.25}, step=2)
    logger.log_image("samples", [Image.new("L", (8, 8))], step=2)
    logger.log_summary({"fid": 3.0})
    logger.close()
    (segment,) = _segments(run.path)
    read = read_wandb(segment)
    assert read.run_id == run_id(run.path) and read.project == "ornstein" and read.name == "digits"
    assert read.config["seed"] == 3 and read.config["sampler"] == {"steps": 50}
    first, second, third = read.history
    assert (first["loss"], first["trainer/global_step"], first["images_seen"]) == (0.5, 1, 128)
    assert (second["loss"], second["trainer/global_step"], second["images_seen"]) == (0.25, 2, 128)
    assert 0 <= first["wall_time_s"] <= second["wall_time_s"]
    assert any(key.startswith("samples") for key in third)
    assert read.summary["fid"] == 3.0
    assert read.metrics["*"] == "trainer/global_step"
    assert {"images_seen", "wall_time_s"} <= set(read.metrics)
    out, err = capfd.readouterr()
    assert out == "" and err == "", "one line is all it says"


def test_a_resumed_run_writes_a_second_segment_of_the_same_id(tmp_path: Path) -> None:
    for start in (0, 3):
        logger = wandb_logger(tmp_path, "ornstein", mode="offline")
        for step in range(start, start + 3):
            logger.log_metrics({"loss": float(step)}, step=step)
        logger.close()
        if start == 0:
            (tmp_path / "wandb" / "latest-run").unlink()
            for folder in (tmp_path / "wandb").glob("offline-run-*"):  # names hold whole seconds
                folder.rename(folder.with_name("offline-run-20000101_000000-" + run_id(tmp_path)))
    parts = [read_wandb(segment) for segment in _segments(tmp_path)]
    assert [part.run_id for part in parts] == [run_id(tmp_path)] * 2
    assert [row["loss"] for part in parts for row in part.history] == [0, 1, 2, 3, 4, 5]


def test_two_runs_in_one_process_do_not_mix(tmp_path: Path) -> None:
    loggers = [wandb_logger(tmp_path / name, "ornstein", mode="offline") for name in ("a", "b")]
    for value, logger in enumerate(loggers):
        logger.log_metrics({"x": value}, step=0)
    for logger in loggers:
        logger.close()
    for value, name in enumerate(("a", "b")):
        (segment,) = _segments(tmp_path / name)
        assert [row["x"] for row in read_wandb(segment).history] == [value]


HOST = {"": "api.wandb.ai", "https://wandb.example.org": "wandb.example.org"}


@pytest.mark.parametrize("base", HOST)
def test_credentials_are_found_without_wandb(nobody: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    if base:
        monkeypatch.setenv("WANDB_BASE_URL", base)
    assert not has_credentials()
    (nobody / ".netrc").write_text("machine elsewhere.org login user password x\n")
    assert not has_credentials()
    (nobody / ".netrc").write_text(f"machine {HOST[base]} login user password {'0' * 40}\n")
    (nobody / ".netrc").chmod(0o600)
    assert has_credentials()
    monkeypatch.setenv("NETRC", str(nobody / "none"))
    assert not has_credentials()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_credentials()


@pytest.mark.parametrize(
    ("mode", "environment", "key", "expected"),
    [
        (None, None, False, "offline"),
        (None, None, True, "online"),
        (None, "offline", True, "offline"),
        (None, "dryrun", True, "offline"),
        (None, "disabled", True, "disabled"),
        ("offline", "online", True, "offline"),
        ("online", None, True, "online"),
        ("online", None, False, "offline"),  # it could only ask for a key
    ],
)
def test_mode(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str | None,
    environment: str | None,
    key: bool,
    expected: str,
) -> None:
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_logger(tmp_path, "ornstein", mode=mode).mode == expected


def test_an_unknown_mode_is_told(tmp_path: Path) -> None:
    with pytest.raises(OrnsteinError, match="one of online, offline, disabled"):
        wandb_logger(tmp_path, "ornstein", mode="onlne")


def _log(logger: RunWandbLogger) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logger.log_metrics({"loss": 1.0}, step=0)
        logger.log_image("samples", ["nowhere.png"], step=0)
        logger.log_hyperparams({"a": 1})
        logger.experiment.log({"loss": 1.0})
        logger.close()
    return [str(each.message) for each in caught if "W&B" in str(each.message)]


def test_a_wandb_that_cannot_be_imported_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "wandb" or name.startswith("wandb."):
            raise ImportError("wandb is broken here")
        return real(name, *rest, **more)

    logger = wandb_logger(tmp_path, "ornstein", mode="offline")
    monkeypatch.setattr(builtins, "__import__", without)
    (warning,) = _log(logger)
    assert "could not start (ImportError: wandb is broken here)" in warning and "goes on without it" in warning


def test_a_failing_start_online_goes_on_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    real = wandb.init

    def init(**options: Any) -> Any:
        if options["mode"] == "online":
            raise TimeoutError("no answer")
        return real(**options)

    monkeypatch.setattr(wandb, "init", init)
    logger = wandb_logger(tmp_path, "ornstein")
    with pytest.warns(UserWarning, match=r"could not start online \(TimeoutError: no answer\): it logs offline"):
        logger.log_metrics({"loss": 1.0}, step=0)
    logger.close()
    (segment,) = _segments(tmp_path)
    assert len(read_wandb(segment).history) == 1


def test_a_run_that_dies_on_the_way_costs_one_warning(tmp_path: Path) -> None:
    logger = wandb_logger(tmp_path, "ornstein", mode="offline")
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.experiment.finish()  # what follows raises inside wandb
    (warning,) = _log(logger)
    assert "stopped working" in warning
