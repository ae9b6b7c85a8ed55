"""The numbers that averages and callbacks take, in one table that needs neither torch nor Lightning.

Constructors check themselves by it; so does whoever looks at a config before Lightning is imported, which takes
seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from ornstein.errors import OrnsteinError

Rule = tuple[Callable[[Any], bool], str]


def _whole(least: int) -> Rule:
    return (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
        f"a whole number, at least {least}",
    )


def _or_null(rule: Rule) -> Rule:
    test, words = rule
    return lambda value: value is None or test(value), f"{words}, or null"


def _choice(*options: str) -> Rule:
    return lambda value: value in options, " or ".join(options)


_EVERY = _whole(1)
_EVERY_OR_NEVER = _or_null(_EVERY)
_SWITCH: Rule = (lambda value: isinstance(value, bool), "true or false")
_SWITCH_OR_EVERY: Rule = (
    lambda value: isinstance(value, bool) or _EVERY[0](value),
    f"true, false, or {_EVERY[1]}",
)
_RATE: Rule = (lambda value: isinstance(value, int | float) and 0 <= value < 1, "a number in [0, 1)")
_POSITIVE: Rule = (
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value > 0,
    "a number above 0",
)
MAX_STD = 0.28  # of the flattest power-function average, gamma = 0, it is 1 / sqrt(12)
_LENGTHS: Rule = (
    lambda value: len(set(value)) == len(value) > 1 and all(0 < std <= MAX_STD for std in value),
    f"two different numbers at least, each in (0, {MAX_STD}], such as [0.05,0.1]",
)
_FILM: Rule = (
    lambda value: value == "gif" or (value == "mp4" and find_spec("av") is not None),
    "gif, or where the package av is installed (pip install 'ornstein[video]') mp4",
)

# Class -> what its options are called on the command line, and the rule of each.
LIMITS: Mapping[str, tuple[str, Mapping[str, Rule]]] = {
    "EMA": ("ema", {"decay": _RATE, "every": _EVERY}),
    "PowerEMA": ("ema", {"every": _EVERY, "snapshot_every": _EVERY, "stds": _LENGTHS}),
    "Preemption": ("callbacks.preemption", {"every": _EVERY}),
    "ShardedStrategy": ("trainer.strategy", {"reshard_after_forward": _SWITCH, "timeout_s": _POSITIVE}),
    "NonFiniteGuard": ("callbacks.nonfinite", {"every": _EVERY}),
    "TrainingLog": ("callbacks.log", {"every": _EVERY, "levels_every": _EVERY_OR_NEVER}),
    "LossHeatmap": ("callbacks.loss_heatmap", {"every": _EVERY_OR_NEVER}),
    "Throughput": ("callbacks.throughput", {"peak_tflops": _or_null(_POSITIVE)}),
    "Validation": ("callbacks.validation", {"every": _EVERY_OR_NEVER, "max_batches": _or_null(_whole(1))}),
    "SampleGrid": (
        "callbacks.sample_grid",
        {
            "every": _EVERY_OR_NEVER,
            "samples_per_class": _whole(1),
            "max_classes": _whole(1),
            "num_samples": _whole(1),
            "batch_size": _whole(1),
        },
    ),
    "Trajectory": (
        "callbacks.trajectory",
        {
            "every": _EVERY_OR_NEVER,
            "samples_per_class": _whole(1),
            "max_classes": _whole(1),
            "num_samples": _whole(1),
            "strip_samples": _whole(1),
            "strip_steps": _whole(2),
            "frames": _whole(2),
            "film": _FILM,
        },
    ),
    "CodecGrid": ("callbacks.codec_grid", {"num_images": _whole(1)}),
    "GenerativeEvaluation": (
        "callbacks.evaluation",
        {"every": _EVERY_OR_NEVER, "num_samples": _or_null(_whole(0)), "batch_size": _whole(1)},
    ),
    "LossTerms": ("callbacks.terms", {"every": _EVERY_OR_NEVER}),
    "ReconstructionGrid": ("callbacks.reconstruction_grid", {"every": _EVERY_OR_NEVER, "num_images": _whole(1)}),
    "ReconstructionEvaluation": (
        "callbacks.evaluation",
        {"every": _EVERY_OR_NEVER, "num_samples": _or_null(_whole(0)), "batch_size": _whole(1)},
    ),
    "CodecFile": (
        "callbacks.codec_file",
        {"dtype": _choice("float32", "float16"), "max_images": _whole(1), "batch_size": _whole(1)},
    ),
    "Checkpoint": (
        "callbacks.checkpoint",
        {
            "every": _EVERY_OR_NEVER,
            "every_images": _EVERY_OR_NEVER,
            "mode": _choice("min", "max"),
            "keep_best": _whole(0),
            "keep_every": _SWITCH_OR_EVERY,
            "keep_every_images": _EVERY_OR_NEVER,
            "keep_last": _or_null(_whole(1)),
            "asynchronous": _SWITCH,
            "ema_weights": _SWITCH,
        },
    ),
}


def check_limits(name: str, /, **options: Any) -> None:
    """Checks those of ``options`` that the class called ``name`` has a rule for; classes unknown here pass.

    Raises:
        OrnsteinError: names the option as it is typed, its value and what it must be.
    """
    key, rules = LIMITS.get(name, ("", {}))
    for option, (test, words) in rules.items():
        if option in options and not test(options[option]):
            raise OrnsteinError(f"{key}.{option}={options[option]} must be {words}.")
