"""TensorBoard, for those who ask for it."""

import os
from pathlib import Path
from typing import Any

from ornstein.experiment.logger_options import check_tensorboard


def tensorboard_logger(run_dir: str | os.PathLike[str]) -> Any:
    """Lightning's ``TensorBoardLogger``, which takes pictures and GIFs too, with its event files in
    ``<run_dir>/tensorboard``.

    A resumed run adds a second event file; TensorBoard shows steps after the checkpoint from the newer one.

    Raises:
        OrnsteinError: where TensorBoard is not installed.
    """
    check_tensorboard()
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    class RunTensorBoardLogger(TensorBoardLogger):
        """Made here, as Lightning's own cannot be imported where TensorBoard is missing."""

        @rank_zero_only
        def log_image(self, key: str, images: list[Any], step: int | None = None, **options: Any) -> None:
            """Log pictures (Pillow or arrays, height x width x channels), several as ``key_0``, ``key_1``, ..."""
            import numpy

            for number, image in enumerate(images):
                pixels = numpy.asarray(image)
                name = key if len(images) == 1 else f"{key}_{number}"
                layout = "HW" if pixels.ndim == 2 else "HWC"
                self.experiment.add_image(name, pixels, global_step=step, dataformats=layout)

        @rank_zero_only
        def log_video(self, key: str, videos: list[Any], step: int | None = None, **options: Any) -> None:
            """Log GIF files, which TensorBoard shows among its pictures; it has no place for other films."""
            from PIL import Image
            from tensorboard.compat.proto.summary_pb2 import Summary

            for film in map(Path, videos):
                if film.suffix != ".gif":
                    continue
                with Image.open(film) as opened:
                    width, height = opened.size
                shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=film.read_bytes())
                summary = Summary(value=[Summary.Value(tag=key, image=shown)])
                self.experiment.file_writer.add_summary(summary, step)

    return RunTensorBoardLogger(save_dir=os.fspath(run_dir), name="tensorboard", version="")
