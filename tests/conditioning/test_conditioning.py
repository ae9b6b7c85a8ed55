"""Conditioners against their contract."""

import pytest
import torch

from ornstein.conditioning import ClassLabel, NoConditioning

LABELS = torch.tensor([0, 3, 9, 5])


def test_no_conditioning_is_empty_whatever_the_batch_holds() -> None:
    conditioner = NoConditioning()
    assert conditioner.num_classes is None and conditioner.has_null is False
    assert conditioner.training_cond({"image": torch.zeros(1), "label": LABELS}, generator=None) == {}
    assert conditioner.cond({"label": LABELS, "caption": ["dog"]}) == conditioner.cond({}) == {}
    assert conditioner.null(4, "cpu") == conditioner.null_form(4, "cpu") == {}
    assert conditioner.needs == () and conditioner.concat_channels == 0 and conditioner.text_dim is None


def test_no_conditioning_refuses_what_it_cannot_honour() -> None:
    with pytest.raises(ValueError, match="conditioner=class_label"):
        NoConditioning(num_classes=10)  # type: ignore[arg-type]


def test_cond_keeps_labels_and_null_is_the_index_after_the_last_class() -> None:
    conditioner = ClassLabel(10)
    cond = conditioner.cond({"label": LABELS.to(torch.uint8), "image": torch.zeros(4), "index": LABELS})
    assert cond["label"].dtype == torch.int64 and cond["label"].equal(LABELS)
    null = conditioner.null(3, "cpu")["label"]
    assert null.dtype == torch.int64 and null.tolist() == [10, 10, 10]


def test_training_drops_to_the_null_class_at_the_given_rate_and_nothing_else() -> None:
    count, dropout = 20_000, 0.1
    label = torch.arange(count) % 10
    out = ClassLabel(10, dropout=dropout).training_cond({"label": label}, generator=torch.Generator().manual_seed(0))[
        "label"
    ]
    dropped = out == 10
    assert out[~dropped].equal(label[~dropped])
    # Five standard deviations of a binomial share.
    assert abs(dropped.double().mean().item() - dropout) < 5 * (dropout * (1 - dropout) / count) ** 0.5
    assert label.max() == 9, "the batch itself must be left alone"


def test_the_generator_decides_the_drops() -> None:
    conditioner = ClassLabel(10, dropout=0.5)

    def draw(seed: int) -> torch.Tensor:
        batch = {"label": torch.zeros(64, dtype=torch.int64)}
        return conditioner.training_cond(batch, generator=torch.Generator().manual_seed(seed))["label"]

    assert draw(1).equal(draw(1))
    assert not draw(1).equal(draw(2))


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, LABELS.tolist()), (1.0, [10] * 4)])
def test_the_ends_of_dropout(dropout: float, expected: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    conditioner = ClassLabel(10, dropout=dropout)
    assert conditioner.training_cond({"label": LABELS}, generator=generator)["label"].tolist() == expected
    assert conditioner.has_null is (dropout > 0)


def test_without_dropout_no_null_class_and_no_draw() -> None:
    conditioner = ClassLabel(10, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    conditioner.training_cond({"label": LABELS}, generator=generator)
    assert generator.get_state().equal(before)
    with pytest.raises(ValueError, match=r"conditioner\.dropout=0\.1"):
        conditioner.null(2, "cpu")
    assert conditioner.null_form(2, "cpu")["label"].tolist() == [10, 10]


BAD_LABELS = [
    (torch.tensor([0.0, 1.0]), "whole numbers"),
    (torch.tensor([True, False]), "whole numbers"),
    (torch.tensor([[1, 2]]), r"shape \(B,\)"),
    (torch.tensor([0, 10]), r"in \[0, 9\] for 10 classes"),
    (torch.tensor([-1, 3]), "reach from -1 to 3"),
]


@pytest.mark.parametrize(("labels", "sentence"), BAD_LABELS)
def test_bad_labels_are_refused_in_training_and_in_sampling(labels: torch.Tensor, sentence: str) -> None:
    conditioner = ClassLabel(10)
    with pytest.raises(ValueError, match=sentence):
        conditioner.training_cond({"label": labels}, generator=None)
    with pytest.raises(ValueError, match=sentence):
        conditioner.cond({"label": labels})


def test_missing_labels_are_refused() -> None:
    conditioner = ClassLabel(10)
    with pytest.raises(ValueError, match="no 'label'"):
        conditioner.training_cond({"image": torch.zeros(1)}, generator=None)
    with pytest.raises(ValueError, match="needs a label for every sample"):
        conditioner.cond({})


@pytest.mark.parametrize(
    ("num_classes", "dropout", "sentence"),
    [
        (None, 0.1, "unlabelled|no classes|has none"),
        (0, 0.1, "at least 1"),
        (10, 1.5, "probability"),
        (10, -0.1, "probability"),
    ],
)
def test_bad_settings_are_refused(num_classes: int | None, dropout: float, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ClassLabel(num_classes, dropout=dropout)
