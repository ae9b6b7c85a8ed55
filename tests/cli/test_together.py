"""Ranks that somebody else started: one folder, and as many of them as the training asks for."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from ornstein.cli import together
from ornstein.errors import OrnsteinError


@pytest.fixture
def rank(monkeypatch):
    """Makes this process one of torchrun's."""
    for name in ("SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def become(number: int, *, world: int = 4, here: int = 2) -> None:
        variables = {"TORCHELASTIC_RUN_ID": "none", "RANK": number, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": here}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return become


def test_a_process_alone_keeps_its_command_line(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    argv = ["train.py", "seed=1"]
    together.prepare_ranks(argv)
    assert argv == ["train.py", "seed=1"]


def test_ranks_share_the_first_ones_time_and_it_alone_writes_hydras_files(rank, monkeypatch):
    monkeypatch.setattr(together, "_from_first_rank", lambda: "2026-01-02/03-04-05")
    root = "${paths.output_root}/${task}"
    folders = [
        f"hydra.{key}.dir='{root}{where}/2026-01-02/03-04-05'" for key, where in (("run", ""), ("sweep", "/multirun"))
    ]
    for number, more in ((0, []), (1, ["hydra.output_subdir=null", "hydra/job_logging=none"])):
        rank(number)
        argv = ["train.py"]
        together.prepare_ranks(argv)
        assert argv == ["train.py", *folders, *more]
    argv = ["train.py", "hydra.run.dir=here"]
    together.prepare_ranks(argv)
    assert argv == ["train.py", "hydra.run.dir=here", folders[1], *more]


def test_devices_and_nodes_are_those_of_torchrun(rank):
    rank(0)
    cfg = OmegaConf.create({"trainer": {"devices": 2, "num_nodes": 2, "accelerator": "cpu"}})
    together.check_processes(cfg)
    cfg.trainer.num_nodes = 1
    with pytest.raises(OrnsteinError, match=r"set trainer\.devices=2 trainer\.num_nodes=2"):
        together.check_processes(cfg)
