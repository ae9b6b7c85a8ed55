"""What loggers are asked for, checked without importing Lightning or the loggers' own libraries."""

import os
from importlib.util import find_spec

from ornstein.errors import OrnsteinError

_MODES = ("online", "offline", "disabled")


def check_wandb_mode(mode: str | None) -> str | None:
    """W&B's mode as asked for, by option or ``WANDB_MODE``; None where neither says.

    Raises:
        OrnsteinError: for a mode that does not exist.
    """
    wanted = mode or os.environ.get("WANDB_MODE") or None
    wanted = {"dryrun": "offline", "run": "online"}.get(str(wanted), wanted)
    if wanted is not None and wanted not in _MODES:
        raise OrnsteinError(f"W&B's mode is one of {', '.join(_MODES)}, not {wanted!r}: set logger.wandb.mode")
    return wanted


def check_tensorboard() -> None:
    """Whether TensorBoard can log.

    Raises:
        OrnsteinError: it is not installed.
    """
    if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
        raise OrnsteinError(
            "logger=tensorboard needs the package tensorboard: pip install tensorboard, or take logger=csv"
        )
