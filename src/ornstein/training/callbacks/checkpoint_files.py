"""The folder of checkpoints: names, links, which states stand under which name, and the averages beside them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ornstein.errors import OrnsteinError
from ornstein.training.power_ema import write_snapshot

CHECKPOINT, AVERAGES = ".ckpt", ".ema.safetensors"
LAST = f"last{CHECKPOINT}"
_NUMBERED = re.compile(r"step_(\d+)\.ckpt")


def best_name(rank: int) -> str:
    """``best.ckpt``, ``best_2.ckpt``, ...; rank 0 is best."""
    return f"best{CHECKPOINT}" if rank == 0 else f"best_{rank + 1}{CHECKPOINT}"


def numbered_name(step: int) -> str:
    """``step_000400.ckpt``."""
    return f"step_{step:06}{CHECKPOINT}"


def beside(checkpoint: Path) -> Path:
    """Where the averages of a checkpoint's state lie: ``last.ema.safetensors`` beside ``last.ckpt``."""
    return checkpoint.with_name(checkpoint.name.removesuffix(CHECKPOINT) + AVERAGES)


def link(source: Path, target: Path) -> None:
    """Makes ``target`` the same file as ``source``, or a copy of it, in one step."""
    os.replace(_staged(source, target), target)


def _staged(source: Path, target: Path) -> Path:
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:  # no hard links here; with its time, by which the newest state is found
        shutil.copy2(source, partial)
    return partial


def arrange_best(folder: Path, wanted: Sequence[int], sources: Mapping[int, Path]) -> None:
    """Has ``best.ckpt``, ``best_2.ckpt``, ... hold the states of the steps ``wanted``, averages too.

    ``sources`` says where each step's state lies now; one that lies nowhere is passed over. Killed at any moment, every
    wanted state still has a name: the last place is filled first, and each place from a link that was made before.
    """
    moves: list[tuple[Path, Path]] = []
    for rank, step in enumerate(wanted):
        target, source = folder / best_name(rank), sources.get(step)
        if source is None or source == target:
            continue
        if beside(source).is_file():  # before the checkpoint, whose step tells whether its place is right
            moves.append((_staged(source, target), target))
            moves.append((_staged(beside(source), beside(target)), beside(target)))
        else:
            moves.append((_staged(source, target), target))
            beside(target).unlink(missing_ok=True)
    for partial, target in reversed(moves):
        os.replace(partial, target)


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; its tensors stay on the disk until they are used."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state


def steps_of_best(folder: Path) -> dict[int, Path]:
    """Step -> file, of the best checkpoints as they are; files that cannot be read are passed over."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(f"best*{CHECKPOINT}")):
        try:
            found.setdefault(int(read_state(path)["global_step"]), path)
        except Exception:  # whatever is the matter with it, it is not a state to keep
            continue
    return found


def prune_numbered(folder: Path, *, keep: int) -> None:
    """Leaves the newest ``keep`` of the numbered checkpoints."""
    named = ((_NUMBERED.fullmatch(path.name), path) for path in folder.glob(f"step_*{CHECKPOINT}"))
    numbered = sorted((int(match[1]), path) for match, path in named if match)
    for _, path in numbered[:-keep]:
        path.unlink(missing_ok=True)


def sweep_up(folder: Path) -> None:
    """Removes what a killed writer left."""
    for leftover in folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)


def write_averages(path: Path, averages: Mapping[str, Any], *, facts: Mapping[str, Any]) -> None:
    """Writes the averaged weights of a checkpoint's EMA state as plain safetensors, atomically.

    The names are the network's own, so that ``network.load_state_dict(safetensors.torch.load_file(path))`` takes them;
    a learned schedule's stand beside them as ``schedule.<name>``.

    Args:
        path: ``checkpoints/last.ema.safetensors``.
        averages: ``network`` and perhaps ``schedule``: name -> tensor.
        facts: step, images seen, ...: text in the file's header.

    Raises:
        OrnsteinError: the file cannot be written; ``path`` is then what it was.
    """
    tensors = {**averages["network"]}
    tensors |= {f"schedule.{name}": value for name, value in averages.get("schedule", {}).items()}
    try:
        write_snapshot({name: value.detach().cpu() for name, value in tensors.items()}, path, facts=facts)
    except OSError as error:
        raise OrnsteinError(
            f"{path} could not be written ({error.strerror or error}): make room or choose another folder; the "
            f"last good checkpoint is {path.with_name(LAST)}"
        ) from error


def step_of_averages(path: Path) -> int | None:
    """The step in a file's header; None where there is no such file or it says nothing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return int((file.metadata() or {})["step"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
