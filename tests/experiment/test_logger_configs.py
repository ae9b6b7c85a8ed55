from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"
OPTIONS = {
    "default": {"csv": "CSVLogger", "wandb": "RunWandbLogger"},
    "csv": {"csv": "CSVLogger"},
    "wandb": {"wandb": "RunWandbLogger"},
    "tensorboard": {"csv": "CSVLogger", "tensorboard": "TensorBoardLogger"},
    "none": {},
}


def test_every_option_is_in_the_table() -> None:
    assert {path.stem for path in (CONF / "logger").glob("*.yaml")} == set(OPTIONS)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_makes_its_loggers_inside_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    if option == "tensorboard" and find_spec("tensorboard") is None:
        pytest.skip("the optional package tensorboard is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(f"logger/{option}")
    root = {"paths": {"run_dir": str(tmp_path)}, "name": "digits", "task": "train"}
    config = OmegaConf.merge(root, config)
    loggers = {key: instantiate(entry) for key, entry in (config.get("logger") or {}).items()}
    assert {key: type(logger).__name__ for key, logger in loggers.items()} == OPTIONS[option]
    for logger in loggers.values():
        assert Path(logger.save_dir) == tmp_path
