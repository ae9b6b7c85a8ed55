"""Switches that building a run sets, and leaves as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ornstein.cli.build import build_loggers, matmul_precision


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


@pytest.mark.parametrize(
    ("option", "made"),
    [
        ("wandb", ["CSVLogger", "RunWandbLogger"]),
        ("[wandb,csv]", ["RunWandbLogger", "CSVLogger"]),
        ("csv", ["CSVLogger"]),
        ("none", []),
    ],
)
def test_wandb_does_not_come_without_the_file_that_its_lost_rows_are_logged_again_from(
    compose: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, made: list[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = build_loggers(compose(f"logger={option}", run_dir=tmp_path))
    assert [type(logger).__name__ for logger in loggers] == made
    assert {Path(logger.path) for logger in loggers if hasattr(logger, "path")} <= {tmp_path / "metrics.csv"}
