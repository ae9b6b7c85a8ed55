"""``python -m ornstein.cli.ema run=... std=0.05,0.1,0.15``: averages of other lengths, after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from ornstein.cli.pairs import read_pairs, run_command
from ornstein.errors import OrnsteinError

HELP = """usage: python -m ornstein.cli.ema run=FOLDER [std=0.05,0.1,0.15] [step=N] [out=FOLDER]

Makes averages of any length out of the snapshots of a run that was trained with ema=power, as safetensors.

  run=FOLDER            the run's folder
  std=0.05,0.1,0.15     lengths: the relative standard deviation of the average's profile; none only lists the snapshots
  step=N                as if training had ended at that snapshot; the last one unless given
  out=FOLDER            where to; ema in the run's folder unless given

What draws and scores needs no file: sample.py run=FOLDER weights=0.15, evaluate.py -m run=FOLDER weights=0.05,0.1,0.15
"""


@dataclass(frozen=True)
class Request:
    """What is asked for; the attributes are the command's keys."""

    run: Path
    stds: tuple[float, ...]
    step: int | None = None
    out: Path | None = None


def main() -> None:
    """Entry point."""
    run_command(lambda words: make(parse(words)), help_text=HELP)


def parse(words: Sequence[str]) -> Request:
    """The command line as a request.

    Raises:
        OrnsteinError: an unknown key, no run, or what should be a number and is none.
    """
    given = read_pairs(words, ("run", "std", "step", "out"), command="ornstein.cli.ema")
    if "run" not in given:
        raise OrnsteinError("run= is missing: add run=outputs/train/<date>/<time> say.")
    try:
        stds = tuple(float(std) for std in given.get("std", "").strip("[]").split(",") if std.strip())
        step = int(given["step"]) if "step" in given else None
    except ValueError:
        raise OrnsteinError(
            f"std={given.get('std', '')} step={given.get('step', '')}: std takes numbers such as 0.05,0.1 and step one."
        ) from None
    return Request(Path(given["run"]).expanduser(), stds, step, Path(given["out"]) if "out" in given else None)


def make(request: Request) -> list[Path]:
    """Writes an average for each length, or lists the snapshots where none is asked for; returns the files.

    Raises:
        OrnsteinError: no snapshots, a length that cannot be made of them, or a file that cannot be written.
    """
    from rich.progress import track
    from safetensors.torch import save

    from ornstein.experiment.atomic import replace_file
    from ornstein.training.posthoc import FOLDER, mixture_of, reconstruct, snapshots_of

    snapshots = snapshots_of(request.run)
    steps = sorted({each.step for each in snapshots})
    kept = ", ".join(sorted({f"{each.std:g}" for each in snapshots}))
    print(f"{len(snapshots)} snapshots of std {kept} at steps {', '.join(map(str, steps))}")
    place, step = request.out or request.run / FOLDER, request.step or steps[-1]
    for std in request.stds:  # all that can be refused is refused before the first file is written
        mixture_of(snapshots, std, step=request.step)
    written = []
    for std in track(request.stds, "averaging", transient=True):
        weights = reconstruct(snapshots, std, step=request.step)
        path = place / f"average_{step:06d}_std_{std:.3f}.safetensors"
        facts = {"format": "pt", "step": str(step), "std": str(std)}
        data = save(weights, metadata=facts)
        try:
            replace_file(path, partial(_write, data))
        except OSError as error:
            raise OrnsteinError(f"{path} could not be written ({error}): make room, or name another out=.") from error
        written.append(path)
        print(f"written {path}")
    return written


def _write(data: bytes, file: IO[bytes]) -> None:
    file.write(data)


if __name__ == "__main__":
    main()
