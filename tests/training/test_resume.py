from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from ornstein.diffusion.objectives import Objective
from ornstein.diffusion.parameterizations import V
from ornstein.training.callbacks import Checkpoint, SampleGrid, Throughput, TrainingLog, Validation
from ornstein.training.ema import EMA
from ornstein.training.estimate import measure_cost
from ornstein.training.lr_schedules import cosine

from .conftest import Remembering


class Killed(RuntimeError):
    pass


class Kill(pl.Callback):
    """Ends the process in the middle of a step, as a power cut would: nothing may be written then."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step - 1:
            raise Killed


STEPS = 13


@pytest.mark.parametrize(
    ("kill", "every", "accumulate"), [(8, 5, 1), (6, 5, 1), (12, 4, 1), (8, 5, 2), (13, 4, 3), (11, 10, 1)]
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(fit, make_module, rows, tmp_path, kill, every, accumulate):
    """Rows, weights, averages and optimizer to the bit. `every` coincides with rows, validations and grids or not."""

    def run(folder, *, ckpt=None, extra=()):
        logger, ema = rows(), EMA()
        checkpoint = Checkpoint(folder, every=every, monitor="val/loss")
        callbacks = [
            ema,
            *extra,
            TrainingLog(every=3, levels_every=4),
            Validation(every=5),
            SampleGrid(folder, every=4),
            Throughput(),
            checkpoint,
        ]
        module = make_module(lr_schedule=lambda optimizer: cosine(optimizer, max_steps=STEPS), flip=True)
        try:
            trainer = fit(
                callbacks,
                steps=STEPS,
                module=module,
                logger=logger,
                ckpt=ckpt,
                accumulate_grad_batches=accumulate,
                gradient_clip_val=1.0,
            )
        except Killed:
            return logger, None, ema, checkpoint
        return logger, trainer, ema, checkpoint

    whole_rows, whole, whole_ema, whole_best = run(tmp_path / "whole")
    first_rows, nothing, *_ = run(tmp_path / "cut", extra=[Kill(kill)])
    assert nothing is None
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    at = torch.load(last, weights_only=True)["global_step"]
    assert (kill - 1) // every * every <= at < kill  # a new best is written too
    second_rows, resumed, resumed_ema, resumed_best = run(tmp_path / "cut", ckpt=last)

    kept = {step: row for step, row in first_rows.without_times().items() if step <= at}
    later = second_rows.without_times()
    assert min(later) > at
    assert {**kept, **later} == whole_rows.without_times()
    assert {5, 10, 13} <= {step for step, row in whole_rows.rows.items() if "val/loss" in row}
    for name, value in whole.lightning_module.state_dict().items():
        assert torch.equal(resumed.lightning_module.state_dict()[name], value), name
    for name, value in whole_ema.network.state_dict().items():
        assert torch.equal(resumed_ema.network.state_dict()[name], value), name
    for ours, theirs in zip(
        resumed.optimizers[0].state_dict()["state"].values(),
        whole.optimizers[0].state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed_best.best_score == whole_best.best_score
    assert resumed.lightning_module.images_seen == whole.lightning_module.images_seen
    grids = sorted(path.name for path in (tmp_path / "whole" / "samples").iterdir())
    assert grids == ["step_000004.png", "step_000008.png", "step_000012.png", "step_000013.png"]
    for name in grids:
        ours, theirs = (tmp_path / folder / "samples" / name for folder in ("cut", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_finished_run_goes_on_with_more_steps(fit, rows, tmp_path):
    whole, longer = rows(), rows()
    long_run = fit([TrainingLog(every=2), Validation(every=3)], steps=9, logger=whole)
    fit([TrainingLog(every=2), Validation(every=3), Checkpoint(tmp_path, monitor=None)], steps=6)
    last = tmp_path / "checkpoints" / "last.ckpt"
    resumed = fit([TrainingLog(every=2), Validation(every=3)], steps=9, logger=longer, ckpt=last)
    assert longer.without_times() == {step: row for step, row in whole.without_times().items() if step > 6}
    for name, value in long_run.lightning_module.state_dict().items():
        assert torch.equal(resumed.lightning_module.state_dict()[name], value)


def test_a_finished_run_resumed_does_nothing(fit, rows, tmp_path):
    fit([Checkpoint(tmp_path, monitor=None)], steps=3)
    last = tmp_path / "checkpoints" / "last.ckpt"
    before, logger = last.read_bytes(), rows()
    fit(
        [TrainingLog(every=1), Validation(every=1), Checkpoint(tmp_path, monitor=None)],
        steps=3,
        logger=logger,
        ckpt=last,
    )
    assert logger.rows == {} and last.read_bytes() == before


def test_what_an_objective_remembers_is_resumed_and_touched_by_training_alone(fit, make_module, make_data, tmp_path):
    def run(steps, *after, ckpt=None):
        module = make_module(objective=Objective(V(), Remembering()))
        return fit(list(after), steps=steps, module=module, ckpt=ckpt).lightning_module

    whole = run(8)
    stopped = run(4, Validation(every=2), Checkpoint(tmp_path, monitor=None))
    assert "objective.time_density.bound" in stopped.state_dict()
    resumed = run(8, ckpt=tmp_path / "checkpoints" / "last.ckpt")
    assert 0 < whole.objective.time_density.bound < 1
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name

    data = make_data()
    data.setup()
    before = resumed.objective.time_density.bound.clone()
    resumed.trainer = None
    measure_cost(resumed, data.train.batch([0, 1, 2, 3]))
    assert torch.equal(resumed.objective.time_density.bound, before)
