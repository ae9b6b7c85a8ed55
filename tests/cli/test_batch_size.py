"""``trainer.find_batch_size=true``: the search, what it is refused with, and real ones under a cap of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ornstein.cli import batch_size
from ornstein.cli.batch_size import Trials, check_batch_size, divisors, largest
from ornstein.cli.build import build_trainer
from ornstein.cli.train import train
from ornstein.errors import OrnsteinError
from ornstein.experiment import identity
from ornstein.experiment.run_dir import read_config


@pytest.mark.parametrize("effective", [1, 2, 7, 12, 96, 128, 360])
def test_the_largest_divisor_that_fits_is_found(effective: int) -> None:
    """Whatever the limit; nothing is tried twice, and what does not fit at most once more than halving has to."""
    sizes = divisors(effective)
    for limit in (0, *sizes):
        tried: list[int] = []

        def fits(size: int, tried: list[int] = tried, limit: int = limit) -> bool:
            tried.append(size)
            return size <= limit

        assert largest(sizes, fits) == (limit or None)
        assert len(tried) == len(set(tried))
        assert sum(size > limit for size in tried) <= 1 + len(sizes).bit_length()


def test_what_cannot_be_looked_for_is_refused(compose: Callable[..., Any]) -> None:
    rows = [
        (["trainer.find_batch_size=yes_please"], "find_batch_size=yes_please must be true or false"),
        (["trainer.memory_cap=0"], "memory_cap=0 must be a number of GB"),
        (["trainer.find_batch_size=true", "objective/coupling=minibatch_ot"], "minibatch_ot.*by hand"),
        (["trainer.find_batch_size=true", "+data.buckets=[[8,8],[8,16]]"], "data.buckets.*by hand"),
        (["trainer=fsdp", "trainer.find_batch_size=true"], "trainer=fsdp.*by hand"),
    ]
    for overrides, words in rows:
        cfg = compose(*overrides)
        with pytest.raises(OrnsteinError, match=words):
            check_batch_size(cfg)


def test_it_is_not_lightnings_business_and_no_other_identity(compose: Callable[..., Any]) -> None:
    """Keys of ours do not reach the Trainer; a batch that was divided is the same run's as the one asked for."""
    cfg = compose("trainer.find_batch_size=true", "trainer.max_steps=1")
    assert build_trainer(cfg, callbacks=[]).max_steps == 1
    asked = {"data": {"batch_size": 128}, "trainer": {"accumulate_grad_batches": 1, "find_batch_size": True}}
    found = {"data": {"batch_size": 32}, "trainer": {"accumulate_grad_batches": 4, "find_batch_size": True}}
    by_hand = {"data": {"batch_size": 32}, "trainer": {"accumulate_grad_batches": 4, "find_batch_size": False}}
    older = {"data": {"batch_size": 32}, "trainer": {"accumulate_grad_batches": 4}}
    assert identity(asked) == identity(found) != identity(by_hand) == identity(older)


def test_nothing_fits(compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trials, "peak", lambda self, size: None)
    cfg = compose("trainer.find_batch_size=true", "trainer.memory_cap=0.1")
    with pytest.raises(OrnsteinError, match=r"not even one image a batch fits of 0\.10 GB.*trainer\.memory_cap"):
        batch_size._search_here(cfg, 128)


@pytest.mark.slow
def test_found_under_a_cap_is_the_run_by_hand_to_the_bit(
    compose: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a cap of memory somewhat above what one image takes, not all 1024 fit: the run trains on what was found, as
    one with these numbers given does, and goes on with them without another search."""
    settings = ["data.batch_size=1024", "trainer.max_steps=2", "metrics=none", "logger=csv", "callbacks=none"]
    settings += ["+callbacks.checkpoint._target_=ornstein.training.callbacks.Checkpoint"]
    settings += ["+callbacks.checkpoint.run_dir=${paths.run_dir}"]
    cfg = compose(*settings)
    with Trials(cfg, 1024, cap=None) as trials:
        alone = trials.peak(1)
    assert alone is not None
    # What malloc has at hand already costs a trial nothing: the whole batch takes several times the 120 MB.
    cap = f"trainer.memory_cap={(alone + 120e6) / 1e9:.3f}"
    searched = ["trainer.find_batch_size=true", cap]
    train(compose(*settings, *searched, run_dir=tmp_path / "found"))
    stored = read_config(tmp_path / "found" / "config.yaml")
    micro, steps = stored["data"]["batch_size"], stored["trainer"]["accumulate_grad_batches"]
    assert 1 < micro < 1024 and micro * steps == 1024 and stored["trainer"]["find_batch_size"] is True

    by_hand = ["data.batch_size=" + str(micro), f"trainer.accumulate_grad_batches={steps}"]
    train(compose(*settings, *by_hand, run_dir=tmp_path / "by_hand"))
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("found", "by_hand")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

    def never(*_: Any) -> Any:
        raise AssertionError("searched again")

    monkeypatch.setattr(batch_size, "_search_here", never)
    again = compose(*settings, *searched, "trainer.max_steps=3", "resume=sweep", run_dir=tmp_path / "found")
    train(again)
    assert (again.data.batch_size, again.trainer.accumulate_grad_batches) == (micro, steps)
    other = compose(*settings, "trainer.max_steps=4", "resume=sweep", run_dir=tmp_path / "found")
    with pytest.raises(OrnsteinError, match=r"find_batch_size=false cannot be changed in a run that goes on"):
        train(other)
