"""The numbers that ``sample.py`` and ``evaluate.py`` share, checked before anything is read."""

from omegaconf import DictConfig

from ornstein.errors import OrnsteinError

LEAST = {"num_samples": 1, "first_index": 0, "batch_size": 1, "seed": 0}


def check_numbers(cfg: DictConfig) -> None:
    """Refuses counts that are none.

    Raises:
        OrnsteinError: names the option as it is typed and what it must be.
    """
    for name, least in LEAST.items():
        value = cfg.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OrnsteinError(f"{name}={value} must be a whole number, at least {least}.")
