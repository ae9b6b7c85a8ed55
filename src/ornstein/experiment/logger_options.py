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


def check_wandb_model(which: str | bool) -> str | bool:
    """Which checkpoints W&B is to take: ``best``, ``all``, or false for none.

    Raises:
        OrnsteinError: anything else.
    """
    if which is not False and which not in ("best", "all"):
        raise OrnsteinError(f"logger.wandb.log_model={which} is one of false, best, all")
    return which


def check_tensorboard() -> None:
    """Whether TensorBoard can log.

    Raises:
        OrnsteinError: it is not installed.
    """
    if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
        raise OrnsteinError(
            "logger=tensorboard needs the package tensorboard: pip install 'ornstein[tensorboard]', or take logger=csv"
        )


def check_mlflow(tracking_uri: str | None = None) -> None:
    """Whether MLflow can log; a server needs less than a database of one's own.

    Raises:
        OrnsteinError: it is not installed, or its way to a database.
    """
    served = (tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite").startswith(("http", "databricks"))
    missing = [name for name in ("mlflow", *(() if served else ("sqlalchemy", "alembic"))) if find_spec(name) is None]
    if missing:
        raise OrnsteinError(
            f"logger=mlflow needs {', '.join(missing)}: pip install 'ornstein[mlflow]', or take logger=csv"
        )
