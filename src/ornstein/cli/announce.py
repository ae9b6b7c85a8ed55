"""What will run, told before the first step, and what came of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    from ornstein.conditioning import Conditioner
    from ornstein.training.estimate import Cost
    from ornstein.training.module import DiffusionModule


def announce(
    cfg: DictConfig, module: Any, data: Any, trainer: Any, run: Any, checkpoint: Path | None
) -> dict[str, float]:
    """Prints what the run is and will cost, and returns the figures for its summary."""
    import torch

    from ornstein.cli.autoencoder import describe_autoencoder, trains_autoencoder
    from ornstein.cli.start import describe_start
    from ornstein.training.callbacks import Throughput
    from ornstein.training.callbacks.lookup import callbacks_of
    from ornstein.training.conditions import prepare_conditions
    from ornstein.training.estimate import measure_cost
    from ornstein.training.latents import prepare_latents
    from ornstein.training.shapes import rows_of_one_shape

    if not trains_autoencoder(cfg):
        prepare_latents(module, data)
        prepare_conditions(module, data, device=trainer.strategy.root_device)
    source = data.train if getattr(data, "latents", None) is None else data.served("train")
    batch = source.batch(rows_of_one_shape(data.train, data.batch_size))
    if trainer.world_size == 1:
        # Where it will train: a GPU's time is not to be told from a CPU's.
        device = trainer.strategy.root_device
        module.to(device)
        batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    cost = measure_cost(module, batch)
    for clock in callbacks_of(trainer, Throughput):
        clock.forward_flops = cost.flops
    accumulate = trainer.accumulate_grad_batches
    effective = data.batch_size * accumulate * trainer.world_size
    steps = trainer.max_steps
    seconds = cost.step_seconds * accumulate * steps
    rows = {
        "run": str(run.path),
        "data": f"{data.train.name}: {_train_count(data)} train, {len(data.val):,} held out, "
        f"{data.channels}x{_sizes(data.train)}"
        + (f", latents from {data.latents}" if source is not data.train else "")
        + (", classes equally often" if getattr(data, "balanced", False) else ""),
        **(describe_autoencoder(module, cost) if trains_autoencoder(cfg) else _describe_denoiser(module, cost)),
        "batch": f"{effective} effective ({data.batch_size} x {accumulate} accumulated x {trainer.world_size} device)",
        "images": f"{effective * steps:,} to see in {steps:,} steps{_epochs(data, effective * steps)}",
        "memory": f"{cost.state_bytes / 1e6:,.0f} MB weights, gradients, moments and averages, "
        f"{cost.activation_bytes / 1e6:,.0f} MB activations",
        "time": f"about {_duration(seconds)} of training ({1 / cost.step_seconds * data.batch_size:,.0f} images/s), "
        "pictures and figures beside it",
    }
    if module.device.type == "cpu":
        rows["threads"] = _threads(torch.get_num_threads())
    rows |= describe_start(module.network)
    if checkpoint is not None:
        rows["resuming"] = _resuming(checkpoint, steps)
    _print(rows)
    _print_buckets(data.train, batch=data.batch_size * trainer.world_size)
    return {"parameters": cost.parameters, "flops": cost.flops, "effective_batch": effective}


def _train_count(data: Any) -> str:
    """How many images training has; a stream's are not those that can be indexed, and may be uncounted."""
    if not getattr(data, "streams", False):
        return f"{len(data.train):,}"
    return f"{data.num_images:,} streamed" if data.num_images else "uncounted streamed"


def _epochs(data: Any, images: int) -> str:
    count = data.num_images if getattr(data, "streams", False) else len(data.train)
    return f", {images / count:,.1f} epochs" if count else ""


def _sizes(dataset: Any) -> str:
    """Of the images: one, or how many shapes there are and which is the most frequent."""
    from ornstein.training.shapes import most_frequent

    if dataset.bucket_of is None:
        return f"{dataset.image_size}x{dataset.image_size}"
    height, width = most_frequent(dataset, 1)[0]
    return f"{height}x{width} most often, of {len(dataset.shapes)} shapes"


def _print_buckets(dataset: Any, *, batch: int) -> None:
    """How many training images each shape got; nothing where all have one."""
    if dataset.bucket_of is None:
        return
    import numpy as np

    from ornstein.data.buckets import bucket_table

    counts = np.bincount(dataset.bucket_of, minlength=len(dataset.shapes))
    away = getattr(dataset.images, "cropped", None)
    cropped = None
    if away is not None:
        cropped = (np.bincount(dataset.bucket_of, weights=away, minlength=len(counts)) / counts.clip(min=1)).tolist()
    lines = bucket_table(dataset.shapes, counts.tolist(), batch=batch, cropped=cropped)
    _print({"buckets" if not place else "": line for place, line in enumerate(lines[:1])})
    for line in lines[1:]:
        _print({"": line})


