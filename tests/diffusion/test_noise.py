"""The counter-based noise: published vectors, independence, and values that depend on their address alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ornstein.diffusion.noise import NoiseSource, derive_seed, philox

# Random123's known answers for philox4x32-10: counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    c = tuple(torch.tensor(word, dtype=torch.int64) for word in words(counter))
    k0, k1 = words(key)
    assert [int(v) for v in philox(c, (k0, k1))] == words(expected)
    batched = philox(tuple(v.expand(3, 2) for v in c), (k0, k1))
    assert all(bool((v == w).all()) for v, w in zip(batched, words(expected), strict=True))


@pytest.mark.parametrize("shape", [(3, 8, 8), (5,), (1,), (2, 3, 2, 3, 2)])
def test_values_depend_on_the_address_alone(shape: tuple[int, ...]) -> None:
    source = NoiseSource(7)
    whole = source.noise(torch.arange(10), 3, 1, shape=shape)
    assert whole.shape == (10, *shape)
    assert whole.dtype == torch.float32
    shuffled = torch.tensor([9, 0, 4, 4])
    assert torch.equal(source.noise(shuffled, 3, 1, shape=shape), whole[shuffled])
    assert torch.equal(NoiseSource(7).bind(torch.tensor([6]), shape)(3, 1), whole[6:7])
    assert source.noise(torch.arange(0), 3, shape=shape).shape == (0, *shape)


def test_a_longer_sample_starts_with_the_same_values() -> None:
    index = torch.arange(3)
    long, short = (NoiseSource(1).noise(index, 0, shape=(size,)) for size in (11, 6))
    assert torch.equal(long[:, :6], short)


ADDRESSES = {
    "seed": lambda v: NoiseSource(v).noise(torch.arange(64), 0, shape=(1024,)),
    "seed-high-word": lambda v: NoiseSource(v << 32).noise(torch.arange(64), 0, shape=(1024,)),
    "step": lambda v: NoiseSource(0).noise(torch.arange(64), v, shape=(1024,)),
    "draw": lambda v: NoiseSource(0).noise(torch.arange(64), 0, v, shape=(1024,)),
    "index": lambda v: NoiseSource(0).noise(torch.arange(64) + 64 * v, 0, shape=(1024,)),
}


@pytest.mark.parametrize("axis", ADDRESSES)
def test_neighbouring_addresses_are_independent(axis: str) -> None:
    first, second = (ADDRESSES[axis](v).flatten() for v in (0, 1))
    count = first.numel()
    for a, b in ((first, second), (first.square() - 1, second.square() - 1)):
        # A sample correlation of independent values has deviation 1/sqrt(n): five of them.
        assert abs(float((a * b).mean() / (a.std() * b.std()))) < 5 / count**0.5


def test_values_are_standard_normal() -> None:
    from scipy import stats

    x = NoiseSource(0).noise(torch.arange(256), 0, shape=(3, 16, 16)).double().flatten()
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3  # one fixed draw: it either is normal or is not
    assert abs(float(x.mean())) < 5 / x.numel() ** 0.5
    assert abs(float(x.var()) - 1) < 5 * (2 / x.numel()) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 5 * (96 / x.numel()) ** 0.5
    lanes = NoiseSource(0).noise(torch.arange(256), 0, shape=(256, 4)).reshape(-1, 4)
    # The four values of one Philox block are independent of each other.
    correlation: Tensor = torch.corrcoef(lanes.T) - torch.eye(4)
    assert float(correlation.abs().max()) < 5 / len(lanes) ** 0.5


def test_values_are_pinned() -> None:
    # A change here changes every published sample: seeds would mean something else.
    values = NoiseSource(0).noise(torch.tensor([0]), 0, shape=(4,))[0].double()
    u = torch.tensor(words(KNOWN[0][2]), dtype=torch.float64).add(0.5) * 2.0**-32
    radius = torch.sqrt(-2 * torch.log(u[[0, 2]]))
    angle = 2 * torch.pi * u[[1, 3]]
    expected = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1).flatten()
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)  # float32 rounding


def test_derived_seeds_are_stable_and_distinct() -> None:
    assert derive_seed(0, 1, "noise") == derive_seed(0, 1, "noise")
    assert derive_seed(42, "train", 7) == 617393764880029806  # blake2b is the same everywhere
    seeds = {derive_seed(seed, step, rank) for seed in range(10) for step in range(100) for rank in range(4)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match="choose a non-negative seed"):
        NoiseSource(seed)


class HostData(TorchDispatchMode):
    """Counts tensors made of Python numbers: on an accelerator, each is a copy that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += str(func).startswith("aten.lift_fresh")
        return func(*args, **(kwargs or {}))


def test_a_draw_copies_nothing_from_the_host_but_the_first_of_a_seed() -> None:
    def drawn(seed: int) -> int:
        with HostData() as host:
            NoiseSource(seed).bind(torch.arange(2), (3, 4))(1)
        return host.seen

    assert drawn(987654321) > 0
    assert drawn(987654321) == 0
