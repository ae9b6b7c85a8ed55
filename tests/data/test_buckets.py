"""Shapes, who gets which, the order of one shape a batch, and data sets of several shapes."""

from collections import Counter
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest

from ornstein.data.base import ImageDataset
from ornstein.data.bucket_order import BucketBatches, BucketsOnce
from ornstein.data.bucketed import BucketedImages, bucketed
from ornstein.data.buckets import (
    assign,
    auto_shapes,
    auto_step,
    bucket_shapes,
    bucket_table,
    cropped_share,
)
from ornstein.errors import OrnsteinError

SHAPES = ((4, 8), (6, 6), (8, 4))


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "image_size", "factor", "expected"),
    [
        (None, 32, 4, None),
        ([[48, 32], [32, 32]], 32, 4, ((32, 32), (48, 32))),
        ([[32, 48]], 32, 16, ((32, 48),)),
        ({"area": 64, "step": 4}, 999, 4, ((4, 16), (4, 12), (8, 8), (12, 4), (16, 4))),
        ({"area": 64, "step": 4, "max_ratio": 2}, 8, 1, ((8, 8),)),
        ("auto", 8, 4, ((4, 16), (4, 12), (8, 8), (12, 4), (16, 4))),
    ],
)
def test_options(option: Any, image_size: int, factor: int, expected: Any) -> None:
    """Every form of the option, wide shapes first."""
    assert bucket_shapes(option, image_size=image_size, factor=factor) == expected


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("automatic", "data.buckets=automatic auto [height, width]"),
        ([], "data.buckets=[] auto"),
        (7, "data.buckets=7 auto"),
        ([[32]], "data.buckets=[[32]] [height, width]"),
        ([32, 48], "data.buckets=[32, 48] [height, width]"),
        ([[32, 0]], "data.buckets [height, width]"),
        ([[32, True]], "data.buckets [height, width]"),
        ([[8, 8], [8, 8]], "data.buckets twice"),
        ({"size": 3}, "data.buckets.size area, step, max_ratio"),
        ({"step": 0}, "data.buckets.step=0 positive"),
        ({"area": 1.5}, "data.buckets.area=1.5 positive"),
        ({"max_ratio": 0.5}, "data.buckets.max_ratio=0.5 1 or more"),
        ({"step": 6}, "data.buckets.step=6 multiple of 4 null"),
        ([[32, 30]], "data.buckets [32,30] divide by 4 [32,32] patch_size"),
    ],
)
def test_refused_options(option: Any, words: str) -> None:
    """One sentence that says the option as typed and what to do."""
    with pytest.raises(OrnsteinError) as refused:
        bucket_shapes(option, image_size=32, factor=4)
    assert all(word in str(refused.value) for word in words.split())


@pytest.mark.parametrize(("size", "step", "ratio"), [(1024, 64, 4.0), (512, 64, 2.0), (64, 4, 4.0), (24, 8, 3.0)])
def test_auto_shapes(size: int, step: int, ratio: float) -> None:
    """Multiples of the step, near the area, within the ratio, closed under turning, the square among them."""
    shapes = auto_shapes(area=size**2, step=step, max_ratio=ratio)
    assert set(shapes) == {(w, h) for h, w in shapes}
    assert any(h == w and abs(h - size) <= step / 2 for h, w in shapes)
    assert all(h % step == w % step == 0 and max(h / w, w / h) <= ratio for h, w in shapes)
    # No other multiple of the step beside either side comes nearer in area.
    for h, w in shapes:
        ways = [[abs(np.log(h * (w + d) / size**2)) for d in (-step, 0, step) if w + d > 0]]
        ways += [[abs(np.log((h + d) * w / size**2)) for d in (-step, 0, step) if h + d > 0]]
        assert any(abs(np.log(h * w / size**2)) <= min(each) + 1e-9 for each in ways)
    assert [h / w for h, w in shapes] == sorted(h / w for h, w in shapes)


def test_auto_at_sdxl_size() -> None:
    """At 1024 pixels in steps of 64, shapes that SDXL's paper lists (appendix I) are there."""
    shapes = auto_shapes(area=1024**2, step=64)
    assert {(512, 2048), (640, 1600), (768, 1344), (896, 1152), (1024, 1024), (1152, 896), (2048, 512)} <= set(shapes)


