"""What goes wrong around a training step: gradients that are no numbers, data workers that die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ornstein.data.sampling import BalancedBatches, EndlessBatches, OrderedBatches, behind
from ornstein.data.workers import MAX_DEATHS, WorkersDied, surviving
from ornstein.errors import OrnsteinError
from ornstein.training.callbacks import Checkpoint, NonFiniteGuard


class BreakGradient(pl.Callback):
    """Makes one gradient of one step infinite or not a number; the loss stays what it is."""

    def __init__(self, *, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step + 1 == self.step:
            next(pl_module.network.parameters()).grad.view(-1)[0] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_bad_gradient_stops_before_the_weights(fit, tmp_path, value, clip):
    """With and without clipping, which would have made all weights as bad; the last checkpoint is named and whole."""
    kept = {}

    class Before(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            kept["module"] = pl_module

    checkpoint = Checkpoint(tmp_path, every=2, monitor=None)
    with pytest.raises(OrnsteinError, match=r"gradient is not finite, though the loss is, at step 4, in a batch.*last"):
        fit(
            [NonFiniteGuard(), BreakGradient(step=4, value=value), Before(), checkpoint],
            steps=9,
            gradient_clip_val=clip,
        )
    assert all(torch.isfinite(p).all() for p in kept["module"].parameters())
    stored = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 2


def test_a_bad_gradient_is_flagged_where_nobody_waits():
    """On accelerators and over several devices: noted without a look, told at the interval."""
    guard = NonFiniteGuard(every=3)
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    trainer = SimpleNamespace(world_size=2, global_step=0, callbacks=[], ckpt_path="old.ckpt", strategy=strategy)
    for step, norm in enumerate([1.0, float("inf"), 2.0], start=1):
        trainer.global_step = step - 1
        guard.on_train_batch_start(trainer, None, {"index": torch.arange(step, step + 2)}, step - 1)
        guard._look_at_gradients(trainer, None, torch.tensor(norm))
        trainer.global_step = step
        if step < 3:
            guard.on_train_batch_end(trainer, None, None, None, step - 1)
    with pytest.raises(OrnsteinError, match=r"gradient .* at step 2, in a batch that begins with images 2, 3: "):
        guard.on_train_batch_end(trainer, None, None, None, 2)


@pytest.mark.parametrize("skipped", [0, 1, 7])
def test_orders_go_on_behind_what_was_read(skipped):
    labels = np.array([0, 0, 1, 2, 1, 0, 0])
    for order in (
        EndlessBatches(7, 3, seed=1, start_batch=2),
        BalancedBatches(labels, 3, seed=1),
        OrderedBatches(7, 1),
    ):
        whole = list(islice(iter(order), skipped, skipped + 4))
        rest = list(islice(iter(behind(order, skipped)), 4))
        assert len(whole) == len(rest)
        for ours, theirs in zip(rest, whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def dying(reads: list[int]) -> Iterator[int]:
    """A loader whose first workers die after two batches, and later ones after one."""

    def read(given: int, until: int) -> Iterator[int]:
        reads.append(given)
        yield from range(given, until)
        raise RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. ")

    return surviving(lambda: read(0, 2), lambda given: read(given, given + 1))


def test_workers_may_die_so_often_and_no_more():
    """Each death is told, each batch comes once, and the end is one sentence; another error is none of them."""
    reads: list[int] = []
    got: list[int] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(WorkersDied, match=r"data workers died 4 times.*data\.num_workers"):
            got.extend(dying(reads))
    assert got == [0, 1, 2, 3, 4]
    assert reads == [0, 2, 3, 4] and len(told) == MAX_DEATHS
    with pytest.warns(UserWarning, match="a data worker died"):
        assert list(islice(dying([]), 5)) == [0, 1, 2, 3, 4]

    def broken() -> Iterator[int]:
        yield 1
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")

    with pytest.raises(RuntimeError, match="Caught"):
        list(surviving(broken, lambda given: iter([])))


class KillWorkers(pl.Callback):
    """Kills a data worker after each of some steps, as the system does where memory runs out."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.steps:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            for worker in multiprocessing.active_children():
                worker.join(0.05)


def test_training_survives_killed_workers(fit, make_data, tmp_path, monkeypatch):
    """A worker process killed for real, told in one line: the weights are those of an undisturbed run, to the bit, and
    no exception comes out of a signal. One too many, and training stops between two steps, with a checkpoint."""
    # torch looks for dead workers every five seconds.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))

    def trained(*kill_after: int, steps: int = 12) -> pl.LightningModule:
        data = make_data()
        data.num_workers = 2 if kill_after else 0
        checkpoint = Checkpoint(tmp_path, every=100, monitor=None)
        return fit([KillWorkers(*kill_after), checkpoint], steps=steps, data=data).lightning_module

    undisturbed = trained()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        disturbed = trained(3)
    assert sum("a data worker died after batch" in str(each.message) for each in told) == 1
    assert disturbed.micro_batches_seen == undisturbed.micro_batches_seen == 12
    for ours, theirs in zip(disturbed.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "torch" not in getattr(signal.getsignal(signal.SIGCHLD), "__module__", "")

    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    # Two batches are read ahead by each of two workers: deaths so far apart that each is met before the next.
    with warnings.catch_warnings(), pytest.raises(WorkersDied, match=f"died {MAX_DEATHS + 1} times"):
        warnings.simplefilter("ignore")
        trained(2, 8, 14, 20, steps=60)
    stored = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert 20 <= stored["global_step"] < 60
