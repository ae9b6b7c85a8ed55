from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.training.callbacks import Checkpoint
from ornstein.training.ema import EMA

from .conftest import Learned


class Witness(pl.Callback):
    """Keeps the weights after each optimizer step; stands before EMA."""

    def __init__(self):
        self.weights = []

    def on_train_start(self, trainer, pl_module):
        self.step = trainer.global_step
        self.initial = copy.deepcopy(pl_module.network.state_dict())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self.weights.append(copy.deepcopy(pl_module.network.state_dict()))


@pytest.mark.parametrize(
    ("decay", "warmup", "every", "accumulate"),
    [
        (0.9, False, 1, 1),
        (0.9, True, 1, 1),
        (0.15, True, 1, 1),
        (0.0, False, 1, 1),
        (0.9, True, 2, 1),
        (0.9, True, 1, 3),
    ],
)
def test_matches_a_computation_by_hand(fit, decay, warmup, every, accumulate):
    witness, ema = Witness(), EMA(decay=decay, warmup=warmup, every=every)
    trainer = fit([witness, ema], steps=5, accumulate_grad_batches=accumulate)
    assert len(witness.weights) == 5
    expected = {name: value.double() for name, value in witness.initial.items()}
    updates = 0
    for weights in witness.weights[every - 1 :: every]:
        rate = min(decay, (1 + updates) / (10 + updates)) if warmup else decay
        expected = {name: rate * expected[name] + (1 - rate) * weights[name].double() for name in expected}
        updates += 1
    assert ema.updates == updates
    for name, value in trainer.lightning_module.evaluation_network().state_dict().items():
        # float32 lerp against float64: a few roundings of 6e-8 of values below 1
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=0)


def test_training_never_touches_the_averages_nor_they_the_checkpoint(fit, tmp_path):
    ema = EMA(decay=0.5, warmup=False)
    trainer = fit([ema, Checkpoint(tmp_path, monitor=None)], steps=3)
    module = trainer.lightning_module
    own = {p.data_ptr() for p in module.network.parameters()}
    assert not own & {p.data_ptr() for p in ema.network.parameters()}
    assert not any(p.requires_grad for p in ema.network.parameters())
    assert all(not name.startswith("averaged") for name in module.state_dict())
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in module.network.state_dict().items():
        assert torch.equal(saved["state_dict"][f"network.{name}"], value)
        assert not torch.equal(ema.network.state_dict()[name], value)
    averages = saved["callbacks"]["EMA"]
    assert averages["updates"] == 3
    assert all(torch.equal(averages["network"][name], value) for name, value in ema.network.state_dict().items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_average_is_that_of_an_undisturbed_run(fit, tmp_path, accumulate):
    undisturbed, stopped, resumed = EMA(), EMA(), EMA()
    fit([undisturbed], steps=6, accumulate_grad_batches=accumulate)
    fit([stopped, Checkpoint(tmp_path, monitor=None)], steps=3, accumulate_grad_batches=accumulate)
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit([resumed], steps=6, ckpt=last, accumulate_grad_batches=accumulate)
    assert resumed.updates == undisturbed.updates == 6
    for name, value in undisturbed.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value)


def test_a_learned_schedule_is_averaged_saved_and_resumed_with_the_network(fit, make_module, tmp_path):
    def schedules(steps, *, ckpt=None, checkpoint=False):
        ema = EMA(decay=0.5, warmup=False)
        after = [ema, *([Checkpoint(tmp_path, monitor=None)] if checkpoint else [])]
        trainer = fit(after, steps=steps, module=make_module(schedule=Learned()), ckpt=ckpt)
        return trainer.lightning_module, ema

    slopes = [8.0]
    expected = torch.tensor(8.0)
    for steps in range(1, 4):
        module, ema = schedules(steps, checkpoint=True)
        slopes.append(float(module.schedule.slope.detach()))
        expected = 0.5 * expected + 0.5 * slopes[-1]
    assert len(set(slopes)) == 4, "the schedule learns"
    # three float32 lerps of values near 8, each rounding to 5e-7
    torch.testing.assert_close(ema.schedule.slope, expected, atol=3e-6, rtol=0)
    assert module.evaluation_schedule() is ema.schedule and module.schedule is not ema.schedule
    denoisers = module.denoiser(), module.denoiser(evaluation=True)
    assert [denoiser.schedule for denoiser in denoisers] == [module.schedule, ema.schedule]

    last = tmp_path / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert torch.equal(saved["state_dict"]["schedule.slope"], module.schedule.slope)
    assert torch.equal(saved["callbacks"]["EMA"]["schedule"]["slope"], ema.schedule.slope)
    whole, resumed = schedules(6), schedules(6, ckpt=last)
    for one, other in ((whole[0].schedule, resumed[0].schedule), (whole[1].schedule, resumed[1].schedule)):
        assert torch.equal(one.slope, other.slope)


def test_a_schedule_without_parameters_leaves_no_trace(fit):
    ema = EMA()
    module = fit([ema], steps=1).lightning_module
    assert ema.schedule is None and module.evaluation_schedule() is module.schedule
    assert set(ema.state_dict()) == {"updates", "network"}


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"every": 0}])
def test_refuses(options):
    with pytest.raises(OrnsteinError, match=r"ema\.(decay|every)="):
        EMA(**options)
