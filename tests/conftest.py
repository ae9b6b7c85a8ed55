"""What the tests of every floor may use; nothing heavy is imported here."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before torch is imported, and inherited by the commands that tests start: one thread each (workers share the cores,
# and sums keep their order), and no library that asks a server for anything.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}

# torchvision's guard, before any test imports Lightning, and in pytest-xdist's own process, which imports the classes
# of its workers' warnings.
import ornstein  # noqa: F401

if TYPE_CHECKING:
    from omegaconf import DictConfig


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that would connect to anything but this machine."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            host = str(address[0])
            try:
                local = ipaddress.ip_address(host).is_loopback
            except ValueError:
                local = host in ("localhost", socket.gethostname())
            if not local:
                pytest.fail(f"a test tried to connect to {host}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C is as it was after each test: Lightning leaves it ignored after a training that was interrupted."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


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
