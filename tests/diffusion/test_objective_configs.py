"""Every option below conf/objective, as configured, for a forward and a backward pass on every schedule it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.objectives import Objective, TrainingNoise
from ornstein.diffusion.parameterizations import V
from ornstein.diffusion.schedules import NoiseSchedule

CONF = Path(__file__).parents[2] / "conf"


def options_of(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def flaws(objective: Objective, schedule: NoiseSchedule) -> str | None:
    """The sentence with which the pair is refused, if it is."""
    try:
        objective.check(schedule)
    except ValueError as error:
        return str(error)
    return None


class Tiny(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, outputs, 1)

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        return self.conv(x) + 1e-4 * noise_cond.reshape(-1, 1, 1, 1)


def train_once(objective: Objective, schedule: NoiseSchedule) -> None:
    torch.manual_seed(0)
    network = Tiny(objective.parameterization.outputs)
    denoiser = Denoiser(network, schedule, objective.parameterization)
    x0 = (torch.arange(4 * 16) % 256 / 127.5 - 1).reshape(4, 1, 4, 4)
    out = objective(denoiser, x0, {}, TrainingNoise(torch.Generator().manual_seed(0)))
    assert out.loss.dtype == torch.float32
    assert out.per_sample.shape == out.t.shape == out.log_snr.shape == (4,)
    assert out.loss.isfinite()
    out.loss.backward()
    for parameter in [*network.parameters(), *schedule.parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    assert float(sum(parameter.grad.abs().sum() for parameter in network.parameters())) > 0


def option(path: str) -> Any:
    """The object that an option's file alone describes."""
    config = OmegaConf.create({"codec": {"sigma_data": 0.5}, "part": OmegaConf.load(CONF / f"{path}.yaml")})
    return instantiate(config.part)


@pytest.fixture(scope="module")
def schedules() -> dict[str, NoiseSchedule]:
    return {name: option(f"scheduler/{name}") for name in options_of("scheduler")}


# Not to be trained on: eps and the score where the signal ends, and learned schedules unless by a bound.
NEEDS_SIGNAL = {"eps", "score", "p2", "vlb", "hybrid"}
BOUNDS = {"vlb", "vdm"}


@pytest.mark.parametrize("name", options_of("objective"))
def test_every_objective_trains_on_every_schedule_it_is_for(compose, schedules, name: str) -> None:
    objective = instantiate(compose(f"objective={name}").objective)
    assert isinstance(objective, Objective)
    for scheduler, schedule in schedules.items():
        refused = flaws(objective, schedule)
        if name in NEEDS_SIGNAL and schedule.zero_terminal_snr:
            assert refused is not None and "does not determine x0" in refused, scheduler
        elif name not in BOUNDS and any(p.requires_grad for p in schedule.parameters()):
            assert refused is not None and "learns whatever noise is easiest" in refused, scheduler
        else:
            assert refused is None, (scheduler, refused)
            schedule.zero_grad()
            train_once(objective, schedule)


GROUPS = ("time", "weighting", "distance", "coupling")
PARTS = [(group, name) for group in GROUPS for name in options_of(f"objective/{group}")]


@pytest.mark.parametrize(("group", "name"), PARTS, ids=["=".join(row) for row in PARTS])
def test_every_part_of_an_objective_trains(schedules, group: str, name: str) -> None:
    part = option(f"objective/{group}/{name}")
    for schedule in schedules.values():
        objective = Objective(V(), **{group: part})
        if flaws(objective, schedule) is None:
            train_once(objective, schedule)


@pytest.mark.parametrize("name", sorted({*options_of("objective/parameterization")} - {"learned_variance"}))
def test_every_parameterization_trains(schedules, name: str) -> None:
    objective = Objective(option(f"objective/parameterization/{name}"))
    for schedule in schedules.values():
        if flaws(objective, schedule) is None:
            train_once(objective, schedule)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective=vlb", "objective/parameterization=eps", "objective.variance=posterior"],
        ["objective=vlb", "objective/parameterization=v", "objective.variance=forward", "objective.last=gaussian"],
        ["objective=vlb", "objective/time=loss_adaptive", "objective.time.t_min=0"],
        ["objective=vlb", "objective/parameterization@objective.parameterization.mean=v"],
        ["objective=hybrid", "objective/parameterization@objective.parameterization.mean=x0"],
        ["objective=vdm", "objective/time=loss_adaptive"],
        ["objective=min_snr", "objective/parameterization=eps"],
        ["objective=eps", "objective/time=uniform", "objective.time.low_discrepancy=shared"],
    ],
    ids=lambda words: " ".join(words),
)
def test_what_the_options_comments_promise(compose, schedules, overrides: list[str]) -> None:
    train_once(instantiate(compose(*overrides).objective), schedules["cosine"])
