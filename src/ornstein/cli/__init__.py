"""The command line: the only place that knows Hydra. ``ornstein COMMAND``, or the root's scripts."""

from __future__ import annotations

import sys

_COMMANDS = ("train", "sample", "evaluate", "encode", "prepare", "export", "convert", "ema", "report", "dashboard")


def main() -> None:
    """Entry point of the ``ornstein`` command: hands what follows the first word to that command."""
    if len(sys.argv) < 2 or sys.argv[1] not in _COMMANDS:
        asked_for_help = len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help")
        print(
            f"usage: ornstein {{{'|'.join(_COMMANDS)}}} [group=option] [key=value] ...\n"
            "       ornstein train --help     lists every group and option",
            file=sys.stdout if asked_for_help else sys.stderr,
        )
        raise SystemExit(0 if asked_for_help else 2)
    command = sys.argv.pop(1)
    sys.argv[0] = f"ornstein {command}"
    from importlib import import_module

    import_module(f"ornstein.cli.{command}").main()
