"""Forward pass, training step and memory of our networks and of diffusers' of the same size, in turn.

::

    python benchmarks/networks.py --markdown table.md              # this machine's CPU (or GPU), fp32 and bf16, eager
    python benchmarks/networks.py --compile --only unet,dit        # compiled as well (minutes of compiling a network)
    python benchmarks/networks.py --utilisation                    # a GPU: images/s and utilisation of DiT-B/2 to XL/2

Both sides have the same widths, depths and attention. Weights are random; a training step is forward, mean squared
error, backward and a fused AdamW step. The two take turns, block by block; the ratio is the median of the ratios of
neighbouring blocks, above 1 where ours is faster. Memory is the GPU's peak beyond what stood there before, on a CPU
what autograd keeps for the backward pass. ``benchmarks/README.md`` says what is held equal.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import ornstein  # noqa: F401  (first: lets torchvision be imported beside any build of torch)

# isort: split
import torch
from common import environment, finite, markdown_table, median, show_table, use_threads, write
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.networks import DiT, UNet, count_flops, count_parameters
from ornstein.training.estimate import activation_bytes

CLASSES = 10
Shape = tuple[int, int, int]
TARGETS = {"unet": 0.9, "dit": 1.0}  # the promised ratio of every cell


class Theirs(nn.Module):
    """A network of diffusers behind our signature."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap ``model(x, timestep, class_labels=...)``."""
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, noise_cond: Tensor, *, label: Tensor) -> Tensor:
        """The network's output ``(B, C, H, W)``."""
        return self.model(x, noise_cond, class_labels=label, return_dict=False)[0]


@dataclass(frozen=True)
class Row:
    """Two networks of the same size, and what they are fed."""

    family: str
    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module]
    shape: Shape
    batch: int


def unets(
    shape: Shape, batch: int, *, widths: Sequence[int], blocks: int, attention: Sequence[bool], head_dim: int
) -> Row:
    """Our U-Net and diffusers' ``UNet2DModel`` with the same levels."""

    def ours() -> nn.Module:
        return UNet(
            shape[0],
            image_size=shape[1],
            base_channels=widths[0],
            channel_mults=[width // widths[0] for width in widths],
            num_blocks=blocks,
            attention=["full" if here else "none" for here in attention],
            head_dim=head_dim,
            num_classes=CLASSES,
        )

    def theirs() -> nn.Module:
        from diffusers import UNet2DModel

        down = ["AttnDownBlock2D" if here else "DownBlock2D" for here in attention]
        up = ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)]
        return Theirs(
            UNet2DModel(
                sample_size=shape[1],
                in_channels=shape[0],
                out_channels=shape[0],
                block_out_channels=tuple(widths),
                layers_per_block=blocks,
                down_block_types=tuple(down),
                up_block_types=tuple(up),
                attention_head_dim=head_dim,
                resnet_time_scale_shift="scale_shift",
                attn_norm_num_groups=32,  # without it the middle's attention has no norm
                num_class_embeds=CLASSES + 1,
            )
        )

    return Row("unet", ours, theirs, shape, batch)


def transformers(shape: Shape, batch: int, *, width: int, depth: int, heads: int, patch: int = 2) -> Row:
    """Our DiT and diffusers' ``DiTTransformer2DModel``, which embeds time and class anew in every block."""

    def ours() -> nn.Module:
        return DiT(
            shape[0],
            image_size=shape[1],
            patch_size=patch,
            hidden_size=width,
            depth=depth,
            heads=heads,
            num_classes=CLASSES,
        )

    def theirs() -> nn.Module:
        from diffusers import DiTTransformer2DModel

        return Theirs(
            DiTTransformer2DModel(
                num_attention_heads=heads,
                attention_head_dim=width // heads,
                in_channels=shape[0],
                out_channels=shape[0],
                num_layers=depth,
                sample_size=shape[1],
                patch_size=patch,
                num_embeds_ada_norm=CLASSES,
                dropout=0.0,
            )
        )

    return Row("dit", ours, theirs, shape, batch)


