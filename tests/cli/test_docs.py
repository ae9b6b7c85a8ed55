"""The generated page of the design space: up to date, whole, and with links that lead somewhere."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import get_class

from ornstein.cli.launch import conf_dir
from ornstein.cli.options.docstrings import parse, prose
from ornstein.cli.options.files import Option, Part
from ornstein.cli.options.measure import measure
from ornstein.cli.options.page import described, groups

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "design_space.md"
STALE = "docs/ is not what docstrings and conf/ say: run `make docs` and commit the pages"
TYPED = [f"{group}={path.stem}" for group in groups() for path in sorted((conf_dir() / group).glob("*.yaml"))]
NO_SOURCE = {"guidance=none"}  # what nobody invented
GIVEN = {"denoiser", "decode"}  # what the commands themselves hand to a class: a loaded model, the codec


def test_the_pages_are_what_docstrings_and_configs_say(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "ornstein.cli.options", str(tmp_path)], check=True, timeout=300)
    assert {path.name for path in tmp_path.iterdir()} == {"design_space.md", "networks.md"}
    for written in tmp_path.iterdir():
        assert written.read_text(encoding="utf-8") == (PAGE.parent / written.name).read_text(encoding="utf-8"), STALE


def entry(typed: str) -> tuple[Option, list[Part]]:
    group, _, name = typed.partition("=")
    return next((option, parts) for option, parts in described(group) if option.name == name)


@pytest.mark.parametrize("typed", TYPED)
def test_an_option_says_what_it_is_its_equation_its_source_and_when_to_choose_it(typed: str) -> None:
    option, parts = entry(typed)
    assert option.comment, "its YAML file begins with no comment"
    assert parts or not option.node, "it builds no class of ours"
    for part in parts:
        assert part.doc.body, f"{part.target} has no docstring"
        if part.target.startswith("ornstein.diffusion."):
            assert part.doc.source or typed in NO_SOURCE, f"{part.target} has no sentence that begins with Source:"
            assert part.doc.when, f"{part.target} has no sentence that begins with When:"
            assert re.search(r"```math|\$`", part.doc.body), f"{part.target} has no equation"


@pytest.mark.parametrize("typed", TYPED)
def test_every_key_says_what_it_is(typed: str) -> None:
    option, _ = entry(typed)
    untold = [name for part in option.parts for name, _, what in part.keys if not what.strip()]
    assert untold == [], "neither a comment behind the key in the YAML file nor a line under Args:"


def arguments(built: type) -> set[str]:
    """Names that a class takes, those that it hands on to its bases included."""
    names: set[str] = set()
    for base in built.__mro__:
        if "__init__" in vars(base):
            taken = list(inspect.signature(base.__init__).parameters.values())[1:]
            own = base is built  # what a base wants without a default, the class gives it itself
            named = [one for one in taken if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
            names |= {one.name for one in named if own or one.default is not one.empty}
            if all(one.kind != one.VAR_KEYWORD for one in taken):
                break
    return names


@pytest.mark.parametrize("typed", TYPED)
def test_every_argument_of_a_class_is_a_key(typed: str) -> None:
    option, _ = entry(typed)
    brought = {choice.key.split(".")[0] for choice in option.choices}
    for part in filter(lambda one: one.is_ours, option.parts):
        named = {name.removeprefix(f"{part.path}.").split(".")[0] for name, _, _ in part.keys}
        inside = {one.path.removeprefix(f"{part.path}.").split(".")[0] for one in option.parts if one is not part}
        assert arguments(get_class(part.target)) - named - inside - brought - GIVEN == set(), "not in the YAML file"


def test_links_lead_to_headings() -> None:
    text = PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(set(anchors)) == len(anchors)
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= set(anchors)
    files = re.findall(r"\]\((\.\./[^)]*|images/[^)]*)\)", text)
    assert files
    assert [name for name in files if not (PAGE.parent / name).is_file()] == []


def test_every_option_has_its_heading() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^### `(.*)`$", text, re.MULTILINE) == TYPED
    assert {"scheduler=cosine", "objective/time=uniform", "sampler/grid=karras", "guidance=cfg"} <= set(TYPED)


def test_equations_close_what_they_open() -> None:
    text = PAGE.read_text(encoding="utf-8")
    equations = re.findall(r"^```math\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL) + re.findall(r"\$`(.*?)`\$", text)
    assert len(equations) > 50
    for equation in equations:
        bare = re.sub(r"\\[{}]", "", equation)
        assert bare.count("{") == bare.count("}"), equation
        assert equation.count(r"\left") - equation.count(r"\leftarrow") == equation.count(r"\right") - equation.count(
            r"\rightarrow"
        ), equation
        assert ":math:" not in equation


DOCSTRING = r"""A thing, see :class:`~ornstein.diffusion.samplers.DDIM` and ``code * here``.

With :math:`a_1 | b` and alpha**2 + sigma**2:

.. math::
    x &= y \\
    z &= w

Order 1. Source: Song et al. 2021 (arXiv 2010.02502), eqs. 12 and 16. More follows. When: few
steps.

- one entry
- another, that
  goes on

Args:
    first: what it is, on
        two lines.
    second (int): the rest.

The end.

Raises:
    ValueError: never shown.
"""


def test_a_docstring_is_taken_apart() -> None:
    doc = parse(DOCSTRING)
    assert doc.source == "Song et al. 2021 ([arXiv 2010.02502](https://arxiv.org/abs/2010.02502)), eqs. 12 and 16."
    assert doc.when == "few steps."
    assert doc.arguments == {"first": "what it is, on two lines", "second": "the rest"}
    assert doc.body.split("\n\n") == [
        "A thing, see `DDIM` and `code * here`.",
        r"With $`a_1 | b`$ and alpha\*\*2 + sigma\*\*2:",
        "```math\n\\begin{aligned}\nx &= y \\\\\nz &= w\n\\end{aligned}\n```",
        "Order 1. More follows.",
        "- one entry\n- another, that goes on",
        "The end.",
    ]


def test_no_docstring_says_nothing() -> None:
    assert parse(None).body == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x_t and _private_", r"x_t and \_private\_"),
        ("a < b ~ c", r"a \< b \~ c"),
        (":math:`\\{a\\}`", r"$`\{a\}`$"),
    ],
)
def test_prose_reads_as_it_was_written(text: str, expected: str) -> None:
    assert prose(text) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddim", ("1", "N", "no")),
        ("heun", ("2", "2 N - 1", "no")),  # the last step ends at sigma = 0 and is Euler's
        ("ddpm", ("", "N", "yes")),
        ("rk45", ("", "as the tolerance asks", "no")),
    ],
)
def test_samplers_are_measured(name: str, expected: tuple[str, str, str]) -> None:
    assert measure(name) == expected