@pytest.mark.parametrize(
    ("size", "factor", "step"), [(1024, 8, 64), (512, 8, 32), (64, 2, 4), (64, 8, 8), (28, 2, 2), (30, 4, 4), (8, 8, 8)]
)
def test_auto_step(size: int, factor: int, step: int) -> None:
    """A multiple of the factor, a sixteenth of the size or more, dividing the size where it can."""
    assert auto_step(size, factor) == step


def test_assignment() -> None:
    """By nearest log ratio; extremes get the extreme shape; ties go by area, then to the first."""
    sizes = [(100, 100), (100, 190), (190, 100), (10, 1000), (1000, 10), (100, 141), (100, 142)]
    assert assign(sizes, SHAPES).tolist() == [1, 0, 2, 0, 2, 1, 0]
    same_ratio = ((8, 8), (16, 16), (32, 32))
    assert assign([(7, 7), (15, 15), (500, 500)], same_ratio).tolist() == [0, 1, 2]
    # Just between two in ratio and in area: the first.
    assert assign([(10, 10)], ((10, 20), (20, 10))).tolist() == [0]


def test_assignment_is_the_nearest_by_search() -> None:
    """Against a plain search over random sizes and shapes."""
    rng = np.random.default_rng(0)
    sizes, shapes = rng.integers(1, 500, (200, 2)), [tuple(s) for s in rng.integers(1, 60, (9, 2)).tolist()]
    for (h, w), found in zip(sizes.tolist(), assign(sizes, shapes).tolist(), strict=True):
        distances = [abs(np.log(h / w) - np.log(a / b)) for a, b in shapes]
        assert distances[found] <= min(distances) + 1e-9


def test_cropped_share() -> None:
    """A 2:1 image in a square loses half of itself, in its own shape nothing."""
    found = cropped_share([(10, 20), (20, 10), (10, 20)], [(8, 8), (8, 8), (4, 8)])
    np.testing.assert_allclose(found, [0.5, 0.5, 0.0])


def test_table() -> None:
    """A line a shape, and a word on buckets smaller than a batch."""
    lines = bucket_table(SHAPES, [300, 97, 3], batch=8, cropped=[0.0, 0.125, 0.5])
    assert len(lines) == 5
    assert lines[1].split() == ["4", "x", "8", "300", "75.0", "%", "37.50", "0.0", "%"]
    assert "8 x 4" in lines[-1] and "more than once" in lines[-1] and "6 x 6" not in lines[-1]


# ---- order -----------------------------------------------------------------------------------------------------------


COUNTS = {"even": (40, 40, 40), "uneven": (97, 20, 3), "one": (1, 30, 0), "small": (3, 2, 1)}


def mixed(counts: tuple[int, ...]) -> np.ndarray:
    """Buckets of N images, in no order."""
    return np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("batch", "world"), [(4, 1), (4, 2), (7, 1), (50, 1)])
def test_every_batch_has_one_shape_and_every_image_its_turn(counts: tuple[int, ...], batch: int, world: int) -> None:
    """No batch mixes shapes on any rank; in each bucket's stream every image stands once before any stands twice; and
    buckets come up as often as they have images, to within one batch.
    """
    buckets = mixed(counts)
    orders = [BucketBatches(buckets, SHAPES, batch, seed=3, rank=rank, world_size=world) for rank in range(world)]
    epochs = 12
    steps = epochs * len(buckets) // (batch * world) + 8
    seen: dict[int, list[int]] = {}
    for step in range(steps):
        whole = np.concatenate([order.indices(step) for order in orders])
        assert len(whole) == batch * world
        assert set(buckets[whole]) == {orders[0].bucket(step)}
        seen.setdefault(orders[0].bucket(step), []).extend(whole.tolist())
    for bucket, count in enumerate(counts):
        stream = seen.get(bucket, [])
        for start in range(0, len(stream) - count + 1, max(count, 1)):
            if count:
                assert sorted(stream[start : start + count]) == np.flatnonzero(buckets == bucket).tolist()
    for epoch in range(1, epochs):  # whole epochs in the order's own reckoning
        stop = sum(orders[0]._before(epoch))
        drawn = Counter(orders[0].bucket(step) for step in range(min(stop, steps)))
        if stop <= steps:
            for bucket, count in enumerate(counts):
                assert abs(drawn[bucket] - epoch * count / (batch * world)) < 1


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_ranks_together_are_one_process(counts: tuple[int, ...]) -> None:
    """Three ranks of 4 read what one of 12 does, in its order."""
    buckets = mixed(counts)
    whole = islice(BucketBatches(buckets, SHAPES, 12, seed=0), 60)
    ranks = [BucketBatches(buckets, SHAPES, 4, seed=0, rank=rank, world_size=3) for rank in range(3)]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(batch, np.concatenate([order.indices(step) for order in ranks]))


