"""The matrix: every schedule x parameterization x sampler of conf/ on a Gaussian mixture, whose truth is known.

A test is a (schedule, sampler) pair; all parameterizations that the pair allows go through it in one batch, each fed by
the exact denoiser through its own input scaling and ``target -> output -> x0``. Trajectories start from draws of the
exact marginal at the schedule's noisiest level (not from pure noise: a schedule that stops short of it would be judged
for that), and every parameterization starts from the same ones with the same noise. So three things are judged:

- the anchor, the batch's first parameterization, against fresh draws of the mixture by sliced Wasserstein distance;
- of a deterministic sampler, also each trajectory against a tight solution of the probability flow from the same x_1;
- every other parameterization against the anchor, trajectory by trajectory, to rounding: a change of variables changes
  no sample, whether or not noise is drawn. ``make test`` runs 32 trajectories of each; the slow run gives each as many
  samples as the anchor, and judges each against fresh draws and the exact flow by itself.

LCM is given the exact flow map, which is what a consistency model is; of the posterior mean its samples are wrong.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from ornstein.diffusion.analytic import DATA, ConsistencyDenoiser, GaussianMixture, through_scaling
from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.noise import NoiseSource
from ornstein.diffusion.parameterizations import LearnedVariance, Parameterization
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import Level, Linear, NoiseSchedule, Scalar

from .tables import PARAMETERIZATIONS, REFUSED, SAMPLERS, SCHEDULES, UNRESOLVED, SamplerRow, option

CONF = Path(__file__).parents[2] / "conf"
F64 = torch.float64
SMALL, LARGE = (800, 32), (2500, 2500)  # samples of the anchor, and of each other parameterization


@cache
def three_components() -> GaussianMixture:
    means = torch.tensor([[-0.7, -0.5], [0.6, 0.7], [0.5, -0.8]], dtype=F64)
    stds, weights = torch.tensor([0.2, 0.15, 0.25], dtype=F64), torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    return GaussianMixture(means, stds, weights)


@dataclass(frozen=True)
class Side:
    """The exact denoiser through several parameterizations at once: the posterior is worked out for all of them."""

    schedule: NoiseSchedule
    parameterizations: tuple[Parameterization, ...]
    sizes: tuple[int, ...]
    consistency: bool = False
    cost: int = 1
    renoises: bool = False
    remembers: bool = False

    def start(self) -> Denoise:
        return self

    def clip(self, prediction: Prediction) -> Prediction:
        return prediction

    def predict(self, x_t: Tensor, t: Scalar | Level, *, again: bool = False) -> Prediction:
        return self(x_t, t, again=again)

    def __call__(self, x_t: Tensor, t: Scalar | Level, *, again: bool = False) -> Prediction:
        level = t if isinstance(t, Level) else self.schedule.level(t, x_t.ndim)
        parts = list(zip(self.parameterizations, x_t.split(self.sizes), self._split(level), strict=True))
        seen = torch.cat([through_scaling(p, x, part) for p, x, part in parts])
        if self.consistency:
            x0, eps = ConsistencyDenoiser(
                three_components(), self.schedule, self.parameterizations[0], tolerance=1e-5
            ).ideal(seen, level)
        else:
            x0, eps = three_components().moments(seen, level)
        out = []
        for (p, x, part), clean, noise in zip(parts, x0.split(self.sizes), eps.split(self.sizes), strict=True):
            target = p.target(clean, noise, part)
            if isinstance(p, LearnedVariance):  # halfway between the two variances, as its second half would say
                target = torch.cat([target, torch.zeros_like(target)], dim=1)
            out.append(p.predict(target, x, part))
        fraction = None if out[0].variance_fraction is None else torch.full_like(x_t, 0.5)
        x0, eps = (torch.cat([getattr(p, name) for p in out]) for name in ("x0", "eps"))
        return Prediction(x_t, level, x0=x0, eps=eps, variance_fraction=fraction)

    def _split(self, level: Level) -> list[Level]:
        columns = [
            v.split(self.sizes) if isinstance(v, Tensor) and v.ndim > 0 and len(v) > 1 else [v] * len(self.sizes)
            for v in level
        ]
        return [Level(*row) for row in zip(*columns, strict=True)]


class SharedNoise:
    """Counter-based noise, drawn once for the whole matrix: number j of each parameterization has that of sample j."""

    drawn: dict[tuple[int, int, int], Tensor] = {}  # noqa: RUF012
    source = NoiseSource(3)
    shape = (2,)

    def __init__(self, sizes: tuple[int, ...], start: Tensor) -> None:
        self.index = torch.cat([torch.arange(size) for size in sizes])
        self.start, self.most = start, max(sizes)

    def expect(self, steps: int) -> SharedNoise:
        return self

    def __call__(self, step: int, draw: int = 0) -> Tensor:
        if step == 0 and draw == 0:
            return self.start[self.index]
        key = (self.most, step, draw)
        if key not in self.drawn:
            self.drawn[key] = self.source.noise(torch.arange(self.most), step, draw, shape=self.shape)
        return self.drawn[key][self.index]


class Truth:
    """Fresh draws of the mixture, and how far from them as many real draws as a cell has may lie."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        angle = torch.arange(8, dtype=F64) * math.pi / 8
        self.directions = torch.stack([angle.cos(), angle.sin()])
        fresh = three_components().sample(50 * count, generator=generator)
        # Quantiles of the projections: the exact one-dimensional optimal transport plan.
        self.quantiles = (fresh @ self.directions).sort(0).values.reshape(count, 50, -1).mean(1)
        real = torch.stack([self.distance(three_components().sample(count, generator=generator)) for _ in range(200)])
        # About 900 (schedule, sampler) pairs, thousands of cells that share their noise: six deviations of real draws
        # around their mean allow for that many tries and for the bias of finitely many steps.
        self.limit = float(real.mean() + 6 * real.std())

    def distance(self, x: Tensor) -> Tensor:
        """Sliced Wasserstein-1 over eight directions."""
        return ((x @ self.directions).sort(0).values - self.quantiles).abs().mean()


