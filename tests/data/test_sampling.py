"""The endless order: a pure function of seed and position."""

from itertools import islice

import numpy as np
import pytest

from ornstein.data import BalancedBatches, EndlessBatches, OrderedBatches
from ornstein.data.sampling import equally_many, evenly_spaced
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


LABELS = np.array([0] * 40 + [1] * 7 + [3] * 2 + [4])


def stream(batch: int, count: int, **arguments: int) -> np.ndarray:
    """The first `count` images of the balanced order."""
    order = BalancedBatches(LABELS, batch, **{"seed": 3, **arguments})
    return np.concatenate(list(islice(order, -(-count // batch))))[:count]


@pytest.mark.parametrize("batch", [1, 4, 5, 13, 100])
def test_balanced_rounds(batch: int) -> None:
    """Every four images hold one of each class, whatever the batch size; each pass through a class is a permutation."""
    images = stream(batch, 4 * 80)
    rounds = LABELS[images].reshape(80, 4)
    assert (np.sort(rounds, axis=1) == [0, 1, 3, 4]).all(), "a class without images is left out"
    assert len({row.tobytes() for row in rounds[:24]}) > 4, "the order within a round changes"
    for label, members in ((0, 40), (1, 7), (3, 2)):
        own = images[LABELS[images] == label]
        passes = own[: len(own) // members * members].reshape(-1, members)
        assert (np.sort(passes, axis=1) == np.flatnonzero(label == LABELS)).all()
        if label == 1:
            assert len({each.tobytes() for each in passes}) > 5
    assert np.array_equal(images, stream(7, 4 * 80))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 9, 10**6])
def test_balanced_resume_and_ranks(world: int, start: int) -> None:
    """Starting at batch n is skipping n; the ranks together are one process with the whole batch."""
    ranks = []
    for rank in range(world):
        arguments = {"seed": 5, "rank": rank, "world_size": world}
        resumed = list(islice(BalancedBatches(LABELS, 6, **arguments, start_batch=start), 5))
        ranks.append(resumed)
        order = BalancedBatches(LABELS, 6, **arguments)
        np.testing.assert_array_equal([order.indices(start + number) for number in range(5)], resumed)
        if start < 100:
            np.testing.assert_array_equal(list(islice(order, start, start + 5)), resumed)
    whole = list(islice(BalancedBatches(LABELS, 6 * world, seed=5, start_batch=start), 5))
    np.testing.assert_array_equal(whole, np.concatenate(ranks, axis=1))


def test_balanced_seeds_differ() -> None:
    assert len({stream(4, 40, seed=seed).tobytes() for seed in range(20)}) == 20


def test_equally_many() -> None:
    """The same number of each class that has any, one more of the first ones; spread over each; sorted."""
    labels = np.array([0, 1, 2, 4] * 30)
    rows = equally_many(labels, 10, class_names="abcde")
    assert np.bincount(labels[rows]).tolist() == [3, 3, 2, 0, 2]
    assert (np.diff(rows) > 0).all() and rows.min() < 20 and rows.max() > 60
    assert np.array_equal(equally_many(labels, 120, class_names="abcde"), np.arange(120))
    with pytest.raises(OrnsteinError, match=r"class 'e' has 1: set data\.limit=4 or less"):
        equally_many(LABELS, 8, class_names="abcde")
    with pytest.raises(OrnsteinError, match=r"4 classes: set data\.limit to 4 or more"):
        equally_many(LABELS, 3, class_names="abcde")
    assert evenly_spaced(100, 4).tolist() == [0, 25, 50, 75]
