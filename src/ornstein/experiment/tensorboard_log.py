"""TensorBoard, for those who ask for it."""

import os
from typing import Any

from ornstein.experiment.logger_options import check_tensorboard


def tensorboard_logger(run_dir: str | os.PathLike[str]) -> Any:
    """Lightning's ``TensorBoardLogger``, with its event files in ``<run_dir>/tensorboard``.

    A resumed run adds a second event file; TensorBoard shows steps after the checkpoint from the newer one.

    Raises:
        OrnsteinError: where TensorBoard is not installed.
    """
    check_tensorboard()
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(save_dir=os.fspath(run_dir), name="tensorboard", version="")
