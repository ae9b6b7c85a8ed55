"""Switches that building a run sets, and leaves as they were."""

from __future__ import annotations

import pytest
import torch

from ornstein.cli.build import matmul_precision


@pytest.mark.parametrize(("asked", "within"), [("medium", "medium"), ("high", "high"), (None, "highest")])
def test_matmul_precision_holds_for_one_run_of_a_sweep(asked: str | None, within: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with pytest.raises(RuntimeError, match="stopped"), matmul_precision(asked):
            assert torch.get_float32_matmul_precision() == within
            raise RuntimeError("stopped")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
