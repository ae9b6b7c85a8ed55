"""Jobs of a sweep that were killed and left no word: their launcher tells of them in their folders."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import open_dict

from ornstein.cli.sweep import FAILED, read_json

_alone = threading.Lock()  # Hydra keeps one config a process, and launchers ask from several threads


def folder_of(launcher: Any, overrides: Sequence[str], number: int) -> Path:
    """The folder of a sweep's job, which its launcher knows only by what it was asked to run."""
    config = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, list(overrides))
    with open_dict(config.hydra.job):
        config.hydra.job.num = number
        config.hydra.job.id = str(number)
    with _alone:
        hydra_config, before = HydraConfig.instance(), HydraConfig.instance().cfg
        try:
            hydra_config.set_config(config)  # subdir asks it for the job's number
            return Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
        finally:
            hydra_config.cfg = before


def tell_lost(folder: Path, reason: str) -> JobReturn:
    """Writes the reason where a failed job's is looked for; what a sweep that goes on takes for the job's end."""
    from ornstein.experiment.atomic import write_json

    write_json(folder / FAILED, {"error": reason})
    return JobReturn(status=JobStatus.COMPLETED)


def word_of(folder: Path) -> JobReturn | None:
    """The end of a job as its folder tells it, where what it returned is lost; None of one that left no word."""
    from ornstein.cli.train_sweep import ENDED_WELL

    summary = read_json(folder / "summary.json")
    if summary.get("status") in ENDED_WELL:
        figures = {name: value for name, value in summary.items() if isinstance(value, int | float)}
        return JobReturn(status=JobStatus.COMPLETED, _return_value=figures)
    return JobReturn(status=JobStatus.COMPLETED) if (folder / FAILED).is_file() else None
