"""Several guidances at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.guidance.base import Call, Part
from ornstein.diffusion.guidance.interval import Interval
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import Level


@dataclass(frozen=True)
class Compose(Part):
    r"""Several guidances, one after another.

    .. math:: \tilde x_0 = \hat x_0 + \sum_k \Delta_k

    What cfg, autoguidance and the like change about the conditional prediction adds up, in any order. An energy
    looks at the prediction that the parts before it have made, so it usually stands last. All branches are evaluated
    together: each distinct one once, those of one network in one batch.

    Args:
        parts: the guidances, a list or a mapping of any names, in their order.

    Source: sums of scores, Du et al. 2023 (arXiv 2302.11552), section 3; Liu et al. 2022 (arXiv 2206.01714).
    When: one guidance is not enough, cfg in an interval with a colour, say.

    Raises:
        ValueError: a part that is no guidance of ours.
    """

    parts: Sequence[Part] | Mapping[str, Part] = ()

    def __post_init__(self) -> None:
        # The config gives a mapping, because a command line can change an entry of it by name.
        given: Any = self.parts.values() if hasattr(self.parts, "values") else self.parts
        parts = tuple(part for part in given if part is not None)
        for part in parts:
            if not isinstance(part, Part):
                raise ValueError(f"guidance.parts holds {part!r}, which is no guidance: subclass guidance.Part.")
        object.__setattr__(self, "parts", parts)

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)  # type: ignore[arg-type]

    @property
    def off(self) -> bool:
        return all(part.off for part in self)

    @property
    def needs_null(self) -> bool:
        return any(part.needs_null for part in self)

    @property
    def needs_condition(self) -> bool:
        return any(part.needs_condition for part in self)

    @property
    def renoises(self) -> bool:
        return any(part.renoises for part in self)

    @property
    def remembers(self) -> bool:
        return any(part.remembers for part in self)

    @property
    def differentiates(self) -> bool:
        return any(part.differentiates for part in self)

    def branches(self, denoiser: Denoise, null: Mapping[str, Tensor]) -> dict[str, Denoise]:
        return {
            prefix + name: branch
            for prefix, part in self._on()
            for name, branch in part.branches(denoiser, null).items()
        }

    def wanted(self, names: Sequence[str], level: Level | None) -> tuple[str, ...]:
        found: list[str] = []
        for prefix, part in self._on():
            own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            found += [prefix + name for name in part.wanted(own, level)]
        return tuple(found)

    def own_cost(self, level: Level | None) -> int:
        return sum(part.own_cost(level) for _, part in self._on())

    def apply(self, call: Call) -> Prediction:
        current = call.current
        for prefix, part in self._on():
            current = part.apply(call.within(prefix, current))
        return current

    def _on(self) -> list[tuple[str, Part]]:
        return [(f"{number}.", part) for number, part in enumerate(self) if not part.off]


def leaves(guidance: Any) -> Iterator[Any]:
    """The guidances that one is made of; itself where it is made of no others."""
    inner = list(guidance) if isinstance(guidance, Compose) else []
    if isinstance(guidance, Interval):
        inner = [guidance.inner]
    if not inner:
        yield guidance
    for part in inner:
        yield from leaves(part)


def replaced(guidance: Any, change: Callable[[Any], Any]) -> Any:
    """The same guidance with every one of its :func:`leaves` passed through ``change``."""
    if isinstance(guidance, Compose):
        return Compose([replaced(part, change) for part in guidance])
    if isinstance(guidance, Interval) and guidance.part is not None:
        return replace(guidance, part=replaced(guidance.part, change))
    return change(guidance)
