"""The processes that an evaluation is spread over: one, ``devices=N`` of this machine, or those of torchrun and srun.

Lightning's Fabric reads the launcher's variables, starts processes and joins them by gloo (CPU) or nccl (GPU).
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ornstein.errors import OrnsteinError

# Ranks wait for the first one's reference statistics, which of a large data set take longer than torch's half hour.
PATIENCE = timedelta(hours=12)
_joined: list[Ranks] = []  # of a process that torchrun or srun started: joined once, however many jobs it runs


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work.

    Attributes:
        rank: its number.
        world: how many there are.
        device: where it draws; None leaves the choice to who builds the model.
    """

    rank: int = 0
    world: int = 1
    device: str | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Its places among ``count`` samples: consecutive ones, so that rank after rank gives them in order."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank; all processes must call it."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives on the first process, on all of them; the others wait and do not call it."""
        return self.gather(make() if self.first else None)[0]


def check_devices(devices: Any) -> int:
    """``devices=N``, checked before anything is started.

    Raises:
        OrnsteinError: no whole number of at least 1, or more than there are GPUs where there are any.
    """
    import torch

    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise OrnsteinError(
            f"devices={devices} must be a whole number, at least 1: so many GPUs, or processes of the CPU."
        )
    if devices > 1 and torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise OrnsteinError(
            f"devices={devices} and this machine has {torch.cuda.device_count()} GPUs: ask for no more."
        )
    return devices


def launched_elsewhere() -> bool:
    """Whether torchrun or srun started this process beside others."""
    if os.environ.get("TORCHELASTIC_RUN_ID"):
        return int(os.environ.get("WORLD_SIZE", "1")) > 1
    if "SLURM_STEP_ID" not in os.environ or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return False
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or "1") > 1


def join() -> Ranks:
    """Joins the processes that torchrun or srun started; all of them must call it, each time it joins once."""
    if not _joined:
        if os.environ.get("TORCHELASTIC_RUN_ID"):
            here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
            nodes = everywhere // here
        else:
            nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or "1")
            here = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ["SLURM_NTASKS"]) // nodes
        fabric = _fabric(here, nodes=nodes)
        fabric.launch()
        _joined.append(_ranks(fabric))
    return _joined[0]


def spread(work: Callable[..., Any], devices: int, *arguments: Any) -> Any:
    """``work(ranks, *arguments)`` in ``devices`` new processes of this machine; gives what the first one returns.

    ``work``, its arguments and what it returns are pickled: a function of a module, and plain values.

    Raises:
        OrnsteinError: as ``work`` raises it, in the same words.
    """
    from torch.multiprocessing import ProcessRaisedException, get_context, start_processes

    found = get_context("spawn").SimpleQueue()
    processes = start_processes(
        _started, (devices, _free_port(), work, arguments, found), devices, join=False, start_method="spawn"
    )
    value = None
    try:
        ended = False
        while not ended:
            ended = processes.join(timeout=0.1)
            if not found.empty():  # before a long answer fills the pipe and its writer waits
                value = found.get()
    except ProcessRaisedException as error:
        # What a process raised reaches this one as the text of its traceback.
        kind, _, sentence = str(error).strip().splitlines()[-1].partition(": ")
        if kind.endswith("OrnsteinError"):
            raise OrnsteinError(sentence) from None
        raise
    return value


def _started(
    rank: int, devices: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...], found: Any
) -> None:
    """One of the processes of :func:`spread`: named to Fabric as its own launcher would name it."""
    from ornstein.cli.launch import register_resolvers

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(devices),
    }
    register_resolvers()
    fabric = _fabric(devices, own=True)
    fabric.launch()
    value = work(_ranks(fabric), *arguments)
    if rank == 0:
        found.put(value)


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def _ranks(fabric: Any) -> Ranks:
    return Ranks(fabric.global_rank, fabric.world_size, str(fabric.device))


def _fabric(devices: int, *, nodes: int = 1, own: bool = False) -> Any:
    """Fabric for processes that exist; ``own``: that :func:`spread` started, be it within a job of SLURM."""
    from ornstein.cli.quiet import quiet_libraries

    quiet_libraries()
    logging.getLogger("lightning.fabric.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*`srun` command is available on your system but is not used.*")
    import torch
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.fabric.strategies import DDPStrategy

    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=DDPStrategy(timeout=PATIENCE),
        plugins=LightningEnvironment() if own else None,
    )
