"""What a network costs: parameters and floating-point operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module, *, trainable: bool = False) -> int:
    """Count the numbers in a module's parameters; `trainable` leaves out frozen ones."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def count_flops(module: nn.Module, *inputs: Tensor, **conditioning: Any) -> float:
    """Count the floating-point operations of one forward pass, **per sample**.

    A multiply-accumulate counts as 2 operations (papers that count MACs, DiT's among them, state half).
    Matrix products, convolutions and attention are counted; normalisations and activations are not. One
    training step costs about three times as much.

    Args:
        module: the network; put back in the mode it was in.
        inputs: positional inputs of one batch, the first `(B, ...)`.
        conditioning: keyword inputs.

    Returns:
        Operations per sample. Works on the meta device, where nothing is computed.
    """
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*inputs, **conditioning)
    finally:
        module.train(training)
    return counter.get_total_flops() / inputs[0].shape[0]
