"""What a run trains on, as a picture: its schedule, where training times fall, and what the loss weighs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image

from ornstein.training.callbacks.show import show_image
from ornstein.training.callbacks.unwritten import pictures_may_fail
from ornstein.training.module import DiffusionModule
from ornstein.training.pictures import save_png

_POINTS = 400
_SHOWN_LOG_SNR = 12.0  # beyond, images hold no noise that 8 bits show, or no signal


class SchedulePlot(pl.Callback):
    """Draws ``schedule.png`` before the first step, for the loggers too: scales and log-SNR over time, the density of
    training times, and the effective weight of the loss over log-SNR (per unit of log-SNR, on the squared error of x0,
    density included).

    About a second of matplotlib, which is imported here only; a run that goes on keeps the picture it has.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / "schedule.png"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws it, on the first rank."""
        assert isinstance(pl_module, DiffusionModule)
        if trainer.is_global_zero and not self.path.exists():
            with pictures_may_fail(self):
                show_image(trainer, "schedule", plot_schedule(pl_module, self.path))


@torch.no_grad()
def plot_schedule(module: DiffusionModule, path: Path) -> Image.Image:
    """The picture of ``module``'s schedule and objective, written as a PNG too."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    schedule, objective = module.schedule, module.objective
    device = next((p.device for p in schedule.parameters()), torch.device("cpu"))
    # Both ends are left out: log-SNR may be infinite there.
    t = torch.linspace(0, 1, _POINTS + 2, dtype=torch.float64, device=device)[1:-1]
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    scales, snr, density, weight = axes.flat
    _draw(scales, t, alpha, label=r"signal $\alpha$")
    _draw(scales, t, sigma, label=r"noise $\sigma$")
    if float(sigma.max()) > 4:
        scales.set_yscale("log")
    scales.legend(frameon=False)
    _finish(scales, "time t (0 is data, 1 is noise)", "scale", f"{type(schedule).__name__} schedule")
    _draw(snr, t, log_snr)
    snr.set_ylim(max(float(log_snr.min()), -20), min(float(log_snr.max()), 20))
    _finish(snr, "time t", r"log-SNR $2\,\ln(\alpha/\sigma)$", "noise level")
    _draw(density, t, objective.time_density.density(t, schedule), fill=True)
    _finish(density, "time t", "density", f"training times ({type(objective.time_density).__name__})")
    low, high = float(log_snr.min()), float(log_snr.max())
    levels = torch.linspace(
        max(low, -_SHOWN_LOG_SNR), min(high, _SHOWN_LOG_SNR), _POINTS, dtype=torch.float64, device=device
    )
    values = objective.effective_weight(schedule, levels)
    _draw(weight, levels, values, fill=True)
    positive = values[torch.isfinite(values) & (values > 0)]
    if positive.numel() and float(positive.max() / positive.median()) > 100:
        weight.set_yscale("log")
        # A density's far tail would stretch the axis over hundreds of powers of ten.
        weight.set_ylim(max(float(positive.min()), float(positive.max()) * 1e-8), float(positive.max()) * 3)
    _finish(
        weight,
        "log-SNR (left is noise, right is data)",
        r"weight on $\|x_0 - \hat x_0\|^2$",
        f"effective loss weighting ({objective.parameterization.name})",
    )
    canvas.draw()
    picture = Image.fromarray(_pixels(canvas)).convert("RGB")
    save_png(picture, path)
    return picture


def _draw(axis: Any, x: torch.Tensor, y: torch.Tensor, *, label: str | None = None, fill: bool = False) -> None:
    values = [value if math.isfinite(value) else math.nan for value in y.double().cpu().tolist()]
    (line,) = axis.plot(x.cpu().tolist(), values, label=label, linewidth=1.8)
    if fill:
        axis.fill_between(x.cpu().tolist(), values, color=line.get_color(), alpha=0.15, linewidth=0)


def _finish(axis: Any, x_label: str, y_label: str, title: str) -> None:
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.set_title(title, loc="left", fontsize=11)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _pixels(canvas: Any) -> Any:
    import numpy

    return numpy.asarray(canvas.buffer_rgba())
