"""Quality against the clock: a bare diffusers loop and ours, trained in turn for a given time, scored alike.

::

    python benchmarks/quality_vs_time.py                          # digits 8x8: 3 seeds, about 20 minutes
    python benchmarks/quality_vs_time.py --row fashion_mnist      # 32x32: 3 seeds, about 65 minutes

Both train on the training split alone. Only training is timed: neither set-up nor sampling nor scoring. Ours learns
its learning-rate schedule's length (``trainer.max_steps``) from a throw-away model timed just before, and a clock
stops it at the budget should the machine have slowed down since. Every method takes the same number of network
evaluations a sample at guidance 1 and the same balanced labels, with its own averaged weights; figures are taken in
the feature space that the package ships. ``benchmarks/README.md`` says how to read them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import (
    TIMED,
    Ours,
    TrainingClock,
    compose_train,
    environment,
    finite,
    image_flops,
    markdown_table,
    median,
    show_table,
    timed_step,
    use_threads,
    write,
)
from hydra.utils import instantiate
from peers import DIGITS, FASHION_MNIST, BareConfig, BareDiffusersLoop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from scoring import CHANCE, Judge, merged, save_grid
from torch import Tensor

from ornstein.cli.build import build_data
from ornstein.metrics import ClassifierFeatures, features_by_name
from ornstein.networks.cost import count_parameters
from ornstein.training.estimate import forward_flops
from ornstein.training.module import DiffusionModule

MARGIN = 0.97  # of the budget that max_steps is planned for: a machine is not equally fast all the time
PICTURES = Path("outputs/benchmarks/quality_vs_time")


@dataclass(frozen=True)
class Method:
    """One line of the table: ``overrides`` of ``train.py``, None for the bare loop; ``share`` of the row's time."""

    title: str
    overrides: tuple[str, ...] | None = ()
    share: float = 1.0


@dataclass(frozen=True)
class Row:
    """A data set with its time, its scoring and its methods."""

    overrides: tuple[str, ...]
    bare: BareConfig
    seconds: float
    samples: int | None  # None: as many as training images
    evaluations: int
    methods: dict[str, Method]


