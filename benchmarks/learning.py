"""Learning, not just running: every network trained on the bundled digits with one budget, and scored.

::

    python benchmarks/learning.py --markdown table.md --json figures.json     # all rows: about a quarter of an hour
    python benchmarks/learning.py --rows dit,latent_dit --check               # fails where a bar is missed

Each row is what ``python train.py ROW`` trains from fresh weights and ``python evaluate.py run=FOLDER`` scores: label
accuracy (how often the digits' classifier reads the class that was asked for) and FID in the digits' feature space, of
as many samples as there are training scans, beside the FID of as many real images. The budget is a number of steps,
so that a row's figures do not depend on how fast a machine is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import environment, finite, markdown_table, show_table, use_threads, write

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("outputs/benchmarks/learning")
SAMPLES = 1438  # as many as training scans
STEPS = 25  # of DDIM, the runs' own sampler: one evaluation each
# Nothing beside training: its end is scored by evaluate.py, and no picture counts.
QUIET = (
    "logger=csv",
    "callbacks.validation.every=null",
    "~callbacks.sample_grid",
    "callbacks.evaluation.num_samples=0",
    "callbacks.checkpoint.every=null",
    "~callbacks.trajectory",
    "~callbacks.schedule_plot",
)
HYDRA_HINT = "Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."


@dataclass(frozen=True)
class Row:
    """What is trained, for how long, and the bars that its figures must reach."""

    words: str  # of train.py
    steps: int = 600  # of 64 images, 27 times through the data
    accuracy: float = 0.9  # at least; 0.1 is chance
    fid: float = 3.0  # at most; 64 is the distance of the data to their own mean image


ROWS = {
    "class_unet": Row("model=class_unet"),
    "class_unet_concat": Row("model=class_unet model.network.label_mode=concat"),
    "class_unet_cross_attention": Row("model=class_unet model.network.label_mode=cross_attention"),
    "dit": Row("model=dit", steps=1200),
    "latent_unet": Row("model=latent_unet"),
    "latent_dit": Row("model=latent_dit", steps=1200),
    "text_unet": Row("model=text_unet"),
    "edm2_tiny": Row(
        "model=class_unet model/network=edm2_tiny model.learning_rate=1e-2 optimizer.weight_decay=0", steps=1200
    ),
    "unet_diffusers": Row("model=unet_diffusers"),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A row's figures; NaN and ``failed`` where a command did not come to its end."""

    row: str
    command: str
    steps: int
    seconds: float = math.nan  # of train.py as a whole
    parameters: float = math.nan
    accuracy: float = math.nan
    fid: float = math.nan
    fid_floor: float = math.nan
    near: float = math.nan
    failed: str | None = None

    @property
    def bars(self) -> Row:
        """What has to be reached."""
        return ROWS[self.row]

    @property
    def met(self) -> bool:
        """Whether both bars are reached."""
        return self.failed is None and self.accuracy >= self.bars.accuracy and self.fid <= self.bars.fid


def measure(name: str, *, seed: int, folder: Path, threads: int, steps: int | None, samples: int) -> Outcome:
    """Trains and scores a row through the commands."""
    row = ROWS[name]
    count = row.steps if steps is None else steps
    words = [*row.words.split(), f"trainer.max_steps={count}"]
    facts: dict[str, Any] = {"row": name, "command": f"python train.py {row.words} trainer.max_steps={count}"}
    run = folder / "run"
    started = time.perf_counter()
    failed = _command("train.py", [*words, f"seed={seed}", *QUIET, _folder(run)], threads=threads)
    seconds = time.perf_counter() - started
    if failed is None:
        asked = [f"run={_quoted(run)}", f"num_samples={samples}", f"seed={seed}", f"sampler.steps={STEPS}"]
        failed = _command("evaluate.py", [*asked, _folder(folder / "evaluation")], threads=threads)
    if failed is not None:
        return Outcome(**facts, steps=count, failed=failed)
    from ornstein.metrics import main_figure

    summary = json.loads((run / "summary.json").read_text())
    values = json.loads((folder / "evaluation" / "evaluation.json").read_text())["values"]
    return Outcome(
        **facts,
        steps=count,
        seconds=seconds,
        parameters=summary["parameters"],
        accuracy=values.get("label_accuracy", math.nan),
        fid=values[main_figure(values) or "fid"],
        fid_floor=values["fid_floor"],
        near=values["memorised_share"],
    )


