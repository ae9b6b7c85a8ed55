"""The config groups that this floor owns: every option builds, and says what it is for."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ornstein.training.callbacks import Checkpoint, GenerativeEvaluation, ProgressBar
from ornstein.training.ema import EMA

CONF = Path(__file__).parents[2] / "conf"
REST = {"paths": {"run_dir": "a_run"}, "seed": 7, "trainer": {"max_steps": 300}, "model": {"learning_rate": 1e-3}}


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def load(group, option, **overrides):
    node = OmegaConf.load(CONF / group / f"{option}.yaml")
    return OmegaConf.merge(OmegaConf.create({**REST, group: node}), {group: overrides})[group]


def test_every_callback_is_built():
    built = {name: instantiate(node) for name, node in load("callbacks", "default").items()}
    assert isinstance(built["progress"], ProgressBar)
    assert isinstance(built["evaluation"], partial) and built["evaluation"].func is GenerativeEvaluation
    assert built["evaluation"](metrics=None).seed == built["sample_grid"].seed == built["trajectory"].seed == 7
    assert isinstance(built["checkpoint"], Checkpoint) and built["checkpoint"].folder == Path("a_run/checkpoints")
    assert list(built)[-1] == "checkpoint"


@pytest.mark.parametrize(
    "name", ["log", "validation", "sample_grid", "trajectory", "evaluation", "checkpoint", "nonfinite"]
)
def test_intervals_are_plain_keys(name):
    node = load("callbacks", "default", **{name: {"every": 123}})
    built = instantiate(node[name])
    built = built(metrics=None) if isinstance(built, partial) else built
    assert built.every == 123


def test_none_is_nothing():
    assert not load("callbacks", "none") and not load("ema", "none") and not load("lr_schedule", "none")


def test_ema():
    assert isinstance(instantiate(load("ema", "default")), EMA)


@pytest.mark.parametrize("option", options("optimizer"))
@pytest.mark.parametrize("schedule", [name for name in options("lr_schedule") if name != "none"])
def test_optimizers_step_with_every_schedule(option, schedule):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = instantiate(load("optimizer", option))([weight])
    scheduler = instantiate(load("lr_schedule", schedule))(optimizer)
    weight.square().sum().backward()
    optimizer.step()
    scheduler.step()
    assert bool((weight < 1).all()) and optimizer.param_groups[0]["lr"] > 0


def test_schedules_end_with_training():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = instantiate(load("lr_schedule", "cosine"))(optimizer)
    assert scheduler.lr_lambdas[0](300) == pytest.approx(0.02) and scheduler.lr_lambdas[0](299) > 0.02


@pytest.mark.parametrize("group", ["callbacks", "ema", "lr_schedule", "optimizer"])
def test_each_option_begins_by_saying_what_it_is(group):
    for option in options(group):
        assert (CONF / group / f"{option}.yaml").read_text().startswith("# ")
