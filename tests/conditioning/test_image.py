"""The image conditioner, its masks, and several conditioners at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ornstein.conditioning import ClassLabel, Compose, Image, Text, image_channels
from ornstein.conditioning.masks import KINDS, NUMBERS, hidden

SIZE = 16
IMAGES = torch.randint(0, 256, (6, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
GIVEN = {"image": IMAGES, "index": torch.arange(6), "seed": 3}
X = IMAGES / 127.5 - 1


def image(source: str = "low_resolution", **options) -> Image:
    return Image(source, **({"channels": 3, "size": SIZE, "image_size": SIZE} | options))


def test_low_resolution_keeps_block_means_and_nothing_finer():
    cond = image(factor=4).cond(GIVEN)["concat"]
    assert cond.shape == (6, 3, SIZE, SIZE)
    means = X.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
    torch.testing.assert_close(cond, functional.interpolate(means, scale_factor=4, mode="bilinear"))
    other = IMAGES.clone()
    other[:, :, 0, 0], other[:, :, 1, 1] = IMAGES[:, :, 1, 1], IMAGES[:, :, 0, 0]
    torch.testing.assert_close(image(factor=4).cond({"image": other})["concat"], cond)


def test_grey_is_the_luma():
    grey = image("grey").cond(GIVEN)["concat"]
    assert grey.shape == (6, 1, SIZE, SIZE)
    torch.testing.assert_close(grey[:, 0], 0.299 * X[:, 0] + 0.587 * X[:, 1] + 0.114 * X[:, 2])


def test_condition_is_what_the_data_carry():
    depth = IMAGES[:, :1]
    conditioner = image("condition", condition_channels=1)
    assert conditioner.needs == ("condition",)
    torch.testing.assert_close(conditioner.cond({"condition": depth})["concat"], X[:, :1])


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_what_a_mask_hides_is_zero_and_flagged_and_the_rest_is_the_image(kind):
    cond = image("mask", mask=kind).cond(GIVEN)["concat"]
    kept, flag = cond[:, :3], cond[:, 3:]
    assert set(flag.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(kept, X * (1 - flag))
    assert len({row.numpy().tobytes() for row in flag}) > 1


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
@pytest.mark.parametrize("size", [(8, 8), (32, 24)])
def test_masks_hide_something_and_never_all(kind, size):
    u = torch.rand(2000, NUMBERS, generator=torch.Generator().manual_seed(1))
    share = hidden(u, size, kind=kind).flatten(1).mean(1)
    assert share.min() > 0 and share.max() < 1
    if kind == "half":
        assert share.eq(0.5).all()
    if kind == "box":  # sides of 30 to 70 %, rounded to whole pixels
        assert share.min() >= (0.3 - 1 / size[0]) * (0.3 - 1 / size[1]) and share.max() <= (0.7 + 1 / min(size)) ** 2


def test_all_four_halves_and_all_three_kinds_turn_up():
    u = torch.rand(400, NUMBERS, generator=torch.Generator().manual_seed(1))
    assert len({mask.numpy().tobytes() for mask in hidden(u, (8, 8), kind="half")}) == 4
    mixed = hidden(u, (8, 8))
    for number, kind in enumerate(KINDS):
        chosen = (u[:, 0] * 3).long() == number
        assert chosen.any() and mixed[chosen].equal(hidden(u[chosen], (8, 8), kind=kind))


def test_a_sampling_mask_depends_on_seed_and_number_alone():
    conditioner = image("mask")
    whole = conditioner.cond(GIVEN)["concat"]
    rows = [4, 1]
    part = conditioner.cond({"image": IMAGES[rows], "index": torch.tensor(rows), "seed": 3})["concat"]
    assert part.equal(whole[rows])
    assert not conditioner.cond({**GIVEN, "seed": 4})["concat"].equal(whole)


def test_training_masks_come_from_the_generator_anew_each_time():
    conditioner = image("mask", dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    first, second = (conditioner.training_cond(GIVEN, generator=generator)["concat"] for _ in range(2))
    assert not first.equal(second)
    assert conditioner.training_cond(GIVEN, generator=torch.Generator().manual_seed(0))["concat"].equal(first)


def test_dropout_and_null_form_are_zeros():
    conditioner = image("grey", dropout=0.5)
    batch = {"image": IMAGES.repeat(200, 1, 1, 1)}
    out = conditioner.training_cond(batch, generator=torch.Generator().manual_seed(0))["concat"]
    dropped = (out == 0).flatten(1).all(1)
    assert 0.4 < dropped.double().mean() < 0.6
    assert out[~dropped].equal(conditioner.cond(batch)["concat"][~dropped])
    assert conditioner.null(2, "cpu")["concat"].equal(torch.zeros(2, 1, SIZE, SIZE))
    assert not image(dropout=0.0).has_null
    with pytest.raises(ValueError, match=r"conditioner\.dropout"):
        image(dropout=0.0).null(2, "cpu")


@pytest.mark.parametrize("source", ["low_resolution", "mask", "grey"])
def test_latents_get_the_condition_at_their_own_resolution_by_area(source):
    pixels = image(source).cond(GIVEN)["concat"]
    latents = image(source, size=4).cond(GIVEN)["concat"]
    torch.testing.assert_close(latents, functional.avg_pool2d(pixels, 4))


def test_pictures_show_the_image_without_its_flags():
    for source, channels in (("low_resolution", 3), ("mask", 3), ("grey", 1)):
        conditioner = image(source)
        shown = conditioner.pictures(conditioner.cond(GIVEN))
        assert shown.dtype == torch.uint8 and shown.shape == (6, channels, SIZE, SIZE)
    whole = image("condition", condition_channels=3)
    assert whole.pictures(whole.cond({"condition": IMAGES})).equal(IMAGES)


REFUSED = [
    ({"source": "depth"}, "conditioner.source=depth low_resolution condition"),
    ({"source": "condition"}, "data.condition_root=FOLDER"),
    ({"source": "grey", "channels": 1}, "data.channels=1 low_resolution"),
    ({"mask": "round"}, "conditioner.mask=round half mixed"),
    ({"factor": 1}, "conditioner.factor=1 at least 2"),
    ({"factor": 5}, "conditioner.factor=5 data.image_size=16"),
    ({"concat_channels": 7}, "conditioner.concat_channels=7 3"),
    ({"dropout": -1}, "conditioner.dropout [0, 1]"),
    ({"num_classes": 3}, "class_image"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError) as caught:
        image(**options)
    assert [word for word in words.split() if word not in str(caught.value)] == []


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="no 'image'"):
        image().cond({"label": torch.zeros(2)})
    with pytest.raises(ValueError, match="no 'index'"):
        image("mask").cond({"image": IMAGES})
    with pytest.raises(ValueError, match="3 channels"):
        image().cond({"image": IMAGES[:, :1]})
    with pytest.raises(ValueError, match=r"no 'condition'.*condition_root"):
        image("condition", condition_channels=1).training_cond({"image": IMAGES}, generator=None)


@pytest.mark.parametrize(("source", "expected"), [("low_resolution", 3), ("mask", 4), ("grey", 1), ("condition", 2)])
def test_channels_by_source(source, expected):
    assert image_channels(source, 3, 2) == expected


# ---- several at once


def both(*, dropout: float = 0.0, label: float = 0.1, of_image: float = 0.0) -> Compose:
    parts = {"label": ClassLabel(5, dropout=label), "image": image(dropout=of_image)}
    return Compose(parts, dropout=dropout, num_classes=5, concat_channels=3)


BATCH = {**GIVEN, "label": torch.arange(6) % 5}


def test_a_composition_gives_the_parts_tensors_and_facts():
    conditioner = both()
    assert (conditioner.num_classes, conditioner.concat_channels, conditioner.text_dim) == (5, 3, None)
    assert conditioner.needs == ("label", "image")
    cond = conditioner.cond(BATCH)
    assert cond["label"].equal(BATCH["label"]) and cond["concat"].equal(image().cond(GIVEN)["concat"])
    assert conditioner.pictures(cond).equal(image().pictures(cond))
    assert not list(conditioner.state_dict())


def test_a_part_that_is_never_dropped_has_no_null_form_and_stays():
    assert set(both().null(2, "cpu")) == {"label"}
    assert set(both(of_image=0.1).null(2, "cpu")) == {"label", "concat"}
    assert set(both(label=0.0, dropout=0.1).null(2, "cpu")) == {"label", "concat"}
    assert not both(label=0.0).has_null
    with pytest.raises(ValueError, match=r"conditioner\.dropout"):
        both(label=0.0).null(2, "cpu")


@pytest.mark.parametrize(
    ("options", "alone", "together"),
    # Shares of samples that lose their class alone, and both.
    [
        ({"label": 0.5, "of_image": 0.5}, 0.25, 0.25),
        ({"label": 0.0, "dropout": 0.5}, 0.0, 0.5),
        ({"label": 0.5}, 0.5, 0.0),
    ],
)
def test_independent_and_joint_dropout(options, alone, together):
    count = 4000
    batch = {"image": IMAGES[:1].expand(count, -1, -1, -1), "label": torch.ones(count, dtype=torch.int64)}
    out = both(**options).training_cond(batch, generator=torch.Generator().manual_seed(0))
    no_label, no_image = out["label"] == 5, (out["concat"] == 0).flatten(1).all(1)
    # Five standard deviations of a share of 4000.
    assert abs((no_label & ~no_image).double().mean() - alone) < 0.035
    assert abs((no_label & no_image).double().mean() - together) < 0.04


def test_class_and_caption_together(encoders, tmp_path):
    text = Text(str(encoders("bert")), text_dim=24, pooled_dim=24, max_length=8, cache=tmp_path)
    conditioner = Compose({"a": ClassLabel(3), "b": text}, num_classes=3, text_dim=24, pooled_dim=24)
    conditioner.prepare(["dog"])
    cond = conditioner.cond({"label": torch.tensor([1, 2]), "caption": ["dog", "cat"]})
    assert set(cond) == {"label", "text", "text_mask", "pooled"}
    assert cond.keys() == conditioner.null(2, "cpu").keys()
    assert conditioner.pictures(cond) is None


def test_bad_compositions_are_refused():
    with pytest.raises(ValueError, match="parts is empty"):
        Compose({})
    with pytest.raises(ValueError, match=r"num_classes=4.*5"):
        Compose({"label": ClassLabel(5)}, num_classes=4)
    with pytest.raises(ValueError, match=r"two of conditioner\.parts give num_classes"):
        Compose({"a": ClassLabel(5), "b": ClassLabel(5)}, num_classes=5)
    with pytest.raises(ValueError, match="concat_channels=0"):
        Compose({"image": image()})
