from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.training.callbacks import Checkpoint, Throughput, TrainingLog
from ornstein.training.callbacks.log import LEVEL_EDGES, LEVEL_NAMES, _level_sums, _Sum
from ornstein.training.ema import EMA
from ornstein.training.lr_schedules import linear


class Witness(pl.Callback):
    """Notes what each micro-batch and step gave."""

    def __init__(self):
        self.losses, self.levels, self.norms, self.lrs = [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = torch.cat([p.grad.flatten() for p in pl_module.parameters()])
        self.norms.append(float(grads.norm()))
        self.lrs.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        output = pl_module.last_output
        self.losses.append(float(output.loss))
        self.levels += zip(output.log_snr.tolist(), output.per_sample.tolist(), strict=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rows_hold_what_happened(fit, rows, make_module, accumulate):
    witness, logger, ema = Witness(), rows(), EMA()
    module = make_module(lr_schedule=lambda optimizer: linear(optimizer, max_steps=6))
    trainer = fit(
        [ema, witness, TrainingLog(every=3, levels_every=6), Throughput()],
        steps=7,
        logger=logger,
        module=module,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1e-3,
    )
    assert sorted(logger.rows) == [0, 3, 6]
    assert 0 <= logger.rows[0].pop("time/wall_s") <= logger.rows[3]["time/wall_s"] <= logger.rows[6]["time/wall_s"]
    assert logger.rows[0] == {"effective_batch": 4.0 * accumulate, "images_seen": 0.0}
    for step in (3, 6):
        row = logger.rows[step]
        interval = witness.losses[(step - 3) * accumulate : step * accumulate]
        # float32 sums of three to six losses of about 1
        assert row["train/loss"] == pytest.approx(sum(interval) / len(interval), rel=1e-6)
        assert row["train/grad_norm"] == pytest.approx(witness.norms[step - 1], rel=1e-5)
        assert row["train/grad_norm"] > 1e-2  # the clipped one would be 1e-3
        assert row["train/lr"] == pytest.approx(witness.lrs[step - 1])
        assert row["train/ema_decay"] == pytest.approx((1 + step) / (10 + step))
        assert row["images_seen"] == 4 * accumulate * step
        assert row["time/images_per_s"] > 0 and 0 <= row["time/data_wait_share"] < 1
    bins: dict[str, list[float]] = {}
    for log_snr, loss in witness.levels[: 6 * accumulate * 4]:
        bins.setdefault(LEVEL_NAMES[sum(log_snr > edge for edge in LEVEL_EDGES)], []).append(loss)
    found = {name.split("/")[1]: value for name, value in logger.rows[6].items() if name.startswith("loss_by_log_snr")}
    assert found == pytest.approx({name: sum(losses) / len(losses) for name, losses in bins.items()}, rel=1e-5)
    assert not any(name.startswith("loss_by_log_snr") for name in logger.rows[3])
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(logger.rows[6]["train/loss"])


def test_wall_time_goes_on_where_it_stopped(fit, rows, tmp_path):
    first, second = rows(), rows()
    slow = Throughput()
    slow.load_state_dict({"wall": 1000.0, "train": 900.0, "wait": 0.0})
    fit([TrainingLog(every=2, levels_every=None), slow, Checkpoint(tmp_path, monitor=None)], steps=4, logger=first)
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit([TrainingLog(every=2, levels_every=None), Throughput()], steps=8, logger=second, ckpt=last)
    assert 1000 <= first.rows[4]["time/wall_s"] <= second.rows[6]["time/wall_s"] <= second.rows[8]["time/wall_s"] < 1100


def test_bins_cover_the_line():
    assert len(LEVEL_NAMES) == len(LEVEL_EDGES) + 1 == 10
    assert LEVEL_NAMES[0] == "below_-8" and LEVEL_NAMES[4] == "-2_to_0" and LEVEL_NAMES[-1] == "above_8"


def test_partial_sums_survive_a_stop(fit, rows, tmp_path):
    whole, first, second = rows(), rows(), rows()
    fit([TrainingLog(every=4, levels_every=5)], steps=10, logger=whole)
    # step 7 lies between rows of either kind
    fit([TrainingLog(every=4, levels_every=5), Checkpoint(tmp_path, monitor=None)], steps=7, logger=first)
    last = tmp_path / "checkpoints" / "last.ckpt"
    sums = torch.load(last, weights_only=True)["callbacks"]["TrainingLog"]
    assert sums["losses"]["count"] == 3 and [len(part) for part in sums["levels"]["parts"]] == [2 * 4] * 3
    fit([TrainingLog(every=4, levels_every=5)], steps=10, logger=second, ckpt=last)
    assert {**first.without_times(), **second.without_times()} == whole.without_times()
    assert sorted(second.rows) == [8, 10]


@pytest.mark.parametrize("options", [{"every": 0}, {"levels_every": 0}])
def test_refuses(options):
    with pytest.raises(OrnsteinError, match=r"callbacks\.log"):
        TrainingLog(**options)


def test_many_losses_are_added_up_alike_in_a_stopped_run():
    """300 steps of 3 losses, two sums made on the way: stopped after any number of them, the bits are the same."""
    vectors = list(torch.rand(300, 3, 3, generator=torch.Generator().manual_seed(0)))
    whole = _Sum(_level_sums, vectors=3)
    for step in vectors:
        whole.add(*step)
    device = torch.device("cpu")
    wanted = whole.take(device)
    assert wanted[1].sum() == 900 and torch.equal(whole.take(device), torch.zeros_like(wanted))
    for stop in (1, 127, 128, 130, 256, 299):
        first, second = _Sum(_level_sums, vectors=3), _Sum(_level_sums, vectors=3)
        for number, step in enumerate(vectors):
            if number == stop:
                second.load_state_dict(first.state_dict())
            (first if number < stop else second).add(*step)
        assert torch.equal(second.take(device), wanted), stop


def test_an_older_checkpoint_is_read_without_what_it_had_not_added_up():
    """It held log-SNRs where alphas and sigmas stand now; its sum stays."""
    older = {"total": torch.ones(2, 10), "parts": [torch.rand(4), torch.rand(4)], "count": 129}
    sums = _Sum(_level_sums, vectors=3)
    sums.load_state_dict(older)
    assert torch.equal(sums.take(torch.device("cpu")), older["total"])
