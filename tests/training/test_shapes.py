"""Samples of several shapes: who gets which, one shape a batch, and each as if drawn alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ornstein.codecs import Identity, KLAutoencoder
from ornstein.conditioning import Image, NoConditioning
from ornstein.data import ImageDataset
from ornstein.data.bucketed import BucketedImages
from ornstein.diffusion.guidance import ClassifierFree
from ornstein.diffusion.variational_bound import VariationalBound
from ornstein.errors import OrnsteinError
from ornstein.networks import DiT, UNet
from ornstein.networks.checks import side_factor
from ornstein.training.callbacks.sample_grid import GridLayout, column_sizes, shown
from ornstein.training.generate import Generated
from ornstein.training.likelihood import held_out_likelihood
from ornstein.training.pictures import letterboxed
from ornstein.training.shapes import compile_for, grouped, most_frequent, rows_of_one_shape, sizes_like, sizes_of_rows

SHAPES = ((4, 8), (8, 8), (8, 4))


def mixed(counts: tuple[int, ...] = (2, 9, 5), *, labels: Any = None, conditions: bool = False) -> ImageDataset:
    """Random grey images of three shapes, shuffled."""
    bucket = np.random.default_rng(0).permutation(np.repeat(np.arange(3), counts))
    rng = np.random.default_rng(1)
    rows = [np.flatnonzero(bucket == number) for number in range(3)]

    def images() -> BucketedImages:
        parts = [rng.integers(0, 256, (len(own), 1, *SHAPES[n]), dtype=np.uint8) for n, own in enumerate(rows)]
        return BucketedImages(parts, rows, image_size=8)

    return ImageDataset(
        images(),
        name="mixed",
        split="val",
        labels=None if labels is None else labels(bucket),
        class_names=("a", "b", "c"),
        conditions=images() if conditions else None,
    )


def test_grouping() -> None:
    """One group without sizes or with one; otherwise the places of each size, in order of appearance."""
    assert list(grouped(None, 3)) == [(None, None)]
    assert list(grouped((4, 8), 3)) == [((4, 8), None)]
    assert list(grouped([(4, 8), (8, 8), (4, 8)], 3)) == [((4, 8), [0, 2]), ((8, 8), [1])]
    with pytest.raises(ValueError, match="2 sizes for 3 samples"):
        list(grouped([(4, 8), (8, 8)], 3))


def test_sizes_follow_the_data() -> None:
    """Any run of samples has the data's shares to within a few, and each size depends on the index alone."""
    data = mixed((20, 90, 50))
    for start, count in ((0, 160), (1000, 320), (7, 3)):
        found = sizes_like(data, range(start, start + count))
        assert found is not None
        if count > 100:
            for shape, share in zip(SHAPES, (20 / 160, 90 / 160, 50 / 160), strict=True):
                assert abs(Counter(found)[shape] - share * count) <= 3
        assert found[1:] == sizes_like(data, list(range(start + 1, start + count)))
    plain = ImageDataset(np.zeros((3, 1, 8, 8), np.uint8), name="plain", split="val")
    assert sizes_like(plain, range(4)) is None and sizes_of_rows(plain, [0]) is None


def test_sizes_follow_the_class() -> None:
    """Where shape and class go together, samples of a class have its shapes; a class without images all shapes."""
    data = mixed((30, 30, 30), labels=lambda bucket: np.minimum(bucket, 1))
    found = sizes_like(data, range(90), labels=[i % 3 for i in range(90)])
    assert found is not None
    assert {found[i] for i in range(0, 90, 3)} == {SHAPES[0]}
    assert {found[i] for i in range(1, 90, 3)} == set(SHAPES[1:])
    assert {found[i] for i in range(2, 90, 3)} == set(SHAPES)


def test_most_frequent_and_one_shape() -> None:
    """By count; rows of the most frequent shape fit into one batch."""
    data = mixed()
    assert most_frequent(data, 2) == [(8, 8), (8, 4)]
    rows = rows_of_one_shape(data, 4)
    assert data.batch(rows)["image"].shape == (4, 1, 8, 8)
    assert sizes_of_rows(data, rows) == [(8, 8)] * 4


def test_letterbox_and_columns() -> None:
    """Tiles of one size with the images in their middle; columns share the shapes; order is the grid's."""
    images = [torch.full((1, *shape), 200, dtype=torch.uint8) for shape in SHAPES]
    tiles = letterboxed(images)
    assert tiles.shape == (3, 3, 8, 8)
    assert [int((tile == 200).all(0).sum()) for tile in tiles] == [32, 64, 32]
    assert (tiles[0, :, 2:6] == 200).all() and not (tiles[0, :, :2] == 200).any()
    same = letterboxed([image for image in images[1:2] for _ in range(2)])
    assert same.shape == (2, 1, 8, 8)

    layout = GridLayout(list(range(8)), 4, None)
    sizes = column_sizes(SHAPES, layout)
    assert sizes == [SHAPES[0], SHAPES[0], SHAPES[1], SHAPES[2]] * 2
    batches = [
        Generated(torch.stack([torch.full((1, *shape), place, dtype=torch.uint8) for place in places]),
                  torch.tensor(places), None, 1)
        for shape, places in grouped(sizes, 8)
        if shape is not None and places is not None
    ]  # fmt: skip
    tiles, _ = shown(batches, layout)
    assert [int(tile[0, 4, 4]) for tile in tiles] == list(range(8))