def rows(*, gpu: bool) -> dict[str, Row]:
    """What is compared, by name: sizes for a CPU, and on a GPU those that people train."""
    small = {
        "unet-8": unets((1, 8, 8), 64, widths=(32, 64), blocks=1, attention=(False, True), head_dim=16),
        "unet-32": unets((3, 32, 32), 8, widths=(64, 128, 128), blocks=2, attention=(False, True, True), head_dim=32),
        "dit-8": transformers((4, 8, 8), 64, width=128, depth=4, heads=4),
        "dit_s_2-32": transformers((4, 32, 32), 4, width=384, depth=12, heads=6),
    }
    levels = {"widths": (128, 256, 384, 512), "attention": (False, False, True, True)}
    large = {
        "unet-64": unets((3, 64, 64), 64, blocks=2, head_dim=64, **levels),
        "dit_b_2-32": transformers((4, 32, 32), 128, width=768, depth=12, heads=12),
        "dit_xl_2-32": transformers((4, 32, 32), 32, width=1152, depth=28, heads=16),
    }
    return small | large if gpu else small


@dataclass(frozen=True)
class Cell:
    """One comparison: seconds a call of each side, the ratio theirs : ours with its quartiles, memory of each."""

    row: str
    family: str
    task: str
    precision: str
    compiled: bool
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    our_bytes: int
    their_bytes: int
    our_parameters: int
    their_parameters: int

    @property
    def met(self) -> bool:
        """Whether ours is as fast as promised."""
        return self.ratio >= TARGETS[self.family]


class Side:
    """One network with its inputs, ready to be run again and again."""

    def __init__(self, network: nn.Module, row: Row, *, task: str, precision: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.network, self.task, self.device = network.to(device), task, device
        self.bf16 = precision == "bf16"
        self.x = torch.randn(row.batch, *row.shape, device=device)
        self.noise_cond = 1000 * torch.rand(row.batch, device=device)
        self.label = torch.arange(row.batch, device=device) % CLASSES
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-5, fused=True) if task == "train" else None
        self.network.train(task == "train")

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 where it is asked for, as Lightning's bf16-mixed does it."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def loss(self) -> Tensor:
        """Mean squared error of one batch."""
        with self.autocast():
            output = self.network(self.x, self.noise_cond, label=self.label)
        return F.mse_loss(output.float(), self.x)

    def __call__(self) -> None:
        """One forward pass, or one training step."""
        if self.optimizer is None:
            with torch.no_grad(), self.autocast():
                self.network(self.x, self.noise_cond, label=self.label)
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def block(self, calls: int) -> float:
        """Seconds a call, over that many."""
        self.wait()
        began = time.perf_counter()
        for _ in range(calls):
            self()
        self.wait()
        return (time.perf_counter() - began) / calls

    def wait(self) -> None:
        """Until an accelerator has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> int:
        """Peak bytes of a call beyond what stands; on a CPU what autograd keeps (nothing for a forward pass alone)."""
        if self.device.type != "cuda":
            return activation_bytes(self.network, self.loss) if self.task == "train" else 0
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before


def compare(
    name: str, row: Row, *, task: str, precision: str, compiled: bool, device: torch.device, blocks: int, seconds: float
) -> Cell:
    """Both sides in turn; a block takes about ``seconds``."""
    sides = [Side(make(), row, task=task, precision=precision, device=device) for make in (row.ours, row.theirs)]
    memory = [side.memory() for side in sides]
    if compiled:
        for side in sides:
            side.network.compile()
    for side in sides:
        side()
    calls = [max(1, round(seconds / side.block(2))) for side in sides]
    times: list[list[float]] = [[], []]
    for _ in range(blocks):
        for side, count, taken in zip(sides, calls, times, strict=True):
            taken.append(side.block(count))
    ratios = sorted(theirs / ours for ours, theirs in zip(*times, strict=True))
    return Cell(
        name,
        row.family,
        task,
        precision,
        compiled,
        *(median(taken) for taken in times),
        median(ratios),
        ratios[len(ratios) // 4],
        ratios[-1 - len(ratios) // 4],
        *memory,
        *(count_parameters(side.network) for side in sides),
    )


HEADER = ("network", "task", "precision", "mode", "ours", "diffusers", "ratio", "quartiles", "memory", "parameters", "")


def lines(cells: Sequence[Cell]) -> Iterator[list[str]]:
    """The table's rows; times in milliseconds a call, memory and parameters in millions, ours / theirs."""
    for cell in cells:
        yield [
            cell.row,
            cell.task,
            cell.precision,
            "compiled" if cell.compiled else "eager",
            f"{1e3 * cell.ours:.2f} ms",
            f"{1e3 * cell.theirs:.2f} ms",
            f"{cell.ratio:.2f}",
            f"{cell.low:.2f} to {cell.high:.2f}",
            f"{cell.our_bytes / 1e6:,.0f} / {cell.their_bytes / 1e6:,.0f} MB" if cell.our_bytes else "-",
            f"{cell.our_parameters / 1e6:.2f} / {cell.their_parameters / 1e6:.2f} M",
            "met" if cell.met else "NOT MET",
        ]