def test_ranks_are_disjoint_within_an_epoch_of_a_bucket() -> None:
    """Where a whole batch divides a bucket, no image stands on two ranks of a step, nor twice in an epoch."""
    buckets = mixed((16, 24, 8))
    orders = [BucketBatches(buckets, SHAPES, 4, seed=5, rank=rank, world_size=2) for rank in (0, 1)]
    stop = sum(orders[0]._before(1))
    seen = Counter(np.concatenate([order.indices(step) for order in orders for step in range(stop)]).tolist())
    assert stop == 6 and seen == Counter(range(48))


@pytest.mark.parametrize("start", [0, 1, 13, 10**6])
def test_resume_is_the_stream_gone_on(start: int) -> None:
    """Starting at batch n equals batches n, n + 1, ... of an order that has been asked for others before."""
    buckets = mixed((97, 20, 3))
    asked = BucketBatches(buckets, SHAPES, 6, seed=5)
    resumed = list(islice(BucketBatches(buckets, SHAPES, 6, seed=5, start_batch=start), 9))
    for step in reversed(range(9)):
        np.testing.assert_array_equal(asked.indices(start + step), resumed[step])


def test_far_batches_are_reached_at_once() -> None:
    """Batch a billion computes two permutations of one bucket at most."""
    order = BucketBatches(mixed((97, 20, 3)), SHAPES, 6, seed=5)
    calls: list[int] = []
    for stream in order.streams:
        assert stream is not None
        inner = stream.permutation
        stream.permutation = lambda epoch, inner=inner: calls.append(epoch) or inner(epoch)  # type: ignore[method-assign]
    order.indices(10**9)
    assert len(calls) <= 2


def test_seeds_differ_and_shapes_take_turns() -> None:
    """Another seed, another order; and the shapes are mixed, not one bucket after the other."""
    buckets = mixed((40, 40, 40))
    shapes = {tuple(BucketBatches(buckets, SHAPES, 4, seed=seed).bucket(n) for n in range(30)) for seed in range(5)}
    assert len(shapes) == 5
    assert all(sum(a != b for a, b in pairwise(each)) > 5 for each in shapes)


def test_rare_buckets_are_not_late_by_rule() -> None:
    """A bucket that fills a batch in twenty epochs comes up first in any of them, as the seed has it."""
    buckets = mixed((100, 99, 1))
    firsts = []
    for seed in range(40):
        order = BucketBatches(buckets, SHAPES, 20, seed=seed)
        firsts.append(next(step for step in range(201) if order.bucket(step) == 2))
    assert min(firsts) < 40 and max(firsts) > 160


def test_once() -> None:
    """Every index once, one shape a batch, shapes mixed, the same every time."""
    buckets = mixed((9, 0, 5))
    order = BucketsOnce(buckets, 4)
    batches = list(order)
    assert len(order) == len(batches) == 3 + 2
    assert sorted(np.concatenate(batches).tolist()) == list(range(14))
    assert all(len(set(buckets[batch])) == 1 for batch in batches)
    even = mixed((40, 40, 40))
    shapes = [int(even[batch[0]]) for batch in BucketsOnce(even, 4)]
    assert [batch.tolist() for batch in order] == [batch.tolist() for batch in BucketsOnce(buckets, 4)]
    assert len(set(shapes[:8])) > 1  # a few of them are no bucket alone


# ---- data sets -------------------------------------------------------------------------------------------------------


def data_set(counts: tuple[int, ...] = (5, 3, 4), **options: Any) -> ImageDataset:
    """Random images of three shapes with labels; the first pixel is the image's number."""
    buckets = mixed(counts)
    rng = np.random.default_rng(0)
    parts, rows = [], []
    for bucket, (h, w) in enumerate(SHAPES):
        own = np.flatnonzero(buckets == bucket)
        part = rng.integers(0, 256, (len(own), 3, h, w), dtype=np.uint8)
        part[:, 0, 0, 0] = own
        parts.append(part)
        rows.append(own)
    images = BucketedImages(parts, rows, image_size=6)
    return ImageDataset(
        images, name="mixed", split="train", labels=np.arange(len(buckets)) % 2, class_names=("a", "b"), **options
    )


