"""The tables that the diffusion tests run over: a new schedule or parameterization is one row here."""

from __future__ import annotations

import pytest
import torch

from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.parameterizations import EDMPreconditioned, Epsilon, Parameterization, Sample, V, Velocity
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Linear, NoiseSchedule, Quadratic, Sigmoid

SCHEDULES = {
    "linear": Linear,
    "quadratic": Quadratic,
    "quadratic_squared_time": lambda: Quadratic(form="squared_time"),
    "sigmoid": Sigmoid,
    "cosine": Cosine,
    "flow": Flow,
    "edm": EDM,
}
PARAMETERIZATIONS = {
    "eps": Epsilon,
    "x0": Sample,
    "v": V,
    "flow": Velocity,
    "edm": lambda: EDMPreconditioned(sigma_data=0.5),
}
# Refused at validation: eps does not determine x0 where alpha reaches 0.
REFUSED = {("flow", "eps")}
CELLS = [(s, p) for s in SCHEDULES for p in PARAMETERIZATIONS if (s, p) not in REFUSED]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # these tensors are tiny: threads only cost


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return SCHEDULES[request.param]()


@pytest.fixture(params=PARAMETERIZATIONS)
def parameterization(request: pytest.FixtureRequest) -> Parameterization:
    return PARAMETERIZATIONS[request.param]()


@pytest.fixture(params=CELLS, ids="-".join)
def cell(request: pytest.FixtureRequest) -> tuple[NoiseSchedule, Parameterization]:
    schedule_name, parameterization_name = request.param
    return SCHEDULES[schedule_name](), PARAMETERIZATIONS[parameterization_name]()


@pytest.fixture
def gaussian() -> GaussianMixture:
    """One Gaussian N(mu, 0.5^2 I) in two dimensions, float64."""
    return GaussianMixture(torch.tensor([[0.4, -0.3]]).double(), torch.tensor([0.5]).double())


@pytest.fixture
def mixture() -> GaussianMixture:
    """Three separate, unequal components in two dimensions, about unit scale."""
    means = torch.tensor([[-0.7, -0.5], [0.6, 0.7], [0.5, -0.8]])
    return GaussianMixture(means, torch.tensor([0.2, 0.15, 0.25]), torch.tensor([0.5, 0.3, 0.2]))