DIT_SIZES = {"b": (768, 12, 12, 256), "l": (1024, 24, 16, 128), "xl": (1152, 28, 16, 128)}  # width, depth, heads, batch


def utilisation(size: str, *, peak: float, steps: int) -> list[str]:
    """A row of images/s and model FLOP utilisation: DiT-`size`/2 on 256x256 latents, bf16, compiled, training steps.

    Utilisation is ``3 * forward FLOPs * images/s / peak``, 2 FLOPs a multiply-add, the backward pass twice the forward.
    """
    width, depth, heads, batch = DIT_SIZES[size]
    row = transformers((4, 32, 32), batch, width=width, depth=depth, heads=heads)
    side = Side(row.ours(), row, task="train", precision="bf16", device=torch.device("cuda"))
    flops = count_flops(side.network, side.x[:1], side.noise_cond[:1], label=side.label[:1])
    side.network.compile()
    side.block(5)
    rate = batch / median([side.block(steps) for _ in range(5)])
    used = 3 * flops * rate / peak
    return [
        f"DiT-{size.upper()}/2",
        f"{batch}",
        f"{flops / 2e9:.1f}",
        f"{rate:,.0f}",
        f"{100 * used:.1f} %",
        f"{side.memory() / 1e9:.1f} GB",
    ]


UTILISATION = ("network", "batch", "GMACs forward", "images/s", "of the peak", "memory")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Forward, training step and memory: ours and diffusers', in turn.")
    parser.add_argument("--only", help="some of the rows, by the beginnings of their names, by commas")
    parser.add_argument("--precision", default="fp32,bf16", help="of fp32 and bf16, by commas (default: both)")
    parser.add_argument("--compile", action="store_true", help="measure compiled networks instead of eager ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=9, help="timed blocks of each side (default: 9)")
    parser.add_argument("--seconds", type=float, default=1.0, help="a block takes about this long (default: 1)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all cores)")
    parser.add_argument("--utilisation", action="store_true", help="on a GPU: images/s and utilisation instead")
    parser.add_argument("--peak", type=float, default=989e12, help="dense bf16 FLOP/s (default: 989e12, an H200's)")
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", metavar="FILE", help="write the table for RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="tiny blocks: only to see that it runs")
    args = parser.parse_args(argv)
    threads = use_threads(args.threads)
    device = torch.device(args.device)
    if args.utilisation:
        if device.type != "cuda":
            parser.error("--utilisation needs a GPU: there is none here")
        table = [utilisation(size, peak=args.peak, steps=2 if args.quick else 10) for size in DIT_SIZES]
        show_table("training, bf16, compiled, 256x256 latents", UTILISATION, table)
        if args.markdown:
            write(args.markdown, markdown_table(UTILISATION, table))
        return
    chosen = rows(gpu=device.type == "cuda")
    if args.only:
        chosen = {name: row for name, row in chosen.items() if name.startswith(tuple(args.only.split(",")))}
    precisions = args.precision.split(",")
    if not chosen or set(precisions) - {"fp32", "bf16"} or args.blocks < 1:
        parser.error("--only, --precision or --blocks leaves nothing to measure")
    console, cells = Console(stderr=True), []
    for (name, row), precision, task in product(chosen.items(), precisions, ("forward", "train")):
        console.print(f"{name}, {task}, {precision} ...")
        timing = {"blocks": 2, "seconds": 0.02} if args.quick else {"blocks": args.blocks, "seconds": args.seconds}
        cells.append(compare(name, row, task=task, precision=precision, compiled=args.compile, device=device, **timing))
    show_table("networks", HEADER, list(lines(cells)))
    where = environment(threads)
    if args.json:
        record = {
            "environment": where,
            "device": str(device),
            "cells": [{**asdict(one), "met": one.met} for one in cells],
        }
        write(args.json, json.dumps(finite(record), indent=2) + "\n")
    if args.markdown:
        how = (
            f"{args.blocks} blocks of {args.seconds:g} s in turn on {device}, {threads} threads, torch "
            f"{where['torch']}, diffusers {where['diffusers']}. Above 1: ours is faster; memory and parameters are "
            "ours / theirs."
        )
        write(args.markdown, f"{how}\n\n{markdown_table(HEADER, list(lines(cells)))}")


if __name__ == "__main__":
    main()
