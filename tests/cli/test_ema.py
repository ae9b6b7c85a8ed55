"""``ornstein ema``: refused lengths leave no files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ornstein.cli.ema import make, parse
from ornstein.errors import OrnsteinError
from ornstein.training.posthoc import snapshot_name


def test_nothing_is_written_where_one_length_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "ema").mkdir()
    for std in (0.05, 0.1):
        facts = {"step": "100", "updates": "100", "std": str(std)}
        save_file({"network.w": torch.ones(3)}, tmp_path / "ema" / snapshot_name(100, std), metadata=facts)
    with pytest.raises(OrnsteinError, match=r"std=0\.005 cannot be made of 2 snapshots"):
        make(parse([f"run={tmp_path}", "std=0.05,0.005", f"out={tmp_path / 'out'}"]))
    assert not (tmp_path / "out").exists()
    (written,) = make(parse([f"run={tmp_path}", "std=0.05", f"out={tmp_path / 'out'}"]))
    assert written.is_file()
