"""Initial weights of the papers' U-Nets."""

from __future__ import annotations

import math

from torch import nn

# name -> gain of each of the projections to queries, keys and values. EDM draws the three as one matrix, from a range
# of sqrt(0.2) * sqrt(6 / (C + 3C)) = sqrt(0.1) * sqrt(6 / 2C).
INITS: dict[str, float] = {"ddpm": 1.0, "edm": math.sqrt(0.1)}


def initialise(network: nn.Module, init: str) -> None:
    """Draw weights of convolutions and linear layers from Xavier's uniform range and set biases to zero, in place.

    Layers that are zero stay zero, where the papers have 1e-10 (DDPM) and 1e-5 (EDM) of that range.
    Source: Ho et al. 2020 (arXiv 2006.11239), their code; Karras et al. 2022 (arXiv 2206.00364), their code.

    Args:
        network: the network.
        init: `ddpm` or `edm` (DDPM++ and NCSN++): they differ in attention alone.
    """
    for name, module in network.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weight = module.weight.detach()
        if weight.is_meta or not weight.any():
            continue
        if name.endswith(".qkv"):
            for part in weight.chunk(3):
                nn.init.xavier_uniform_(part, gain=INITS[init])
        else:
            nn.init.xavier_uniform_(weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
