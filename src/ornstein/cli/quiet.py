"""Keeping libraries' advertisements and known-harmless warnings out of what a user reads."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

_OURS = str(Path(__file__).resolve().parents[1])
_as_python_tells = warnings.formatwarning


def quiet_libraries() -> None:
    """Lets Lightning speak from warnings on, once (it has a handler of its own beside Hydra's)."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    # torch's profiler announces its own beginning and end.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Lightning 2.6 still asks torch in a way that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    # Our data is arrays in memory: workers would only slow it down.
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    # Told wherever Slurm is installed; its jobs are what hydra/launcher=slurm starts.
    warnings.filterwarnings("ignore", message=r".*`srun` command is available.*")
    warnings.formatwarning = _sentence


def _sentence(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of ours is one for who typed the command: without the place in our source that it came from."""
    if issubclass(category, UserWarning) and filename.startswith(_OURS):
        return f"warning: {message}\n"
    return _as_python_tells(message, category, filename, lineno, line)
