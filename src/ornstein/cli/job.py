"""A training over several devices that Lightning cannot start: processes of its own, which Hydra knows nothing of.

Lightning starts the other ranks by repeating the command line. With ``-m`` each of them would run the whole sweep, and
where a rank dies it kills the process that started it, which is the sweep's; and a command line with ``resume=`` has
become another one by then. So the ranks of such a training are all started by torchrun, from its composed config.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ornstein.errors import OrnsteinError

FIGURES = ".figures.json"  # what the job returns, for those who search by it
JOB = ".job.yaml"
FAULT = ".fault"  # the first rank's that ran into one; the others die of its absence
NOTICED = ".noticed"  # the notice that the ranks were stopped by, after a checkpoint
RANK = ".rank"  # .rank0, .rank1, ...: their process ids
LEAVE_S = 60.0  # for ranks that end: torchrun gives them half of it
AGAIN_EVERY_S = 5.0  # between two times that a notice is passed on: before training begins, ranks do not hear it


def needs_processes(cfg: DictConfig) -> int:
    """How many processes this training has to be started with: several only in a sweep, or resumed, on many devices."""
    from hydra.core.hydra_config import HydraConfig

    from ornstein.cli.ranks import launched_elsewhere

    if not HydraConfig.initialized() or launched_elsewhere():
        return 1
    # In a job of SLURM that is one task Lightning would look for the others in vain.
    alone = "SLURM_JOB_ID" in os.environ
    return devices_of(cfg.trainer) if _sweeping() or alone or cfg.resume not in (None, "auto") else 1


def _sweeping() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def devices_of(trainer: Any) -> int:
    """How many devices of this machine a trainer's config asks for: a number, a list of them, -1 or auto for all."""
    import torch

    devices, accelerator = trainer.get("devices", 1), str(trainer.get("accelerator", "auto"))
    if OmegaConf.is_list(devices):
        return len(devices)
    if devices in (-1, "-1", "auto"):
        return max(torch.cuda.device_count(), 1) if accelerator in ("auto", "gpu", "cuda") else 1
    if isinstance(devices, str) and "," in devices:
        return len([each for each in devices.split(",") if each.strip()])
    return int(devices)


