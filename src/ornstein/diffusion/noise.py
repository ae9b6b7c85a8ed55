"""Counter-based randomness: every number is a function of where it is used, never of what was drawn before.

Sampling draws from :class:`NoiseSource`, whose values depend on (seed, sample index, step, draw) alone, so that sample
number i is the same whatever the batch size, the number of devices, or the rank that drew it. Training draws from a
generator seeded anew each step by :func:`derive_seed`, so that a resumed run needs no generator state to go on exactly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


@lru_cache(maxsize=64)
def _constants(key: tuple[int, int], device: torch.device, ndim: int) -> tuple[Tensor, Tensor]:
    """Multipliers (2, 1, ...) and round keys (rounds, 2, 1, ...), kept: to copy them to a device, the host waits."""
    keys = [[(k + i * w) & _MASK for k, w in zip(key, _WEYL, strict=True)] for i in range(_ROUNDS)]
    lane = (2, *([1] * ndim))
    return (
        torch.tensor(_MULTIPLIERS, device=device).reshape(lane),
        torch.tensor(keys, device=device).reshape(_ROUNDS, *lane),
    )


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Philox-4x32-10, vectorised.

    Args:
        counter: four int64 tensors of broadcastable shapes, values in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        (4, *broadcast shape) int64, values uniform in [0, 2**32).

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    # Both lanes of a round in one tensor: on small draws, the number of operations is the whole cost.
    even, odd = torch.stack([c0, c2]), torch.stack([c1, c3])
    multipliers, keys = _constants(key, c0.device, c0.ndim)
    for i in range(_ROUNDS):
        # The product wraps in int64; its 64 bits are still those of the unsigned product, so masks recover both halves.
        crossed = (even * multipliers).flip(0)
        even = (crossed >> 32).bitwise_and_(_MASK).bitwise_xor_(odd).bitwise_xor_(keys[i])
        odd = crossed.bitwise_and_(_MASK)
    return torch.stack([even[0], odd[0], even[1], odd[1]])


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
        steps = torch.full((1,), step, dtype=torch.int64, device=index.device)
        return self.noises(index, steps, draw, shape=shape)[0].float()

    def noises(self, index: Tensor, steps: Tensor, draw: int = 0, *, shape: Sequence[int]) -> Tensor:
        """The values of several steps (N,) int64 at once, (N, B, *shape) float64: each as :meth:`noise` rounds it."""
        size = math.prod(shape)
        blocks = -(-size // 4)
        element = torch.arange(blocks, device=index.device, dtype=torch.int64)[None, None, :]
        sample = index.to(torch.int64)[None, :, None]
        which = torch.full((), draw, dtype=torch.int64, device=index.device)
        bits = philox((element, sample, steps[:, None, None], which), (self.seed & _MASK, self.seed >> 32))
        u = bits.double().add_(0.5).mul_(2.0**-32)
        radius, angle = u[0::2].log().mul_(-2.0).sqrt_(), u[1::2].mul_(2.0 * math.pi)
        normals = torch.empty(len(steps), len(index), blocks, 2, 2, dtype=u.dtype, device=u.device)
        pairs = normals.permute(3, 4, 0, 1, 2)
        torch.mul(radius, angle.cos(), out=pairs[:, 0])
        torch.mul(radius, angle.sin(), out=pairs[:, 1])
        return normals.reshape(len(steps), len(index), blocks * 4)[..., :size].reshape(len(steps), len(index), *shape)

    def bind(self, index: Tensor, shape: Sequence[int]) -> SampleNoise:
        """The noise of one batch of samples, as samplers take it."""
        return SampleNoise(self, index, tuple(shape))


_AHEAD = 2**20  # values that may be drawn ahead of need: 4 MiB


@dataclass(frozen=True)
class SampleNoise:
    """A :class:`NoiseSource` bound to a batch: ``noise(step, draw) -> (B, *shape)`` float32.

    Steps are drawn ahead in blocks, because a draw costs about the same for one small step as for fifty: as many as
    :meth:`expect` was told of, else each block twice the last. What is drawn ahead changes no value.
    """

    source: NoiseSource
    index: Tensor
    shape: tuple[int, ...]
    horizon: int = 0
    _ahead: dict[int, tuple[int, tuple[Tensor, ...]]] = field(default_factory=dict, repr=False, compare=False)

    def expect(self, steps: int) -> SampleNoise:
        """The same noise, for a sampler of so many steps."""
        return replace(self, horizon=steps + 1)

    def __call__(self, step: int, draw: int = 0) -> Tensor:
        first, block = self._ahead.get(draw, (0, ()))
        if first <= step < first + len(block):
            return block[step - first]
        goes_on = len(block) > 0 and step == first + len(block)
        most = max(1, _AHEAD // max(1, len(self.index) * math.prod(self.shape)))
        count = 2 * len(block) if goes_on else 1
        if 0 < step < self.horizon:  # not for the initial noise: a deterministic sampler asks for no other
            count = self.horizon - step
        count = min(count, most)
        steps = torch.arange(step, step + count, device=self.index.device)
        block = self.source.noises(self.index, steps, draw, shape=self.shape).float().unbind()
        self._ahead[draw] = (step, block)
        return block[0]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of its parts, e.g. (run seed, step, rank, purpose)."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
