"""Options as ``conf/`` and the docstrings of their classes say them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from hydra.utils import get_class

from ornstein.cli.launch import conf_dir
from ornstein.cli.options.docstrings import Doc, parse, prose


@dataclass(frozen=True)
class Part:
    """A class that an option builds, and the keys that reach it.

    Attributes:
        path: the key that holds it, empty for the option's own class.
        target: its dotted name.
        doc: its docstring; empty for a class of another library.
        keys: (name, default as typed, what it is) by key, names dotted from the option.
    """

    path: str
    target: str
    doc: Doc
    keys: tuple[tuple[str, str, str], ...]

    @property
    def name(self) -> str:
        return self.target.rpartition(".")[2]

    @property
    def is_ours(self) -> bool:
        return self.target.startswith("ornstein.")


@dataclass(frozen=True)
class Choice:
    """An option that another brings along.

    Attributes:
        typed: how the command line names the choice, such as ``sampler/grid``.
        key: where it lands below the option.
        group: its config group.
        name: the option that stands there by default.
    """

    typed: str
    key: str
    group: str
    name: str


@dataclass(frozen=True)
class Option:
    """One YAML file of a group."""

    group: str
    name: str
    comment: str
    node: Mapping[str, Any]
    choices: tuple[Choice, ...]
    parts: tuple[Part, ...]

    @property
    def typed(self) -> str:
        """As it stands on the command line."""
        return f"{self.group}={self.name}"


def options(group: str) -> list[Option]:
    """The options of a group, by name."""
    return [read_option(group, path.stem) for path in sorted((conf_dir() / group).glob("*.yaml"))]


@cache
def read_option(group: str, name: str) -> Option:
    """Reads ``conf/<group>/<name>.yaml`` and the docstrings of the classes that it names."""
    text = (conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8")
    node: dict[str, Any] = yaml.safe_load(text) or {}
    choices: dict[str, Choice] = {}
    for entry in node.pop("defaults", []):
        if isinstance(entry, dict):
            made = [_choice(group, key, str(value)) for key, value in entry.items()]
            choices |= {choice.typed: choice for choice in made}
        elif entry != "_self_":  # a base in the same group, which this option changes
            base = read_option(group, entry)
            node, choices = _merged(base.node, node), {choice.typed: choice for choice in base.choices} | choices
    remarks = _remarks(text)
    parts = tuple(_parts("", node, remarks)) if node else ()  # an empty file switches something off
    return Option(group, name, comment_of(text), node, tuple(choices.values()), parts)


def _choice(group: str, key: str, value: str) -> Choice:
    """An entry of the defaults list: ``grid: uniform``, or ``/guidance@parts.first: cfg`` with a place of its own."""
    chosen, _, place = key.removeprefix("override ").partition("@")
    path = chosen[1:] if chosen.startswith("/") else f"{group}/{chosen}"
    typed = f"{path}@{group.replace('/', '.')}.{place}" if place else path
    return Choice(typed, place or chosen, path, value)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def comment_of(text: str) -> str:
    """The comment that the file begins with, as one line."""
    lines = [line for line in text.splitlines() if not line.startswith("# @package")]
    heads = [line.removeprefix("#").strip() for line in lines[: next(_not_comments(lines), len(lines))]]
    return prose(" ".join(heads))


def _not_comments(lines: list[str]) -> Iterator[int]:
    return (number for number, line in enumerate(lines) if not line.startswith("#"))


def _remarks(text: str) -> dict[str, str]:
    """Comments that stand behind a key, by its dotted name."""
    made: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        entry = re.match(r"( *)(\w+):(?:\s+(?!#)[^#]*?)?(?:\s+# ?(.*))?$", line)
        if entry:
            path = [*(outer for outer in path if outer[0] < len(entry[1])), (len(entry[1]), entry[2])]
            if entry[3]:
                made[".".join(name for _, name in path)] = prose(entry[3].strip().rstrip("."))
    return made


def _parts(path: str, node: Mapping[str, Any], remarks: Mapping[str, str]) -> Iterator[Part]:
    """The part that a node with a ``_target_`` is, then those inside it."""
    target = str(node["_target_"])
    docs = class_docs(target) if target.startswith("ornstein.") else [Doc()]
    arguments = {name: text for doc in reversed(docs) for name, text in doc.arguments.items()}
    inner: list[tuple[str, Mapping[str, Any]]] = []

    def rows(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
        for key, value in values.items():
            name = f"{prefix}.{key}".lstrip(".")
            if isinstance(value, dict) and "_target_" in value:
                inner.append((name, value))
            elif isinstance(value, dict) and value:
                yield from rows(name, value)
            elif key != "_target_":
                yield name, _as_typed(value), remarks.get(name) or arguments.get(key, "")

    keys = list(rows(path, node))
    if not target.startswith("ornstein."):  # another library's class stands there as a key like any other
        keys.insert(0, (f"{path}._target_", target, remarks.get(f"{path}._target_", "")))
    yield Part(path, target, docs[0], tuple(keys))
    for name, value in inner:
        yield from _parts(name, value, remarks)


def class_docs(target: str) -> list[Doc]:
    """The docstring of a class, then those of its bases, whose arguments it may take."""
    return [parse(base.__doc__) for base in get_class(target).__mro__ if base.__module__.startswith("ornstein.")]


def _as_typed(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
