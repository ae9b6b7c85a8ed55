"""``python -m ornstein.cli.report outputs/...``: one self-contained page about a run or a sweep."""

from __future__ import annotations

import argparse
from pathlib import Path

from ornstein.errors import OrnsteinError


def main() -> None:
    """Entry point."""
    from ornstein.cli.launch import fail

    parser = argparse.ArgumentParser(
        prog="python -m ornstein.cli.report",
        description="Writes report.html: table, curves, quality against cost and pictures of a run, or of all runs "
        "below a folder, in one file that opens anywhere.",
    )
    parser.add_argument(
        "folder", type=Path, help="a run's folder, or one that holds several: outputs/train/multirun/..."
    )
    parser.add_argument("--out", type=Path, help="the file; report.html in FOLDER unless given")
    parser.add_argument("--pictures", type=int, default=6, help="pictures of each kind that a run shows (default: 6)")
    arguments = parser.parse_args()
    try:
        print(f"written {report(arguments.folder, out=arguments.out, pictures=arguments.pictures)}")
    except OrnsteinError as error:
        fail(error)


def report(folder: Path, *, out: Path | None = None, pictures: int = 6) -> Path:
    """Writes the page, with a line of progress, and returns its path.

    Raises:
        OrnsteinError: no run there, a number below 1, or a page that cannot be written.
    """
    from rich.console import Console

    from ornstein.experiment.report.page import write_report

    if pictures < 1:
        raise OrnsteinError(f"--pictures {pictures} must be at least 1.")
    with Console(stderr=True).status("reading runs") as status:
        try:
            return write_report(
                folder, out=out, max_pictures=pictures, advance=lambda name: status.update(f"read {name}")
            )
        except OSError as error:
            raise OrnsteinError(
                f"the report could not be written ({error}): make room, or name another --out."
            ) from error


if __name__ == "__main__":
    main()