def unet() -> UNet:
    torch.manual_seed(0)
    network = UNet(1, image_size=8, base_channels=8, channel_mults=(1, 2), num_blocks=1, groups=4)
    nn.init.normal_(network.out.weight, std=0.1)
    return network


@pytest.mark.parametrize("batch_size", [2, 64])
def test_samples_of_several_sizes_are_those_of_each_alone(make_module: Any, batch_size: int) -> None:
    """Grouping by size changes no sample: number i at size s is what it is when only it is drawn."""
    module = make_module(network=unet(), classes=None, codec=Identity(1, 8, sigma_data=0.5))
    sizes = [SHAPES[i % 3] for i in range(7)]
    seen = {}
    for batch in module.generate(range(10, 17), size=sizes, batch_size=batch_size):
        assert len({tuple(image.shape) for image in batch.images}) == 1
        seen |= dict(zip(batch.index.tolist(), batch.images, strict=True))
    assert sorted(seen) == list(range(10, 17))
    for place, size in enumerate(sizes):
        (alone,) = module.generate([10 + place], size=size)
        assert tuple(alone.images.shape[2:]) == size
        # One level of 256 either way: convolutions over another batch size round differently.
        assert (alone.images[0].int() - seen[10 + place].int()).abs().max() <= 1
    (square,) = module.generate([3])
    (same,) = module.generate([3], size=(8, 8))
    assert torch.equal(square.images, same.images)


def test_each_sample_keeps_its_own_label(make_module: Any) -> None:
    """Labels go with their samples into the groups."""
    module = make_module()
    sizes = [(4, 8), (8, 8), (4, 8), (8, 8)]
    labels = {}
    for batch in module.generate(range(4), size=sizes, labels=[2, 1, 0, 1]):
        labels |= dict(zip(batch.index.tolist(), batch.labels.tolist(), strict=True))
    assert labels == {0: 2, 1: 1, 2: 0, 3: 1}


@pytest.mark.parametrize("source", ["low_resolution", "mask", "condition"])
def test_samples_conditioned_on_images_of_their_size(make_module: Any, source: str) -> None:
    """Held-out images of the sample's own shape are given, image i itself where it has that shape; with guidance."""
    conditioner = Image(source, channels=1, size=8, image_size=8, factor=2, condition_channels=1)
    network = UNet(
        1, image_size=8, base_channels=8, channel_mults=(1,), num_blocks=1, groups=4,
        concat_channels=conditioner.concat_channels,
    )  # fmt: skip
    module = make_module(network=network, conditioner=conditioner, codec=Identity(1, 8, sigma_data=0.5))
    data = mixed(conditions=source == "condition")
    module.held_out = lambda: data
    sizes = sizes_of_rows(data, range(len(data)))
    assert sizes is not None
    count = 0
    for batch in module.generate(range(len(data)), size=sizes, guidance=ClassifierFree(2.0)):
        assert batch.conditions is not None and batch.conditions.shape[2:] == batch.images.shape[2:]
        if source == "condition":
            for row, shown_ in zip(batch.index.tolist(), batch.conditions, strict=True):
                np.testing.assert_array_equal(data.conditions[[row]][0], shown_)  # type: ignore[index]
        count += len(batch.images)
    assert count == len(data)
    with pytest.raises(OrnsteinError, match="no held-out image of mixed has that size"):
        list(module.generate(range(2), size=(16, 8)))


def test_training_on_conditions_of_any_shape() -> None:
    """What is diffused is as many times smaller as for squares, in latents too; dropped conditions are zeros."""
    conditioner = Image("grey", channels=3, size=4, image_size=16, dropout=1.0)
    batch = {"image": torch.randint(0, 256, (3, 3, 8, 32), dtype=torch.uint8)}
    found = conditioner.training_cond(batch, generator=torch.Generator())["concat"]
    assert found.shape == (3, 1, 2, 8) and not found.any()


def test_codecs_take_other_sizes_where_they_are_told_to() -> None:
    """With `any_size`, all that divides; a square encodes as before; latents have the shape that is promised."""
    torch.manual_seed(0)
    codec = KLAutoencoder(1, 16, channels=4, width=8, multipliers=[1, 2, 2], blocks=1, groups=4)
    with pytest.raises(OrnsteinError, match=r"\(B, 1, 16, 16\)"):
        codec.encode(torch.zeros(1, 1, 8, 16))
    square = torch.rand(2, 1, 16, 16)
    before = codec.encode(square)
    codec.any_size = True
    assert torch.equal(before, codec.encode(square))
    z = codec.encode(torch.zeros(2, 1, 8, 24))
    assert tuple(z.shape[1:]) == codec.latent_shape(8, 24) == (4, 2, 6)
    assert codec.decode(z).shape == (2, 1, 8, 24)
    with pytest.raises(OrnsteinError, match="multiples of 4"):
        codec.encode(torch.zeros(1, 1, 10, 16))
    with pytest.raises(OrnsteinError, match=r"choose \[8,16\]"):
        codec.latent_shape(9, 16)