def run_processes(cfg: DictConfig, count: int) -> dict[str, float]:
    """Runs the job in ``count`` processes and returns its figures.

    A notice that reaches this process (SIGUSR1, SIGUSR2: all that a SLURM job of one task hears of its end) is passed
    on to the ranks; when they have written their checkpoint it is answered here, as a training in this process answers
    it.

    Raises:
        OrnsteinError: the job's own sentence, or how its processes died.
        Preempted: a notice stopped it.
    """
    from hydra.core.hydra_config import HydraConfig

    folder = Path(str(cfg.paths.run_dir))
    shares = str(max(1, (os.cpu_count() or 1) // count))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / FIGURES, folder / FAULT, folder / NOTICED, *folder.glob(f"{RANK}*")):
        path.unlink(missing_ok=True)
    OmegaConf.save(OmegaConf.create({"hydra": HydraConfig.get(), "job": cfg}), folder / JOB)
    log = folder / "ranks.log" if _sweeping() else None
    with ExitStack() as stack:
        told = None if log is None else stack.enter_context(log.open("ab"))
        passing_on = stack.enter_context(_notices(folder))
        running = subprocess.Popen(
            [*command, "-m", "ornstein.cli.job", str(folder)],
            stdout=told,
            stderr=None if told is None else subprocess.STDOUT,
            env={"OMP_NUM_THREADS": shares, **os.environ},
            preexec_fn=_deaf,
        )
        try:
            code = _wait(running, passing_on)
        finally:
            running.terminate()  # torchrun ends its ranks; nothing, where it has ended
            with suppress(subprocess.TimeoutExpired):
                running.wait(timeout=LEAVE_S)
    for path in folder.glob(f"{RANK}*"):
        path.unlink()
    if (folder / NOTICED).is_file():
        _answer(folder / NOTICED, passing_on.before)
    if code == 0 and (folder / FIGURES).is_file():
        figures = dict(json.loads((folder / FIGURES).read_text(encoding="utf-8")))
        for name in (FIGURES, JOB):
            (folder / name).unlink()
        return figures
    fault = folder / FAULT
    killed = f"a process of {folder} was killed, by the system perhaps as memory ran out (docs/failures.md)"
    reason = fault.read_text(encoding="utf-8") if fault.is_file() else killed
    raise OrnsteinError(reason if log is None else f"{reason} (the whole log is {log})")


class _Notices:
    """The last notice that came, None before there is one, and whoever answered each kind before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number: int | None = None
        self.before: dict[int, Any] = {}

    def pass_on(self) -> None:
        """Sends it to every rank that runs."""
        if self.number is None:
            return
        for place in self.folder.glob(f"{RANK}*"):
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(place.read_text(encoding="utf-8")), self.number)


@contextmanager
def _notices(folder: Path) -> Iterator[_Notices]:
    """Within it notices are kept, and the processes that are started do not die of them."""
    kept = _Notices(folder)

    def hear(number: int, frame: Any) -> None:
        kept.number = number

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGUSR1", "SIGUSR2"):
            number = getattr(signal, name)
            kept.before[number] = signal.signal(number, hear)
    before = dict(kept.before)
    # Dying at once would leave the ranks to be killed before they have written their checkpoint.
    if before and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, _leave)
    try:
        yield kept
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _deaf() -> None:
    """Spares this process the notices, of which it would die: torchrun, and a rank whose handlers Python takes away."""
    for name in ("SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def _wait(running: subprocess.Popen[bytes], notices: _Notices) -> int:
    """The exit status of the ranks, to whom notices are passed on while they run."""
    passed_at = float("-inf")
    while True:
        try:
            return running.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if notices.number is not None and time.monotonic() - passed_at > AGAIN_EVERY_S:
                passed_at = time.monotonic()
                notices.pass_on()


def _answer(noticed: Path, before: dict[int, Any]) -> None:
    """Has the job queued again, by whoever answered its notices before, and raises what stopped it."""
    from ornstein.training.callbacks.preemption import Preempted, requeue

    notice = noticed.read_text(encoding="utf-8")
    noticed.unlink()
    number = int(getattr(signal, notice))
    handler: Callable[[int, Any], Any] | Any = before.get(number)
    if callable(handler):
        handler(number, None)
    else:
        requeue()
    raise Preempted(notice, lambda: None)


def main() -> None:
    """One rank: ``python -m ornstein.cli.job FOLDER`` under torchrun."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import setup_globals

    from ornstein.cli.launch import fail, find_mistake, register_resolvers
    from ornstein.cli.train import train
    from ornstein.training.callbacks.preemption import NOTICES, Preempted

    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    # Not this process's to answer: outside training it is heard and forgotten, and sent again.
    for name in NOTICES:
        signal.signal(getattr(signal, name), lambda number, frame: None)
    (folder / f"{RANK}{rank}").write_text(str(os.getpid()), encoding="utf-8")
    register_resolvers()
    setup_globals()
    stored = OmegaConf.load(folder / JOB)
    # Without Hydra's types, which are not stored.
    HydraConfig.instance().cfg = OmegaConf.create({"hydra": stored.hydra})  # type: ignore[assignment]
    cfg = OmegaConf.create(OmegaConf.to_container(stored.job, resolve=False))
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, True)
    try:
        figures = train(cfg)
    except Preempted as stop:
        if rank == 0:
            (folder / NOTICED).write_text(stop.notice, encoding="utf-8")
        return  # all of them: of one that fails torchrun kills the others, which may still be closing their logs
    except Exception as error:
        mistake = find_mistake(error)
        sentence = " ".join(str(mistake or f"{type(error).__name__}: {error}").split())
        with suppress(FileExistsError), (folder / FAULT).open("x", encoding="utf-8") as file:
            file.write(sentence)
        if mistake is None:
            raise
        fail(mistake)
    finally:
        _deaf()  # a last notice would end this process while it is about to end
    if rank == 0:
        (folder / FIGURES).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
