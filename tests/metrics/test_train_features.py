from dataclasses import replace

import pytest
import torch

from ornstein.metrics import train_features
from ornstein.metrics.classifier import load_classifier
from ornstein.metrics.train_features import RECIPES, arrays, augment, fit, main, open_data, predict, standardise

SHORT = replace(RECIPES["digits"], epochs=6, sizes=())


def test_a_short_training_learns_and_repeats_itself():
    x, y = (part[:700] for part in arrays(open_data("digits", "train"), 8))
    state = torch.get_rng_state()
    first, second = (fit(x, y, SHORT, seed=3, verbose=False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert (predict(first, x)[1].argmax(1) == y).float().mean() > 0.9  # chance is 0.1; the full recipe reaches 0.997
    other = fit(x, y, replace(SHORT, epochs=1), seed=4, verbose=False)
    assert not torch.equal(other.neck.weight, fit(x, y, replace(SHORT, epochs=1), seed=5, verbose=False).neck.weight)
    standardise(first, x)
    assert float(predict(first, x)[0].double().var(0).sum()) == pytest.approx(64, rel=1e-3)  # float32 features


def test_augmentation_moves_by_what_the_recipe_says():
    x = torch.full((64, 1, 8, 8), -1.0)
    x[:, :, 3:5, 3:5] = 1.0
    generator = torch.Generator().manual_seed(0)
    moved = augment(x, SHORT, generator=generator)
    assert moved.shape == x.shape and moved.min() >= -1.001 and moved.max() <= 1.001
    still = augment(x, replace(SHORT, rotate=0, zoom=0, shift=0), generator=generator)
    torch.testing.assert_close(still, x, rtol=0, atol=1e-5)
    weights = (moved + 1).flatten(1)
    columns = torch.arange(8.0).repeat(8)
    shift = (weights * columns).sum(1) / weights.sum(1) - 3.5
    assert 0.3 < shift.abs().max() <= 0.8  # up to 0.7 pixels, and bilinear weights
    edge = replace(SHORT, rotate=0, zoom=0, shift=0, flip=True)
    x[:, :, :, :4] = 0.5
    flipped = augment(x, edge, generator=generator)
    mirrored = [torch.allclose(one, two.flip(-1), atol=1e-5) for one, two in zip(flipped, x, strict=True)]
    assert 10 < sum(mirrored) < 54  # a fair coin


def test_the_command_writes_a_file_that_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train_features.RECIPES, "digits", replace(SHORT, epochs=1))
    main(["--data", "digits", "--seed", "5", "--out", str(tmp_path / "new.safetensors")])
    net, metadata = load_classifier(tmp_path / "new.safetensors")
    assert metadata["seed"] == 5 and metadata["held_out"] == 359 and not net.training
    assert f"{metadata['correct']} of 359 held-out images right" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [tmp_path / "new.safetensors"]
