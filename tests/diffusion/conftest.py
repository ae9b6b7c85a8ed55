"""Fixtures over the rows of ``tables.py``, and the mixtures that are the ground truth."""

from __future__ import annotations

import pytest
import torch

from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.parameterizations import Parameterization
from ornstein.diffusion.schedules import NoiseSchedule

from . import tables

# One schedule of each kind: a table, one with kinks, zero SNR, variance exploding, steep, rescaled. Every row of the
# table meets all samplers and parameterizations in test_matrix.py, and what schedules must hold in test_schedules.py.
SCHEDULES = {
    name: tables.SCHEDULES[name]
    for name in ("linear", "quadratic-squared_time", "cosine", "flow", "edm", "laplace", "sub_vp-zero_terminal_snr")
}
# A learned variance is another network output, with tests of its own.
PARAMETERIZATIONS = {name: make for name, make in tables.PARAMETERIZATIONS.items() if make().outputs == 1}
REFUSED = tables.REFUSED
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
