"""``trainer.find_batch_size=true``: the largest micro-batch that fits, and as many of them as keep the effective batch.

What is asked for, ``data.batch_size`` times ``trainer.accumulate_grad_batches``, stays the effective batch of a device.
Its divisors are tried for real, by two optimizer steps of the very module on batches of the very data, in a process of
its own: so the run's own randomness is not moved, and memory that runs out takes nobody along. On a CPU that process
may hold ``trainer.memory_cap`` GB and is refused more by the system; on a GPU it may allocate so much of the device.

A run's weights depend on the micro-batch to the bit (sums have another order, draws are a micro-batch's own), so what
was found stands in ``config.yaml``, and a run that goes on takes it from there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from ornstein.cli.ranks import launched_elsewhere
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.experiment import RunDirectory

OWN_KEYS = ("find_batch_size", "memory_cap")  # of conf/trainer, which Lightning's Trainer does not know
SHARE = 0.8  # of the memory that is free: pictures, figures and other programs want some too
PATIENCE = timedelta(hours=2)  # of ranks for each other's searches
JOB, LOG = "job.yaml", "log.txt"
# What would make the trial one rank of those that are looking.
_RANKS = ("SLURM_", "TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_")


def check_batch_size(cfg: DictConfig) -> None:
    """Whether a batch size can be looked for, and the two keys are what they must be.

    Raises:
        OrnsteinError: says what to set instead.
    """
    asked, cap = (cfg.trainer.get(key) for key in OWN_KEYS)
    if not isinstance(asked, bool | None):
        raise OrnsteinError(f"trainer.find_batch_size={asked} must be true or false.")
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int | float) or cap <= 0):
        raise OrnsteinError(f"trainer.memory_cap={cap} must be a number of GB above 0, or null for what is free.")
    if not asked:
        return
    by_hand = "set data.batch_size and trainer.accumulate_grad_batches by hand"
    if cfg.data.get("buckets") is not None:
        raise OrnsteinError(
            f"trainer.find_batch_size=true tries batches of one shape and data.buckets gives several: {by_hand}."
        )
    if str(OmegaConf.select(cfg, "objective.coupling._target_", default="")).endswith(".MinibatchOT"):
        raise OrnsteinError(
            "trainer.find_batch_size=true would choose within how many images objective/coupling=minibatch_ot pairs "
            f"noise: {by_hand}."
        )
    if "ShardedStrategy" in str(OmegaConf.select(cfg, "trainer.strategy._target_", default="")):
        raise OrnsteinError(
            f"trainer.find_batch_size=true tries one device and trainer=fsdp spreads the weights over all: {by_hand}."
        )


def settle_batch_size(cfg: DictConfig, run: RunDirectory) -> None:
    """Puts the batch size that was found into ``cfg``: by a search, or from the run that goes on. All ranks call it.

    Raises:
        OrnsteinError: not even one image fits; or the run began with another answer to ``trainer.find_batch_size``.
    """
    from ornstein.cli.build import plain
    from ornstein.experiment import identity
    from ornstein.experiment.run_dir import read_config

    asked = bool(cfg.trainer.get("find_batch_size"))
    stored = read_config(run.config_path) if run.config_path.is_file() else None
    if stored is not None:
        found = bool((stored.get("trainer") or {}).get("find_batch_size"))
        goes_on = run.last_checkpoint() is not None
        if goes_on and found != asked:
            raise OrnsteinError(
                f"trainer.find_batch_size={str(asked).lower()} cannot be changed in a run that goes on: its place in "
                "the data is counted in batches; leave it out, or start a new run."
            )
        if asked and found and (goes_on or identity(stored) == identity(plain(cfg))):
            _set(cfg, int(stored["data"]["batch_size"]), _product(OmegaConf.create(stored)))
            return
    if asked:
        effective = _product(cfg)
        micro, told = _search_here(cfg, effective)
        micro = _agreed(micro, str(run.path))
        _set(cfg, micro, effective)
        _say(f"{micro} x {effective // micro} accumulated = {effective}{told}")


def _product(cfg: DictConfig) -> int:
    return int(cfg.data.batch_size) * int(cfg.trainer.get("accumulate_grad_batches", 1))


def _set(cfg: DictConfig, micro: int, effective: int) -> None:
    with open_dict(cfg):
        cfg.data.batch_size = micro
        cfg.trainer.accumulate_grad_batches = effective // micro


def divisors(effective: int) -> list[int]:
    """The sizes of micro-batches that divide a batch, ascending."""
    return [size for size in range(1, effective + 1) if effective % size == 0]


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending ``sizes`` that fits, where all below one that fits do too; None where none does.

    Each size is at least twice the one before until one does not fit; then the gap is halved.
    """
    good, bad, place = -1, len(sizes), 0
    while place < bad:
        if not fits(sizes[place]):
            bad = place
            break
        good = place
        further = (index for index in range(good + 1, bad) if sizes[index] >= 2 * sizes[good])
        place = next(further, max(good + 1, bad - 1))
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(sizes[middle]):
            good = middle
        else:
            bad = middle
    return None if good < 0 else sizes[good]