BARE = Method("bare diffusers loop", None)
ROWS = {
    "digits": Row(
        ("data=digits",), DIGITS, seconds=110.0, samples=None, evaluations=50,
        methods={
            "bare": BARE,
            "third": Method("ours, a third of the time", share=1 / 3),
            "equal": Method("ours"),
            "dit": Method("ours, model=dit scheduler=cosine", ("model=dit", "scheduler=cosine")),
        },
    ),
    "fashion_mnist": Row(
        ("data=fashion_mnist",), FASHION_MNIST, seconds=600.0, samples=1000, evaluations=25,
        methods={"bare": BARE, "equal": Method("ours")},
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One training and its figures."""

    method: str
    seed: int
    budget: float
    seconds: float
    steps: int
    batch_size: int
    images_per_s: float
    parameters: int
    mflops: float
    sampler: str
    evaluations: int
    accuracy: float
    fid: float
    distance: float  # median distance to the nearest training image, in feature space
    near: float  # share of samples nearer than the held-out images' 5th percentile
    copies: float


@dataclass(frozen=True)
class Trained:
    """A training's totals, and how to draw from it."""

    seconds: float
    steps: int
    batch_size: int
    parameters: int
    flops: float
    sampler: str
    sample: Callable[[Tensor], tuple[Tensor, int]]  # labels -> uint8 images, evaluations a sample


def train_bare(
    images: Tensor, labels: Tensor, config: BareConfig, *, seconds: float, seed: int, watch: Callable[..., None]
) -> Trained:
    """The bare loop, in slices of two seconds so that its progress shows."""
    loop = BareDiffusersLoop(images, labels, config, seed=seed)
    while loop.seconds < seconds:
        loop.train(min(2.0, seconds - loop.seconds))
        watch(loop.seconds, loop.steps)

    def sample(asked: Tensor) -> tuple[Tensor, int]:
        return loop.sample(len(asked), asked, steps=config.sample_steps, seed=seed), config.sample_steps

    shape = (config.channels, config.image_size, config.image_size)
    flops = image_flops(loop.unet, shape, class_labels=torch.zeros(1, dtype=torch.int64))
    return Trained(loop.seconds, loop.steps, config.batch_size, loop.parameters, flops, "DDIM", sample)


def train_ours(
    overrides: Sequence[str], *, seconds: float, evaluations: int, seed: int, quick: bool, watch: Callable[..., None]
) -> Trained:
    """Ours as ``python train.py OVERRIDES`` trains it, its schedule cut to what fits into ``seconds``."""
    words = [*overrides, f"seed={seed}"]
    measured = timed_step(words, warm=2 if quick else 5, steps=3 if quick else 15, seconds=0.03 * seconds)
    max_steps = max(1, int(MARGIN * seconds / measured))
    cfg = compose_train([*words, *TIMED, f"trainer.max_steps={max_steps}"])
    clock = TrainingClock(seconds, watch=watch)
    ours = Ours(cfg, extra=[clock])
    ours.fit()
    sampler, name = with_evaluations(cfg, ours.module, evaluations)

    def sample(asked: Tensor) -> tuple[Tensor, int]:
        drawn = list(ours.module.generate(range(len(asked)), sampler=sampler, labels=asked.tolist(), seed=seed))
        return torch.cat([batch.images.cpu() for batch in drawn]), drawn[-1].nfe

    return Trained(
        clock.seconds, len(clock.ends), ours.module.images_seen // len(clock.ends),
        count_parameters(ours.module.network), forward_flops(ours.module), name, sample,
    )  # fmt: skip


def with_evaluations(cfg: Any, module: DiffusionModule, evaluations: int) -> tuple[Any, str]:
    """The run's own sampler with as many steps as make exactly ``evaluations`` network evaluations a sample.

    Never more; one less where the sampler cannot take an odd or even number. With its name and steps.
    """
    best: tuple[int, Any, str] | None = None
    for steps in dict.fromkeys((evaluations, evaluations // 2 + 1, evaluations // 2)):
        node = cfg.sampler.copy()
        node.steps = max(1, steps)
        sampler = instantiate(node)
        spent = next(iter(module.generate(range(1), sampler=sampler))).nfe
        if spent <= evaluations and (best is None or spent > best[0]):
            best = spent, sampler, f"{type(sampler).__name__}, {node.steps} steps"
    assert best is not None
    return best[1], best[2]


def run(row_name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and scores every method on every seed; writes the record after each."""
    row, console = ROWS[row_name], Console(stderr=True)
    threads = use_threads(args.threads)
    evaluations = args.evaluations or row.evaluations
    base = compose_train([*row.overrides, *args.override])
    data = build_data(base)
    data.setup()
    samples = args.samples or row.samples or len(data.train)
    features = features_by_name(base.data.features)
    assert isinstance(features, ClassifierFeatures)
    console.print(f"{row_name}: {len(data.train)} training images, measuring the real ones ...")
    judge = Judge.of(data, features, samples=samples)
    train = data.train.batch(torch.arange(len(data.train)))
    bare = replace(row.bare, sample_steps=evaluations)
    asked = torch.arange(samples) % bare.num_classes
    record: dict[str, Any] = {
        "row": row_name,
        "seconds": args.seconds or row.seconds,
        "samples": samples,
        "evaluations": evaluations,
        "training_images": len(data.train),
        "features": {"name": features.name, "fingerprint": features.fingerprint},
        "override": list(args.override),
        "environment": environment(threads),
        "titles": {key: row.methods[key].title for key in args.methods},
        "floor": judge.floor,
        "outcomes": [],
    }
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[info]}"))
    # No thread of its own, which would take time from training: the bar moves when a step has ended.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for key in args.methods:
                method = row.methods[key]
                budget = record["seconds"] * method.share
                task = progress.add_task(f"seed {seed}: {method.title}", total=budget, info="")
                watch = _watcher(progress, task, budget)
                if method.overrides is None:
                    trained = train_bare(train["image"], train["label"], bare, seconds=budget, seed=seed, watch=watch)
                else:
                    trained = train_ours(
                        [*row.overrides, *method.overrides, *args.override], seconds=budget,
                        evaluations=evaluations, seed=seed, quick=args.quick, watch=watch,
                    )  # fmt: skip
                progress.update(task, completed=budget, info="sampling")
                progress.refresh()
                images, spent = trained.sample(asked)
                save_grid(images, bare.num_classes, data.class_names, PICTURES / f"{row_name}_{key}_seed{seed}.png")
                outcome = Outcome(
                    method=key, seed=seed, budget=budget, seconds=trained.seconds, steps=trained.steps,
                    batch_size=trained.batch_size,
                    images_per_s=trained.steps * trained.batch_size / trained.seconds,
                    parameters=trained.parameters, mflops=trained.flops / 1e6, sampler=trained.sampler,
                    evaluations=spent, **judge.score(images, asked),
                )  # fmt: skip
                record["outcomes"].append(asdict(outcome))
                progress.remove_task(task)
                progress.print(
                    f"seed {seed}: {method.title}: {outcome.seconds:.1f} s, {outcome.steps} steps, "
                    f"accuracy {100 * outcome.accuracy:.1f} %, FID {outcome.fid:.2f}, near {100 * outcome.near:.1f} %",
                    soft_wrap=True,
                )
                if args.json:
                    write(args.json, json.dumps(finite(record), indent=2) + "\n")
    return record


def _watcher(progress: Progress, task: Any, budget: float) -> Callable[[float, int], None]:
    shown = 0.0

    def watch(seconds: float, steps: int) -> None:
        nonlocal shown
        if seconds - shown >= 0.5:
            shown = seconds
            progress.update(task, completed=seconds, info=f"{seconds:.0f} of {budget:.0f} s, step {steps}")
            progress.refresh()

    return watch


def medians(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each method the median over seeds of every figure."""
    found: dict[str, dict[str, float]] = {}
    for key in record["titles"]:
        mine = [outcome for outcome in record["outcomes"] if outcome["method"] == key]
        names = [name for name, value in mine[0].items() if isinstance(value, int | float)] if mine else []
        found[key] = {name: median([outcome[name] for outcome in mine]) for name in names}
    return found


def verdicts(record: dict[str, Any]) -> list[tuple[str, bool]]:
    """What the project promises of its medians, and whether it holds."""
    mid = {key: value for key, value in medians(record).items() if value}
    bare, found = mid.get("bare"), []
    if bare and record["row"] == "digits":
        if third := mid.get("third"):
            met = third["accuracy"] >= bare["accuracy"] and third["fid"] <= bare["fid"]
            found.append(("in a third of the time: the bare loop's accuracy and FID, or better", met))
        for key, name in (("equal", "at equal time"), ("dit", "the transformer at equal time")):
            if ours := mid.get(key):
                met = ours["accuracy"] > bare["accuracy"] and ours["fid"] < bare["fid"]
                found.append((f"{name}: better in both", met))
    if bare and record["row"] == "fashion_mnist" and (ours := mid.get("equal")):
        found.append(("at equal time: at most half of the bare loop's FID", ours["fid"] <= bare["fid"] / 2))
    for key, value in mid.items():
        if key != "bare":
            title = record["titles"][key]
            found.append((f"{title}: at most {200 * CHANCE:.0f} % near (twice chance)", value["near"] <= 2 * CHANCE))
            within = all(o["seconds"] <= o["budget"] for o in record["outcomes"] if o["method"] == key)
            found.append((f"{title}: within its time", within))
    return found


HEADER = (
    "method", "seconds", "steps", "images/s", "parameters", "MFLOPs", "accuracy %", "FID", "distance", "near %"
)  # fmt: skip


def table(record: dict[str, Any]) -> list[list[str]]:
    """The median of each method, below it its seeds, and the real images."""
    rows, mid = [], medians(record)
    for key, title in record["titles"].items():
        mine = [outcome for outcome in record["outcomes"] if outcome["method"] == key]
        if len(mine) > 1:
            rows.append(_line(f"**{title}**", mid[key]))
        for outcome in mine:
            name = f"{title} (seed {outcome['seed']})" if len(mine) == 1 else f"seed {outcome['seed']}"
            rows.append(_line(name, outcome))
    floor = record["floor"]
    real = ["-"] * 5
    rows.append([
        f"held-out images ({floor['held_out_count']})", *real, f"{100 * floor['held_out_accuracy']:.1f}",
        f"{floor['held_out_fid']:.2f}", f"{floor['held_out_distance']:.2f}", f"{100 * CHANCE:.1f}",
    ])  # fmt: skip
    halves, whole = floor["count"], record["training_images"]
    rows.append([f"real against real ({halves} : {halves})", *real, "-", f"{floor['fid']:.2f}", "-", "-"])
    rows.append([
        f"the same, carried to {record['samples']} : {whole}", *real, "-",
        f"{floor['fid_at_same_count']:.2f}", "-", "-",
    ])  # fmt: skip
    return rows


def _line(name: str, figures: dict[str, float]) -> list[str]:
    return [
        name, f"{figures['seconds']:.1f}", f"{figures['steps']:.0f}", f"{figures['images_per_s']:.0f}",
        f"{figures['parameters']:,.0f}", f"{figures['mflops']:.1f}", f"{100 * figures['accuracy']:.1f}",
        f"{figures['fid']:.2f}", f"{figures['distance']:.2f}", f"{100 * figures['near']:.1f}",
    ]  # fmt: skip


def summary(record: dict[str, Any]) -> str:
    """The Markdown of ``RESULTS.md``: how, the table, and the promises."""
    where, outcomes = record["environment"], record["outcomes"]
    samplers = {o["method"]: f"{o['sampler']} ({o['evaluations']} evaluations)" for o in outcomes}
    lines = [
        f"{record['seconds']:.0f} s of training, {record['samples']} samples with balanced labels at guidance 1, "
        f"{record['evaluations']} network evaluations each; features `{record['features']['name']}` "
        f"({record['features']['fingerprint'][:12]}); {where['threads']} threads, torch {where['torch']}, "
        f"diffusers {where['diffusers']}, lightning {where['lightning']}.",
        "Samplers: " + "; ".join(f"{record['titles'][key]}: {name}" for key, name in samplers.items()) + ".",
        "",
        markdown_table(HEADER, table(record)),
        *(f"- {'met' if met else '**not met**'}: {name}" for name, met in verdicts(record)),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Quality against the clock: a bare diffusers loop and ours, in turn.")
    parser.add_argument("--row", choices=list(ROWS), default="digits", help="data set (default: digits)")
    parser.add_argument("--seconds", type=float, help="of training at equal time (default: 110 digits, 600 fashion)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each method (default: 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="number of the first seed (default: 0)")
    parser.add_argument("--methods", help="some of the row's, by commas: bare,third,equal,dit (default: all)")
    parser.add_argument("--override", action="append", default=[], help="of ours, as for train.py; may be repeated")
    parser.add_argument("--samples", type=int, help="to score (default: as many as training scans, or 1000)")
    parser.add_argument("--evaluations", type=int, help="of the network, a sample (default: 50 digits, 25 fashion)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all cores)")
    parser.add_argument("--json", metavar="FILE", help="write every figure; again after each training")
    parser.add_argument("--markdown", metavar="FILE", help="write the table for RESULTS.md")
    parser.add_argument("--merge", nargs="+", metavar="FILE", help="measure nothing: one table from several --json")
    parser.add_argument("--quick", action="store_true", help="one seed, 3 s, few samples: only to see that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.seconds = 1, args.seconds or 3.0
        args.samples, args.evaluations = args.samples or 100, args.evaluations or 6
    known = ROWS[args.row].methods
    args.methods = args.methods.split(",") if args.methods else list(known)
    if unknown := [key for key in args.methods if key not in known]:
        parser.error(f"--methods: {', '.join(unknown)} is not among {', '.join(known)}")
    record = merged(args.merge) if args.merge else run(args.row, args)
    show_table(f"{record['row']}: medians over seeds, and each seed", HEADER, table(record))
    for name, met in verdicts(record):
        print(f"{'met    ' if met else 'NOT MET'}  {name}")
    print(f"grids: {PICTURES}/{record['row']}_*.png")
    if args.markdown:
        write(args.markdown, summary(record))


if __name__ == "__main__":
    main()
