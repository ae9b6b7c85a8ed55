"""Power-function averages: by hand, by the integral, resumed, and mixed into other lengths after training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ornstein.errors import OrnsteinError
from ornstein.training.posthoc import (
    gamma_of,
    inner_product,
    mixture,
    power_decay,
    reconstruct,
    snapshot_name,
    snapshots_of,
)
from ornstein.training.power_ema import PowerEMA

from .test_ema import Witness


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_lengths_have_the_published_exponents(std, gamma):
    assert gamma_of(std) == pytest.approx(gamma, abs=0.005), "two decimals are published"


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_the_length_is_the_standard_deviation_of_the_profile(std):
    gamma = gamma_of(std)
    t = (np.arange(200_000) + 0.5) / 200_000
    weight = (gamma + 1) * t**gamma / len(t)
    mean = (weight * t).sum()
    # The midpoint rule's error at this many points is below 1e-8.
    assert weight.sum() == pytest.approx(1, abs=1e-6)
    assert np.sqrt((weight * (t - mean) ** 2).sum()) == pytest.approx(std, rel=1e-5)


@pytest.mark.parametrize("std", [0, -0.1, 0.3, float("nan")])
def test_lengths_out_of_range_are_refused(std):
    with pytest.raises(OrnsteinError, match="std="):
        gamma_of(std)


def test_inner_products_are_the_integrals():
    t, gamma = np.array([300.0, 1000.0]), np.array([gamma_of(0.05), gamma_of(0.15)])
    found = inner_product(t[:, None], gamma[:, None], t_b=t[None], gamma_b=gamma[None])
    tau = np.arange(1_000_000) / 1000 + 0.0005
    profiles = np.where(tau < t[:, None], (gamma[:, None] + 1) * (tau / t[:, None]) ** gamma[:, None] / t[:, None], 0)
    np.testing.assert_allclose(found, profiles @ profiles.T / 1000, rtol=1e-4)  # the midpoint rule over a jump at 300


def walk(updates: int, stds, *, every: int) -> tuple[np.ndarray, dict]:
    """A random walk of weights, and its averages after every so many updates, by the recursion."""
    weights = np.cumsum(np.random.default_rng(0).standard_normal((updates, 8)), axis=0) / np.sqrt(updates)
    kept = {}
    for std in stds:
        average = np.zeros(8)
        for t in range(1, updates + 1):
            rate = power_decay(t, gamma_of(std))
            average = rate * average + (1 - rate) * weights[t - 1]
            if t % every == 0:
                kept[t, std] = average
    return weights, kept


@pytest.mark.parametrize(("std", "tolerance"), [(0.05, 1e-9), (0.1, 1e-9), (0.07, 2e-3), (0.15, 5e-3), (0.03, 2e-2)])
def test_other_lengths_are_made_of_two(std, tolerance):
    """A length that was kept comes back to rounding; others to the residual of their profile, which the mixture tells
    (times the walk's spread, of order 1)."""
    _, kept = walk(1000, (0.05, 0.1), every=50)
    found = mixture([t for t, _ in kept], [s for _, s in kept], target_updates=1000, target_std=std)
    _, truth = walk(1000, (std,), every=1000)
    mixed = sum(weight * kept[key] for weight, key in zip(found.weights, kept, strict=True))
    assert np.abs(mixed - truth[1000, std]).max() < tolerance
    assert found.residual < max(tolerance * 20, 1e-6) and found.weights.sum() == pytest.approx(1, abs=1e-3)


def write(folder, updates=400, every=50, stds=(0.05, 0.1)):
    _, kept = walk(updates, stds, every=every)
    (folder / "ema").mkdir(parents=True)
    for (t, std), value in kept.items():
        facts = {"step": str(t), "updates": str(t), "std": str(std)}
        save_file(
            {"network.w": torch.from_numpy(value).float()}, folder / "ema" / snapshot_name(t, std), metadata=facts
        )
    return kept


def test_snapshots_on_disk(tmp_path):
    kept = write(tmp_path)
    snapshots = snapshots_of(tmp_path)
    assert len(snapshots) == 16
    for step in (200, None):
        found = reconstruct(snapshots, 0.1, step=step)["network.w"]
        # float32 files, mixed in float64: a rounding of values of order 1
        np.testing.assert_allclose(found.numpy(), kept[step or 400, 0.1], atol=1e-6)
    with pytest.raises(OrnsteinError, match="step=70 has no snapshot: choose one of 50, 100"):
        reconstruct(snapshots, 0.1, step=70)
    with pytest.raises(OrnsteinError, match=r"std=0.005 cannot be made of 16 snapshots of std=0.05, 0.1"):
        reconstruct(snapshots, 0.005)
    damaged = snapshots[0].path
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(OrnsteinError, match="cut short or damaged"):
        snapshots_of(tmp_path)
    with pytest.raises(OrnsteinError, match="train with ema=power"):
        snapshots_of(tmp_path / "other")


def test_the_callback_averages_by_the_recursion_and_writes_what_it_averaged(fit, tmp_path):
    witness = Witness()
    ema = PowerEMA(tmp_path, stds=(0.1, 0.2), snapshot_every=2)
    trainer = fit([witness, ema], steps=5)
    names = sorted(path.name for path in (tmp_path / "ema").iterdir())
    assert names == [snapshot_name(step, std) for step in (2, 4, 5) for std in (0.1, 0.2)]
    for std in (0.1, 0.2):
        average = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in witness.initial.items()}
        for t, weights in enumerate(witness.weights, start=1):
            rate = power_decay(t, gamma_of(std))
            average = {name: rate * average[name] + (1 - rate) * weights[name].double() for name in average}
        found = reconstruct(snapshots_of(tmp_path), std)
        for name, value in average.items():
            # float32 lerps against float64: a few roundings of 6e-8 of values below 1
            torch.testing.assert_close(found[f"network.{name}"].double(), value, atol=1e-6, rtol=0)
        if std == 0.1:
            own = trainer.lightning_module.evaluation_network().state_dict()
            assert all(torch.allclose(own[name].double(), value, atol=1e-6) for name, value in average.items())


@pytest.mark.parametrize("stds", [(0.1,), (0.1, 0.1), (0.1, 0.4), (0.0, 0.1)])
def test_lengths_that_make_no_family_are_refused(stds, tmp_path):
    with pytest.raises(OrnsteinError, match=r"ema\.stds=.* two different numbers"):
        PowerEMA(tmp_path, stds=stds)
