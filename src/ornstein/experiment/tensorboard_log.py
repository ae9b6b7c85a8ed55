"""TensorBoard, for those who ask for it."""

import os
from importlib.util import find_spec
from typing import Any

from ornstein.errors import OrnsteinError


def tensorboard_logger(run_dir: str | os.PathLike[str]) -> Any:
    """Lightning's ``TensorBoardLogger``, with its event files in ``<run_dir>/tensorboard``.

    A resumed run adds a second event file; TensorBoard shows steps after the checkpoint from the newer one.

    Raises:
        OrnsteinError: where TensorBoard is not installed.
    """
    if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
        raise OrnsteinError(
            "logger=tensorboard needs the package tensorboard: pip install tensorboard, or take logger=csv"
        )
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(save_dir=os.fspath(run_dir), name="tensorboard", version="")