@pytest.mark.parametrize("positions", ["sincos", "rope", "sincos_rope", "learned"])
def test_transformers_take_other_grids(positions: str) -> None:
    """Positions are made once a shape, are no part of a checkpoint, and tell rows from columns."""
    torch.manual_seed(0)
    network = DiT(1, image_size=8, patch_size=2, hidden_size=16, depth=1, heads=2, positions=positions)
    before = set(network.state_dict())
    nn.init.normal_(network.out.weight)
    for shape in (*SHAPES, *SHAPES):
        assert network(torch.randn(2, 1, *shape), torch.ones(2)).shape == (2, 1, *shape)
    assert set(network.state_dict()) == before
    made = network.positions._made
    kinds = {"sincos": 1, "rope": 1, "sincos_rope": 2, "learned": 0}[positions]
    assert len(made) == 3 * kinds
    x = torch.randn(1, 1, 4, 8)
    turned = network(x.mT.contiguous(), torch.ones(1)).mT
    assert not torch.allclose(network(x, torch.ones(1)), turned, atol=1e-3)


@pytest.mark.parametrize(
    ("network", "factor"),
    [(unet(), 2), (DiT(1, patch_size=4, hidden_size=16, depth=1, heads=2), 4), (nn.Conv2d(1, 1, 1), None)],
    ids=["unet", "dit", "other"],
)
def test_side_factor(network: nn.Module, factor: int | None) -> None:
    """What a network says of the sides it takes."""
    assert side_factor(network) == factor


def test_unconditional_sampling_takes_any_size_that_divides(make_module: Any) -> None:
    """Others are refused by the network's own sentence."""
    module = make_module(network=unet(), classes=None, conditioner=NoConditioning())
    with pytest.raises(OrnsteinError, match="5 x 8 do not divide by 2"):
        list(module.generate(range(1), size=(5, 8)))


def test_training_on_latents_of_several_shapes(make_module: Any) -> None:
    """Batches of any shape are encoded as they come, mirrored ones too, and the loss has a gradient."""
    torch.manual_seed(0)
    codec = KLAutoencoder(1, 16, channels=2, width=8, multipliers=[1, 2, 2], blocks=1, groups=4)
    network = UNet(2, image_size=4, base_channels=8, channel_mults=(1, 2), num_blocks=1, groups=4)
    module = make_module(network=network, classes=None, codec=codec, conditioner=NoConditioning(), flip=True)
    for shape in ((8, 16), (16, 8), (24, 8)):
        image = torch.randint(0, 256, (3, 1, *shape), dtype=torch.uint8)
        loss = module.training_step({"image": image, "index": torch.arange(3)}, 0)
        loss.backward()
        assert torch.isfinite(loss)
        (drawn,) = module.generate(range(2), size=shape)
        assert drawn.images.shape == (2, 1, *shape)


def test_likelihood_of_images_of_several_shapes(make_module: Any) -> None:
    """Each image's bits/dim is what it has alone, in the order of the numbers that stand beside it."""
    module = make_module(network=unet(), classes=None, codec=Identity(1, 8, sigma_data=0.5))
    data = mixed()
    method = VariationalBound(steps=3)
    whole = held_out_likelihood(module, data, method, num_images=None, batch_size=4)
    assert sorted(whole.index.tolist()) == list(range(len(data)))
    assert np.isfinite(whole.bits.numpy()).all()
    again = held_out_likelihood(module, data, method, num_images=None, batch_size=16)
    bits = dict(zip(again.index.tolist(), again.bits.tolist(), strict=True))
    # Float32, in other batches.
    np.testing.assert_allclose([bits[row] for row in whole.index.tolist()], whole.bits.numpy(), rtol=1e-4)


class Own(nn.Module):
    """torch leaves modules of its own uncompiled where they are called alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.mix(x))


def test_one_graph_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for more shapes than torch allows graphs by itself: none falls back, none is compiled twice."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([tuple(each.shape) for each in inputs if isinstance(each, torch.Tensor)][-1])
        return graph.forward

    network = Own()
    compile_here = network.compile
    monkeypatch.setattr(network, "compile", lambda **options: compile_here(backend=backend, **options))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch._dynamo.reset()
    shapes = [(4 * number, 8) for number in range(1, 11)]
    compile_for(network, len(shapes))
    for height, width in (*shapes, *shapes):
        assert network(torch.randn(2, 1, height, width)).shape == (2, 1, height, width)
    assert len(graphs) == len(shapes)
    torch._dynamo.reset()
