"""What the framework adds to a training step, and how long it takes to start.

::

    python benchmarks/overhead.py               # the step: networks from tiny to a step of 100 ms
    python benchmarks/overhead.py --unaveraged  # beside a bare loop that does not average its weights
    python benchmarks/overhead.py --startup     # the start: to the first step, to --help, to a refused config

Ours is one ``Trainer.fit`` of what ``python train.py`` builds, with all of its default callbacks and loggers. The bare
side is the loop that one writes by hand for the same network, weights, batch size, optimizer, clipping, loss and
average of the weights (which samples are drawn with, and whose pass over the weights takes the longer the more there
are), on images held in memory, with nothing looked at and nothing logged. A callback lets the two take turns block by
block in one process, so that a machine that slows down slows both, and what is judged is the median over neighbouring
blocks of their difference. A block is as long as the interval between rows of the log, so each of ours holds one.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ornstein  # noqa: F401  (first: lets torchvision be imported beside any build of torch)

# isort: split
import lightning.pytorch as pl
import torch
from common import compose_train, environment, finite, markdown_table, median, quiet, show_table, use_threads, write
from hydra.utils import instantiate
from rich.console import Console
from torch import Tensor, nn

from ornstein.cli.build import build_callbacks, build_data, build_loggers, build_module, build_trainer
from ornstein.experiment import close_loggers
from ornstein.networks.cost import count_parameters

MOST_SHARE, MOST_SECONDS = 0.03, 1.5e-3  # promised: 3 % of a step of 100 ms, 1.5 ms of any
SHARE_FROM = 0.08  # seconds from which a step counts as one of 100 ms
# The name and what makes its network and step that size.
SIZES: dict[str, tuple[str, ...]] = {
    "tiny": ("model.network.base_channels=8", "data.batch_size=16"),
    "small": ("model.network.base_channels=16", "data.batch_size=32"),
    "default": (),
    "large": ("model.network.base_channels=48",),
}
# What is typed after `python train.py`, and the seconds promised.
STARTUP: dict[str, tuple[tuple[str, ...], float]] = {
    "first step": (("trainer.max_steps=1",), 15.0),
    "--help": (("--help",), 3.0),
    "unknown option": (("model=dti",), 3.0),
    "refused combination": (("objective=eps", "scheduler=flow"), 3.0),
}
_ROOT = Path(__file__).resolve().parents[1]
_NOTE = """
import pathlib, time
import lightning.pytorch as pl

class NotedStart(pl.Callback):
    def on_train_batch_start(self, *_):
        pathlib.Path("first_step").write_text(f"{time.time()} {time.process_time()}")
"""


class _Enough(Exception):
    """All blocks are measured."""


@dataclass(frozen=True)
class Block:
    """Seconds of a step: the mean of the block by the wall's clock and by this process's, the median step's."""

    wall: float
    cpu: float
    step: float


@dataclass(frozen=True)
class Overhead:
    """A step of ours beside the bare one, in seconds; differences are medians over neighbouring blocks."""

    size: str
    parameters: int
    batch_size: int
    bare: float
    ours: float
    extra: float
    low: float
    high: float
    bare_cpu: float
    extra_cpu: float
    extra_median_step: float

    @property
    def share(self) -> float:
        """How much longer ours takes, of a bare step."""
        return self.extra / self.bare

    @property
    def met(self) -> bool:
        """At most 1.5 ms longer, and where a step takes 100 ms at most 3 %."""
        return self.extra <= MOST_SECONDS and (self.bare < SHARE_FROM or self.share <= MOST_SHARE)