truth_of = cache(Truth)


@cache
def start_of(name: str, count: int) -> tuple[Tensor, Tensor]:
    """Draws of the exact marginal at a schedule's noisiest level, and where the exact flow takes them."""
    mixture, schedule = three_components(), SCHEDULES[name]()
    first, last = schedule.level(1.0), schedule.level(0.0)
    generator = torch.Generator().manual_seed(1)
    x0 = mixture.sample(count, generator=generator)
    x = first.alpha * x0 + first.sigma * torch.randn(count, 2, generator=generator, dtype=F64)
    return x, mixture.flow(x, first, last, tolerance=1e-8)


@cache
def own_start(count: int) -> tuple[Tensor, Tensor]:
    """The same for a sampler that begins with pure noise at the end of DDPM's linear table."""
    noise = NoiseSource(3).noise(torch.arange(count), 0, shape=(2,)).double()
    return noise, three_components().flow(noise, Linear().level(1.0), DATA, tolerance=1e-8)


def allowed(schedule: str, row: SamplerRow) -> list[str]:
    """The parameterizations that have a meaning with a schedule and a sampler, the anchor first."""
    names = [name for name in PARAMETERIZATIONS if (schedule, name) not in REFUSED]
    if row.needs == "variance":
        names = [name for name in names if option(name) == "learned_variance"]
    return names


@dataclass(frozen=True)
class Cell:
    """One cell's figures: distance to fresh draws, mean error against the exact flow, largest step from the anchor."""

    sliced: float
    error: float
    apart: float


def run(schedule: str, row: SamplerRow, sizes: tuple[int, int]) -> dict[str, Cell]:
    """All cells of a (schedule, sampler) pair."""
    names = allowed(schedule, row)
    counts = (sizes[0], *[sizes[1]] * (len(names) - 1))
    built = SCHEDULES[schedule]()
    x_1, exact = own_start(sizes[0]) if row.own_start else start_of(schedule, sizes[0])
    start = x_1 if row.own_start else x_1 / built.level(1.0).sigma
    side = Side(built, tuple(PARAMETERIZATIONS[n]() for n in names), counts, consistency=row.needs == "consistency")
    state = row.make(row.steps, row.grid).sample(side, SharedNoise(counts, start))
    parts = state.x.double().split(counts)
    truth = truth_of(sizes[0])
    cells = {}
    for name, x in zip(names, parts, strict=True):
        sliced = float(truth.distance(x)) if len(x) == sizes[0] else 0.0
        error = float((x - exact[: len(x)]).norm(dim=1).mean())
        cells[name] = Cell(sliced, error, float((x - parts[0][: len(x)]).abs().max()))
    return cells


def judge(schedule: str, sampler: str, sizes: tuple[int, int]) -> None:
    row = SAMPLERS[sampler]
    if (schedule, sampler) in UNRESOLVED:
        with pytest.raises(ValueError, match="closer than a Brownian path"):
            run(schedule, row, sizes)
        return
    cells = run(schedule, row, sizes)
    for name, cell in cells.items():
        where = f"{schedule} x {name} x {sampler}: {cell}"
        assert cell.sliced < truth_of(sizes[0]).limit, where
        assert row.error is None or cell.error < row.error, where
        assert cell.apart < row.rounding, where


