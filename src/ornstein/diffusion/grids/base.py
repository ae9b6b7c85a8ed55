"""A grid of levels, and how a rule's times become one."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol, overload

import torch
from torch import Tensor

from ornstein.diffusion.schedules import Level, NoiseSchedule

_LONG = 10_000  # levels from which a grid is kept packed
_FIELDS = len(Level._fields)


@dataclass(frozen=True)
class Grid:
    """A falling sequence of levels; ``grid[i]`` to ``grid[i + 1]`` is step i."""

    levels: Sequence[Level]

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def __getitem__(self, i: int) -> Level:
        return self.levels[i]


class GridRule(Protocol):
    """Chooses ``steps + 1`` falling times in [0, 1], (steps + 1,) float64, for a schedule.

    A rule may have ``to_zero``: on a schedule that keeps noise at t = 0 (edm's sigma_min), its last step then goes on
    to clean data, alpha = 1 and sigma = 0, from where the schedule ends.
    """

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor: ...


def check_steps(steps: object) -> None:
    """Refuses a number of steps that is none.

    Raises:
        ValueError: steps < 1, or not a whole number.
    """
    if isinstance(steps, bool) or not isinstance(steps, Integral):
        raise ValueError(f"sampler.steps={steps} must be a whole number, 50 say.")
    if steps < 1:
        raise ValueError(f"sampler.steps={steps}: a sampler needs at least 1 step.")


def make_grid(rule: GridRule, schedule: NoiseSchedule, steps: int) -> Grid:
    """The grid of a rule on a schedule.

    Raises:
        ValueError: steps < 1 or not whole, or a rule that gives times that do not fall or leave [0, 1].
    """
    check_steps(steps)
    clean = clean_level(schedule) if getattr(rule, "to_zero", False) else None
    # The clean level takes the last step, so the rule places one step less; with a single one, only its start.
    count = steps if clean is None else steps - 1
    times = rule.times(schedule, max(count, 1))[: count + 1 if clean is not None else None]
    if times.shape != (count + 1,) or not bool((times.diff() < 0).all()):
        raise ValueError(f"the time grid needs {count + 1} strictly falling times: choose fewer steps or another grid.")
    if not (float(times[0]) <= 1 and float(times[-1]) >= 0):
        raise ValueError("the time grid leaves [0, 1]: 0 is data and 1 is noise.")
    tail = () if clean is None else (clean,)
    if len(times) < _LONG:
        return Grid((*schedule.levels(times), *tail))
    packed = array("d")
    for part in times.split(_LONG):
        for level in schedule.levels(part):
            packed.extend(float(value) for value in level)
    for level in tail:
        packed.extend(float(value) for value in level)
    return Grid(PackedLevels(packed))


class PackedLevels(Sequence[Level]):
    """Levels as plain float64, a fifth of what objects take: a grid of a million steps is 40 MB."""

    def __init__(self, values: array[float]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values) // _FIELDS

    @overload
    def __getitem__(self, i: int) -> Level: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Level]: ...
    def __getitem__(self, i: int | slice) -> Level | Sequence[Level]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        start = range(len(self))[i] * _FIELDS
        return Level(*self.values[start : start + _FIELDS])


def clean_level(schedule: NoiseSchedule) -> Level | None:
    """Data beyond a schedule that ends with noise left, as a level of its own at t = 0; None where t = 0 is data."""
    end = schedule.level(0.0)
    if end.sigma == 0:
        return None
    return end._replace(alpha=1.0, sigma=0.0)


def ramp(first: float, last: float, count: int) -> Tensor:
    """Evenly from first to last, (count,) float64; ``first`` alone where count is 1."""
    return torch.linspace(first, last, count, dtype=torch.float64)
