"""The endless order: a pure function of seed and position."""

from itertools import islice

import numpy as np
import pytest

from ornstein.data import EndlessBatches, OrderedBatches
from ornstein.errors import OrnsteinError


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (10, 10), (7, 3), (5, 13), (1, 4), (100, 1)])
def test_every_epoch_is_a_permutation(size: int, batch: int) -> None:
    """The stream cut into pieces of `size` is permutations, whatever the batch size, and they differ."""
    order = EndlessBatches(size, batch, seed=3)
    stream = np.concatenate(list(islice(order, -(-6 * size // batch))))[: 6 * size].reshape(6, size)
    assert (np.sort(stream, axis=1) == np.arange(size)).all()
    if size >= 7:
        # Six epochs of 7! = 5040 orders or more: equal ones would be chance in hundreds.
        assert len({epoch.tobytes() for epoch in stream}) == 6


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 7, 1000])
def test_resume_is_the_stream_gone_on(world: int, start: int) -> None:
    """Starting at batch n equals skipping n batches, on every rank."""
    for rank in range(world):
        arguments = {"seed": 5, "rank": rank, "world_size": world}
        skipped = list(islice(EndlessBatches(23, 6, **arguments), start, start + 5))
        resumed = list(islice(EndlessBatches(23, 6, **arguments, start_batch=start), 5))
        np.testing.assert_array_equal(skipped, resumed)


def test_ranks_together_are_one_process() -> None:
    """Two ranks of 4 read what one of 8 does."""
    whole = list(islice(EndlessBatches(30, 8, seed=0), 12))
    ranks = [list(islice(EndlessBatches(30, 4, seed=0, rank=rank, world_size=2), 12)) for rank in (0, 1)]
    np.testing.assert_array_equal(whole, np.concatenate(ranks, axis=1))


def test_far_batches_are_reached_at_once() -> None:
    """Batch a billion computes one permutation or two, not all before it."""
    order = EndlessBatches(1000, 128, seed=0, start_batch=10**9)
    calls = []
    inner = order.permutation
    order.permutation = lambda epoch: calls.append(epoch) or inner(epoch)  # type: ignore[method-assign]
    next(iter(order))
    assert len(calls) <= 2


def test_seeds_and_epochs_do_not_meet() -> None:
    """(seed, epoch) pairs with equal sums or products have orders of their own."""
    orders = {EndlessBatches(50, 1, seed=s).permutation(e).tobytes() for s in range(8) for e in range(8)}
    assert len(orders) == 64


def test_ordered() -> None:
    """Everything once, in order; the last batch is short."""
    batches = list(OrderedBatches(10, 4))
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(OrderedBatches(10, 4)) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 0, "batch_size": 1},
        {"size": 1, "batch_size": 0},
        {"size": 1, "batch_size": 1, "rank": 2, "world_size": 2},
        {"size": 1, "batch_size": 1, "start_batch": -1},
    ],
)
def test_refusals(arguments: dict) -> None:
    """Numbers out of range."""
    with pytest.raises(OrnsteinError):
        EndlessBatches(**{"seed": 0, **arguments})
