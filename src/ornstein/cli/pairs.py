"""Commands that are no Hydra apps, and take key=value words all the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence

from ornstein.errors import OrnsteinError


def run_command(body: Callable[[Sequence[str]], object], *, help_text: str) -> None:
    """Runs a command on the words that were typed, or prints its help; a mistake is one sentence and exit code 1."""
    from ornstein.cli.launch import fail

    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text, end="")
        return
    try:
        body(sys.argv[1:])
    except OrnsteinError as error:
        fail(error)


def read_pairs(words: Sequence[str], keys: Collection[str], *, command: str) -> dict[str, str]:
    """The values by key, without the quotes that a shell may have left.

    Raises:
        OrnsteinError: a word that is no key=value, or a key that the command does not have.
    """
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in keys:
            raise OrnsteinError(f"{word} is not known here; python -m {command} --help lists the keys.")
        given[key] = value.strip("'\"")
    return given
