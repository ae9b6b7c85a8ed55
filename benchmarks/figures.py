"""The README's table of figures: every bundled data set in its own feature space, the real-vs-real floor beside.

::

    python benchmarks/figures.py                                   # what needs no training: a minute or two
    python benchmarks/figures.py --train digits                    # also what `python train.py data=digits` reaches
    python benchmarks/figures.py --run mnist=outputs/train/D/T     # also a finished run of it

For each data set, against its training images: held-out images as they are, which is what a perfect model would score,
and blurred, which is how the figures tell a worse one; then models. Beside each Fréchet distance stands the floor, what
as many random training images would score. Data that are not at hand are named with what to do, and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import compose_train, environment, finite, markdown_table, show_table, use_threads, write
from torch import Tensor

from ornstein.cli.build import build_data, build_metrics
from ornstein.cli.launch import as_ours
from ornstein.errors import OrnsteinError
from ornstein.metrics.figures.naming import main_figure
from ornstein.training import scoring

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("outputs/benchmarks/figures")
# What is composed for each data set; `python train.py` with the same words is its run.
DATA = {
    "digits": ("data=digits",),
    "mnist": ("data=mnist",),
    "fashion_mnist": ("data=fashion_mnist",),
    "emoji": ("data=emoji",),
}
BLURS = (16, 8)  # standard deviation of the blur: the image's side divided by these


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table; the figures of ``count`` images against the training images of ``data``."""

    data: str
    what: str
    count: int
    extractor: str
    fingerprint: str
    name: str  # of the Fréchet distance
    value: float
    floor: float
    interval: tuple[float, float] | None = None
    kid: float | None = None
    kid_se: float | None = None
    accuracy: float | None = None

    def cells(self) -> list[str]:
        """The row as text."""
        spread = "" if self.interval is None else f" ({self.interval[0]:.3g} to {self.interval[1]:.3g})"
        error = "" if self.kid_se is None else f" ± {self.kid_se:.2g}"
        return [
            f"{self.data}: {self.what}",
            self.extractor,
            f"{self.count:,}",
            f"{self.name} {self.value:.3g}{spread}",
            f"{self.floor:.3g}",
            "-" if self.kid is None else f"{self.kid:.2g}{error}",
            "-" if self.accuracy is None else f"{100 * self.accuracy:.1f} %",
        ]


HEADER = ("images", "feature space", "samples", "Fréchet distance (95 %)", "real vs real", "KID ± error", "accuracy")


def row_of(data: str, what: str, report: dict[str, Any]) -> Row:
    """A row from an ``evaluation.json``."""
    values = report["values"]
    name = main_figure(values)
    assert name is not None
    ends = [values.get(f"{name}_{end}") for end in ("low", "high")]
    kid = next(
        (value for key, value in values.items() if re.fullmatch(r"kid(_(?!std|se|low|high)[a-z0-9]+)?", key)), None
    )
    return Row(
        data=data,
        what=what,
        count=report["num_samples"],
        extractor=report["extractor"],
        fingerprint=report["fingerprint"],
        name=name,
        value=values[name],
        floor=next(value for key, value in values.items() if key.endswith("_floor")),
        interval=None if None in ends else (ends[0], ends[1]),
        kid=kid,
        kid_se=next((value for key, value in values.items() if key.startswith("kid_se")), None),
        accuracy=values.get("label_accuracy"),
    )


def real_rows(name: str, *, limit: int | None, bootstrap: int) -> list[Row]:
    """The rows of held-out images, sharp and blurred.

    Args:
        name: of the data set.
        limit: held-out images at most.
        bootstrap: resamples of the intervals.

    Raises:
        OrnsteinError: the data or the feature space are not at hand.
    """
    with as_ours():
        cfg = compose_train([*DATA[name], "callbacks=none", "logger=none", f"++metrics.bootstrap={bootstrap}"])
        data = build_data(cfg)
        data.setup()
        metrics = build_metrics(cfg.metrics)
    if metrics is None:
        raise OrnsteinError(f"data={name} names no feature space.")
    held_out = data.val
    count = len(held_out) if limit is None else min(limit, len(held_out))
    batch = held_out.batch(list(range(count)))
    images, labels = batch["image"], batch.get("label")
    scoring.set_references(metrics, data.reference)
    floor = scoring.floor_of(metrics, data.reference, count)
    rows = []
    for part in (None, *BLURS):
        metrics.reset()
        shown = images if part is None else blurred(images, images.shape[-1] / part)
        metrics.update(shown, labels)
        values = metrics.compute()
        values |= scoring.figures_beside(metrics, floor, values, count)
        what = "held-out images" if part is None else f"the same, blurred (sigma side/{part})"
        rows.append(row_of(name, what, metrics.report(values, floor=floor.to_dict()).to_dict()))
    return rows


