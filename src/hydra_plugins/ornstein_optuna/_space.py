"""What is searched: overrides in Hydra's sweep syntax as Optuna's distributions, and a trial as overrides again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Transformer
from hydra.errors import HydraException

from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    import optuna

Value = str | int | float | bool | None
_LOG = "log"
_RANGES = "interval(1e-5, 1e-2), tag(log, interval(1e-5, 1e-2)), int(interval(1, 8)), range(1, 9) or choice(a, b)"


@dataclass(frozen=True)
class Param:
    """One searched key.

    Attributes:
        key: as an override has it, ``+model.dropout`` or ``objective``.
        typed: how it was given, for sentences.
        choices: its values where they are listed; else None.
        low, high, step, log, whole: its range otherwise, both ends included; ``step`` None is continuous.
        when: other keys and the values of them under which it is searched.
    """

    key: str
    typed: str
    choices: tuple[Value, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    whole: bool = False
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The key without Hydra's signs."""
        return self.key.lstrip("+")

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """What Optuna calls it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices is not None:
            return CategoricalDistribution(self.choices)
        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=step)
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def suggest(self, trial: optuna.Trial) -> Value:
        """The trial's value."""
        if self.choices is not None:
            value: Value = trial.suggest_categorical(self.name, self.choices)
            return value
        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=step, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def listed(self) -> list[Value] | None:
        """All its values; None of a continuous range."""
        if self.choices is not None:
            return list(self.choices)
        step = 1 if self.whole and self.step is None else self.step
        if step is None:
            return None
        count = int((self.high - self.low) / step + 1e-9) + 1
        return [int(self.low + i * step) if self.whole else self.low + i * step for i in range(count)]


@dataclass(frozen=True)
class Space:
    """What is searched, keys that others wait for before those, and the overrides that every job has."""

    params: tuple[Param, ...]
    fixed: tuple[str, ...]

    def suggest(self, trial: optuna.Trial) -> dict[str, Value]:
        """A trial's value of every key that is searched under the values before it."""
        values: dict[str, Value] = {}
        for param in self.params:
            if self._searched(param, values):
                values[param.name] = param.suggest(trial)
        return values

    def words(self, values: Mapping[str, Value]) -> list[str]:
        """The values as overrides."""
        keys = {param.name: param.key for param in self.params}
        return [f"{keys.get(name, name)}={as_text(value)}" for name, value in values.items()]

    def grid(self) -> Iterator[dict[str, Value]]:
        """Every combination, of a space without continuous ranges."""
        yield from self._combinations(0, {})

    def _combinations(self, place: int, values: dict[str, Value]) -> Iterator[dict[str, Value]]:
        if place == len(self.params):
            yield values
            return
        param = self.params[place]
        if not self._searched(param, values):
            yield from self._combinations(place + 1, values)
            return
        for value in param.listed() or []:
            yield from self._combinations(place + 1, {**values, param.name: value})

    def _searched(self, param: Param, values: Mapping[str, Value]) -> bool:
        given = {word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in self.fixed}
        for key, wanted in param.when.items():
            held = as_text(values[key]) if key in values else given.get(key)
            if held not in wanted:
                return False
        return True


def as_text(value: Value) -> str:
    """A value as Hydra reads it; texts are as they were typed."""
    return value if isinstance(value, str) else Transformer.str(value)


def read_space(params: Mapping[str, Any], words: Sequence[str], *, loader: ConfigLoader) -> Space:
    """The space of a config's ``params`` and the command line's overrides, which have the last word of a key.

    Args:
        params: keys, and Hydra's words for what of each is searched; or ``{space: WORDS, when: {KEY: VALUE or
            LIST}}`` for a key that is searched only where another has that value. A plain value is fixed.
        words: overrides of the command line; one that is no sweep fixes its key.
        loader: Hydra's, which knows the options of groups.

    Raises:
        OrnsteinError: a range that is none, an option that there is not, or nothing to search.
    """
    parser = OverridesParser.create(config_loader=loader)
    found: dict[str, tuple[Override, str, Mapping[str, tuple[str, ...]]]] = {}
    for key, given in params.items():
        place, when = f"hydra.sweeper.params.{key}", {}
        if isinstance(given, Mapping):
            unknown = sorted(set(given) - {"space", "when"})
            if unknown or "space" not in given:
                raise OrnsteinError(
                    f"{place} has {', '.join(map(str, unknown)) or 'no space'}: give it `space` (what of it is "
                    "searched) and `when` (another key and its value), or the space alone."
                )
            when = {
                str(other): tuple(map(_typed, value if isinstance(value, list | tuple) else [value]))
                for other, value in (given.get("when") or {}).items()
            }
            given = given["space"]
        word = f"{key}={_typed(given)}"
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            raise OrnsteinError(
                f"{place}={given} is not read: {' '.join(str(error).split('See https:')[0].split())}; e.g. {_RANGES}."
            ) from None
        found[_name(override)] = (override, f"{place}={given}", when)
    for override, word in zip(parser.parse_overrides(list(words)), words, strict=True):
        found[_name(override)] = (override, word, {})
    sweeps = {name: entry for name, entry in found.items() if entry[0].is_sweep_override()}
    fixed = [str(override.input_line) for name, (override, _, _) in found.items() if name not in sweeps]
    if not sweeps:
        raise OrnsteinError(
            "hydra.sweeper.params is empty and so is the command line: say what is searched, e.g. "
            "'optimizer.lr=tag(log, interval(1e-5, 1e-2))' objective=v,x0, or choose hparams_search=optuna."
        )
    space = [_param(override, typed, when, loader) for override, typed, when in sweeps.values()]
    ordered = _ordered(space, set(found))
    given = {word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in fixed}
    # Those that wait for what the command line has decided otherwise are not searched.
    searched = [p for p in ordered if all(given.get(key, wanted[0]) in wanted for key, wanted in p.when.items())]
    return Space(tuple(searched), tuple(fixed))


