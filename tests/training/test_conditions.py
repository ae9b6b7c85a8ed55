"""What samples are conditioned on: asked for, or from held-out data; and that it is drawn, shown and scored so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ornstein.conditioning import ClassLabel, Compose, Conditioner, Image
from ornstein.data import DataModule, ImageDataset
from ornstein.diffusion.guidance import ClassifierFree, NoGuidance
from ornstein.metrics.paired import psnr
from ornstein.training.callbacks import SampleGrid
from ornstein.training.condition_pictures import short_labels
from ornstein.training.conditions import Conditions, mirrored
from ornstein.training.estimate import forward_flops, measure_cost
from ornstein.training.likelihood import held_out_likelihood
from ornstein.training.scoring import draw_into, label_protocol

CPU = torch.device("cpu")
COLOURS = ["red", "green", "blue"]
SIZE, COUNT = 4, 24


class Words(Conditioner):
    """A caption as its length, which is as good as an embedding here."""

    needs = ("caption",)
    has_null = True
    pooled_dim = 1
    prepared: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.prepared = []

    def training_cond(self, batch: Mapping[str, Any], *, generator: torch.Generator | None) -> dict[str, Tensor]:
        return self.cond(batch)

    def cond(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"pooled": torch.tensor([[float(len(caption))] for caption in given["caption"]])}

    def null_form(self, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
        return {"pooled": torch.zeros(batch_size, 1)}

    def prepare(self, captions: Any, *, device: torch.device | str = "cpu") -> None:
        self.prepared += captions


class Network(nn.Module):
    """Adds whatever it is conditioned on to a small convolution."""

    def __init__(self, channels: int = 0) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1 + channels, 1, 3, padding=1)
        self.gain = nn.Parameter(torch.tensor(0.1))

    def forward(
        self,
        x: Tensor,
        noise_cond: Tensor,
        label: Tensor | None = None,
        pooled: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        out = self.mix(x if concat is None else torch.cat([x, concat], dim=1))
        for each in (label, pooled):
            out = out if each is None else out + self.gain * each.float().reshape(-1, 1, 1, 1)
        return out


def dataset(*, split: str = "val", labels: bool = True, conditions: bool = True) -> ImageDataset:
    generator = np.random.default_rng(0 if split == "train" else 1)
    images, maps = (generator.integers(0, 256, (COUNT, 1, SIZE, SIZE)).astype(np.uint8) for _ in range(2))
    classes = np.arange(COUNT) * 7 % 3
    return ImageDataset(
        images,
        name="tiny",
        split=split,  # type: ignore[arg-type]
        labels=classes if labels else None,
        class_names=COLOURS,
        captions=[f"{COLOURS[label]} {'x' * row}" for row, label in enumerate(classes)],
        conditions=maps if conditions else None,
    )


HELD_OUT = dataset()
NEVER: Any = lambda: pytest.fail("no data are needed")  # noqa: E731


def image_conditioner(**options: Any) -> Image:
    return Image(**({"source": "low_resolution", "channels": 1, "size": SIZE, "factor": 2} | options))


def test_open_captions_are_those_of_held_out_images_by_number_with_their_labels() -> None:
    indices = [3, COUNT + 3, 50, 0]
    given = Conditions(Words(), indices, held_out=lambda: HELD_OUT).batch(0, 3, device=CPU)
    rows = [index % COUNT for index in indices[:3]]
    assert given.captions == given.values["caption"] == [HELD_OUT.captions[row] for row in rows]
    assert given.labels.tolist() == HELD_OUT.labels[rows].tolist()
    assert given.values["index"].tolist() == indices[:3] and given.values["seed"] == 0


def test_open_images_and_conditions_likewise() -> None:
    batch = HELD_OUT.batch([5, 6])
    for source, key in (("low_resolution", "image"), ("condition", "condition")):
        conditioner = image_conditioner(source=source, condition_channels=1)
        given = Conditions(conditioner, range(5, 9), held_out=lambda: HELD_OUT).batch(0, 2, device=CPU)
        assert given.values[key].equal(batch[key]) and given.labels.equal(batch["label"])


def test_what_is_asked_for_needs_no_data() -> None:
    asked = Conditions(Words(), range(4), prompts=["a", "b", "c", "d"], held_out=NEVER)
    given = asked.batch(1, 3, device=CPU)
    assert given.captions == ["b", "c"] and given.labels is None
    labels = Conditions(ClassLabel(3), [4, 5], held_out=NEVER).batch(0, 2, device=CPU)
    assert labels.labels.tolist() == [1, 2] and "caption" not in labels.values
    pictures = torch.zeros(2, 1, SIZE, SIZE, dtype=torch.uint8)
    both = Compose({"a": ClassLabel(3), "b": image_conditioner()}, num_classes=3, concat_channels=1)
    given = Conditions(both, range(2), images=pictures, held_out=NEVER).batch(0, 2, device=CPU)
    assert given.labels.tolist() == [0, 1] and given.values["image"].equal(pictures)


def test_labels_choose_among_held_out_images_of_their_class() -> None:
    both = Compose({"a": ClassLabel(3), "b": image_conditioner()}, num_classes=3, concat_channels=1)
    given = Conditions(both, range(30, 36), labels=[2] * 6, held_out=lambda: HELD_OUT).batch(0, 6, device=CPU)
    rows = np.flatnonzero(HELD_OUT.labels == 2)[[30 % 8, 31 % 8, 32 % 8, 33 % 8, 34 % 8, 35 % 8]]
    assert given.values["image"].equal(HELD_OUT.batch(rows)["image"]) and given.labels.tolist() == [2] * 6


def test_what_nobody_gives_is_refused() -> None:
    with pytest.raises(ValueError, match=r"conditioned on a caption for every sample.*give prompts"):
        Conditions(Words(), range(2))
    both = Compose({"a": ClassLabel(3), "b": Words()}, num_classes=3, pooled_dim=1)
    with pytest.raises(ValueError, match="prompts alone name no class"):
        Conditions(both, range(2), prompts=["a", "b"], held_out=lambda: HELD_OUT)


@pytest.fixture
def module(make_module):
    def make(conditioner: Conditioner | None = None, **options: Any):
        conditioner = Words() if conditioner is None else conditioner
        made = make_module(conditioner=conditioner, network=Network(conditioner.concat_channels), **options)
        made.held_out = lambda: HELD_OUT
        return made

    return make


@pytest.mark.parametrize("kind", ["caption", "image", "mask"])
def test_a_sample_depends_on_seed_number_and_its_condition_alone(module, kind) -> None:
    made = module(
        None if kind == "caption" else image_conditioner(source="mask" if kind == "mask" else "low_resolution")
    )
    whole = torch.cat([batch.images for batch in made.generate(range(COUNT + 6), seed=2, batch_size=7)])
    (one,) = made.generate([COUNT + 2], seed=2)
    (some,) = made.generate([9, 4], seed=2)
    # Convolutions sum in another order for another batch size: at most one of 256 levels.
    for got, expected in ((one.images, whole[[COUNT + 2]]), (some.images, whole[[9, 4]])):
        assert (got.int() - expected.int()).abs().max() <= 1
    if kind == "caption":
        (asked,) = made.generate([9, 4], prompts=[HELD_OUT.captions[9], HELD_OUT.captions[4]], seed=2)
        assert asked.images.equal(some.images) and asked.captions == some.captions
        (other,) = made.generate([9, 4], prompts=["", ""], seed=2)
        assert not other.images.equal(some.images)
    else:
        assert one.conditions.shape == (1, 1, SIZE, SIZE)
        (asked,) = made.generate([9, 4], images=HELD_OUT.batch([9, 4])["image"], seed=2)
        assert asked.images.equal(some.images)


class Seen(NoGuidance):
    nulls: list[Any] = []  # noqa: RUF012

    def __call__(self, denoiser: Any, null: Any) -> Any:
        self.nulls.append((dict(denoiser.cond), dict(null)))
        return denoiser


def test_guidance_gets_the_null_form_or_the_negative_prompts(module) -> None:
    made, guidance = module(), Seen()
    list(made.generate(range(2), guidance=guidance))
    list(made.generate(range(2), guidance=guidance, negative_prompt="four"))
    (_, null), (_, negative) = guidance.nulls
    assert null["pooled"].tolist() == [[0.0], [0.0]] and negative["pooled"].tolist() == [[4.0], [4.0]]
    guidance.nulls.clear()
    both = Compose({"a": ClassLabel(3), "b": image_conditioner(dropout=0.0)}, num_classes=3, concat_channels=1)
    list(module(both).generate(range(2), guidance=guidance))
    ((cond, null),) = guidance.nulls
    assert null["concat"].equal(cond["concat"]) and null["label"].tolist() == [3, 3]


def test_guidance_by_captions_changes_samples_and_costs_two_evaluations(module) -> None:
    (plain,) = module().generate(range(3))
    (guided,) = module().generate(range(3), guidance=ClassifierFree(scale=3.0))
    assert guided.nfe == 2 * plain.nfe and not guided.images.equal(plain.images)


def test_conditions_are_mirrored_with_their_images() -> None:
    batch = HELD_OUT.batch(range(4))
    flip = torch.tensor([True, False, True, False])
    seen = mirrored(batch, flip, image_conditioner())
    assert seen["image"][0].equal(batch["image"][0].flip(-1)) and seen["image"][1].equal(batch["image"][1])
    assert seen["condition"] is batch["condition"], "what nobody looks at is left alone"
    assert mirrored(batch, None, image_conditioner()) is batch and mirrored(batch, flip, ClassLabel(3)) is batch


def test_training_mirrors_image_and_condition_alike(module) -> None:
    """Mirrored data under the same draws: every view's loss is that of the other, up to the kernel's own handedness."""
    made = module(image_conditioner(dropout=0.0), flip=True)
    seen: list[tuple[Tensor, Tensor]] = []
    forward = made.objective.forward
    made.objective.forward = lambda denoiser, x0, cond, noise: (  # type: ignore[method-assign]
        seen.append((x0, cond["concat"])) or forward(denoiser, x0, cond, noise)
    )
    batch = HELD_OUT.batch(range(16))
    made.training_step(batch, 0)
    x0, concat = seen[0]
    conditioner = made.conditioner
    expected = conditioner.cond({"image": x0.add(1).mul(127.5).round().to(torch.uint8)})["concat"]
    torch.testing.assert_close(concat, expected)
    assert not x0.equal(batch["image"] / 127.5 - 1), "some were mirrored"


def test_costs_and_likelihood_of_conditioned_models(module) -> None:
    for conditioner in (Words(), image_conditioner(), ClassLabel(3)):
        made = module(conditioner)
        assert forward_flops(made) > 0
        assert measure_cost(made, HELD_OUT.batch(range(4))).step_seconds > 0
        from ornstein.diffusion.variational_bound import VariationalBound

        bits = held_out_likelihood(made, HELD_OUT, VariationalBound(steps=4), num_images=3)
        assert bits.bits.isfinite().all()


class Metrics:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.captions: list[str] = []
        self.labels: list[int] = []

    def update(self, images: Tensor, labels: Tensor | None, *, captions: Any, index: Any = None) -> None:
        self.captions += captions or []
        self.labels += [] if labels is None else labels.tolist()


def test_scores_get_the_captions_and_labels_that_samples_were_given(module) -> None:
    metrics: Any = Metrics()
    draw_into(metrics, module(), range(COUNT + 2), dataset=dataset(split="train"), batch_size=10)
    assert metrics.captions == [*HELD_OUT.captions, *HELD_OUT.captions[:2]]
    assert metrics.labels == [*HELD_OUT.labels, *HELD_OUT.labels[:2]]
    metrics = Metrics()
    draw_into(metrics, module(), range(2), dataset=HELD_OUT, prompts=["a", "b"])
    assert metrics.captions == ["a", "b"] and metrics.labels == []


@pytest.mark.parametrize("source", ["low_resolution", "mask", "condition"])
def test_restored_images_are_scored_beside_those_that_they_should_be(module, source) -> None:
    made = module(image_conditioner(source=source, condition_channels=1))
    metrics: Any = Metrics()
    metrics.names_clip = False
    taken: list[Any] = []
    drawn = draw_into(metrics, made, range(COUNT + 2), dataset=HELD_OUT, batch_size=10, take=taken.append)
    rows = [*range(COUNT), 0, 1]
    assert torch.cat([batch.originals for batch in taken]).equal(HELD_OUT.batch(rows)["image"])
    expected = psnr(torch.cat([batch.images for batch in taken]), HELD_OUT.batch(rows)["image"]).mean()
    assert drawn.paired == {"psnr": pytest.approx(float(expected))}  # too small for SSIM and LPIPS
    # A user's own pictures of another size than the samples have no pixels to compare.
    pictures = torch.zeros(2, 1, 2 * SIZE, 2 * SIZE, dtype=torch.uint8)
    if source == "low_resolution":
        assert draw_into(metrics, made, range(2), dataset=HELD_OUT, images=pictures).paired == {}


def test_samples_of_words_have_nothing_to_be_compared_with(module) -> None:
    metrics: Any = Metrics()
    drawn = draw_into(metrics, module(), range(2), dataset=HELD_OUT)
    assert drawn.paired == {} and next(iter(module().generate(range(2)))).originals is None


@pytest.mark.parametrize(
    ("conditioner", "given", "expected"),
    [(Words(), False, "held_out"), (Words(), True, "given"), (ClassLabel(3), False, "balanced")],
)
def test_a_report_says_how_conditions_were_chosen(module, conditioner, given, expected) -> None:
    assert label_protocol(module(conditioner), given=given) == expected


def test_row_labels_leave_out_what_all_captions_begin_with() -> None:
    assert short_labels(["a digit one", "a digit two"]) == ["one", "two"]
    assert short_labels(["a dog", "a dog"]) == ["a dog", "a dog"] and short_labels(["a dog"]) == ["a dog"]
    assert short_labels(["x" * 99, ""])[0] == "x" * 27 + "…" and short_labels([]) == []


def make_data() -> DataModule:
    return DataModule(dataset, batch_size=4, num_classes=3, class_names=COLOURS)


def test_a_grid_has_a_row_a_caption_and_the_captions_beside_it(fit, module, tmp_path: Path) -> None:
    made = module()
    grid = SampleGrid(tmp_path, every=None, samples_per_class=2, max_classes=3)
    fit([grid], steps=1, module=made, data=make_data())
    lines = (tmp_path / "samples" / "step_000001.txt").read_text().splitlines()
    expected = [f"{row + column * COUNT:06d}\t{HELD_OUT.captions[row]}" for row in range(3) for column in range(2)]
    assert lines == expected
    assert (tmp_path / "samples" / "step_000001.png").is_file()
    assert set(made.conditioner.prepared) == set(HELD_OUT.captions)


def test_a_grid_shows_what_each_row_was_given(fit, module, tmp_path: Path, monkeypatch) -> None:
    tiles: list[Tensor] = []
    from ornstein.training.callbacks import sample_grid

    real = sample_grid.image_grid
    monkeypatch.setattr(
        sample_grid,
        "image_grid",
        lambda images, columns, **options: tiles.append(images) or real(images, columns, **options),
    )
    conditioner = image_conditioner(dropout=0.0)
    fit([SampleGrid(tmp_path, every=None, num_samples=5)], steps=1, module=module(conditioner), data=make_data())
    (grid,) = tiles
    assert len(grid) == 12  # five samples in rows of three, filled up, each row below the row of its conditions
    shown = conditioner.pictures(conditioner.cond(HELD_OUT.batch(range(5))))
    assert grid[[0, 1, 2, 6, 7]].equal(shown) and not grid[[8, 11]].any()