PAIRS = list(itertools.product(SCHEDULES, SAMPLERS))
# Variants of a sampler go over one schedule of each kind in the fast run, and over all in the slow one.
FAST = [(s, p) for s, p in PAIRS if option(p) == p or s in ("linear", "constant", "edm", "flow")]


@pytest.mark.parametrize(("schedule", "sampler"), FAST)
def test_cells(schedule: str, sampler: str) -> None:
    judge(schedule, sampler, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "sampler"), PAIRS)
def test_cells_one_by_one(schedule: str, sampler: str) -> None:
    judge(schedule, sampler, LARGE)


def test_no_cell_is_left_out() -> None:
    cells = {(s, p, name) for s, name in PAIRS for p in allowed(s, SAMPLERS[name])}
    every = set(itertools.product(SCHEDULES, PARAMETERIZATIONS, SAMPLERS))
    no_signal = {(s, p, name) for s, p, name in every if (s, p) in REFUSED}
    no_variance = {
        (s, p, n) for s, p, n in every if SAMPLERS[n].needs == "variance" and option(p) != "learned_variance"
    }
    assert cells == every - no_signal - no_variance
    assert not cells & (no_signal | no_variance)
    # The fast run has every option of every group, with all of the other two.
    assert {(s, option(n)) for s, n in FAST} == {(s, option(n)) for s, n in PAIRS}


@pytest.mark.parametrize(
    ("group", "rows"),
    [("scheduler", SCHEDULES), ("sampler", SAMPLERS), ("objective/parameterization", PARAMETERIZATIONS)],
)
def test_every_option_of_conf_has_a_row(group: str, rows: dict[str, object]) -> None:
    options = {path.stem for path in (CONF / group).glob("*.yaml")}
    assert options == {option(name) for name in rows}


def test_every_objective_trains_a_parameterization_of_the_table() -> None:
    for path in (CONF / "objective").glob("*.yaml"):
        defaults = yaml.safe_load(path.read_text())["defaults"]
        (name,) = [entry["parameterization"] for entry in defaults if "parameterization" in entry]
        assert name in PARAMETERIZATIONS, path


@pytest.mark.parametrize(("schedule", "parameterization"), sorted(REFUSED))
def test_refused_for_want_of_signal(schedule: str, parameterization: str) -> None:
    built, meaning = SCHEDULES[schedule](), PARAMETERIZATIONS[parameterization]()
    denoiser = three_components().denoiser(built, meaning)
    with pytest.raises(ValueError, match="does not determine x0 where alpha = 0: choose objective="):
        _ = denoiser(torch.zeros(1, 2, dtype=F64), 1.0).x0


def test_refusals_are_the_rule_that_validation_goes_by() -> None:
    rule = {
        (s, p)
        for s, schedule in SCHEDULES.items()
        for p, parameterization in PARAMETERIZATIONS.items()
        if parameterization().needs_signal and schedule().zero_terminal_snr
    }
    assert rule == REFUSED


@pytest.mark.parametrize("parameterization", [p for p in PARAMETERIZATIONS if option(p) != "learned_variance"])
def test_refused_for_want_of_a_variance(parameterization: str) -> None:
    side = Side(SCHEDULES["linear"](), (PARAMETERIZATIONS[parameterization](),), (4,))
    with pytest.raises(ValueError, match="needs a network that predicts its variance"):
        SAMPLERS["ddpm-learned"].make(5, None).sample(side, SharedNoise((4,), torch.zeros(4, 2)))


def test_lcm_needs_the_flow_map() -> None:
    """Of the posterior mean its samples are wrong, which is why its cells have a consistency model."""
    start, _ = start_of("linear", SMALL[0])
    side = Side(SCHEDULES["linear"](), (PARAMETERIZATIONS["v"](),), (SMALL[0],))
    x = SAMPLERS["lcm"].make(3, SAMPLERS["lcm"].grid).sample(side, SharedNoise((SMALL[0],), start)).x
    assert truth_of(SMALL[0]).distance(x) > truth_of(SMALL[0]).limit


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["fast", "slow"])
def test_the_limits_notice_a_wrong_sampler(sizes: tuple[int, int]) -> None:
    truth, mixture = truth_of(sizes[0]), three_components()
    draws = mixture.sample(sizes[0], generator=torch.Generator().manual_seed(5))
    centre = mixture.means.mean(0)
    assert truth.distance(draws) < truth.limit
    # A seventh too much spread, or a tenth of the data's deviation to one side.
    assert truth.distance(centre + 1.15 * (draws - centre)) > truth.limit
    assert truth.distance(draws + 0.1) > truth.limit
