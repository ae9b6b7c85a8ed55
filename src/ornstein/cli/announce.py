"""What will run, told before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    from ornstein.training.module import DiffusionModule


def announce(
    cfg: DictConfig, module: DiffusionModule, data: Any, trainer: Any, run: Any, checkpoint: Path | None
) -> dict[str, float]:
    """Prints a table of what the run is and will cost, and returns the figures for its summary."""
    from rich.console import Console
    from rich.table import Table

    from ornstein.training.estimate import measure_cost

    batch = data.train.batch(list(range(min(data.batch_size, len(data.train)))))
    cost = measure_cost(module, batch)
    accumulate = trainer.accumulate_grad_batches
    effective = data.batch_size * accumulate * trainer.world_size
    steps = trainer.max_steps
    seconds = cost.step_seconds * accumulate * steps
    table = Table(show_header=False, box=None, pad_edge=False, title=None)
    rows = {
        "run": str(run.path),
        "data": f"{data.train.name}: {len(data.train):,} train, {len(data.val):,} held out, "
        f"{data.channels}x{data.image_size}x{data.image_size}",
        "network": f"{type(module.network).__name__}, {cost.parameters:,} parameters, "
        f"{cost.flops / 1e6:,.1f} MFLOPs a sample (2 a multiply-add)",
        "diffusion": f"{type(module.schedule).__name__} schedule, {module.objective.parameterization.name} output, "
        f"{type(module.sampler).__name__} sampler with {module.sampler.steps} steps",
        "batch": f"{effective} effective ({data.batch_size} x {accumulate} accumulated x {trainer.world_size} device)",
        "images": f"{effective * steps:,} to see in {steps:,} steps, {effective * steps / len(data.train):,.1f} epochs",
        "memory": f"{cost.state_bytes / 1e6:,.0f} MB weights, gradients, moments and averages, "
        f"{cost.activation_bytes / 1e6:,.0f} MB activations",
        "time": f"about {_duration(seconds)} of training ({1 / cost.step_seconds * data.batch_size:,.0f} images/s)",
    }
    if checkpoint is not None:
        rows["resuming"] = str(checkpoint)
    for name, text in rows.items():
        table.add_row(f"[bold]{name}", text)
    Console(soft_wrap=True).print(table)
    return {"parameters": cost.parameters, "flops": cost.flops, "effective_batch": effective}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
