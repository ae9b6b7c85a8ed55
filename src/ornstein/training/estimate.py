"""What a run will cost, before its first step: parameters, FLOPs, memory and time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ornstein.networks.cost import count_flops, count_parameters
from ornstein.training.module import DiffusionModule


@dataclass(frozen=True)
class Cost:
    """Costs of a run.

    Attributes:
        parameters: trainable ones.
        flops: of one forward pass of one sample, 2 a multiply-add.
        state_bytes: weights, gradients, two optimizer moments and averages in float32.
        activation_bytes: kept for one backward pass of a micro-batch.
        step_seconds: one forward and backward pass of a micro-batch, measured.
    """

    parameters: int
    flops: int
    state_bytes: int
    activation_bytes: int
    step_seconds: float


def measure_cost(module: DiffusionModule, batch: dict[str, Any]) -> Cost:
    """Runs one micro-batch forward and backward twice, and leaves no gradient, no count and no buffer changed behind.

    Training reseeds every step, so that nothing here changes what the run will draw.
    """
    was_training = module.training
    module.train()
    module.codec.eval()
    counters = module.micro_batches_seen, module.images_seen
    # An objective may keep a history of losses, a network running means.
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # The first pass warms up and counts what autograd keeps; the second is the one that is timed.
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module.training_step(batch, 0).backward()
    _synchronise(module.device)
    started = time.perf_counter()
    module.training_step(batch, 0).backward()
    _synchronise(module.device)
    seconds = time.perf_counter() - started
    module.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    module.micro_batches_seen, module.images_seen = counters
    module.last_output = None
    module.train(was_training)
    parameters = count_parameters(module, trainable=True)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    activations = sum(size for pointer, size in kept.items() if pointer not in weights)
    return Cost(parameters, forward_flops(module), parameters * 4 * 5, activations, seconds)


def forward_flops(module: DiffusionModule) -> int:
    """FLOPs of one forward pass of one sample, 2 a multiply-add."""
    x = torch.zeros(1, *module.latent_shape, device=module.device)
    conditional = module.conditioner.num_classes is not None
    label = torch.zeros(1, dtype=torch.int64, device=module.device) if conditional else None
    cond = module.conditioner.cond(label)
    return int(count_flops(module.network, x, torch.zeros(1, device=module.device), **cond))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
