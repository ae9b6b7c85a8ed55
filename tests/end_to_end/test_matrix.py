"""Every pair of options of model, schedule, objective, sampler, guidance and distance: trained, sampled, resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, product

import pytest
import torch

import ornstein
from ornstein.cli.launch import find_mistake
from ornstein.cli.resume import prepare_resume
from ornstein.cli.train import train
from ornstein.cli.validate import validate

FACTORS = {
    "model": ("pixel_unet", "class_unet", "dit", "latent_unet", "latent_dit"),
    "scheduler": ("linear", "cosine", "sigmoid", "laplace", "sub_vp", "flow", "edm"),
    "objective": ("eps", "x0", "v", "flow", "edm", "score", "hybrid"),
    "sampler": ("ddpm", "ddim", "euler", "heun", "dpmpp_2m", "unipc", "rk45", "diffusers"),
    "guidance": ("none", "cfg", "apg", "interval"),
    "objective/distance": ("l1", "l2", "pseudo_huber"),
}
# Pairs that cannot work, and the words that say so. The schedules, samplers and guidances that are not here are judged
# on ground truth, in tests/diffusion, and run through the command line below.
REFUSED = {
    frozenset({("sampler", "rk45"), ("guidance", "apg")}): "guidance.momentum=0",
    **{frozenset({("scheduler", "flow"), ("objective", name)}): "zero SNR" for name in ("eps", "score", "hybrid")},
    **{frozenset({("model", "pixel_unet"), ("guidance", name)}): "no condition" for name in ("cfg", "apg", "interval")},
    **{
        frozenset({("model", name), ("objective", "hybrid")}): "objective.last=gaussian"
        for name in ("latent_unet", "latent_dit")
    },
}
OTHERS = (
    "scheduler=vdm_learned objective=vdm",
    "objective=vlb sampler=ddpm sampler.variance=learned",
    "objective=vlb model=latent_unet objective.last=gaussian",
    "scheduler=flow objective=flow objective/coupling=minibatch_ot sampler=unipc",
    "scheduler=cosine scheduler.shift=2 scheduler.zero_terminal_snr=true objective/time=loss_adaptive sampler=deis",
    "scheduler=ve objective=edm objective/time=mode sampler=annealed_langevin",
    "scheduler=snr_sigmoid scheduler.input_scale=0.5 objective=min_snr sampler=predictor_corrector",
    "objective=sigmoid sampler=lcm sampler/grid=trailing",
    "objective=p2 sampler=pndm sampler/grid=quadratic",
    "objective=truncated_snr sampler=lms sampler/grid=sd3_shift",
    "guidance=cfgpp sampler=euler sampler/grid=beta",
    "guidance=compose sampler=dpmpp_2m_sde sampler/grid=exponential",
    "guidance=classifier sampler=dpmpp_2s",
    "sampler=dpmpp_3m_sde sampler/grid=ays_sd",
)
Row = dict[str, str]
Pair = frozenset[tuple[str, str]]


def pairs_of(row: Row) -> set[Pair]:
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def allowed_pairs() -> list[Pair]:
    every = [
        frozenset({(one, a), (two, b)})
        for one, two in combinations(FACTORS, 2)
        for a, b in product(FACTORS[one], FACTORS[two])
    ]
    return [pair for pair in every if pair not in REFUSED]


def all_pairs() -> Iterator[Row]:
    """Rows that hold every allowed pair at least once: each begins with the first pair that is still missing and takes
    of every other factor the option that adds most."""
    missing = allowed_pairs()
    turn = 0
    while missing:
        row = dict(sorted(missing[0]))
        for factor in FACTORS:
            if factor in row:
                continue
            gains = {
                option: len(pairs_of({**row, factor: option}) & set(missing))
                for option in FACTORS[factor]
                if not pairs_of({**row, factor: option}) & set(REFUSED)
            }
            # Among equals not always the first, or cheap rows would fill up with one option.
            order = [*FACTORS[factor][turn % len(FACTORS[factor]) :], *FACTORS[factor]]
            row[factor] = max((option for option in order if option in gains), key=gains.__getitem__)
        turn += 1
        missing = [pair for pair in missing if pair not in pairs_of(row)]
        yield {factor: row[factor] for factor in FACTORS}


ROWS = list(all_pairs())
FAST = 10  # of them, spread over the whole; the rest is slow


def overrides_of(row: Row, tiny: Callable[..., list[str]]) -> list[str]:
    return tiny(row["model"]) + [f"{factor}={option}" for factor, option in row.items() if factor != "model"]


def test_the_rows_hold_every_pair_that_can_work():
    held = set().union(*map(pairs_of, ROWS))
    assert held == set(allowed_pairs())
    assert len(ROWS) < 80  # 56 at least: eight samplers by seven schedules


def spread(row: int) -> list[pytest.MarkDecorator]:
    chosen = {round(i * (len(ROWS) - 1) / (FAST - 1)) for i in range(FAST)}
    return [] if row in chosen else [pytest.mark.slow]


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=spread(number), id="-".join(row.values())) for number, row in enumerate(ROWS)],
)
def test_a_row_trains_samples_and_resumes(compose, tiny, tmp_path, row):
    trains_samples_and_resumes(
        compose, overrides_of(row, tiny), tmp_path / "run", latent=row["model"].startswith("latent")
    )


@pytest.mark.parametrize("words", [pytest.param(words, marks=pytest.mark.slow) for words in OTHERS])
def test_the_other_options_do_too(compose, tiny, tmp_path, words):
    given = dict(word.split("=", 1) for word in words.split())
    model = given.pop("model", "class_unet")
    overrides = [*tiny(model), *(f"{key}={value}" for key, value in given.items())]
    trains_samples_and_resumes(compose, overrides, tmp_path / "run", latent=model.startswith("latent"))


def trains_samples_and_resumes(compose, overrides, folder, *, latent):
    figures = train(compose(*overrides, run_dir=folder))
    assert all(torch.isfinite(torch.tensor(value)) for value in figures.values())
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3 and state["ornstein"]["images_seen"] == 12

    run = ornstein.load(folder)
    images = run.sample(4, steps=2)
    size = 32 if latent else 8
    assert images.dtype == torch.uint8 and images.shape == (4, 1, size, size)
    # After three steps from a zero output a predicted x0 is still grey, and may round to one grey everywhere.
    assert len(images.unique()) > 1 or "objective=x0" in overrides

    argv = ["train.py", f"resume={folder}", "trainer.max_steps=5"]
    name = prepare_resume(argv)
    train(compose(*argv[1:], run_dir=folder, config_name=name))
    resumed = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == 5 and resumed["ornstein"]["images_seen"] == 20
    assert resumed["callbacks"]["EMA"]["updates"] == 5
    assert all(torch.isfinite(value).all() for value in resumed["state_dict"].values() if value.is_floating_point())
    steps = [line.split(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("pair", "words"), REFUSED.items(), ids=[" with ".join(sorted(value for _, value in pair)) for pair in REFUSED]
)
def test_the_other_pairs_are_refused_whatever_stands_beside_them(compose, pair, words):
    """Every option of every other factor stands beside the two once."""
    for turn in range(max(map(len, FACTORS.values()))):
        row = dict(pair)
        for factor in (each for each in FACTORS if each not in row):
            options = FACTORS[factor][turn % len(FACTORS[factor]) :] + FACTORS[factor]
            row[factor] = next(
                each for each in options if not pairs_of({**row, factor: each}) & (REFUSED.keys() - {pair})
            )
        with pytest.raises(Exception) as caught:
            validate(compose(*(f"{name}={value}" for name, value in row.items())))
        assert words in str(find_mistake(caught.value)), row
