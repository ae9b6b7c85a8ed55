"""What ``evaluate.py`` says of figures that rest on too few samples, and what it refuses before it draws any."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from ornstein.cli.evaluate import _check_options, too_few
from ornstein.cli.ranks import Ranks, check_devices, launched_elsewhere
from ornstein.cli.reuse import Held
from ornstein.errors import OrnsteinError
from ornstein.metrics.report import MetricReport


@pytest.mark.parametrize(
    ("count", "fid", "floor", "words"),
    [
        (64, 80.0, 3.0, "num_samples=64 64 features at least 65 640"),
        (2, 80.0, 100.0, "num_samples=2 at least 65"),
        (65, 80.0, 45.0, "score 45 floor fid_65 80 65 samples"),
        (65, 80.0, 40.0, None),
        (1000, 6.0, 2.0, None),
        (1000, 2.0, 1.5, "score 1.5 fid_1k 1,000 samples"),
        (1000, 6.0, None, None),
    ],
)
@pytest.mark.parametrize("space", ["fid", "fd_efficientnet"])
def test_few_samples_are_warned_about(
    space: str, count: int, fid: float, floor: float | None, words: str | None
) -> None:
    name = f"{space}_{'1k' if count == 1000 else count}"
    report = MetricReport(
        values={name: fid} | ({} if floor is None else {f"{space}_floor": floor}),
        num_samples=count,
        reference={},
        extractor="digits",
        fingerprint="",
        settings={"num_features": 64},
    )
    told = too_few(report)
    if words is None:
        assert told is None
    else:
        expected = [word.replace("fid_", f"{space}_") for word in words.split()]
        assert told is not None and [word for word in expected if word not in told] == [], told


@pytest.mark.parametrize(
    ("options", "several", "words"),
    [
        ({}, False, None),
        ({"keep_samples": "npz", "logger": {"wandb": {"project": "x"}}}, True, None),
        ({"keep_samples": "jpg"}, False, "keep_samples=jpg is unknown"),
        ({"logger": {"csv": {"path": "x"}}}, False, "choose logger=wandb or logger=none"),
        ({"likelihood": {"_target_": "ornstein.training.likelihood.ODE"}}, False, None),
        ({"likelihood": {"_target_": "ornstein.training.likelihood.ODE"}}, True, "computed by one process alone"),
    ],
)
def test_options_are_checked_before_anything_is_read(options: dict[str, Any], several: bool, words: str | None) -> None:
    cfg = OmegaConf.create({"keep_samples": None, "logger": {}, "likelihood": {}, **options})
    if words is None:
        _check_options(cfg, several=several)
    else:
        with pytest.raises(OrnsteinError, match=words):
            _check_options(cfg, several=several)


@pytest.mark.parametrize("devices", [0, -1, True, "two", 1.5, None])
def test_devices_are_a_number(devices: Any) -> None:
    with pytest.raises(OrnsteinError, match=f"devices={devices} must be a whole number, at least 1"):
        check_devices(devices)


@pytest.mark.parametrize(("world", "count"), [(1, 5), (2, 5), (3, 7), (4, 4), (5, 3)])
def test_shares_are_consecutive_and_whole(world: int, count: int) -> None:
    shares = [Ranks(rank, world).share(count) for rank in range(world)]
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, True),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, False),  # a batch script, not srun
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "interactive"}, False),
    ],
)
def test_launchers_are_known_by_their_variables(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], several: bool
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_elsewhere() is several


def test_what_is_held_is_made_again_where_what_decides_it_changed() -> None:
    held, made = Held(), []

    def make() -> object:
        made.append(object())
        return made[-1]

    first = held.get("module", {"a": 1, "b": [2]}, make)
    assert held.get("module", {"b": [2], "a": 1}, make) is first
    assert held.get("data", {"a": 1, "b": [2]}, make) is not first
    assert held.get("module", {"a": 2, "b": [2]}, make) is made[-1] and len(made) == 3
