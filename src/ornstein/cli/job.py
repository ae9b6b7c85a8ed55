"""A training over several devices that Lightning cannot start: processes of its own, which Hydra knows nothing of.

Lightning starts the other ranks by repeating the command line. With ``-m`` each of them would run the whole sweep, and
where a rank dies it kills the process that started it, which is the sweep's; and a command line with ``resume=`` has
become another one by then. So the ranks of such a training are all started by torchrun, from its composed config.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ornstein.errors import OrnsteinError

FIGURES = ".figures.json"  # what the job returns, for those who search by it
JOB = ".job.yaml"
FAULT = ".fault"  # the first rank's that ran into one; the others die of its absence


def needs_processes(cfg: DictConfig) -> int:
    """How many processes this training has to be started with: several only in a sweep, or resumed, on many devices."""
    from hydra.core.hydra_config import HydraConfig

    from ornstein.cli.ranks import launched_elsewhere

    if not HydraConfig.initialized() or launched_elsewhere():
        return 1
    return devices_of(cfg.trainer) if _sweeping() or cfg.resume not in (None, "auto") else 1


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

    Raises:
        OrnsteinError: the job's own sentence, or how its processes died.
    """
    from hydra.core.hydra_config import HydraConfig

    folder = Path(str(cfg.paths.run_dir))
    shares = str(max(1, (os.cpu_count() or 1) // count))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    folder.mkdir(parents=True, exist_ok=True)
    for name in (FIGURES, FAULT):
        (folder / name).unlink(missing_ok=True)
    OmegaConf.save(OmegaConf.create({"hydra": HydraConfig.get(), "job": cfg}), folder / JOB)
    log = folder / "ranks.log" if _sweeping() else None
    with ExitStack() as stack:
        told = None if log is None else stack.enter_context(log.open("ab"))
        done = subprocess.run(
            [*command, "-m", "ornstein.cli.job", str(folder)],
            stdout=told,
            stderr=None if told is None else subprocess.STDOUT,
            env={"OMP_NUM_THREADS": shares, **os.environ},
            check=False,
        )
    if done.returncode == 0 and (folder / FIGURES).is_file():
        figures = dict(json.loads((folder / FIGURES).read_text(encoding="utf-8")))
        for name in (FIGURES, JOB):
            (folder / name).unlink()
        return figures
    fault = folder / FAULT
    reason = fault.read_text(encoding="utf-8") if fault.is_file() else f"a process of {folder} was killed"
    raise OrnsteinError(reason if log is None else f"{reason} (the whole log is {log})")


def main() -> None:
    """One rank: ``python -m ornstein.cli.job FOLDER`` under torchrun."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import setup_globals

    from ornstein.cli.launch import fail, find_mistake, register_resolvers
    from ornstein.cli.train import train

    folder = Path(sys.argv[1])
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
    except Exception as error:
        mistake = find_mistake(error)
        sentence = " ".join(str(mistake or f"{type(error).__name__}: {error}").split())
        with suppress(FileExistsError), (folder / FAULT).open("x", encoding="utf-8") as file:
            file.write(sentence)
        if mistake is None:
            raise
        fail(mistake)
    if int(os.environ["RANK"]) == 0:
        (folder / FIGURES).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
