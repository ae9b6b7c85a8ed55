"""Every option of conf/scheduler: it builds, it is the table's row, and it lists every argument with its default."""

from __future__ import annotations

import inspect

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from ornstein.diffusion import schedules
from ornstein.diffusion.schedules import Modifiable

from .test_schedules import CONFIGS, EXPLODING, OPTIONS

NEUTRAL = {"shift": 1.0, "zero_terminal_snr": False, "input_scale": 1.0}
T = torch.tensor([0.0, 0.001, 0.37, 0.5, 0.9995, 1.0], dtype=torch.float64)


@pytest.fixture(params=OPTIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_option_is_in_the_table() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == OPTIONS.keys()


def test_every_schedule_is_an_option() -> None:
    found = {value for value in vars(schedules).values() if isinstance(value, type) and issubclass(value, Modifiable)}
    assert found - {Modifiable, schedules.BetaSchedule} <= set(OPTIONS.values())


@torch.no_grad()
def test_option_is_its_row(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    assert path.read_text().startswith("# ")
    built, row = instantiate(OmegaConf.load(path)), OPTIONS[name]()
    assert type(built) is OPTIONS[name]
    assert torch.equal(torch.stack(built.coefficients(T)), torch.stack(row.coefficients(T)))
    assert (built.zero_terminal_snr, built.variance_preserving) == (row.zero_terminal_snr, row.variance_preserving)


def test_option_lists_every_argument(name: str) -> None:
    given = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    assert get_class(given.pop("_target_")) is OPTIONS[name]
    parameters = inspect.signature(OPTIONS[name]).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert given == NEUTRAL | own


@torch.no_grad()
def test_modifiers_are_overrides(name: str) -> None:
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    config.shift, config.input_scale, config.zero_terminal_snr = 2, 0.5, name not in EXPLODING
    built = instantiate(config)
    row = OPTIONS[name](shift=2.0, input_scale=0.5, zero_terminal_snr=name not in EXPLODING)
    assert torch.equal(torch.stack(built.coefficients(T)), torch.stack(row.coefficients(T)))
    assert built.zero_terminal_snr == (name not in EXPLODING)


def test_docstrings_tell_what_the_docs_page_shows(name: str) -> None:
    text = inspect.getdoc(OPTIONS[name])
    assert text is not None
    for part in (".. math::", "Source: ", "\nWhen: "):
        assert part in text, f"{OPTIONS[name].__name__} lacks {part.strip()}"


@pytest.mark.parametrize(("override", "refused"), [("scheduler.shift=2", False), ("objective=eps", True)])
def test_from_the_command_line(override: str, refused: bool) -> None:
    from ornstein.cli.compose import compose_train
    from ornstein.errors import OrnsteinError

    overrides = ["scheduler=cosine", "scheduler.zero_terminal_snr=true", override]
    if refused:
        with pytest.raises(OrnsteinError, match="zero SNR"):
            compose_train(overrides)
        return
    assert instantiate(compose_train(overrides).scheduler).level(1.0).alpha == 0.0
