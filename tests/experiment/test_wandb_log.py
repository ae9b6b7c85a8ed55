import builtins
import os
import runpy
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

import ornstein  # (first: its torchvision guard lets Lightning be imported)
from ornstein.errors import OrnsteinError
from ornstein.experiment.run_dir import RunDirectory
from ornstein.experiment.wandb_artifacts import sweep_of
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
    first, second = read.history
    assert (first["loss"], first["trainer/global_step"], first["images_seen"]) == (0.5, 1, 128)
    # What is logged at one step is one row of that number, pictures too.
    assert (second["loss"], second["trainer/global_step"], second["images_seen"]) == (0.25, 2, 128)
    assert [row["_step"] for row in read.history] == [1, 2]
    assert 0 <= first["time/wall_s"] <= second["time/wall_s"]
    assert any(key.startswith("samples") for key in second)
    assert read.summary["fid"] == 3.0
    assert read.metrics["*"] == "trainer/global_step"
    assert {"images_seen", "time/wall_s"} <= set(read.metrics)
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


def test_quality_has_three_axes(tmp_path: Path) -> None:
    logger = wandb_logger(tmp_path, "ornstein", mode="offline")
    figures = {"val/fid_1k": 3.0, "val/fid_1k_low": 2.5, "images_seen": 640.0, "time/wall_s": 7.25}
    logger.log_metrics({"train/loss": 1.0, "images_seen": 320.0, "time/wall_s": 3.5}, step=5)
    logger.log_metrics(figures, step=10)
    logger.log_metrics({"mine": 1.0}, step=9)  # Lightning's own rows come one step late
    logger.close()
    (segment,) = _segments(tmp_path)
    read = read_wandb(segment)
    assert [row["trainer/global_step"] for row in read.history] == [5, 10]
    last = read.history[-1]
    assert last["mine"] == 1.0 and last["images_seen"] == 640 and last["time/wall_s"] >= 7.25
    assert last["val/fid_1k"] == last["by_images_seen/fid_1k"] == last["by_wall_time/fid_1k"] == 3.0
    assert "by_images_seen/fid_1k_low" not in last
    assert read.metrics["by_images_seen/fid_1k"] == "images_seen"
    assert read.metrics["by_wall_time/fid_1k"] == "time/wall_s"
    assert "by_images_seen/fid_1k" not in read.history[0]


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("outputs/train/multirun/2026-11-21/12-00-00/0", "sweep-2026-11-21-12-00-00"),
        ("outputs/train/multirun/2026-11-21/12-00-00/seed=1/lr=2", "sweep-2026-11-21-12-00-00"),
        ("mine/3", "sweep-mine"),
        ("outputs/train/2026-11-21/12-00-00", None),
    ],
)
def test_a_sweep_is_known_by_its_folder(tmp_path: Path, folder: str, expected: str | None) -> None:
    for sweep in ("outputs/train/multirun/2026-11-21/12-00-00", "mine"):
        (tmp_path / sweep).mkdir(parents=True)
        (tmp_path / sweep / "multirun.yaml").write_text("{}")
    assert sweep_of(tmp_path / folder) == expected


@pytest.mark.parametrize(
    ("options", "group", "tags"),
    [
        ({}, "sweep-mine", ["data=digits", "model=dit"]),
        ({"group": "ablation", "tags": ["a"]}, "ablation", ["a"]),
    ],
)
def test_a_sweeps_runs_stand_together(tmp_path: Path, options: dict[str, Any], group: str, tags: list[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "multirun.yaml").write_text("{}")
    chosen = {"model": "dit", "guidance": "none", "data": "digits", "experiment": None}
    logger = wandb_logger(
        tmp_path / "mine" / "0",
        "o",
        mode="offline",
        job_type="train",
        choices=chosen,
        log_code=False,
        **options,
    )
    logger.log_metrics({"x": 1.0}, step=0)
    logger.close()
    (segment,) = _segments(tmp_path / "mine" / "0")
    read = read_wandb(segment)
    assert (read.group, read.job_type, sorted(read.tags)) == (group, "train", tags)
    assert read.config["choices"] == chosen
    assert not read.artifacts


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (False, {"best.ckpt", "last.ckpt", "last.ema.safetensors"}),
        ("best", {"best.ckpt"}),
    ],
)
def test_config_code_and_model_are_artifacts(tmp_path: Path, which: str | bool, expected: set[str]) -> None:
    run = RunDirectory(tmp_path / "run")
    run.write_config({"seed": 3, "callbacks": {"mine": {"_target_": f"{__name__}.{_segments.__name__}"}}})
    run.write_json("environment.json", {"python": "3.11"})
    logger = wandb_logger(run.path, "ornstein", mode="offline", log_model=which)
    logger.log_metrics({"loss": 0.5}, step=1)
    checkpoints = run.path / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    for name in ("best.ckpt", "last.ckpt", "last.ema.safetensors"):
        (checkpoints / name).write_bytes(name.encode())
    logger.close()
    (segment,) = _segments(run.path)
    read = read_wandb(segment)
    config, code, model = (read.artifacts[name] for name in (f"config-{read.run_id}", "code", f"model-{read.run_id}"))
    assert set(model) == expected
    if which:
        # As they were, though a resumed run replaces them.
        (run.path / "new").write_bytes(b"later")
        os.replace(run.path / "new", checkpoints / "best.ckpt")
        assert model["best.ckpt"].read_bytes() == b"best.ckpt" and not read.references
    else:
        assert read.references["best.ckpt"] == (checkpoints / "best.ckpt").as_uri()
    assert set(config) == {"config.yaml", "environment.json"}
    assert config["config.yaml"].read_text() == (run.path / "config.yaml").read_text()
    places = [place for artifact in (config, code) for place in artifact.values()]
    assert all(place.is_relative_to(run.path) for place in places), "everything of a run lies in its folder"
    with zipfile.ZipFile(code["code.zip"]) as archive:
        names = set(archive.namelist())
        package = "src/ornstein/" if "src/ornstein/__init__.py" in names else "ornstein/"
        assert archive.read(f"{package}errors.py") == Path(ornstein.__file__).with_name("errors.py").read_bytes()
        own = "user/" + "/".join(__name__.split(".")) + ".py"
        assert archive.read(own) == Path(__file__).read_bytes(), "what a user's _target_ names"
        assert not any(name.startswith(("tests/", "outputs/")) for name in names)


def test_which_model_is_checked(tmp_path: Path) -> None:
    with pytest.raises(OrnsteinError, match=r"logger\.wandb\.log_model=last is one of false, best, all"):
        wandb_logger(tmp_path, "ornstein", log_model="last")
