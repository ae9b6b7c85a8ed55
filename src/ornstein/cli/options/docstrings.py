"""Docstrings of the package as GitHub's Markdown: prose, equations, source, when to use, and arguments."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field

_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
_ARGUMENT = re.compile(r"(\w+)(?: \([^)]*\))?: (.*)")
_MATH = ".. math::"
# Full stops that end no sentence.
_ABBREVIATION = re.compile(r"(?:\b(?:al|algs?|app|cf|ch|e\.g|eqs?|figs?|i\.e|no|p|pp|secs?|thm|vs))$", re.IGNORECASE)
_MARKUP = re.compile(r"``(?P<literal>.+?)``|:math:`(?P<math>.+?)`|:\w+:`~?(?P<role>[^`]+)`|`(?P<code>[^`]+)`")
_ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Doc:
    """What a docstring says, in Markdown.

    Attributes:
        body: paragraphs and display equations, without what stands below.
        source: what follows ``Source:``, empty where there is none.
        when: what follows ``When:``, empty where there is none.
        arguments: the entries of ``Args:`` by name.
    """

    body: str = ""
    source: str = ""
    when: str = ""
    arguments: dict[str, str] = field(default_factory=dict)


def parse(docstring: str | None) -> Doc:
    """Reads a docstring in the package's manner; ``None`` says nothing."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    blocks: list[str] = []
    sources: list[str] = []
    whens: list[str] = []
    arguments: dict[str, str] = {}
    while lines:
        line = lines.pop(0)
        section = _SECTION.match(line)
        if section or line.startswith(_MATH):
            inner = _indented(lines)
            if section is None:
                blocks += _equations([line.removeprefix(_MATH), *inner])
            elif section[1] == "Args":
                arguments |= _arguments(inner)
        elif line:
            text = _paragraph(line, lines)
            source, text = _take("Source:", text)
            when, text = _take("When:", text)
            sources += source
            whens += when
            if text:
                blocks.append(text if text.startswith("- ") else prose(text))
    return Doc("\n\n".join(blocks), prose(" ".join(sources)), prose(" ".join(whens)), arguments)


def prose(text: str) -> str:
    """One paragraph: literals, roles and inline equations in GitHub's form, all else as it reads."""
    made, end = [], 0
    for found in _MARKUP.finditer(text):
        made.append(_plain(text[end : found.start()]))
        end = found.end()
        if found["math"]:
            # The form with backticks: in the bare one Markdown takes the backslashes of \, and \{ away.
            made.append(f"$`{found['math']}`$")
        else:
            made.append(f"`{found['literal'] or found['code'] or found['role'].rpartition('.')[2]}`")
    made.append(_plain(text[end:]))
    return "".join(made)


def _plain(text: str) -> str:
    text = re.sub(r"[*~$<\\]", r"\\\g<0>", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _indented(lines: list[str]) -> list[str]:
    """Takes the indented lines (and blank ones between them) off the front."""
    inner = []
    while lines and (not lines[0] or lines[0].startswith(" ")):
        inner.append(lines.pop(0))
    return inner


def _paragraph(first: str, lines: list[str]) -> str:
    """Takes the rest of a paragraph off the front; a list keeps a line for each entry."""
    listed = first.startswith("- ")
    text = first
    while lines and lines[0] and not lines[0].startswith(_MATH) and not _SECTION.match(lines[0]):
        line = lines.pop(0)
        text += ("\n" if listed and line.startswith("- ") else " ") + line.strip()
    return "\n".join(f"- {prose(entry[2:])}" for entry in text.split("\n")) if listed else text


def _equations(lines: list[str]) -> list[str]:
    """One block for each equation; blank lines part them."""
    made = []
    for equation in re.split(r"\n\s*\n", "\n".join(line.strip() for line in lines).strip()):
        if "\\begin" not in equation and ("&" in equation or r"\\" in equation):
            equation = f"\\begin{{aligned}}\n{equation}\n\\end{{aligned}}"
        made.append(f"```math\n{equation}\n```")
    return made


def _arguments(lines: list[str]) -> dict[str, str]:
    made: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc("\n".join(lines)).splitlines():
        entry = _ARGUMENT.match(line)
        if entry:
            name = entry[1]
            made[name] = entry[2]
        elif name and line:
            made[name] += f" {line.strip()}"
    return {name: prose(text.rstrip(".")) for name, text in made.items()}


def _take(label: str, text: str) -> tuple[list[str], str]:
    """Takes every sentence that begins with ``label`` out of a paragraph."""
    taken = []
    while (start := text.find(label)) >= 0:
        rest = text[start + len(label) :]
        end = next(
            (
                stop.end()
                for stop in re.finditer(r"\.(?=\s+[^a-z(\d]|\s*$)", rest)
                if not _ABBREVIATION.search(rest[: stop.start()])
            ),
            len(rest),
        )
        taken.append(rest[:end].strip())
        text = f"{text[:start].rstrip()} {rest[end:].strip()}".strip()
    return taken, text
