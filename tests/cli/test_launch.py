"""The command line before Hydra reads it, and what may stand beside ``resume=``."""

from __future__ import annotations

import pytest

from ornstein.cli.launch import options_first
from ornstein.cli.resume import _check_changes
from ornstein.errors import OrnsteinError


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        ("a=1 -m b=2", "-m a=1 b=2"),
        ("a=1 --multirun b=2,3 c=4", "--multirun a=1 b=2,3 c=4"),
        ("-m a=1 b=2", "-m a=1 b=2"),
        ("a=1 --config-dir here b=2 -m ~c", "--config-dir here -m a=1 b=2 ~c"),
        ("a=1 --config-dir=here b=2", "--config-dir=here a=1 b=2"),
        ("a=1 --cfg job +b=2", "--cfg job a=1 +b=2"),
        ("a=-1 ~b", "a=-1 ~b"),
        ("a=1 --info ~b", "--info a=1 ~b"),
        ("", ""),
    ],
)
def test_hydras_own_options_come_before_the_overrides(given: str, ordered: str) -> None:
    """Hydra refuses ``train.py model=dit -m seed=1,2``: its parser takes overrides in one piece only."""
    assert options_first(["train.py", *given.split()]) == ["train.py", *ordered.split()]


@pytest.mark.parametrize(
    "words",
    [
        "optimizer.lr=1e-4",
        "optimizer=sgd",
        "model.learning_rate=1e-4",
        "model=dit",
        "model.network.dropout=0.3",
        "objective=x0",
        "objective/time=uniform",
        "scheduler.num_timesteps=10",
        "conditioner.dropout=0",
        "codec=kl",
        "data=mnist",
        "data.batch_size=8",
        "seed=1",
        "ema=none",
        "lr_schedule=none",
        "~optimizer.fused",
        "+optimizer.amsgrad=true",
        "hydra.run.dir=elsewhere",
        "paths.output_root=elsewhere",
        "debug=overfit",
    ],
)
def test_what_a_resumed_run_cannot_honour_is_named(words: str) -> None:
    with pytest.raises(OrnsteinError) as caught:
        _check_changes(["train.py", "trainer.max_steps=9", *words.split()])
    told = str(caught.value)
    assert told.startswith(f"{words} cannot be changed beside resume=") and "max_steps" not in told


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ("trainer.max_steps=9 trainer.precision=bf16-mixed +trainer.max_time=00:01:00:00", {}),
        ("logger.wandb.mode=offline ~logger.wandb callbacks.log.every=3 ~callbacks.trajectory", {}),
        ("+callbacks.mine={_target_:my.Mine}", {}),
        ("lr_schedule.min_ratio=0.1 ema.decay=0.99 name=again clip_x0=1 metrics.num_samples=10", {}),
        ("data.root=/moved data.num_workers=2 model.compile=true trust_targets=[my]", {}),
        ("logger=csv sampler=heun sampler.steps=3", {"logger": "csv", "sampler": "heun"}),
        ("guidance=null --config-dir here -m", {"guidance": None}),
    ],
)
def test_what_it_can_honour_is_let_through(words: str, chosen: dict[str, str | None]) -> None:
    assert _check_changes(["train.py", *words.split()]) == chosen
