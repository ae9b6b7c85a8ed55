"""``python -m ornstein.cli.report outputs/...``: one self-contained page about a run or a sweep."""

from __future__ import annotations

import argparse
from pathlib import Path

from ornstein.errors import OrnsteinError

MEGABYTES, LEAST = 14, 6


def main() -> None:
    """Entry point."""
    from ornstein.cli.launch import fail

    parser = argparse.ArgumentParser(
        prog="python -m ornstein.cli.report",
        description="Writes report.html: table, curves, quality against cost and pictures of a run, of all runs below "
        "a folder, or of several such, in one file that opens anywhere.",
    )
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        type=Path,
        nargs="+",
        help="a run's folder, or one that holds several: outputs/train/multirun/...",
    )
    parser.add_argument("--out", type=Path, help="the file; report.html in FOLDER unless given, of several in this one")
    parser.add_argument("--pictures", type=int, default=6, help="pictures of each kind that a run shows (default: 6)")
    parser.add_argument(
        "--megabytes",
        type=float,
        default=MEGABYTES,
        help=f"about how large the page may become: pictures are made smaller where it would be larger ({MEGABYTES})",
    )
    given = parser.parse_args()
    try:
        path = report(*given.folders, out=given.out, pictures=given.pictures, megabytes=given.megabytes)
        print(f"written {path}")
    except OrnsteinError as error:
        fail(error)


def report(*folders: Path, out: Path | None = None, pictures: int = 6, megabytes: float = MEGABYTES) -> Path:
    """Writes the page, with a line of progress, and returns its path.

    Raises:
        OrnsteinError: no run there, a number that is too small, or a page that cannot be written.
    """
    from rich.console import Console

    from ornstein.experiment.report.page import write_report

    if pictures < 1:
        raise OrnsteinError(f"--pictures {pictures} must be at least 1.")
    if not megabytes >= LEAST:
        raise OrnsteinError(f"--megabytes {megabytes:g} must be at least {LEAST}: the plotting library alone takes 5.")
    with Console(stderr=True).status("reading runs") as status:
        try:
            return write_report(
                folders,
                out=out,
                max_pictures=pictures,
                max_bytes=int(megabytes * 1e6),
                advance=lambda name: status.update(f"read {name}"),
            )
        except OSError as error:
            raise OrnsteinError(
                f"the report could not be written ({error}): make room, or name another --out."
            ) from error


if __name__ == "__main__":
    main()
