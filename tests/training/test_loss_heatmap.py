"""The loss by noise level over time: exact means in bounded memory, a picture of them that goes on after a stop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ornstein.errors import OrnsteinError
from ornstein.training.callbacks import Checkpoint, LossHeatmap, TrainingLog
from ornstein.training.callbacks.level_history import LevelHistory
from ornstein.training.callbacks.log import LEVEL_NAMES
from ornstein.training.callbacks.loss_heatmap import plot_levels


def test_history_is_bounded_and_its_means_are_exact() -> None:
    history = LevelHistory(2)
    for row in range(1, 1500):
        history.add(10 * row, [float(row), 0.0], [2.0, 0.0])
    steps, means = history.means()
    assert 256 <= len(history) <= 512 and steps[-1] == 14990 and steps == sorted(set(steps))
    begin = 0
    for end, mean in zip(steps, means[:, 0].tolist(), strict=True):
        inside = range(begin // 10 + 1, end // 10 + 1)
        assert mean == pytest.approx(sum(inside) / (2 * len(inside)), rel=1e-12)
        begin = end
    assert torch.isnan(means[:, 1]).all()
    again = LevelHistory(2)
    again.load_state_dict(history.state_dict())
    assert again.means()[0] == steps and torch.equal(again.means()[1][:, 0], means[:, 0])


def test_a_step_that_comes_again_replaces_what_was_there() -> None:
    history = LevelHistory(1)
    for step in (10, 20, 30, 20):
        history.add(step, [float(step)], [1.0])
    assert history.means()[0] == [10, 20]


def test_picture_shows_losses_where_and_when_they_were() -> None:
    losses = torch.full((4, 10), 1.0, dtype=torch.float64)
    losses[2:, 7] = 2.0  # the later half of one level
    losses[:, 0] = torch.nan
    picture = np.asarray(plot_levels([10, 20, 30, 40], losses)).astype(int)
    yellow = (picture[..., 0] > 200) & (picture[..., 1] > 200) & (picture[..., 2] < 100)
    purple = (picture[..., 0] < 90) & (picture[..., 1] < 20) & (picture[..., 2] > 70)
    left = slice(0, int(picture.shape[1] * 0.89))  # without the colour bar
    ys, xs = np.nonzero(yellow[:, left])
    columns = np.nonzero(purple[:, left].any(0))[0]
    assert xs.min() == pytest.approx((columns.min() + columns.max()) / 2, abs=3)
    rows = np.nonzero((yellow | purple)[:, left].any(1))[0]
    height = (rows.max() - rows.min() + 1) / 9  # nine bins have a colour
    assert len(set(ys)) == pytest.approx(height, abs=2)
    # log-SNR grows upward: bin 7 has two above it
    assert ys.min() - rows.min() == pytest.approx(2 * height, abs=3)


def test_resumed_picture_begins_where_the_run_did(fit, rows, tmp_path) -> None:
    def callbacks(folder):
        return [TrainingLog(every=4, levels_every=2), LossHeatmap(folder, every=4), Checkpoint(folder, monitor=None)]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    logger = rows()
    trainer = fit(callbacks(whole), steps=8, logger=logger)
    assert logger.pictures == [("loss_by_log_snr", 4), ("loss_by_log_snr", 8)]
    (log,) = [each for each in trainer.callbacks if isinstance(each, TrainingLog)]
    steps, means = log.history.means()
    assert steps == [2, 4, 6, 8] and means.shape == (4, len(LEVEL_NAMES))
    for step, row in zip(steps, means.tolist(), strict=True):
        expected = [logger.rows[step].get(f"loss_by_log_snr/{name}", float("nan")) for name in LEVEL_NAMES]
        np.testing.assert_array_equal(row, expected)
    fit(callbacks(cut), steps=5)
    last = cut / "checkpoints" / "last.ckpt"
    fit(callbacks(cut), steps=8, ckpt=last)
    with Image.open(whole / "loss_by_log_snr.png") as one, Image.open(cut / "loss_by_log_snr.png") as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_nothing_where_there_are_no_levels(fit, tmp_path) -> None:
    fit([TrainingLog(every=2, levels_every=None), LossHeatmap(tmp_path, every=2)], steps=2)
    assert not (tmp_path / "loss_by_log_snr.png").exists()


def test_refuses_an_interval_of_none() -> None:
    with pytest.raises(OrnsteinError, match=r"callbacks\.loss_heatmap\.every"):
        LossHeatmap("run", every=0)
