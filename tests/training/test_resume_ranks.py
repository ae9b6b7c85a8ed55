"""Two processes that were killed go on as if they had not been: each rank's draws, data and losses, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("resumed_ranks.py")
SOURCE = Path(__file__).parents[2] / "src"


def train(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *more],
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_every_rank_goes_on_with_its_own_draws(tmp_path: Path) -> None:
    """Killed in step 6 of 8, two micro-batches a step, with the checkpoint at 3: dropout, flips, times that follow the
    losses of both ranks, and the data of each.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = train(whole)
    assert done.returncode == 0, done.stderr[-2000:]
    assert train(cut, "6").returncode != 0
    assert not list(cut.glob("rank*.json")) and (cut / "checkpoints" / "last.ckpt").is_file()
    again = train(cut)
    assert again.returncode == 0, again.stderr[-2000:]
    drawn = []
    for rank in (0, 1):
        ours, theirs = (json.loads((folder / f"rank{rank}.json").read_text()) for folder in (cut, whole))
        assert list(ours["drawn"]) == [str(number) for number in range(7, 17)]
        assert ours["drawn"] == {number: theirs["drawn"][number] for number in ours["drawn"]}
        assert ours["weights"] == theirs["weights"]
        drawn.append(theirs["drawn"])
    assert all(drawn[0][number][:2] != drawn[1][number][:2] for number in drawn[0]), "ranks draw different things"
