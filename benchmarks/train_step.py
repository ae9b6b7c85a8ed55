"""Images a second of a training step: ours and a named peer, taking turns in one process.

::

    python benchmarks/train_step.py                       # every comparison, about five minutes
    ORNSTEIN_PEERS=FOLDER python benchmarks/train_step.py --only library

Ours is one long ``Trainer.fit`` of what ``python train.py`` builds, with all that Lightning does around a step. A
callback lets the peer take turns: after every block of our steps it runs a block of the peer's, and each block is
timed without its first steps (caches are the other side's then). The ratio is the median of the ratios of
neighbouring blocks, so that a machine that slows down slows both. The first pair of blocks is left out.
``benchmarks/README.md`` says what each comparison holds equal.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ornstein  # noqa: F401  (first: lets torchvision be imported beside any build of torch)

# isort: split
import lightning.pytorch as pl
import torch
from common import (
    TIMED,
    Ours,
    compose_train,
    environment,
    finite,
    image_flops,
    markdown_table,
    median,
    show_table,
    use_threads,
    write,
)
from peers import DIGITS, DenoisingDiffusionPeer, bare_train_step, bare_unet
from rich.console import Console
from torch import Tensor, nn

from ornstein.networks.cost import count_parameters
from ornstein.training.estimate import forward_flops

Block = Callable[[int], float]  # trains that many steps, returns their seconds

# What a step of the default run passes through; pictures, figures and checkpoints between steps are not its speed.
DEFAULT_RUN = (
    "logger=csv",
    "~callbacks.progress",
    "~callbacks.schedule_plot",
    "~callbacks.validation",
    "~callbacks.sample_grid",
    "~callbacks.trajectory",
    "~callbacks.evaluation",
    "~callbacks.checkpoint",
    *(word for word in TIMED if word.startswith(("trainer", "+trainer"))),
)
# The network of the bare loop of quality_vs_time.py, without classes as in diffusers' example.
SAME_NETWORK = (
    "model=pixel_unet",
    "model/network=unet2d_diffusers",
    "objective=eps",
    "objective/time=discrete_uniform",
    "scheduler=linear",
    f"model.network.block_out_channels={list(DIGITS.block_out_channels)}",
    f"model.network.layers_per_block={DIGITS.layers_per_block}",
    "model.network.down_block_types=[DownBlock2D,AttnDownBlock2D]",
    "model.network.up_block_types=[AttnUpBlock2D,UpBlock2D]",
)
LIBRARY_DIM, LIBRARY_MULTS, LIBRARY_SIZE = 32, (1, 2, 4), 32
LIBRARY_NETWORK = (
    "model=pixel_unet",
    "model/network=annotated",
    f"model.network.base_channels={LIBRARY_DIM}",
    f"model.network.channel_mults={list(LIBRARY_MULTS)}",
    "model.network.groups=8",
    f"data.image_size={LIBRARY_SIZE}",
    "data.sigma_data=0.7",
)


@dataclass(frozen=True)
class Side:
    """One side of a comparison."""

    name: str
    images_per_s: float
    parameters: int
    mflops: float


@dataclass(frozen=True)
class Comparison:
    """Ours beside a peer; ``ratio`` is the median over neighbouring blocks, ``low`` and ``high`` its quartiles."""

    name: str
    ours: Side
    peer: Side
    batch_size: int
    image_size: int
    ratio: float
    low: float
    high: float
    target: float | None

    @property
    def met(self) -> bool | None:
        """Whether the promised ratio is reached; None where none is promised."""
        return None if self.target is None else self.ratio >= self.target


class TakeTurns(pl.Callback):
    """Times blocks of the Trainer's own steps, and lets the peer train a block after each.

    Args:
        peer: see :data:`Block`.
        blocks, steps: timed blocks of each side, and timed steps of a block.
        warm: steps at the start of each block that are not timed.
    """

    def __init__(self, peer: Block, *, blocks: int, steps: int, warm: int) -> None:
        self.peer, self.blocks, self.steps, self.warm = peer, blocks, steps, warm
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._done, self._began = 0, 0.0

    @property
    def total_steps(self) -> int:
        """What ``trainer.max_steps`` has to be."""
        return (self.blocks + 1) * (self.warm + self.steps)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Starts and stops the clock, and hands over at the end of a block."""
        self._done += 1
        if self._done == self.warm:
            self._began = time.perf_counter()
        elif self._done == self.warm + self.steps:
            self.ours.append(time.perf_counter() - self._began)
            self.peer(self.warm)
            self.theirs.append(self.peer(self.steps))
            self._done = 0


@dataclass(frozen=True)
class Peer:
    """What the other side is: built when its turn to be compared comes."""

    name: str
    network: nn.Module
    block: Block
    cond: dict[str, Tensor]


