from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.training.callbacks import Checkpoint, NonFiniteGuard


class Break(pl.Callback):
    """Makes a weight, and so the loss of the next step, not a number."""

    def __init__(self, *, after):
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.after:
            with torch.no_grad():
                next(pl_module.network.parameters()).view(-1)[0] = torch.nan


class Batches(pl.Callback):
    def __init__(self):
        self.indices = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.indices.append(batch["index"].tolist())


def test_stops_before_the_loss_reaches_the_weights(fit, make_data, tmp_path):
    batches, witness = Batches(), []

    class Witness(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            witness.append(trainer.global_step + 1)

    checkpoint = Checkpoint(tmp_path, every=2, monitor=None)
    with pytest.raises(OrnsteinError) as error:
        fit([batches, NonFiniteGuard(), Break(after=3), Witness(), checkpoint], steps=9, data=make_data(batch_size=12))
    message = str(error.value)
    assert "at step 4" in message
    assert f"images {', '.join(map(str, batches.indices[3][:10]))}:" in message
    assert str(tmp_path / "checkpoints" / "last.ckpt") in message
    assert witness == [1, 2, 3]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_no_checkpoint_of_bad_weights(fit, tmp_path):
    with pytest.raises(OrnsteinError, match=r"at step 2 the weights .* no checkpoint had been written yet"):
        fit([NonFiniteGuard(), Break(after=2), Checkpoint(tmp_path, every=2, monitor=None)], steps=9)
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("check", ["at the interval", "before a checkpoint"])
def test_the_flag_names_the_first_bad_step(check):
    """What accelerators and several devices do: losses are noted, and looked at later."""
    guard = NonFiniteGuard(every=5)
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    trainer = SimpleNamespace(world_size=2, global_step=0, callbacks=[], ckpt_path="old.ckpt", strategy=strategy)
    module = object.__new__(_Module())
    for step, loss in enumerate([1.0, 2.0, float("inf"), float("nan"), 1.0], start=1):
        trainer.global_step = step - 1
        module.__dict__["last_output"] = SimpleNamespace(loss=torch.tensor(loss))
        guard.on_train_batch_start(trainer, module, {"index": torch.arange(step, step + 3)}, step - 1)
        guard.on_before_backward(trainer, module, torch.tensor(0.0))
        trainer.global_step = step
        if step < 5:
            guard.on_train_batch_end(trainer, module, None, None, step - 1)
    with pytest.raises(OrnsteinError, match=r"at step 3, in a batch that begins with images 3, 4, 5: .*old\.ckpt"):
        if check == "at the interval":
            guard.on_train_batch_end(trainer, module, None, None, 4)
        else:
            guard.check_before_checkpoint(trainer, module)


def _Module():
    from ornstein.training.module import DiffusionModule

    return DiffusionModule


def test_refuses():
    with pytest.raises(OrnsteinError, match="nonfinite"):
        NonFiniteGuard(every=0)