def _describe_denoiser(module: DiffusionModule, cost: Cost) -> dict[str, str]:
    from ornstein.networks import Experts, count_parameters

    network = module.network
    active = f", {network.active_parameters():,} active" if isinstance(network, Experts) else ""
    condition = _describe_condition(module.conditioner)
    return {
        **_describe_latents(module),
        **({"condition": condition} if condition else {}),
        "network": f"{type(network).__name__}, {count_parameters(network):,} parameters{active}, "
        f"{cost.flops / 1e6:,.1f} MFLOPs a sample (2 a multiply-add)",
        "diffusion": f"{type(module.schedule).__name__} schedule, {module.objective.parameterization.name} output, "
        f"{type(module.sampler).__name__} sampler with {module.sampler.steps} steps",
    }


def _describe_latents(module: DiffusionModule) -> dict[str, str]:
    """What is diffused instead of pixels, if anything."""
    from ornstein.codecs import Identity

    if isinstance(module.codec, Identity):
        return {}
    shape = "x".join(map(str, module.latent_shape))
    return {"latents": f"{shape}, of {type(module.codec).__name__}"}


def _describe_condition(conditioner: Conditioner) -> str:
    """What the network is given beside the noisy image, and how much of it training drops."""
    from ornstein.conditioning import ClassLabel, Image, Text

    told = []
    for part in conditioner.modules():
        if isinstance(part, ClassLabel):
            told.append(f"one of {part.num_classes} classes ({100 * part.dropout:g} % dropped)")
        elif isinstance(part, Text):
            sizes = [f"{part.max_length} tokens of {part.text_dim}"] if part.text_dim else []
            sizes += [f"a vector of {part.pooled_dim}"] if part.pooled_dim else []
            told.append(f"captions by {part.encoder.name}, {' and '.join(sizes)} ({100 * part.dropout:g} % dropped)")
        elif isinstance(part, Image):
            told.append(f"{part.source} images, {part.concat_channels} channels ({100 * part.dropout:g} % dropped)")
    return "; ".join(told)


def conclude(run: Any, figures: dict[str, float]) -> None:
    """Prints the run's final figures on held-out data and where everything is."""
    told = []
    for name, value in figures.items():
        if not name.startswith("val/") or name.endswith(("_low", "_high")):
            continue
        ends = [figures[f"{name}_{end}"] for end in ("low", "high") if f"{name}_{end}" in figures]
        interval = f" [{ends[0]:.4g}, {ends[1]:.4g}]" if len(ends) == 2 else ""
        told.append(f"{name.removeprefix('val/')} {value:.4g}{interval}")
    _print({**({"figures": ", ".join(told)} if told else {}), "written to": str(run.path)})


def interrupted(run: Any) -> None:
    """Prints how to go on with a run that was stopped from outside."""
    if run.last_checkpoint() is not None:
        _print({"stopped": f"go on with it by resume={run.path}"})


def _print(rows: dict[str, str]) -> None:
    """A line a row, never cropped: a terminal wraps it, a file keeps it. Of several processes one speaks."""
    from rich.console import Console
    from rich.text import Text

    from ornstein.experiment.lock import is_writer

    if not is_writer():
        return
    for name, text in rows.items():
        Console(soft_wrap=True).print(Text.assemble((f"{name:<11}", "bold"), text), soft_wrap=True)


def _resuming(checkpoint: Path, steps: int) -> str:
    import torch

    done = int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    if done >= steps:
        return f"{checkpoint.name}, at step {done:,} of {steps:,}: nothing left to do but by trainer.max_steps=..."
    return f"{checkpoint.name}, at step {done:,}"


def _threads(count: int) -> str:
    """Threads that training uses, and whether others want the cores too: then fewer threads are often faster."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = f"{count} of this machine's {usable} CPU cores; OMP_NUM_THREADS=N before the command changes it"
    # This process is one of those that the load counts.
    others = os.getloadavg()[0] - 1 if hasattr(os, "getloadavg") else 0.0
    if count > 1 and others > usable - count + 0.5:
        told += f", and fewer may be faster now: other work keeps about {others:.0f} busy"
    return told


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