class Bare:
    """The loop by hand: the same network and loss as ``ours``, its images in memory.

    The loss is that of the default run: v on the cosine schedule, times logit-normal and stratified over the batch, a
    tenth of the labels dropped.
    """

    def __init__(self, module: Any, data: Any, cfg: Any, *, averages: bool = True) -> None:
        self.network: nn.Module = copy.deepcopy(module.network).train()
        self.parameters = list(self.network.parameters())
        self.averages = [parameter.detach().clone() for parameter in self.parameters] if averages else []
        self.rate = 1 - cfg.ema.decay
        self.optimizer: torch.optim.Optimizer = instantiate(cfg.optimizer)(self.parameters)
        self.lr_schedule = instantiate(cfg.lr_schedule)(self.optimizer)
        self.clip, self.size, self.null = cfg.trainer.gradient_clip_val, cfg.data.batch_size, data.num_classes
        whole = data.train.batch(torch.arange(len(data.train)))
        self.images, self.labels = whole["image"], whole["label"]
        steps = torch.arange(1, 1001, dtype=torch.float64) / 1000
        alpha_bar = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2) ** 2
        self.alpha, self.sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        self.batches = self._batches()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for rows in torch.randperm(len(self.images)).split(self.size):
                if len(rows) == self.size:
                    yield self.images[rows], self.labels[rows]

    def step(self) -> None:
        """One optimizer step."""
        images, label = next(self.batches)
        x0 = images.float() / 127.5 - 1.0
        label = label.masked_fill(torch.rand(self.size) < 0.1, self.null)
        u = (torch.arange(self.size) + torch.rand(self.size)) / self.size
        t = torch.sigmoid(torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
        place = (t * 1000).long().clamp(max=999)
        alpha, sigma = self.alpha[place].reshape(-1, 1, 1, 1), self.sigma[place].reshape(-1, 1, 1, 1)
        eps = torch.randn_like(x0)
        output = self.network(alpha * x0 + sigma * eps, 1000 * t, label=label)
        loss = nn.functional.mse_loss(output, alpha * eps - sigma * x0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.lr_schedule.step()
        if self.averages:
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self.parameters, self.rate)


class TakeTurns(pl.Callback):
    """Times blocks of the Trainer's steps and lets the bare loop train a block after each, the first pair not kept."""

    def __init__(self, bare: Callable[[], None], *, blocks: int, steps: int) -> None:
        self.bare, self.blocks, self.steps = bare, blocks, steps
        self.ours: list[Block] = []
        self.theirs: list[Block] = []
        self._ends: list[float] = []
        self._cpu = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the time; at the end of a block it is the bare loop's turn."""
        self._ends.append(time.perf_counter())
        if len(self._ends) <= self.steps:
            return
        self.ours.append(_block(self._ends, time.process_time() - self._cpu))
        self._ends, began = [time.perf_counter()], time.process_time()
        for _ in range(self.steps):
            self.bare()
            self._ends.append(time.perf_counter())
        self.theirs.append(_block(self._ends, time.process_time() - began))
        if len(self.ours) > self.blocks:
            raise _Enough
        self._ends, self._cpu = [time.perf_counter()], time.process_time()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clocks."""
        self._ends, self._cpu = [time.perf_counter()], time.process_time()


def _block(ends: Sequence[float], cpu: float) -> Block:
    steps = len(ends) - 1
    each = [after - before for before, after in pairwise(ends)]
    return Block((ends[-1] - ends[0]) / steps, cpu / steps, median(each))


def measure(name: str, *, blocks: int, averages: bool = True, extra: Sequence[str] = ()) -> Overhead:
    """Trains ours and the bare loop, which averages its weights or not, in turns: ``blocks`` timed blocks of each."""
    with tempfile.TemporaryDirectory() as folder:
        # Never reached: a last step would draw and score samples, which belong to no step.
        words = [*SIZES[name], "trainer.accelerator=cpu", "trainer.max_steps=100000", "logger.wandb.mode=offline"]
        cfg = compose_train([*words, *extra], run_dir=folder)
        data = build_data(cfg)
        data.setup()
        module = build_module(cfg)
        bare = Bare(module, data, cfg, averages=averages)
        clock = TakeTurns(bare.step, blocks=blocks, steps=cfg.callbacks.log.every if "log" in cfg.callbacks else 10)
        with quiet():
            trainer = build_trainer(cfg, callbacks=[*build_callbacks(cfg), clock])
            trainer.loggers = build_loggers(cfg)
            try:
                trainer.fit(module, data)
            except _Enough:
                pass
            finally:
                close_loggers(trainer.loggers)
    pairs = list(zip(clock.ours[1:], clock.theirs[1:], strict=True))
    extras = sorted(ours.wall - bare_.wall for ours, bare_ in pairs)
    return Overhead(
        name,
        count_parameters(module.network),
        int(cfg.data.batch_size),
        median([theirs.wall for _, theirs in pairs]),
        median([ours.wall for ours, _ in pairs]),
        median(extras),
        extras[len(extras) // 4],
        extras[-1 - len(extras) // 4],
        median([theirs.cpu for _, theirs in pairs]),
        median([ours.cpu - theirs.cpu for ours, theirs in pairs]),
        median([ours.step - theirs.step for ours, theirs in pairs]),
    )


HEADER = (
    "network",
    "parameters",
    "batch",
    "bare step",
    "ours",
    "longer by",
    "quartiles",
    "CPU time",
    "median step",
    "share",
    "promised",
)


def table(found: Sequence[Overhead]) -> list[list[str]]:
    """One line a size, in milliseconds."""
    rows = []
    for one in found:
        promise = f"{1e3 * MOST_SECONDS:.1f} ms" + (f", {100 * MOST_SHARE:.0f} %" if one.bare >= SHARE_FROM else "")
        times = [f"{1e3 * value:.2f} ms" for value in (one.bare, one.ours, one.extra)]
        spread = f"{1e3 * one.low:.2f} to {1e3 * one.high:.2f}"
        more = [f"{1e3 * one.extra_cpu:.2f} of {1e3 * one.bare_cpu:.2f}", f"{1e3 * one.extra_median_step:.2f}"]
        verdict = f"{promise} {'met' if one.met else 'NOT MET'}"
        rows.append(
            [
                one.size,
                f"{one.parameters:,}",
                f"{one.batch_size}",
                *times,
                spread,
                *more,
                f"{100 * one.share:.1f} %",
                verdict,
            ]
        )
    return rows


@dataclass(frozen=True)
class Start:
    """Seconds from a command to what it is to show: the medians of some starts by the wall's clock and in CPU time."""

    name: str
    command: str
    wall: float
    cpu: float
    most: float

    @property
    def met(self) -> bool:
        """Whether it shows that in time."""
        return self.wall < self.most


def time_start(name: str, *, repeats: int) -> Start:
    """Runs a command as a user does. What is awaited is its end, or for training the beginning of its first step."""
    words, most = STARTUP[name]
    walls, cpus = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(_ROOT / "train.py"), *words]
            if name == "first step":
                (Path(folder) / "noted_start.py").write_text(_NOTE)
                command += ["+callbacks.noted={_target_: noted_start.NotedStart}"]
            environment_ = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{_ROOT / 'src'}"}
            before, began = os.times(), time.time()
            done = subprocess.run(command, cwd=folder, env=environment_, capture_output=True, text=True, check=False)
            ended, after = time.time(), os.times()
            noted = Path(folder) / "first_step"
            if name == "first step":
                if not noted.is_file():
                    raise SystemExit(f"{' '.join(command)} did not train:\n{done.stderr[-2000:]}")
                at, cpu = map(float, noted.read_text().split())
                walls.append(at - began)
                cpus.append(cpu)
                continue
            walls.append(ended - began)
            cpus.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return Start(name, " ".join(["python train.py", *words]), median(walls), median(cpus), most)


