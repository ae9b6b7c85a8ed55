"""The guidance contract, and the one denoiser that carries out every guidance.

A guidance names the branches that it wants (the null condition, a weaker model) and says what it makes of their
predictions. The branches are then evaluated together: each distinct one once, those of one network in one batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor, nn

from ornstein.diffusion.denoiser import Denoise, Denoiser
from ornstein.diffusion.guidance.branches import Plan, distinct, plan
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import Level, NoiseSchedule, Scalar


class Guidance(Protocol):
    """Builds a guided denoiser from a bound one and the null (dropped) form of its conditioning."""

    @property
    def needs_null(self) -> bool:
        """Whether the model must have been trained with dropped conditioning."""
        ...

    def __call__(self, denoiser: Denoiser, null: Mapping[str, Tensor]) -> Denoise: ...


@dataclass
class Call:
    """One call of a guided denoiser, as a part sees it.

    Attributes:
        denoiser: the denoiser that is guided, with its conditioning.
        x_t: (B, *shape); tracks gradients where a part differentiates through the denoiser.
        level: the noise level.
        again: not the step's first call: momentum stands still.
        cond: what the denoiser itself predicts.
        current: what the parts before this one have made of it.
        outputs: predictions of the branches, by name.
        memory: tensors kept from call to call of one trajectory.
        keep_graph: the caller differentiates through this call.
        prefix: what stands before this part's names in ``outputs`` and ``memory``.
    """

    denoiser: Denoise
    x_t: Tensor
    level: Level
    again: bool
    cond: Prediction
    current: Prediction
    outputs: Mapping[str, Prediction]
    memory: dict[str, Tensor]
    keep_graph: bool
    prefix: str = ""

    def branch(self, name: str) -> Prediction:
        """What a branch of this part predicts."""
        return self.outputs[self.prefix + name]

    def recall(self, name: str) -> Tensor | None:
        """What :meth:`remember` kept in an earlier call of this trajectory."""
        return self.memory.get(self.prefix + name)

    def remember(self, name: str, value: Tensor) -> None:
        """Keeps a tensor for the trajectory's next calls."""
        self.memory[self.prefix + name] = value if self.keep_graph else value.detach()

    def accept(self, guided: Prediction) -> Prediction:
        """``guided``, made from the branches, joined to what the parts before have made: changes of x0 add up."""
        if self.current is self.cond:
            return guided
        return self.current.with_x0(lambda x0: x0 + (guided.x0 - self.cond.x0))

    def within(self, prefix: str, current: Prediction) -> Call:
        """The call as a part inside this one sees it."""
        return replace(self, prefix=self.prefix + prefix, current=current)


class Part(ABC):
    """A guidance that stands alone or beside others. A subclass gives ``apply``, and ``branches`` where it needs any.

    Attributes:
        off: it changes nothing, and costs nothing.
        needs_null: the model must have been trained with dropped conditioning.
        needs_condition: the model must be conditional.
        renoises: it sets ``Prediction.renoise_eps``.
        remembers: what it adds depends on the steps before.
        differentiates: ``apply`` takes gradients through the denoiser.
    """

    @property
    def off(self) -> bool:
        return False

    @property
    def needs_null(self) -> bool:
        return False

    @property
    def needs_condition(self) -> bool:
        return self.needs_null

    @property
    def renoises(self) -> bool:
        return False

    @property
    def remembers(self) -> bool:
        return False

    @property
    def differentiates(self) -> bool:
        return False

    def branches(self, denoiser: Denoise, null: Mapping[str, Tensor]) -> dict[str, Denoise]:
        """What must be evaluated beside the denoiser itself, by name.

        Raises:
            ValueError: the denoiser cannot give a branch.
        """
        return {}

    def wanted(self, names: Sequence[str], level: Level | None) -> tuple[str, ...]:
        """Which of its branches are needed at a level; None asks for the most that any level needs."""
        return tuple(names)

    def own_cost(self, level: Level | None) -> int:
        """Evaluations per sample of networks of its own, beside the branches."""
        return 0

    @abstractmethod
    def apply(self, call: Call) -> Prediction:
        """The guided prediction, before clipping."""

    def __call__(self, denoiser: Denoise, null: Mapping[str, Tensor]) -> Denoise:
        """The guided denoiser; the denoiser itself where the guidance is off."""
        if self.off:
            return denoiser
        branches = self.branches(denoiser, null)
        every = distinct([denoiser, *branches.values()])
        return Guided(denoiser, self, branches, dict(zip(["", *branches], every, strict=True)))


