from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

CONF = Path(__file__).resolve().parents[2] / "conf"
OPTIONS = {
    "default": {"csv": "CSVLogger", "wandb": "RunWandbLogger"},
    "csv": {"csv": "CSVLogger"},
    "wandb": {"wandb": "RunWandbLogger"},
    "tensorboard": {"csv": "CSVLogger", "tensorboard": "RunTensorBoardLogger"},
    "mlflow": {"csv": "CSVLogger", "mlflow": "RunMLFlowLogger"},
    "all": {
        "csv": "CSVLogger",
        "wandb": "RunWandbLogger",
        "tensorboard": "RunTensorBoardLogger",
        "mlflow": "RunMLFlowLogger",
    },
    "none": {},
}


def test_every_option_is_in_the_table() -> None:
    assert {path.stem for path in (CONF / "logger").glob("*.yaml")} == set(OPTIONS)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_makes_its_loggers_inside_the_run_folder(
    compose: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    for package, needed_by in (("tensorboard", ("tensorboard", "all")), ("mlflow", ("mlflow", "all"))):
        if option in needed_by and find_spec(package) is None:
            pytest.skip(f"the optional package {package} is not installed")
    # It begins with a database, which tests/experiment/test_mlflow_log.py waits for.
    monkeypatch.setattr("ornstein.experiment.mlflow_log.MLFlowLogger.__init__", lambda self, **_: None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = compose(f"logger={option}", run_dir=tmp_path)
    loggers = {key: instantiate(entry) for key, entry in (config.logger or {}).items()}
    assert {key: type(logger).__name__ for key, logger in loggers.items()} == OPTIONS[option]
    for logger in loggers.values():
        assert Path(logger.save_dir) == tmp_path


def test_several_at_once_by_name(compose: Callable[..., Any]) -> None:
    assert set(compose("logger=[csv,tensorboard,wandb]").logger) == {"csv", "tensorboard", "wandb"}
