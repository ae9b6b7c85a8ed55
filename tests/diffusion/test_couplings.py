"""Couplings: a permutation of the noise, the cheapest there is, with the data left where it was."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion.couplings import Coupling, Independent, MinibatchOT
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.objectives import Objective, TrainingNoise
from ornstein.diffusion.parameterizations import Velocity
from ornstein.diffusion.schedules import Flow

COUPLINGS = {"independent": Independent, "minibatch_ot": MinibatchOT}


def pair(size: int, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, *shape, generator=generator) + 1, torch.randn(size, *shape, generator=generator)


def cost(x0: Tensor, eps: Tensor) -> float:
    return float((x0 - eps).double().square().sum())


@pytest.mark.parametrize("size", [0, 1, 2, 33])
@pytest.mark.parametrize("name", COUPLINGS)
def test_noise_is_permuted(name: str, size: int) -> None:
    x0, eps = pair(size, 2, 3)
    before = x0.clone()
    paired = COUPLINGS[name]()(x0, eps)
    assert torch.equal(x0, before)
    rows = sorted(map(tuple, eps.flatten(1).tolist()))
    assert sorted(map(tuple, paired.flatten(1).tolist())) == rows


@pytest.mark.parametrize("seed", range(5))
def test_ot_is_the_cheapest_of_all_permutations(seed: int) -> None:
    x0, eps = pair(6, 3, seed=seed)
    least = min(cost(x0, eps[list(order)]) for order in itertools.permutations(range(6)))
    assert cost(x0, MinibatchOT()(x0, eps)) == pytest.approx(least, rel=1e-6)
    assert least < cost(x0, eps)


def test_ot_sorts_in_one_dimension() -> None:
    x0, eps = pair(50, 1)
    paired = MinibatchOT()(x0, eps)
    assert torch.equal(paired[x0.flatten().argsort()].flatten(), eps.flatten().sort().values)


class Seen(nn.Module):
    def forward(self, x: Tensor, noise_cond: Tensor, label: Tensor) -> Tensor:
        self.x, self.label = x, label
        return torch.zeros_like(x)


@pytest.mark.parametrize("name", COUPLINGS)
def test_conditioning_stays_with_its_data(name: str) -> None:
    coupling: Coupling = COUPLINGS[name]()
    x0 = 100.0 * torch.arange(1, 17).reshape(16, 1, 1, 1).expand(16, 1, 2, 2)
    network, label = Seen(), torch.arange(16)
    objective = Objective(Velocity(), coupling=coupling)
    noise = TrainingNoise(torch.Generator().manual_seed(0))
    out = objective(Denoiser(network, Flow(), Velocity()), x0, {"label": label}, noise)
    assert torch.equal(network.label, label)
    # x_t is (1 - t) x0 up to noise of unit scale: still of the image that the label belongs to.
    offset = network.x.mean((1, 2, 3)) - (1 - out.t) * x0[:, 0, 0, 0]
    assert float(offset.abs().max()) < 4


def test_only_the_independent_one_says_so() -> None:
    assert Independent().independent
    assert not MinibatchOT().independent
