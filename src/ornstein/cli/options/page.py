"""The page: every option with its equation, its source, when to choose it, and its keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ornstein.cli.launch import conf_dir
from ornstein.cli.options.docstrings import Doc
from ornstein.cli.options.files import Option, Part, class_docs, options, read_option
from ornstein.cli.options.measure import measure


@dataclass(frozen=True)
class Group:
    """A config group: its heading, and a sentence or two on what it chooses."""

    title: str
    about: str


# Groups on disk that are not named here come last, under their own path.
GROUPS = {
    "scheduler": Group(
        "Noise schedules",
        "Signal and noise scale over time: $`x_t = \\alpha(t)\\, x_0 + \\sigma(t)\\, \\epsilon`$ with t from 0 (data) "
        "to 1 (noise). All of them meet in the log-SNR $`\\lambda = 2 \\ln(\\alpha/\\sigma)`$.",
    ),
    "objective": Group(
        "Objectives",
        "The training loss: what the network predicts, where times are drawn, how levels are weighted, and what is "
        "measured between output and target.",
    ),
    "objective/parameterization": Group(
        "Parameterizations", "What the network's output means: all of them are linear in `x0`, `eps` and $`x_t`$."
    ),
    "objective/time": Group("Time densities", "Where training draws its times."),
    "objective/weighting": Group("Weightings", "What a level weighs in the loss, on top of the time density."),
    "objective/distance": Group("Distances", "What is measured between output and target, element by element."),
    "objective/coupling": Group("Couplings", "Which noise goes with which image."),
    "sampler": Group(
        "Samplers",
        "From noise to data. Order and network evaluations (NFE) are those of the default keys; evaluations are "
        "counted on a Gaussian mixture, and guidance that needs a second branch doubles them.\n\n"
        "![Error of the deterministic samplers over their network evaluations](images/convergence.png)\n\n"
        "Largest distance to the exact flow of a Gaussian, as `benchmarks/convergence.py` draws it.",
    ),
    "sampler/grid": Group("Time grids", "The N + 1 times at which a sampler with N steps stands."),
    "guidance": Group("Guidance", "Wraps the denoiser into another one, so that every sampler takes every guidance."),
    "likelihood": Group(
        "Likelihood", "Bits/dim of held-out images, an option of `evaluate.py`; of pixels only, and without guidance."
    ),
}
ROOTS = ("scheduler", "objective", "sampler", "guidance", "likelihood")


def groups() -> list[str]:
    """Every group of the diffusion core that ``conf/`` holds, those of :data:`GROUPS` first and in its order."""
    found = [path for root in ROOTS for path in _groups_below(root)]
    return [path for path in GROUPS if path in found] + [path for path in found if path not in GROUPS]


def _groups_below(group: str) -> Iterator[str]:
    folder = conf_dir() / group
    if folder.is_dir():
        yield group
        for inner in sorted(path.name for path in folder.iterdir() if path.is_dir()):
            yield from _groups_below(f"{group}/{inner}")


def _shared(listed: list[Option]) -> str | None:
    """The class that several options of a group build from different parts: described once, at the group's head."""
    wholes = [option.parts[0].target for option in listed if option.choices]
    return next((target for target in wholes if wholes.count(target) > 1), None) if _differ(listed) else None


def _differ(listed: list[Option]) -> bool:
    """Whether it is what they bring along that tells a group's options apart."""
    return len({option.choices for option in listed}) > len(listed) / 2


def described(group: str) -> list[tuple[Option, list[Part]]]:
    """Each option of a group with the parts that its entry describes.

    They are its own class and those inside; or, where its class is the group's shared one, what it brings along and
    fewer than half of the others do.
    """
    listed = options(group)
    shared = _shared(listed)
    alike = [option for option in listed if option.parts and option.parts[0].target == shared]
    brought = [choice for option in alike for choice in option.choices]
    made = []
    for option in listed:
        parts = [part for part in option.parts if part.is_ours and part.target != shared]
        if option in alike:
            for choice in option.choices:
                if brought.count(choice) < len(alike) / 2:
                    whole = read_option(choice.group, choice.name).parts[0]
                    parts.append(replace(whole, path=choice.key))
        made.append((option, parts))
    return made


def page() -> str:
    """The whole page."""
    names = groups()
    lines = [
        "# The design space",
        "<!-- Written by `make docs` from docstrings and conf/: change those, not this page. -->",
        "Every option of the diffusion core: what it is, its equation and source, when to choose it, and its keys with "
        "their defaults. Any of them goes with any other, as in\n"
        "`python train.py scheduler=cosine objective=v sampler=heun sampler.steps=20`; a combination without "
        "meaning is refused before anything trains.\n"
        "Notation: `x0` is clean data, `eps` noise, `alpha` and `sigma` the scales of signal and noise, log-SNR is "
        "$`2 \\ln(\\alpha/\\sigma)`$, NFE are network evaluations per sample.",
        "## Contents",
        "\n".join(f"- [{_heading(name)}]({_anchor(_heading(name))}): {_links(name)}" for name in names),
        *(block for name in names for block in _group(name)),
    ]
    return "\n\n".join(lines) + "\n"


def _heading(group: str) -> str:
    return f"{GROUPS[group].title}: `{group}=`" if group in GROUPS else f"`{group}=`"


def _anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return "#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _link(option: Option) -> str:
    return f"[`{option.typed}`]({_anchor(option.typed)})"


def _links(group: str) -> str:
    return ", ".join(f"[{option.name}]({_anchor(option.typed)})" for option in options(group))


def _group(group: str) -> Iterator[str]:
    listed = described(group)
    yield f"## {_heading(group)}"
    if group in GROUPS:
        yield GROUPS[group].about
    shared = _shared([option for option, _ in listed])
    if shared is not None:
        doc = class_docs(shared)[0]
        yield doc.body
        yield from _tail(doc)
    if group == "sampler":
        yield _table(
            ("option", "what it is", "order", "NFE for N steps", "draws noise on the way"),
            [(_link(option), option.comment, *measure(option.name)) for option, _ in listed],
        )
    else:
        yield _table(("option", "what it is"), [(_link(option), option.comment) for option, _ in listed])
    for option, parts in listed:
        yield from _entry(option, parts)


def _entry(option: Option, parts: list[Part]) -> Iterator[str]:
    file = f"conf/{option.group}/{option.name}.yaml"
    yield f"### `{option.typed}`"
    yield f"[{file}](../{file}): {option.comment}"
    for part in parts:
        yield f"**`{part.path}`: {part.name}.** {part.doc.body}" if part.path else part.doc.body
        yield from _tail(part.doc)
    prefix = option.group.replace("/", ".")
    rows = [
        (
            f"[`{one.typed}`]({_anchor(_heading(one.group))})",
            f"[`{one.name}`]({_anchor(f'{one.group}={one.name}')})",
            read_option(one.group, one.name).comment,
        )
        for one in option.choices
    ]
    for part in option.parts:
        rows += [(f"`{prefix}.{name}`", f"`{default}`", what) for name, default, what in part.keys]
    if rows:
        yield _table(("key", "default", "what it is"), rows)


def _tail(doc: Doc) -> Iterator[str]:
    lines = [f"**{label}:** {text}" for label, text in (("Source", doc.source), ("When", doc.when)) if text]
    if lines:
        yield "  \n".join(lines)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    ruled = [head, ("---",) * len(head), *rows]
    return "\n".join(f"|{'|'.join(_cell(text) for text in row)}|" for row in ruled)


def _cell(text: str) -> str:
    bars = text.replace("|", r"\|")
    return f" {bars} " if text else " "