def compare(
    name: str,
    title: str,
    overrides: Sequence[str],
    make_peer: Callable[[Ours], Peer],
    *,
    turns: dict[str, int],
    target: float | None = None,
) -> Comparison:
    """Builds both sides and lets them take turns."""
    with tempfile.TemporaryDirectory() as folder:
        length = TakeTurns(lambda steps: 0.0, **turns).total_steps
        cfg = compose_train([*overrides, f"trainer.max_steps={length}"], run_dir=folder)
        clock = TakeTurns(lambda steps: 0.0, **turns)
        ours = Ours(cfg, extra=[clock])
        peer = make_peer(ours)
        clock.peer = peer.block
        ours.fit()
    ratios = sorted(theirs / own for own, theirs in zip(clock.ours[1:], clock.theirs[1:], strict=True))
    batch, images = cfg.data.batch_size, cfg.data.batch_size * turns["steps"]
    shape = ours.module.latent_shape
    network = ours.module.network
    return Comparison(
        name,
        Side(title, images / median(clock.ours[1:]), count_parameters(network), forward_flops(ours.module) / 1e6),
        Side(
            peer.name,
            images / median(clock.theirs[1:]),
            count_parameters(peer.network),
            image_flops(peer.network, shape, **peer.cond) / 1e6,
        ),
        batch,
        shape[-1],
        median(ratios),
        ratios[len(ratios) // 4],
        ratios[-1 - len(ratios) // 4],
        target,
    )


def bare_peer(
    name: str, make_unet: Callable[[Ours], Any], *, ema: bool, prediction: str = "epsilon", betas: str = "linear"
) -> Callable[[Ours], Peer]:
    """A bare loop on our data: DDPMScheduler, AdamW (fused, as ours), gradient clipping, EMA if asked for."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    def make(ours: Ours) -> Peer:
        unet = make_unet(ours)
        scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule=betas, prediction_type=prediction)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
        average = EMAModel(unet.parameters(), decay=0.999, foreach=True) if ema else None
        step = bare_train_step(unet, scheduler, optimizer, ema=average)
        classes = unet.config.num_class_embeds
        batches = _batches(ours, classes)

        def block(steps: int) -> float:
            unet.train()
            began = time.perf_counter()
            for _ in range(steps):
                images, cond = next(batches)
                step(images, **cond)
            return time.perf_counter() - began

        cond = {} if classes is None else {"class_labels": torch.zeros(1, dtype=torch.int64)}
        return Peer(name, unet, block, cond)

    return make


def _batches(ours: Ours, classes: int | None) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Our training images as a bare loop holds them: floats in memory, shuffled; a tenth of the labels dropped."""
    data, size = ours.data.train, ours.data.batch_size
    whole = data.batch(torch.arange(len(data)))
    images = whole["image"].float() / 127.5 - 1.0
    while True:
        for index in torch.randperm(len(images)).split(size):
            if len(index) < size:
                continue
            cond = {}
            if classes is not None:
                dropped = torch.rand(size) < 0.1
                cond["class_labels"] = whole["label"][index].masked_fill(dropped, classes - 1)
            yield images[index], cond


def same_unet(ours: Ours) -> Any:
    """Our network's own UNet2DModel once more, with weights of its own."""
    model: Any = ours.module.network.model
    return type(model).from_config(model.config)


def unet_of_size(ours: Ours) -> Any:
    """The bare loop's UNet2DModel in the width and depth whose parameters are nearest to our network's."""
    parameters = count_parameters(ours.module.network)
    sizes = [
        replace(DIGITS, image_size=ours.data.image_size, block_out_channels=(width, 2 * width), layers_per_block=layers)
        for width in range(8, 136, 8)
        for layers in (1, 2)
    ]
    with torch.device("meta"):
        counts = [count_parameters(bare_unet(size)) for size in sizes]
    return bare_unet(min(zip(counts, sizes, strict=True), key=lambda pair: abs(pair[0] - parameters))[1])


def library_peer(*, batch_size: int) -> Callable[[Ours], Peer]:
    """denoising-diffusion-pytorch's Trainer on its own Unet and our images, fed from memory."""

    def make(ours: Ours) -> Peer:
        data = ours.data.train
        peer = DenoisingDiffusionPeer(
            data.batch(torch.arange(len(data)))["image"],
            dim=LIBRARY_DIM,
            dim_mults=LIBRARY_MULTS,
            batch_size=batch_size,
            in_memory=True,
        )
        return Peer("denoising-diffusion-pytorch, its Unet", peer.unet, lambda steps: peer.train(steps).seconds, {})

    return make


def run(only: Sequence[str], *, turns: dict[str, int], batch_size: int | None, console: Console) -> list[Comparison]:
    """The comparisons named, one after another; one whose peer is not installed says how to install it."""
    size = [f"data.batch_size={batch_size}"] if batch_size else []
    found: list[Comparison] = []
    if "network" in only:
        for ema in (False, True):
            console.print(f"the identical network, {'with' if ema else 'without'} EMA ...")
            words = [*SAME_NETWORK, *TIMED, *size, *([] if ema else ["ema=none"])]
            with_ema = " + EMA" if ema else ""
            peer = bare_peer(f"bare loop, UNet2DModel{with_ema}", same_unet, ema=ema)
            name = f"identical network{with_ema}"
            found.append(compare(name, f"ours, UNet2DModel{with_ema}", words, peer, turns=turns, target=0.97))
    if "default" in only:
        console.print("the default run and a UNet2DModel of its size ...")
        peer = bare_peer(
            "bare loop, UNet2DModel + EMA",
            unet_of_size,
            ema=True,
            prediction="v_prediction",
            betas="squaredcos_cap_v2",
        )
        found.append(compare("default run", "ours, python train.py", [*DEFAULT_RUN, *size], peer, turns=turns))
    if "library" in only:
        console.print("denoising-diffusion-pytorch's trainer ...")
        batch = max(16, batch_size or 16)  # its Trainer refuses fewer
        words = [*LIBRARY_NETWORK, *TIMED, f"data.batch_size={batch}"]
        try:
            peer = library_peer(batch_size=batch)
            name = "library's trainer"
            found.append(compare(name, "ours, its U-Net's size", words, peer, turns=turns, target=1.0))
        except ModuleNotFoundError as error:
            console.print(f"skipped: {error}", markup=False, soft_wrap=True)
    return found


HEADER = (
    "comparison",
    "size",
    "batch",
    "ours: images/s",
    "parameters",
    "MFLOPs",
    "peer: images/s",
    "parameters",
    "MFLOPs",
    "ours / peer",
    "quartiles",
    "promised",
)


def table(found: Sequence[Comparison]) -> list[list[str]]:
    """One line a comparison."""
    rows = []
    for one in found:
        sides = [
            [f"{side.images_per_s:.1f}", f"{side.parameters:,}", f"{side.mflops:.1f}"] for side in (one.ours, one.peer)
        ]
        promised = "-" if one.target is None else f"{one.target:.2f} {'met' if one.met else 'NOT MET'}"
        name = f"{one.ours.name} : {one.peer.name}"
        figures = [f"{one.ratio:.3f}", f"{one.low:.3f} to {one.high:.3f}", promised]
        rows.append([name, f"{one.image_size}", f"{one.batch_size}", *sides[0], *sides[1], *figures])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    names = ("network", "default", "library")
    parser = argparse.ArgumentParser(description="Images/s of a training step: ours and a peer, taking turns.")
    parser.add_argument("--only", help=f"some of the comparisons, by commas: {','.join(names)} (default: all)")
    parser.add_argument("--blocks", type=int, default=9, help="timed blocks of each side (default: 9)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a block (default: 10)")
    parser.add_argument("--warm", type=int, default=2, help="untimed steps at the start of a block (default: 2)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all cores)")
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", metavar="FILE", help="write the table for RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="tiny blocks and batches: only to see that it runs")
    args = parser.parse_args(argv)
    only = args.only.split(",") if args.only else list(names)
    if unknown := [name for name in only if name not in names]:
        parser.error(f"--only: {', '.join(unknown)} is not among {', '.join(names)}")
    turns = {"blocks": args.blocks, "steps": args.steps, "warm": args.warm}
    if args.quick:
        turns = {"blocks": 2, "steps": 2, "warm": 1}
    if min(turns.values()) < 1:
        parser.error("--blocks, --steps and --warm must be at least 1")
    threads = use_threads(args.threads)
    found = run(only, turns=turns, batch_size=16 if args.quick else None, console=Console(stderr=True))
    record = {
        **turns,
        "environment": environment(threads),
        "comparisons": [{**asdict(one), "met": one.met} for one in found],
    }
    show_table("training step", HEADER, table(found))
    if args.json:
        write(args.json, json.dumps(finite(record), indent=2) + "\n")
    if args.markdown:
        where = record["environment"]
        how = (
            f"{turns['blocks']} blocks of {turns['steps']} steps in turn, {threads} threads, torch {where['torch']}, "
            f"diffusers {where['diffusers']}, lightning {where['lightning']}. MFLOPs: one forward pass of one image."
        )
        write(args.markdown, f"{how}\n\n{markdown_table(HEADER, table(found))}")


if __name__ == "__main__":
    main()