def blurred(images: Tensor, sigma: float) -> Tensor:
    """uint8 (N, C, H, W) through a Gaussian of standard deviation ``sigma`` pixels, edges repeated."""
    import torch

    reach = max(1, round(3 * sigma))
    at = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).reshape(1, 1, 1, -1)
    flat = images.float().flatten(0, 1)[:, None]
    for shape in (kernel, kernel.transpose(2, 3)):
        pad = [reach * (shape.shape[3] > 1)] * 2 + [reach * (shape.shape[2] > 1)] * 2
        flat = torch.nn.functional.conv2d(torch.nn.functional.pad(flat, pad, mode="replicate"), shape)
    return flat.round().clamp(0, 255).to(torch.uint8).reshape(images.shape)


def model_row(name: str, run: Path, *, samples: int | None) -> Row:
    """The row of a finished run, scored by ``python evaluate.py run=FOLDER``.

    Raises:
        OrnsteinError: what the command said.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [f"run='{run}'", f"hydra.run.dir='{folder}/evaluation'"]
        _command("evaluate.py", [*words, *([] if samples is None else [f"num_samples={samples}"])])
        report = json.loads((Path(folder) / "evaluation" / "evaluation.json").read_text())
    sampling = report["sampling"]
    what = f"a model after {sampling['images_seen']:,} images, {sampling['sampler']}, NFE {sampling['nfe']}"
    return row_of(name, what, report)


def _command(script: str, words: Sequence[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words], env=environment, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise OrnsteinError(f"{script} {' '.join(words)} failed: {done.stderr[-500:]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Figures of the bundled data sets, the real-vs-real floor beside.")
    parser.add_argument("--rows", help=f"some of the data sets, by commas: {','.join(DATA)} (default: all at hand)")
    parser.add_argument("--train", help="data sets, by commas, of which `python train.py data=NAME` is trained too")
    parser.add_argument(
        "--run", action="append", default=[], metavar="NAME=FOLDER", help="a finished run of a data set"
    )
    parser.add_argument("--samples", type=int, help="of models (default: as many as evaluate.py draws)")
    parser.add_argument("--bootstrap", type=int, default=100, help="resamples of the intervals (default: 100; 0: none)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all cores)")
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", metavar="FILE", help="write the table for the README")
    parser.add_argument(
        "--quick", action="store_true", help="a hundred images, the digits alone: only to see that it runs"
    )
    args = parser.parse_args(argv)
    named = ["digits"] if args.quick else args.rows.split(",") if args.rows else list(DATA)
    trained = args.train.split(",") if args.train else []
    runs = dict(each.split("=", 1) for each in args.run)
    if unknown := [name for name in (*named, *trained, *runs) if name not in DATA]:
        parser.error(f"{', '.join(unknown)}: not among {', '.join(DATA)}")
    threads = use_threads(args.threads)
    rows: list[Row] = []
    missing: dict[str, str] = {}
    for name in named:
        try:
            rows += real_rows(name, limit=100 if args.quick else None, bootstrap=0 if args.quick else args.bootstrap)
        except OrnsteinError as error:
            missing[name] = " ".join(str(error).split())
            print(f"left out: {name}: {missing[name]}", file=sys.stderr)
            continue
        if name in trained:
            runs[name] = str((OUT / name).absolute())
            _command("train.py", [*DATA[name], "logger=csv", f"hydra.run.dir='{runs[name]}'"])
        if name in runs:
            rows.append(model_row(name, Path(runs[name]), samples=args.samples))
    show_table("figures", HEADER, [row.cells() for row in rows])
    record = {"rows": [asdict(row) for row in rows], "left_out": missing, "environment": environment(threads)}
    if args.json:
        write(args.json, json.dumps(finite(record), indent=2) + "\n")
    if args.markdown:
        write(args.markdown, markdown_table(HEADER, [row.cells() for row in rows]))


if __name__ == "__main__":
    main()
