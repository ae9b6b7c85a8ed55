"""Counter-based randomness: every number is a function of where it is used, never of what was drawn before.

Sampling draws from :class:`NoiseSource`, whose values depend on (seed, sample index, step, draw) alone, so that sample
number i is the same whatever the batch size, the number of devices, or the rank that drew it. Training draws from a
generator seeded anew each step by :func:`derive_seed`, so that a resumed run needs no generator state to go on exactly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10, vectorised.

    Args:
        counter: four int64 tensors of broadcastable shapes, values in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, values uniform in [0, 2**32).

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps in int64; its 64 bits are still those of the unsigned product, so masks recover both halves.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True)
class NoiseSource:
    """Standard normal noise addressed by (seed, sample index, step, draw).

    Args:
        seed: any integer in [0, 2**64).

    Raises:
        ValueError: the seed is outside that range.
    """

    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} is outside [0, 2**64): choose a non-negative seed.")

    def noise(self, index: Tensor, step: int, draw: int = 0, *, shape: Sequence[int]) -> Tensor:
        """Standard normal values for a batch of samples.

        Args:
            index: (B,) int64, the samples' numbers, each in [0, 2**32).
            step: non-negative step of the sampler; 0 is the initial noise.
            draw: which of several draws within the step.
            shape: shape of one sample.

        Returns:
            (B, *shape) float32 on the device of ``index``. The Box-Muller transform runs in float64, so that devices
            whose float32 logarithm or cosine differ in the last bit still agree after rounding.
        """
        size = math.prod(shape)
        blocks = -(-size // 4)
        element = torch.arange(blocks, device=index.device, dtype=torch.int64)[None, :]
        sample = index.to(torch.int64)[:, None]
        zero = torch.zeros((), dtype=torch.int64, device=index.device)
        key = (self.seed & _MASK, self.seed >> 32)
        bits = philox((element, sample, zero + step, zero + draw), key)
        u = [(b.double() + 0.5) * 2.0**-32 for b in bits]
        normals: list[Tensor] = []
        for first, second in ((u[0], u[1]), (u[2], u[3])):
            radius, angle = torch.sqrt(-2.0 * torch.log(first)), 2.0 * math.pi * second
            normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
        flat = torch.stack(normals, dim=-1).reshape(index.shape[0], blocks * 4)[:, :size]
        return flat.reshape(index.shape[0], *shape).float()

    def bind(self, index: Tensor, shape: Sequence[int]) -> SampleNoise:
        """The noise of one batch of samples, as samplers take it."""
        return SampleNoise(self, index, tuple(shape))


@dataclass(frozen=True)
class SampleNoise:
    """A :class:`NoiseSource` bound to a batch: ``noise(step, draw) -> (B, *shape)`` float32."""

    source: NoiseSource
    index: Tensor
    shape: tuple[int, ...]

    def __call__(self, step: int, draw: int = 0) -> Tensor:
        return self.source.noise(self.index, step, draw, shape=self.shape)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of its parts, e.g. (run seed, step, rank, purpose)."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
