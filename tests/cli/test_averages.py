"""What an evaluation says of the averages of the weights that it was made with."""

from __future__ import annotations

import json
from typing import Any

import pytest
from omegaconf import OmegaConf

from ornstein.cli.score import average_of
from ornstein.errors import OrnsteinError

PLAIN = {"_target_": "ornstein.training.EMA", "decay": 0.999}
POWER = {"_target_": "ornstein.training.power_ema.PowerEMA", "run_dir": "outputs/run", "stds": [0.05, 0.1], "every": 1}


@pytest.mark.parametrize(
    ("ema", "weights", "told"),
    [
        (PLAIN, "ema", {"decay": 0.999}),
        (PLAIN, "model", None),
        ({}, "ema", None),
        (POWER, "ema", {"stds": [0.05, 0.1], "every": 1}),  # a list of the config is no list of JSON
        (POWER, "0.07", {"std": 0.07}),  # an average of its own, not the model as trained
        (POWER, 0.07, {"std": 0.07}),
        (POWER, "model", None),
    ],
)
def test_weights_are_told_as_they_are(ema: dict[str, Any], weights: str | float, told: dict[str, Any] | None) -> None:
    found = average_of(OmegaConf.create({"ema": ema, "weights": weights}))
    assert found == told and json.loads(json.dumps(found)) == told


def test_weights_that_do_not_exist_are_refused() -> None:
    with pytest.raises(OrnsteinError, match="weights=best is unknown"):
        average_of(OmegaConf.create({"ema": PLAIN, "weights": "best"}))
