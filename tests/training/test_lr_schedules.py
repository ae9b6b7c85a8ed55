from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.training.lr_schedules import constant, cosine, inverse_sqrt, linear


def rates(schedule, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (constant, {0: 1.0, 99: 1.0}),
        (partial(constant, warmup_steps=3), {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 50: 1.0}),
        (partial(cosine, max_steps=100), {0: 1.0, 50: 0.5, 25: 0.5 + math.sqrt(0.125), 100: 0.0, 150: 0.0}),
        (partial(cosine, max_steps=110, warmup_steps=10, min_ratio=0.1), {4: 5 / 11, 10: 1.0, 60: 0.55, 110: 0.1}),
        (partial(linear, max_steps=100, min_ratio=0.2), {0: 1.0, 50: 0.6, 100: 0.2, 130: 0.2}),
        (partial(linear, max_steps=120, warmup_steps=20), {9: 10 / 21, 20: 1.0, 70: 0.5, 120: 0.0}),
        (partial(inverse_sqrt, reference_steps=25), {0: 1.0, 25: 1.0, 100: 0.5, 225: 1 / 3}),
        (partial(inverse_sqrt, reference_steps=25, warmup_steps=4), {0: 0.2, 4: 1.0, 100: 0.5}),
    ],
)
def test_rates(schedule, expected):
    found = rates(schedule, max(expected) + 1)
    assert {step: found[step] for step in expected} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "schedule",
    [
        partial(cosine, max_steps=0),
        partial(cosine, max_steps=10, min_ratio=1.5),
        partial(linear, max_steps=10, warmup_steps=-1),
        partial(inverse_sqrt, reference_steps=0),
        partial(constant, warmup_steps=-1),
    ],
)
def test_refuses(schedule):
    with pytest.raises(OrnsteinError, match="lr_schedule"):
        rates(schedule, 1)
