"""A trial's reports, and its end: in one process, in several, and where the storage does not answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ornstein.errors import Pruned
from ornstein.training.callbacks.checkpoint import Checkpoint
from ornstein.training.callbacks.pruning import TrialPruning


class Trial:
    """Wants to end where a figure is above 1."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.reports: list[tuple[float, int]] = []

    def report(self, value: float, step: int) -> None:
        if self.fault is not None:
            raise self.fault
        self.reports.append((value, step))

    def should_prune(self) -> bool:
        return self.reports[-1][0] > 1


def trainer_of(*callbacks: Any, world_size: int = 1, rank: int = 0, word: bool | None = None) -> Any:
    """As much of a trainer as the callback looks at; ``word`` is what the first process broadcasts to the others."""
    told: list[bool] = []

    def broadcast(value: bool, src: int) -> bool:
        told.append(value)
        return value if word is None else word

    return SimpleNamespace(
        callbacks=list(callbacks),
        callback_metrics={},
        global_step=0,
        max_steps=100,
        world_size=world_size,
        is_global_zero=rank == 0,
        strategy=SimpleNamespace(broadcast=broadcast),
        told=told,
    )


def step(callback: TrialPruning, trainer: Any, figure: float | None = None) -> None:
    trainer.global_step += 1
    if figure is not None:
        trainer.callback_metrics["val/fid_1k"] = torch.tensor(figure)
    callback.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]


def test_each_figure_is_reported_once_and_a_hopeless_one_ends_the_training() -> None:
    trial = Trial()
    callback, trainer = TrialPruning("val/fid", open_trial=lambda: trial), trainer_of()  # type: ignore[arg-type,return-value]
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    for figure in (None, 0.5, None, 0.5, float("nan")):
        step(callback, trainer, figure)
    callback.on_train_batch_end(trainer, None, None, None, 1)  # type: ignore[arg-type]  # a micro-batch of that step
    assert trial.reports == [(0.5, 2), (0.5, 4)], "the same number logged anew counts, no number does not"
    with pytest.raises(Pruned, match="pruned at step 6 with val/fid_1k 2"):
        step(callback, trainer, 2.0)
    assert trainer.told == [], "one process asks nobody"
    trainer.global_step = trainer.max_steps - 1
    step(callback, trainer, 3.0)
    assert trial.reports[-1] == (3.0, 100), "the last step's figure ends nothing that has not ended"


def test_the_checkpoint_callback_ends_it(tmp_path: Any) -> None:
    checkpoint = Checkpoint(tmp_path)
    callback = TrialPruning("val/fid", open_trial=Trial)  # type: ignore[arg-type]
    step(callback, trainer_of(checkpoint), 2.0)
    assert isinstance(checkpoint._stop, Pruned), "raised by that one, after it has written the step's state"


@pytest.mark.parametrize("word", [True, False])
def test_all_processes_do_what_the_first_was_told(word: bool) -> None:
    def never() -> Any:
        raise AssertionError("only the first process opens the study")

    callback, trainer = TrialPruning("val/fid", open_trial=never), trainer_of(world_size=2, rank=1, word=word)
    step(callback, trainer)
    assert trainer.told == [], "no figure, nothing to agree on"
    if word:
        with pytest.raises(Pruned):
            step(callback, trainer, 0.5)
    else:
        step(callback, trainer, 2.0)
    assert trainer.told == [False]


def test_a_storage_that_does_not_answer_stops_no_training(caplog: pytest.LogCaptureFixture) -> None:
    trial = Trial(OSError("stale file handle"))
    callback, trainer = TrialPruning("val/fid", open_trial=lambda: trial), trainer_of()  # type: ignore[arg-type,return-value]
    for figure in (2.0, 3.0):
        step(callback, trainer, figure)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == "this trial cannot be reported, and will not be pruned (stale file handle)"
