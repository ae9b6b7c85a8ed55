"""Evaluating several denoisers on one noisy batch: each distinct one once, those of one network in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ornstein.diffusion.denoiser import Denoise, Denoiser, Rescheduled
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import Level, NoiseSchedule


@dataclass(frozen=True)
class Plan:
    """Calls that give every branch its prediction.

    Attributes:
        calls: a denoiser for each batch, with the numbers of the evaluations that it holds.
        names: the number of the evaluation that each branch reads.
    """

    calls: tuple[tuple[Denoise, tuple[int, ...]], ...]
    names: Mapping[str, int]

    @property
    def cost(self) -> int:
        """Network evaluations per sample."""
        return sum(len(numbers) * denoise.cost for denoise, numbers in self.calls)

    def __call__(self, x_t: Tensor, level: Level, again: bool) -> dict[str, Prediction]:
        """The branches' predictions, before clipping."""
        found: dict[int, Prediction] = {}
        for denoise, numbers in self.calls:
            times = len(numbers)
            if times == 1:
                found[numbers[0]] = denoise.predict(x_t, level, again=again)
            else:
                together = denoise.predict(torch.cat([x_t] * times), level.repeat(times), again=again)
                found |= zip(numbers, together.split(times), strict=True)
        return {name: found[number] for name, number in self.names.items()}


def plan(branches: Mapping[str, tuple[int, Denoise]], schedule: NoiseSchedule) -> Plan:
    """The calls that evaluate named branches, given with their numbers, on a batch noised by ``schedule``."""
    batches: dict[tuple[object, ...], dict[int, Denoise]] = {}
    for number, denoise in branches.values():
        batches.setdefault(_batch_key(denoise), {})[number] = denoise
    calls = tuple((_on(schedule, _together(list(each.values()))), tuple(each)) for each in batches.values())
    return Plan(calls, {name: number for name, (number, _) in branches.items()})


def distinct(denoisers: Sequence[Denoise]) -> list[int]:
    """A number for each denoiser, equal where they would predict the same.

    Compares conditionings by value, which an accelerator must be waited for: done once a batch, before the first step.
    """
    seen: list[Denoise] = []
    numbers = []
    for denoise in denoisers:
        number = next((i for i, other in enumerate(seen) if _same(denoise, other)), len(seen))
        if number == len(seen):
            seen.append(denoise)
        numbers.append(number)
    return numbers


def _batch_key(denoise: Denoise) -> tuple[object, ...]:
    if not isinstance(denoise, Denoiser):
        return (id(denoise),)
    shapes = tuple(sorted((name, value.dtype, tuple(value.shape[1:])) for name, value in denoise.cond.items()))
    return (type(denoise), id(denoise.network), id(denoise.schedule), id(denoise.parameterization), str(shapes))


def _same(one: Denoise, other: Denoise) -> bool:
    if one is other:
        return True
    if not (isinstance(one, Denoiser) and isinstance(other, Denoiser)) or _batch_key(one) != _batch_key(other):
        return False
    return all(value is other.cond[name] or torch.equal(value, other.cond[name]) for name, value in one.cond.items())


def _together(denoisers: Sequence[Denoise]) -> Denoise:
    first = denoisers[0]
    if len(denoisers) == 1:
        return first
    bound = [each for each in denoisers if isinstance(each, Denoiser)]
    return bound[0].bind({name: torch.cat([each.cond[name] for each in bound]) for name in bound[0].cond})


def _on(schedule: NoiseSchedule, denoise: Denoise) -> Denoise:
    own = denoise.schedule
    return denoise if own is schedule or _same_levels(own, schedule) else Rescheduled(denoise, schedule)


def _same_levels(one: NoiseSchedule, other: NoiseSchedule) -> bool:
    """Whether two schedules agree wherever one looks: a run loaded twice has two objects of one schedule."""
    times = torch.linspace(0, 1, 65, dtype=torch.float64)
    return type(one) is type(other) and one.levels(times) == other.levels(times)
