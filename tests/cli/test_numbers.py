"""Counts that sample.py and evaluate.py cannot take are told of in a sentence, not met by a traceback later."""

import pytest
from omegaconf import OmegaConf

from ornstein.cli.numbers import check_numbers
from ornstein.errors import OrnsteinError


@pytest.mark.parametrize(
    "word",
    ["num_samples=0", "num_samples=2.5", "first_index=-1", "batch_size=0", "batch_size=many", "seed=x", "seed=true"],
)
def test_counts_that_are_none_are_refused(word: str) -> None:
    good = OmegaConf.create({"num_samples": 1, "first_index": 0, "batch_size": 1, "seed": 0})
    check_numbers(good)
    shown = word.replace("true", "True")
    with pytest.raises(OrnsteinError, match=rf"^{shown} must be a whole number, at least [01]\.$"):
        check_numbers(OmegaConf.merge(good, OmegaConf.from_dotlist([word])))