def _search_here(cfg: DictConfig, effective: int) -> tuple[int, str]:
    cap = _cap(cfg)
    peaks: dict[int, str] = {}
    with Trials(cfg, effective, cap=cap) as trials:

        def fits(size: int) -> bool:
            held = trials.peak(size)
            peaks[size] = "does not fit" if held is None else f"{held / 1e9:.2f} GB"
            return held is not None

        micro = largest(divisors(effective), fits)
    where = f"of {cap / 1e9:.2f} GB " if cap is not None else "of the device's memory "
    told = "; ".join(f"{size}: {peak}" for size, peak in sorted(peaks.items()))
    if micro is None:
        raise OrnsteinError(
            f"trainer.find_batch_size=true: not even one image a batch fits {where}({told}): raise trainer.memory_cap, "
            "or take a smaller model, model.network.checkpointing=true where it has that, or "
            "trainer.precision=bf16-mixed on a GPU."
        )
    return micro, f" ({where}{told})"


class Trials:
    """A process that tries batch sizes, started anew where the last one died of it; a context manager.

    Args:
        cfg: the run's config.
        effective: the batch that the micro-batches make up.
        cap: bytes that the process may hold; None leaves it to the device.
    """

    def __init__(self, cfg: DictConfig, effective: int, *, cap: int | None) -> None:
        self._cfg, self._effective, self._cap = cfg, effective, cap
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Trials:
        """Opens a folder for what the trials write."""
        self._place = tempfile.TemporaryDirectory(prefix="ornstein-batch-")
        folder = Path(self._place.name)
        cfg = OmegaConf.create(OmegaConf.to_container(self._cfg, resolve=True, throw_on_missing=False))
        OmegaConf.save(cfg, folder / JOB)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process and removes the folder."""
        self._end()
        self._place.cleanup()

    def peak(self, size: int) -> int | None:
        """Bytes that two steps at that micro-batch took at most; None where it does not fit.

        Raises:
            OrnsteinError: the trial failed of something else.
        """
        if self._process is None:
            self._process = self._started()
        assert self._process.stdin is not None and self._process.stdout is not None
        answer: dict[str, Any] = {}
        try:
            self._process.stdin.write(json.dumps({"size": size, "cap": self._cap, "of": self._effective}) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith("{"):
                    answer = json.loads(line)
                    break
        except BrokenPipeError:
            pass
        if "error" in answer:
            raise OrnsteinError(f"trainer.find_batch_size=true: a trial with {size} images failed: {answer['error']}")
        if not answer and self._process.wait() > 0 and (size == 1 or self._cap is None):
            told = (Path(self._place.name) / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise OrnsteinError(
                f"trainer.find_batch_size=true: a trial with {size} images ended: {told[-1] if told else 'silently'}"
            )
        held = answer.get("peak")
        if held is None and (self._cap is not None or not answer):
            self._end()  # it is dead, or its peak is no longer that of what follows
        return None if held is None else int(held)

    def _started(self) -> subprocess.Popen[str]:
        alone = {name: value for name, value in os.environ.items() if not name.startswith(_RANKS)}
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        for name in ("RANK", "WORLD_SIZE", "NODE_RANK"):
            alone.pop(name, None)
        with (Path(self._place.name) / LOG).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ornstein.cli.batch_trial", self._place.name, local],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=alone,
            )

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _cap(cfg: DictConfig) -> int | None:
    """Bytes that one training process of this machine may hold; None where a GPU trains and nobody says."""
    asked = cfg.trainer.get("memory_cap")
    if asked is not None:
        return int(float(asked) * 1e9)
    import torch

    if torch.cuda.is_available() and str(cfg.trainer.get("accelerator", "auto")) in ("auto", "gpu", "cuda"):
        return None
    from ornstein.cli.job import devices_of

    beside = int(os.environ.get("LOCAL_WORLD_SIZE") or devices_of(cfg.trainer))
    return int(SHARE * available_memory() / max(beside, 1))


def available_memory() -> int:
    """Bytes that processes of this machine, or of the container that this is, can still take."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return max(free, 0)


def _agreed(micro: int, key: str) -> int:
    """The least that any rank has found, where torchrun or srun started several."""
    if not launched_elsewhere():
        return micro
    from ornstein.cli.together import _rank, _store

    store, world = _store(), int(os.environ["WORLD_SIZE"])
    names = [f"ornstein/batch_size/{key}/{rank}" for rank in range(world)]
    store.set(names[_rank()], str(micro))
    store.wait(names, PATIENCE)
    return min(int(store.get(name).decode()) for name in names)


def _say(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == 0:
        Console(soft_wrap=True).print(Text.assemble(("batch size ", "bold"), text), soft_wrap=True)
