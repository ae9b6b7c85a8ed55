"""Realism against its definition, and the best and worst of samples however they come."""

from __future__ import annotations

import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.metrics.realism import MOST, BestWorst, Realism
from ornstein.metrics.statistics import Statistics, moments_of


def real(features, index=None):
    total, outer = features.double().sum(0), features.double().T @ features.double()
    index = torch.arange(len(features)) if index is None else index
    moments = moments_of(total, outer, count=len(features))
    return Statistics(count=len(features), moments=moments, features=features, index=index)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_realism_is_the_papers():
    bank, samples = normal(60, 5, seed=0), normal(20, 5, seed=1) * 1.5
    score, distance, nearest = Realism(real(bank, torch.arange(60) * 3), k=3)(samples)
    radii = [sorted(float((a - b).norm()) for b in bank)[3] for a in bank]
    kept = [row for row in range(60) if radii[row] <= sorted(radii)[29]]  # torch's median of 60 is the lower one
    for row, sample in enumerate(samples):
        away = [float((sample - each).norm()) for each in bank]
        assert float(score[row]) == pytest.approx(max(radii[each] / away[each] for each in kept), rel=1e-9)
        assert float(distance[row]) == pytest.approx(min(away), rel=1e-9)
        assert int(nearest[row]) == 3 * away.index(min(away))


def test_copies_score_most_and_outliers_do_not_count():
    bank = torch.cat([normal(50, 4, seed=0), torch.full((1, 4), 100.0, dtype=torch.float64)])
    near = int((bank[:, None] - bank).norm(dim=-1).kthvalue(4, dim=1).values.argmin())  # its ball is the smallest
    score, distance, nearest = Realism(real(bank))(torch.stack([bank[near], bank[50] + 1]))
    # The outlier's ball reaches as far as all others: without pruning anything near it would be most real.
    assert score[0] == MOST and distance[0] == 0
    assert score[1] < 0.1 and nearest.tolist() == [near, 50]
    with pytest.raises(OrnsteinError, match="more than 3 real images"):
        Realism(real(bank[:3]))


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_the_best_and_the_worst_of_all_whatever_the_batches(batch):
    features = normal(40, 5, seed=2) * torch.linspace(0.1, 4, 40)[:, None]
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, 2, 2)
    realism = Realism(real(normal(80, 5, seed=0)))
    judge = BestWorst(realism, count=6)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(batch))
    for rows in order.split(batch):
        judge.add(features[rows], images[rows], index=rows, labels=rows % 10)
    found, scores = judge.extremes(), realism(features)[0]
    ranked = scores.argsort(descending=True).tolist()
    assert [each.sample for each in found.best] == ranked[:6]
    assert [each.sample for each in found.worst] == ranked[::-1][:6]
    for each in (*found.best, *found.worst):
        assert each.label == each.sample % 10 and int(each.image[0, 0, 0]) == each.sample
    # Each entry owns its pixels: a view would keep its whole batch alive.
    assert all(each.image.untyped_storage().nbytes() == 4 for each in found.best)


def test_few_samples_are_either_good_or_bad():
    judge = BestWorst(Realism(real(normal(20, 3, seed=0))), count=8)
    judge.add(normal(5, 3, seed=1), torch.zeros(5, 1, 2, 2, dtype=torch.uint8), index=torch.arange(5))
    found = judge.extremes()
    assert len(found.best) == len(found.worst) == 2
    assert not {each.sample for each in found.best} & {each.sample for each in found.worst}
