"""What the tests of every floor may use; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from omegaconf import DictConfig


@pytest.fixture(scope="session")
def compose_config() -> Callable[..., DictConfig]:
    """Composes a config as the command line does, in this process: ``compose_config("model=dit", run_dir=folder)``.

    It leaves Hydra's own config set, as a running command has it; ``compose`` takes it away again.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    from ornstein.cli.launch import conf_dir, register_resolvers

    def composed(*overrides: str, run_dir: Path, config_name: str = "train") -> DictConfig:
        register_resolvers()
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            cfg = hydra_compose(
                config_name, [*overrides, f"hydra.runtime.output_dir='{run_dir}'"], return_hydra_config=True
            )
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg

    return composed


@pytest.fixture
def compose(compose_config: Callable[..., DictConfig], tmp_path: Path) -> Iterator[Callable[..., DictConfig]]:
    """``compose("model=dit")``, for a run in a folder of the test's own."""
    from hydra.core.hydra_config import HydraConfig

    def composed(*overrides: str, run_dir: Path = tmp_path / "run", config_name: str = "train") -> DictConfig:
        return compose_config(*overrides, run_dir=run_dir, config_name=config_name)

    yield composed
    HydraConfig.instance().cfg = None
