"""Memory that runs out and disks that are full, in one sentence; tests/end_to_end/test_failures.py has real ones."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ornstein.cli.failures import told_failures
from ornstein.errors import OrnsteinError

HALF = "data.batch_size=3 trainer.accumulate_grad_batches=2"
ROWS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), ["on the device", HALF, "bf16-mixed"]),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ["on the CPU", HALF, "checkpointing=true"]),
    (MemoryError(), ["on the CPU", "data.batch_size=6", "trainer.find_batch_size=true"]),
    (OSError(errno.ENOSPC, "No space left on device"), ["the disk of", "is full", "MB are free", "make room"]),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "/nowhere/a"), ["the quota of / is full", "/nowhere/a could not be"]),
]


@pytest.mark.parametrize(("error", "words"), ROWS, ids=[type(row[0]).__name__ for row in ROWS])
def test_each_is_told_with_a_way_out(tmp_path: Path, error: Exception, words: list[str]) -> None:
    cfg = OmegaConf.create(
        {
            "paths": {"run_dir": str(tmp_path / "run")},
            "data": {"batch_size": 6},
            "trainer": {"precision": "32-true"},
            "model": {"network": {"checkpointing": False}},
        }
    )
    with pytest.raises(OrnsteinError) as told, told_failures(cfg):
        raise error
    for word in [*words, "no checkpoint had been written yet"]:
        assert word in str(told.value)


def test_anything_else_is_left_as_it_is(tmp_path: Path) -> None:
    """A sentence of ours too, and one of ours wins over the full disk that its summary then met."""
    cfg = OmegaConf.create({"paths": {"run_dir": str(tmp_path)}, "data": {"batch_size": 6}, "trainer": {}})
    with pytest.raises(KeyError), told_failures(cfg):
        raise KeyError("a")
    with pytest.raises(OrnsteinError, match=r"^first$"), told_failures(cfg):
        try:
            raise OrnsteinError("first")
        finally:
            raise OSError(errno.ENOSPC, "No space left on device")
