"""Where over the noise levels a model learns, and when: the loss of each level over the whole training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor

from ornstein.training.base import TrainingModule
from ornstein.training.callbacks.log import LEVEL_EDGES, TrainingLog
from ornstein.training.callbacks.lookup import callbacks_of
from ornstein.training.callbacks.periodic import Periodic
from ornstein.training.callbacks.progress import progress_task
from ornstein.training.callbacks.show import show_image
from ornstein.training.limits import check_limits
from ornstein.training.pictures import save_png

_WIDTH = 2.0  # of a bin on the picture; the outermost two have no outer edge of their own
_WIDE = 20.0  # where the largest loss is that many times the smallest, colours go by its logarithm


class LossHeatmap(Periodic):
    """Draws ``loss_by_log_snr.png``, for the loggers too: steps by log-SNR, coloured by the mean loss that
    :class:`TrainingLog` has of each of its ten bins, up to the present. Nothing where it keeps none
    (``callbacks.log.levels_every=null``).

    Put it behind the log. A resumed run's picture begins where the run did.

    Args:
        run_dir: the run's folder.
        every: optimizer steps between pictures; null is only at the end.

    Raises:
        OrnsteinError: every < 1.
    """

    pictures = True

    def __init__(self, run_dir: str | Path, *, every: int | None = 500) -> None:
        check_limits("LossHeatmap", every=every)
        super().__init__(every=every, at_end=True)
        self.path = Path(run_dir) / "loss_by_log_snr.png"

    def act(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Draws it, on the first rank."""
        if not trainer.is_global_zero:
            return
        for log in callbacks_of(trainer, TrainingLog):
            steps, losses = log.history.means()
            if steps:
                with progress_task(trainer, "picture"):
                    picture = plot_levels(steps, losses)
                    save_png(picture, self.path)
                    show_image(trainer, "loss_by_log_snr", picture)


def plot_levels(steps: Sequence[int], losses: Tensor) -> Image.Image:
    """The picture of mean losses (N, 10), NaN where there is none, of the intervals that end at ``steps``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from numpy import asarray

    edges = [LEVEL_EDGES[0] - _WIDTH, *LEVEL_EDGES, LEVEL_EDGES[-1] + _WIDTH]
    known = losses[torch.isfinite(losses)]
    if not known.numel():
        known = torch.ones(1)
    low, high = float(known.min()), float(known.max())
    norm = LogNorm(low, high) if 0 < low * _WIDE < high else Normalize(low, high)
    figure = Figure(figsize=(9, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_facecolor("0.85")  # bins in which nothing was drawn
    shown = torch.where(torch.isfinite(losses), losses, torch.nan).T.numpy()
    mesh = axis.pcolormesh([0, *steps], edges, shown, norm=norm, cmap="viridis")
    axis.set(xlabel="optimizer step", ylabel="log-SNR (down is noise)", xlim=(0, steps[-1]))
    ticks = [edges[0] + _WIDTH / 2, *LEVEL_EDGES, edges[-1] - _WIDTH / 2]
    axis.set_yticks(
        ticks, [f"below {LEVEL_EDGES[0]:g}", *(f"{edge:g}" for edge in LEVEL_EDGES), f"above {LEVEL_EDGES[-1]:g}"]
    )
    axis.set_title("training loss by noise level", loc="left", fontsize=11)
    figure.colorbar(mesh, label="mean loss")
    canvas.draw()
    return Image.fromarray(asarray(canvas.buffer_rgba())).convert("RGB")
