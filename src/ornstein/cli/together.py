"""Processes that torchrun or srun started, each with the whole command line: they agree on one run folder.

Each would take the folder's name from its own clock. So the first one's time goes into the others' command lines, by
the store that they meet at; and of Hydra's own files, the first alone writes any.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ornstein.cli.launch import peek_argument
from ornstein.cli.ranks import launched_elsewhere
from ornstein.errors import OrnsteinError

PATIENCE_S = 600.0  # for nodes that start one after the other


def prepare_ranks(argv: list[str]) -> None:
    """Makes the command line name the run's folder, the same on all ranks; of a process that is alone, nothing."""
    if not launched_elsewhere():
        return
    root = "${paths.output_root}/${task}"
    unnamed = {
        "hydra.run.dir": root,
        "hydra.sweep.dir": f"{root}/multirun",
    }
    unnamed = {key: folder for key, folder in unnamed.items() if peek_argument(argv, key) is None}
    if unnamed:
        began = _from_first_rank()
        argv += [f"{key}='{folder}/{began}'" for key, folder in unnamed.items()]
    if _rank() > 0:
        argv += ["hydra.output_subdir=null", "hydra/job_logging=none"]


def _from_first_rank() -> str:
    """``DATE/TIME`` of the first rank, on all of them."""
    import time

    store = _store()
    if _rank() == 0:
        store.set("ornstein/began", time.strftime("%Y-%m-%d/%H-%M-%S"))
    return str(store.get("ornstein/began").decode())


@cache
def _store() -> Any:
    """What the ranks will meet at anyway when the process group is made.

    Kept, as the first rank's is the server: when that goes, so does what the others have not read yet.
    """
    from torch.distributed import rendezvous

    if not os.environ.get("TORCHELASTIC_RUN_ID"):
        from lightning.fabric.plugins.environments import SLURMEnvironment

        place = SLURMEnvironment(auto_requeue=False)
        os.environ |= {
            "MASTER_ADDR": place.main_address,
            "MASTER_PORT": str(place.main_port),
            "RANK": str(place.global_rank()),
            "WORLD_SIZE": str(place.world_size()),
        }
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=PATIENCE_S)))
    except (RuntimeError, ValueError) as error:
        raise OrnsteinError(
            f"rank {_rank()} did not find the first one at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within {PATIENCE_S:.0f} s ({error}): see docs/cluster.md."
        ) from error
    return store


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0")


def check_processes(cfg: DictConfig) -> None:
    """``trainer.devices`` and ``trainer.num_nodes`` are those of whoever started the processes.

    Raises:
        OrnsteinError: names both, and what to set.
    """
    if not os.environ.get("TORCHELASTIC_RUN_ID") or not launched_elsewhere():
        return
    from ornstein.cli.job import devices_of

    here = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = int(os.environ["WORLD_SIZE"]) // here
    devices = devices_of(cfg.trainer)
    own_nodes = int(OmegaConf.select(cfg, "trainer.num_nodes", default=1))
    if (devices, own_nodes) != (here, nodes):
        raise OrnsteinError(
            f"torchrun started {here} processes on each of {nodes} nodes, and trainer.devices={devices} "
            f"trainer.num_nodes={own_nodes}: set trainer.devices={here} trainer.num_nodes={nodes}."
        )
