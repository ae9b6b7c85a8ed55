"""What a run meets that is nobody's mistake, out of memory and a full disk, told in one sentence with a way out."""

from __future__ import annotations

import errno
import gc
import re
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ornstein.errors import OrnsteinError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc"
    r"|(CUBLAS|CUDNN)\w*ALLOC_FAILED",
    re.IGNORECASE,
)
# What draws samples rather than trains, by the files that stand in an error's traceback.
_DRAWING = (
    *("generate.py", "sample_grid.py", "trajectory.py", "evaluation.py", "scoring.py"),
    *("reconstruction.py", "codec_grid.py"),
)


@contextmanager
def told_failures(cfg: DictConfig) -> Iterator[None]:
    """Within it, memory that runs out and a disk that is full are raised as an OrnsteinError, anything else as it is.

    Tensors that the failed run left are let go, for the next run of a sweep in this process.
    """
    try:
        yield
    except OrnsteinError:
        raise
    except Exception as error:
        known = next((each for each in _behind(error) if isinstance(each, OrnsteinError)), None)
        sentence = _explained(error, cfg)
        if sentence is None:
            raise
        for each in _behind(error):
            traceback.clear_frames(each.__traceback__)
        release_memory()
        raise (known if known is not None else OrnsteinError(sentence)) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or the CPU."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # torch.OutOfMemoryError is a RuntimeError too, and so is what the CPU's allocator raises.
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None


def release_memory() -> None:
    """Lets go of what only cycles hold, and gives a GPU's cached blocks back."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _behind(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from or within, the latest first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _explained(error: Exception, cfg: DictConfig) -> str | None:
    for each in _behind(error):
        if isinstance(each, OSError) and each.errno in _FULL:
            return _full(each, cfg)
        if out_of_memory(each):
            drawing = [frame.filename for frame in traceback.extract_tb(each.__traceback__)]
            return _memory(each, cfg, drawing=any(Path(name).name in _DRAWING for name in drawing))
    return None


def _memory(error: BaseException, cfg: DictConfig, *, drawing: bool) -> str:
    on_device = type(error).__name__ in ("OutOfMemoryError", "AcceleratorError") or "CUDA" in str(error)
    where = "on the device" if on_device else "on the CPU"
    if drawing:
        return (
            f"out of memory {where} while samples were drawn: lower callbacks.sample_grid.batch_size, "
            f"callbacks.evaluation.batch_size or data.eval_batch_size; {_standing(cfg)}."
        )
    batch, steps = int(cfg.data.batch_size), int(cfg.trainer.get("accumulate_grad_batches", 1))
    ways = []
    if batch > 1:
        half = next(size for size in range(batch // 2, 0, -1) if batch % size == 0)
        ways = [
            *([] if cfg.trainer.get("find_batch_size") else ["trainer.find_batch_size=true"]),
            f"data.batch_size={half} trainer.accumulate_grad_batches={steps * batch // half} (as many images a step)",
        ]
    if OmegaConf.select(cfg, "model.network.checkpointing") is False:
        ways.append("model.network.checkpointing=true")
    if on_device and str(cfg.trainer.get("precision", "")).startswith("32"):
        ways.append("trainer.precision=bf16-mixed")
    tried = ", ".join(ways) or "a smaller model"
    return f"out of memory {where} with data.batch_size={batch}: try {tried}; {_standing(cfg)}."


def _full(error: OSError, cfg: DictConfig) -> str:
    folder = Path(str(cfg.paths.run_dir)).absolute()
    wanted = Path(str(error.filename)) if error.filename is not None else folder
    told = f"{error.filename} could not be written" if error.filename is not None else "a file could not be written"
    there = next(place for place in (wanted, *wanted.absolute().parents) if place.is_dir())
    disk = shutil.disk_usage(there)
    quota = "the quota of" if error.errno == errno.EDQUOT else "the disk of"
    return (
        f"{quota} {there} is full, {told}: {disk.free / 1e6:,.1f} MB of {disk.total / 1e6:,.0f} MB are free there; "
        f"make room, or take another folder (paths.output_root=FOLDER); {_standing(cfg)}."
    )


def _standing(cfg: DictConfig) -> str:
    """What is left of the run: its last whole checkpoint, and how to go on from it."""
    from ornstein.experiment.run_dir import newest_whole_checkpoint

    folder = Path(str(cfg.paths.run_dir))
    good: Any = newest_whole_checkpoint(folder / "checkpoints")
    if good is None:
        return "no checkpoint had been written yet"
    return f"the last good checkpoint is {good}, resume={folder} goes on from it"