START_HEADER = ("until", "command", "seconds", "CPU time", "promised")


def start_table(starts: Sequence[Start]) -> list[list[str]]:
    """One line a command."""
    return [
        [
            one.name,
            one.command,
            f"{one.wall:.2f}",
            f"{one.cpu:.2f}",
            f"{one.most:.0f} s {'met' if one.met else 'NOT MET'}",
        ]
        for one in starts
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What the framework adds to a training step, and to its start.")
    parser.add_argument("--startup", action="store_true", help="time the start instead of the step")
    parser.add_argument("--unaveraged", action="store_true", help="the bare loop keeps no average of its weights")
    parser.add_argument("--sizes", help=f"some of the networks, by commas: {','.join(SIZES)} (default: all)")
    parser.add_argument("--blocks", type=int, default=40, help="timed blocks of each side, of 10 steps (default: 40)")
    parser.add_argument("--repeats", type=int, default=3, help="starts of each command (default: 3)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all cores)")
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", metavar="FILE", help="write the table for RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="few blocks of the tiny network: only to see that it runs")
    args = parser.parse_args(argv)
    sizes = args.sizes.split(",") if args.sizes else ["tiny"] if args.quick else list(SIZES)
    if unknown := [name for name in sizes if name not in SIZES]:
        parser.error(f"--sizes: {', '.join(unknown)} is not among {', '.join(SIZES)}")
    blocks = 3 if args.quick else args.blocks
    if blocks < 1 or args.repeats < 1:
        parser.error("--blocks and --repeats must be at least 1")
    threads = use_threads(args.threads)
    console = Console(stderr=True)
    record: dict[str, Any] = {"environment": environment(threads)}
    if args.startup:
        starts = [time_start(name, repeats=1 if args.quick else args.repeats) for name in STARTUP]
        record["starts"] = [{**asdict(one), "met": one.met} for one in starts]
        title, header, rows = "start-up", START_HEADER, start_table(starts)
    else:
        found = []
        for name in sizes:
            console.print(f"{name} ...")
            found.append(measure(name, blocks=blocks, averages=not args.unaveraged))
        record |= {"blocks": blocks, "averages": not args.unaveraged}
        record["sizes"] = [{**asdict(one), "share": one.share, "met": one.met} for one in found]
        title, header, rows = "training step", HEADER, table(found)
    show_table(title, header, rows)
    if args.json:
        write(args.json, json.dumps(finite(record), indent=2) + "\n")
    if args.markdown:
        where = record["environment"]
        how = f"{threads} threads, torch {where['torch']}, lightning {where['lightning']}."
        write(args.markdown, markdown_table(header, rows) + f"\n{how}\n")


if __name__ == "__main__":
    main()
