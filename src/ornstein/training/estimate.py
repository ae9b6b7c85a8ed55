"""What a run will cost, before its first step: parameters, FLOPs, memory and time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ornstein.codecs import Autoencoder
from ornstein.codecs.codec import sides_of
from ornstein.networks.cost import count_flops, count_parameters
from ornstein.training.autoencoder import AutoencoderModule
from ornstein.training.base import TrainingModule
from ornstein.training.module import DiffusionModule


@dataclass(frozen=True)
class Cost:
    """Costs of a run.

    Attributes:
        parameters: trainable ones.
        flops: of one forward pass of one sample, 2 a multiply-add.
        state_bytes: weights, and of trainable ones gradients, two optimizer moments and averages, in float32.
        activation_bytes: kept for one backward pass of a micro-batch.
        step_seconds: one forward and backward pass of a micro-batch, measured.
    """

    parameters: int
    flops: int
    state_bytes: int
    activation_bytes: int
    step_seconds: float


def measure_cost(module: TrainingModule, batch: dict[str, Any]) -> Cost:
    """Runs one micro-batch forward and backward twice, and leaves no gradient, no count and no buffer changed behind.

    Training reseeds every step, so that nothing here changes what the run will draw.
    """
    was_training = module.training
    module.train()
    if isinstance(module, DiffusionModule):
        module.codec.eval()
    counters = module.micro_batches_seen, module.images_seen
    # An objective may keep a history of losses, a network running means.
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    # The first pass warms up and counts what autograd keeps; the second is the one that is timed.
    activations = activation_bytes(module, lambda: module.training_step(batch, 0))
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
    frozen = count_parameters(module) - parameters
    return Cost(parameters, forward_flops(module), 4 * (5 * parameters + frozen), activations, seconds)


def activation_bytes(module: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for one backward pass of ``loss``, the module's own weights not counted; runs it."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss().backward()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def forward_flops(module: TrainingModule) -> int:
    """FLOPs of one forward pass of one sample, 2 a multiply-add; of an autoencoder, to encode and decode one image."""
    if isinstance(module, AutoencoderModule):
        return _autoencoder_flops(module.network, module.device)
    assert isinstance(module, DiffusionModule)
    x = torch.zeros(1, *module.latent_shape, device=module.device)
    cond = module.conditioner.null_form(1, module.device)
    return int(count_flops(module.network, x, torch.zeros(1, device=module.device), **cond))


def _autoencoder_flops(network: Autoencoder, device: torch.device) -> int:
    (height, width), (h, w) = sides_of(network.image_size), sides_of(network.size)
    x = torch.zeros(1, network.image_channels, height, width, device=device)
    y = torch.zeros(1, network.decoder.stem.in_channels, h, w, device=device)
    return int(count_flops(network.encoder, x) + count_flops(network.decoder, y))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
