"""The loss-adaptive time density: unbiased, with a history that is the published one, kept, shared and left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.densities import AdaptiveTimeDensity, LossAdaptiveTime, UniformTime
from ornstein.diffusion.objectives import Objective, TrainingNoise
from ornstein.diffusion.parameterizations import V
from ornstein.diffusion.schedules import Cosine

CPU = torch.device("cpu")


def training_noise(seed: int = 0) -> TrainingNoise:
    return TrainingNoise(torch.Generator().manual_seed(seed))


def steep(t: Tensor) -> Tensor:
    """A loss that one end dominates, as the bound's is."""
    return 1e-3 / (t + 1e-3) + 0.01


def adapted(**options) -> LossAdaptiveTime:
    density = LossAdaptiveTime(bins=20, **options)
    for seed in range(40):
        t = density.draw(64, Cosine(), training_noise(seed), CPU)
        density.update(t, steep(t))
    assert density.probabilities().max() > 0.15  # three times the uniform one
    return density


def test_expectation_is_that_of_uniform_times() -> None:
    density = adapted(t_min=0.01)
    t = density.draw(100_000, Cosine(), training_noise(99), CPU)
    assert float(t.min()) >= 0.01 and float(t.max()) <= 1
    fine = torch.linspace(0.01, 1, 100_001)
    for f in (steep, torch.cos, lambda t: (t > 0.7).float()):
        # Stratified draws: each stratum's error is below 1/100,000 of the total variation of f/q, here about 100.
        assert float((density.importance(t) * f(t)).mean()) == pytest.approx(float(f(fine).mean()), rel=5e-3)
    assert float(density.importance(t).double().mean()) == pytest.approx(1, rel=1e-3)


def test_it_draws_where_the_loss_is_and_lowers_its_spread() -> None:
    def spread(density) -> float:
        t = [density.draw(64, Cosine(), training_noise(seed), CPU) for seed in range(200)]
        weigh = density.importance if isinstance(density, LossAdaptiveTime) else torch.ones_like
        return float(torch.stack([(weigh(x) * steep(x)).mean() for x in t]).std())

    assert spread(adapted(low_discrepancy=False)) < 0.6 * spread(UniformTime(low_discrepancy=False))


def test_probabilities_are_the_published_ones() -> None:
    # Nichol & Dhariwal 2021, eq. 18, with the last 10 losses of each bin, one by one.
    density, kept = LossAdaptiveTime(bins=5, history=10, t_min=0.0), [[] for _ in range(5)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        t = torch.rand(37, generator=generator)
        losses = torch.rand(37, generator=generator) * (1 + 10 * t)
        for time, loss in zip(t.tolist(), losses.tolist(), strict=True):
            history = kept[min(int(time * 5), 4)]
            history.append(loss)
            del history[:-10]
        full = bool((density.counts >= 10).all())
        uniform = torch.full((5,), 0.2, dtype=torch.float64)
        assert full or torch.equal(density.probabilities(), uniform)
        density.update(t, losses)
    for b in range(5):
        torch.testing.assert_close(density.losses[b].sort().values, torch.tensor(kept[b]).sort().values)
    size = torch.tensor([sum(x * x for x in history) / 10 for history in kept], dtype=torch.float64).sqrt()
    expected = 0.999 * size / size.sum() + 0.001 / 5
    torch.testing.assert_close(density.probabilities(), expected, rtol=1e-6, atol=0)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        return self.factor * x


def run(objective: Objective, network: nn.Module, seed: int = 0):
    x0 = torch.linspace(-1, 1, 256).reshape(64, 1, 2, 2)
    return objective(Denoiser(network, Cosine(), V()), x0, {}, training_noise(seed))


def test_history_is_part_of_the_objectives_state_and_goes_on_from_it() -> None:
    objective, network = Objective(V(), LossAdaptiveTime(bins=8)), Gain()
    for seed in range(30):
        run(objective, network, seed)
    state = objective.state_dict()
    assert set(state) == {"time_density.losses", "time_density.counts"}
    again = Objective(V(), LossAdaptiveTime(bins=8))
    again.load_state_dict(state)
    ours, theirs = run(objective, network, 77), run(again, network, 77)
    assert torch.equal(ours.per_sample, theirs.per_sample)
    assert torch.equal(ours.t, theirs.t)
    fresh = run(Objective(V(), LossAdaptiveTime(bins=8)), network, 77)
    assert not torch.equal(ours.t, fresh.t)
    assert int(objective.time_density.counts.sum()) == 31 * 64


def test_validation_neither_learns_nor_is_steered() -> None:
    objective, network = Objective(V(), LossAdaptiveTime(bins=8)), Gain()
    for seed in range(30):
        run(objective, network, seed)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    with torch.no_grad():
        run(objective, network, 1)
    objective.eval()
    steered = run(objective, network, 2)
    # In evaluation the draws are uniform, and weigh 1: losses of one epoch compare with those of the next.
    plain = run(Objective(V(), UniformTime()), network, 2)
    torch.testing.assert_close(steered.t, plain.t, rtol=0, atol=1e-6)
    torch.testing.assert_close(steered.loss, plain.loss, rtol=1e-4, atol=0)
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name])


def test_effective_weight_is_that_of_uniform_times() -> None:
    log_snr = torch.linspace(-4, 4, 9, dtype=torch.float64)
    ours = Objective(V(), adapted()).effective_weight(Cosine(), log_snr)
    torch.testing.assert_close(ours, Objective(V(), UniformTime()).effective_weight(Cosine(), log_snr))


def test_zero_losses_leave_it_uniform() -> None:
    density = LossAdaptiveTime(bins=4, history=1, t_min=0.0)
    density.update(torch.tensor([0.1, 0.3, 0.6, 0.9]), torch.zeros(4))
    assert density.probabilities().tolist() == [0.25] * 4


def test_protocol() -> None:
    assert isinstance(LossAdaptiveTime(), AdaptiveTimeDensity)
    assert not isinstance(UniformTime(), AdaptiveTimeDensity)


RANK = """
import sys, torch, torch.distributed as dist
from ornstein.diffusion.densities import LossAdaptiveTime
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
density = LossAdaptiveTime(bins=4, history=3, t_min=0.0)
for i in range(3):
    t = (torch.arange(6) + 0.5) / 6
    density.update(t, t + 10 * rank + i)
torch.save(density.state_dict(), f"{store}.{rank}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_all_ranks_keep_one_history(tmp_path: Path) -> None:
    store = tmp_path / "store"
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(store)]) for rank in range(2)]
    assert [process.wait(120) for process in ranks] == [0, 0]
    first, second = (torch.load(f"{store}.{rank}", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = LossAdaptiveTime(bins=4, history=3, t_min=0.0)
    t = (torch.arange(6) + 0.5) / 6
    for i in range(3):
        alone.update(torch.cat([t, t]), torch.cat([t + i, t + 10 + i]))
    assert all(torch.equal(first[name], value) for name, value in alone.state_dict().items())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"t_min": 1.0}, r"t_min=1.0 must lie in \[0, 1\)"),
        ({"bins": 0}, "bins >= 1"),
        ({"history": 0}, "history >= 1"),
        ({"uniform_prob": 0.0}, "uniform_prob in"),
        ({"low_discrepancy": "sobol"}, "choose true, false or shared"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LossAdaptiveTime(**options)