def test_batches_of_one_shape() -> None:
    """Any rows of one shape, in the order asked for; rows of two shapes are refused."""
    data = data_set()
    assert len(data) == 12 and data.image_size == 6 and data.channels == 3 and data.shapes == SHAPES
    for piece in data.pieces(size=2):
        batch = data.batch(piece[::-1].copy())
        assert batch["image"][:, 0, 0, 0].tolist() == piece[::-1].tolist() == batch["index"].tolist()
        assert tuple(batch["image"].shape[2:]) == SHAPES[data.bucket_of[piece[0]]]
        assert batch["label"].tolist() == (piece[::-1] % 2).tolist()
    with pytest.raises(OrnsteinError, match="do not fit into one batch"):
        data.batch(range(12))


def test_pieces_cover_everything_once() -> None:
    """All rows, or those asked for; in order where there is one shape."""
    data = data_set()
    for rows in (None, [3, 1, 11, 7]):
        found = np.concatenate(list(data.pieces(size=2, rows=rows))).tolist()
        assert sorted(found) == sorted(range(12) if rows is None else rows)
    plain = ImageDataset(np.zeros((5, 1, 4, 4), np.uint8), name="plain", split="train")
    assert plain.bucket_of is None and plain.shapes == ((4, 4),)
    assert [piece.tolist() for piece in plain.pieces(size=2)] == [[0, 1], [2, 3], [4]]


def test_subset_fingerprint_and_keys() -> None:
    """A subset keeps its images; fingerprints depend on pixels and shapes; keys are the pixels'."""
    data = data_set()
    rows = np.array([7, 0, 3, 11])
    part = data.subset(rows)
    for place, row in enumerate(rows.tolist()):
        np.testing.assert_array_equal(part.images[[place]], data.images[[row]])
    assert part.labels is not None and part.labels.tolist() == [1, 0, 1, 1]
    np.testing.assert_array_equal(part.content_keys, data.content_keys[rows])
    assert len({bytes(key) for key in data.content_keys}) == 12
    assert data.fingerprint == data_set().fingerprint != part.fingerprint
    assert data_set(content=b"x").fingerprint != data_set((5, 4, 3), content=b"x").fingerprint


def test_sigma_is_that_of_all_pixels() -> None:
    """Over images of every shape."""
    from ornstein.data.describe import measure_sigma_data

    data = data_set()
    pixels = np.concatenate([data.images[rows].ravel() for rows in data.pieces(size=1)])
    assert measure_sigma_data(data) == pytest.approx(np.std(pixels / 127.5 - 1), rel=1e-12)


@pytest.mark.parametrize(
    "rows", [[[0, 1], [2]], [[0, 1], [1, 2]], [[0, 1], [4, 2]]], ids=["count", "twice", "not 0 to N-1"]
)
def test_row_numbers_are_checked(rows: list[list[int]]) -> None:
    """0 .. N-1, each once, one for each image."""
    with pytest.raises(OrnsteinError, match="row number"):
        BucketedImages([np.zeros((2, 1, h, w), np.uint8) for h, w in SHAPES[:2]], rows, image_size=6)


def test_storing_leaves_out_what_is_bad() -> None:
    """Whoever stores says which of its images it kept; the rows that are left are numbered anew."""
    sizes = np.array([(10, 20), (10, 10), (20, 10), (10, 10), (10, 21), (0, 0)])

    def store(rows: np.ndarray, shape: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        assert shape[0] == len(rows)
        good = np.flatnonzero(rows != 3)
        pixels = rows[good].astype(np.uint8)
        return np.broadcast_to(pixels[:, None, None, None], (len(good), *shape[1:])), good

    images, kept = bucketed(sizes, SHAPES, store, image_size=6, channels=1)
    assert kept.tolist() == [0, 1, 2, 4] and images.shape == (4, 1, 6, 6)
    assert [int(images[[row]].max()) for row in range(4)] == kept.tolist()
    assert images.cropped is not None and images.cropped.round(3).tolist() == [0, 0, 0, 0.048]