@dataclass(frozen=True)
class Guided:
    """A denoiser under a guidance: evaluates the branches together, applies the guidance, clips its result once.

    ``cost`` is that of the latest call, because guidance in an interval costs less outside it; before any call, the
    most that a call can cost.
    """

    denoiser: Denoise
    part: Part
    branches: Mapping[str, Denoise]
    numbers: Mapping[str, int]  # of the distinct evaluation behind each branch; the denoiser itself is ""
    plans: dict[tuple[str, ...], Plan] = field(default_factory=dict, repr=False, compare=False)
    memory: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    latest: list[int] = field(default_factory=list, repr=False, compare=False)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    @property
    def cost(self) -> int:
        return self.latest[0] if self.latest else self._plan(None).cost + self.part.own_cost(None)

    @property
    def renoises(self) -> bool:
        return self.part.renoises or self.denoiser.renoises

    @property
    def remembers(self) -> bool:
        every = (self.denoiser, *self.branches.values())
        return self.part.remembers or any(denoise.remembers for denoise in every)

    def start(self) -> Denoise:
        """The same guidance without momentum, for a new trajectory."""
        denoiser = self.denoiser.start()
        branches = {name: branch.start() for name, branch in self.branches.items()}
        same = denoiser is self.denoiser and all(branches[name] is self.branches[name] for name in branches)
        return Guided(denoiser, self.part, branches, self.numbers, self.plans if same else {})

    def clip(self, prediction: Prediction) -> Prediction:
        return self.denoiser.clip(prediction)

    def __call__(self, x_t: Tensor, t: Scalar | Level, *, again: bool = False) -> Prediction:
        return self.clip(self.predict(x_t, t, again=again))

    def predict(self, x_t: Tensor, t: Scalar | Level, *, again: bool = False) -> Prediction:
        """The guided prediction, before clipping."""
        level = t if isinstance(t, Level) else self.schedule.level(t, x_t.ndim)
        keep = torch.is_grad_enabled()
        if not self.part.differentiates:
            return self._guided(x_t, level, again, keep)
        with torch.inference_mode(False), torch.enable_grad():
            guided = self._guided(tracked(x_t, keep), level, again, keep)
        if keep:
            return guided
        renoise = guided.renoise_eps.detach() if self.renoises else None
        fraction = None if guided.variance_fraction is None else guided.variance_fraction.detach()
        return Prediction(x_t, level, x0=guided.x0.detach(), variance_fraction=fraction, renoise_eps=renoise)

    def _guided(self, x_t: Tensor, level: Level, again: bool, keep: bool) -> Prediction:
        chosen = self._plan(level)
        self.latest[:] = [chosen.cost + self.part.own_cost(level)]
        outputs = chosen(x_t, level, again)
        cond = outputs[""]
        return self.part.apply(Call(self.denoiser, x_t, level, again, cond, cond, outputs, self.memory, keep))

    def _plan(self, level: Level | None) -> Plan:
        names = ("", *self.part.wanted(tuple(self.branches), level))
        if names not in self.plans:
            denoisers = {"": self.denoiser, **self.branches}
            self.plans[names] = plan({name: (self.numbers[name], denoisers[name]) for name in names}, self.schedule)
        return self.plans[names]


def finite(key: str, value: object) -> None:
    """Refuses what is no finite number, because images would come out black without a word.

    Raises:
        ValueError: names the key as it is typed.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        shown = "null" if value is None else value if isinstance(value, Real) else repr(value)
        raise ValueError(f"{key}={shown} must be a finite number, such as 2.0.")


def tracked(x: Tensor, keep: bool) -> Tensor:
    """The tensor x as one whose gradients are recorded: itself where the caller's graph goes on through it."""
    return x if keep and x.requires_grad else x.detach().clone().requires_grad_()


def beside(network: nn.Module, denoiser: Denoise) -> None:
    """Moves a network to the device of the denoiser's, once it is known: a trainer moves models after it is built."""
    own = getattr(denoiser, "network", None)
    like = next(own.parameters(), None) if isinstance(own, nn.Module) else None
    if like is not None:
        network.to(like.device)


def gradient(total: Callable[[Tensor], Tensor], at: Tensor, *, keep: bool) -> Tensor:
    """The gradient of a scalar function, also where the sampler has switched gradients off."""
    with torch.inference_mode(False), torch.enable_grad():
        point = tracked(at, keep)
        (slope,) = torch.autograd.grad(total(point), point, create_graph=keep, materialize_grads=True)
    return slope