def _name(override: Override) -> str:
    # A deletion is no value of its key.
    key = override.get_key_element()
    return key if override.is_delete() else key.lstrip("+")


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else Transformer.str(value)


def _param(override: Override, typed: str, when: Mapping[str, tuple[str, ...]], loader: ConfigLoader) -> Param:
    key, sweep = override.get_key_element(), override.value()
    common: dict[str, Any] = {"key": key, "typed": typed, "when": when}
    tags = set(getattr(sweep, "tags", None) or ())
    if tags - {_LOG} or (tags and not isinstance(sweep, IntervalSweep)):
        other = ", ".join(sorted(tags - {_LOG}))
        raise OrnsteinError(
            f"{typed}: "
            + (f"the tag {other} means nothing here" if other else "log is for an interval")
            + "; e.g. tag(log, interval(1e-5, 1e-2))."
        )
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None and sweep.end is not None
        low, high, log = float(sweep.start), float(sweep.end), _LOG in tags
        if not low < high or (log and low <= 0):
            raise OrnsteinError(
                f"{typed}: an interval goes from a smaller number to a larger one"
                + (", and a logarithmic one begins above 0." if log else ".")
            )
        return Param(**common, low=low, high=high, log=log, whole=isinstance(sweep.start, int))
    if isinstance(sweep, RangeSweep):
        numbers = sorted(sweep.range())
        if not numbers:
            raise OrnsteinError(f"{typed}: there is no number in this range; its end is not part of it.")
        step = abs(float(sweep.step))
        whole = all(isinstance(number, int) for number in numbers)
        return Param(**common, low=numbers[0], high=numbers[-1], step=step, whole=whole)
    assert isinstance(sweep, ChoiceSweep) or override.is_choice_sweep()
    choices = tuple({as_text(choice): choice for choice in map(_choice, override.sweep_iterator())}.values())
    if len(set(choices)) < len(choices):  # 1 and true, which Python takes for the same
        choices = tuple(map(as_text, choices))
    _check_options(override.key_or_group, typed, choices, loader)
    return Param(**common, choices=choices)


def _choice(value: Any) -> Value:
    """A listed value as a study can keep it: numbers as they are, all else in Hydra's words."""
    return value if value is None or isinstance(value, bool | int | float) else Transformer.str(value)


def _check_options(group: str, typed: str, choices: Sequence[Value], loader: ConfigLoader) -> None:
    options = loader.get_group_options(group, results_filter=ObjectType.CONFIG)
    if "." in group or not options:
        return
    unknown = [as_text(choice) for choice in choices if choice is not None and as_text(choice) not in options]
    unknown = [choice for choice in unknown if not choice.startswith("[") and "/" not in choice]
    if unknown:
        raise OrnsteinError(f"{typed}: there is no {group}={unknown[0]}; it has {', '.join(sorted(options))}.")


def _ordered(params: Sequence[Param], known: set[str]) -> list[Param]:
    """Those that wait for others behind them.

    Raises:
        OrnsteinError: one that waits for a key that has no value here, or that waits for itself.
    """
    names = {param.name for param in params}
    for param in params:
        missing = [key for key in param.when if key not in known]
        if missing:
            raise OrnsteinError(
                f"{param.typed} is searched when {missing[0]} has a certain value, and that is neither searched nor "
                f"given: add {missing[0]}=... to the search."
            )
    done: list[Param] = []
    waiting = list(params)
    while waiting:
        placed = {param.name for param in done}
        ready = [param for param in waiting if all(key in placed or key not in names for key in param.when)]
        if not ready:
            raise OrnsteinError(f"{waiting[0].typed} waits for a key that waits for it: leave one `when` out.")
        done += ready
        waiting = [param for param in waiting if param not in ready]
    return done