def _command(script: str, words: Sequence[str], *, threads: int) -> str | None:
    """Runs one of the root's scripts; what it said where it failed, None where it did not."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, str(ROOT / script), *words], env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    told = " ".join(done.stderr.replace(HYDRA_HINT, "").split())
    return told[told.rfind("error: ") :][-400:] if told else f"{script} ended with {done.returncode}"


def _folder(path: Path) -> str:
    return f"hydra.run.dir={_quoted(path)}"


def _quoted(path: Path) -> str:
    text = str(path.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


HEADER = ("model", "steps", "s", "parameters", "accuracy %", "at least", "FID", "at most", "real FID", "near %")


def lines(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The table's rows; a bar that is missed stands in bold."""
    return [
        [
            one.row, f"{one.steps}", _number(one.seconds, ".0f"), _number(one.parameters, ",.0f"),
            _bold(_number(100 * one.accuracy, ".1f"), one.accuracy >= one.bars.accuracy),
            f"{100 * one.bars.accuracy:.0f}", _bold(_number(one.fid, ".2f"), one.fid <= one.bars.fid),
            f"{one.bars.fid:g}", _number(one.fid_floor, ".2f"), _number(100 * one.near, ".1f"),
        ]
        for one in outcomes
    ]  # fmt: skip


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _bold(text: str, met: bool) -> str:
    return text if met else f"**{text}**"


def summary(outcomes: Sequence[Outcome], *, seed: int, samples: int, where: dict[str, Any]) -> str:
    """The Markdown: how, the table, and the commands."""
    return "\n".join([
        f"{samples} samples of {STEPS} DDIM steps without guidance; seed {seed}, {where['threads']} thread(s), "
        f"torch {where['torch']}.",
        "",
        markdown_table(HEADER, lines(outcomes)),
        "```",
        *(one.command for one in outcomes),
        f"python evaluate.py run=FOLDER num_samples={samples} sampler.steps={STEPS}",
        "```",
        *(f"- {one.row}: {one.failed}" for one in outcomes if one.failed is not None),
    ]) + "\n"  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 where ``--check`` finds a bar missed."""
    parser = argparse.ArgumentParser(description="Every network on the bundled digits with one budget, and scored.")
    parser.add_argument("--rows", help=f"some of {', '.join(ROWS)}, by commas (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise (default: 0)")
    parser.add_argument("--steps", type=int, help="of training instead of the row's own")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"to score (default: {SAMPLES})")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all cores)")
    parser.add_argument("--json", metavar="FILE", help="write every figure; again after each row")
    parser.add_argument("--markdown", metavar="FILE", help="write the table")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--quick", action="store_true", help="20 steps, 80 samples: only to see that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.samples = args.steps or 20, min(args.samples, 80)
    names = list(ROWS) if args.rows is None else args.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"--rows: {', '.join(unknown)} is not among {', '.join(ROWS)}")
    threads = use_threads(args.threads)
    where = environment(threads)
    folder = OUT / time.strftime("%Y-%m-%d_%H-%M-%S")
    outcomes: list[Outcome] = []
    for name in names:
        print(f"{name} ...", flush=True)
        one = measure(
            name, seed=args.seed, folder=folder / name, threads=threads, steps=args.steps, samples=args.samples
        )
        outcomes.append(one)
        told = one.failed or f"accuracy {100 * one.accuracy:.1f} %, FID {one.fid:.2f}, {one.seconds:.0f} s"
        print(f"{name}: {told}", flush=True)
        if args.json:
            record = {"seed": args.seed, "samples": args.samples, "environment": where}
            record["rows"] = [asdict(each) | {"bars": asdict(each.bars), "met": each.met} for each in outcomes]
            write(args.json, json.dumps(finite(record), indent=2) + "\n")
    show_table("learning: figures and bars", HEADER, lines(outcomes))
    if args.markdown:
        write(args.markdown, summary(outcomes, seed=args.seed, samples=args.samples, where=where))
    missed = [one.row for one in outcomes if not one.met]
    print(f"bars missed: {', '.join(missed)}" if missed else "every bar is met")
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
