"""What can be told of a data config before anything is read."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from ornstein.errors import OrnsteinError

Crop = Literal["adm", "edm", "edm_wide", "stretch", "none"]
CROPS: tuple[Crop, ...] = get_args(Crop)
Storage = Literal["auto", "memory", "mapped", "lazy", "unchecked"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
POLICIES = ("drop", "refuse", "allow")
REFERENCES = ("whole", "limited")
PARTS = ("test", "train")
SWITCHES = ("balanced", "caption_files", "every_caption", "exact_resume", "flip", "streaming", "trust_pipes")
_LEAST = {
    "batch_size": 1,
    "eval_batch_size": 1,
    "limit": 1,
    "num_workers": 0,
    "max_bad": 0,
    "channels": 1,
    "num_classes": 1,
    "seed": 0,
}
BALANCED_WAY_OUT = "name a data set with classes and say how many (data.num_classes), or set data.balanced=false"


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses options of a data module, or of its splits, that cannot be meant; those that are not there pass.

    Raises:
        OrnsteinError: names the option as it is typed.
    """
    for key, least in _LEAST.items():
        value = options.get(key)
        if key == "num_classes" and value == "auto":
            continue
        if value is not None and not _is_whole(value, least):
            raise OrnsteinError(f"data.{key}={value}: give a whole number of at least {least}")
    # Several numbers are told by who builds the network, which is what takes no other shape than squares.
    side = options.get("image_size", 1)
    if isinstance(side, str) or not (isinstance(side, Sequence) or _is_whole(side, 1)):
        raise OrnsteinError(f"data.image_size={side}: give one positive side in pixels, 64 say")
    sigma = options.get("sigma_data")
    if sigma is not None and not (_is_number(sigma) and sigma > 0):
        raise OrnsteinError(f"data.sigma_data={sigma}: give a number above 0, 0.5 say: the images' standard deviation")
    for key in SWITCHES:
        if not isinstance(options.get(key, False), bool | None):
            raise OrnsteinError(f"data.{key}={options[key]}: give true or false")
    several: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("overlap", POLICIES),
        ("limit_reference", REFERENCES),
        ("val_from", PARTS),
        ("crop", CROPS),
        ("storage", STORAGES),
    )
    for key, known in several:
        if options.get(key, known[0]) not in known:
            raise OrnsteinError(f"data.{key}={options[key]} does not exist: choose one of {', '.join(known)}")
    if options.get("balanced") and "num_classes" in options and options["num_classes"] is None:
        raise OrnsteinError(f"data.balanced=true needs classes: {BALANCED_WAY_OUT}")
    check_shares(options.get("val_fraction"), options.get("test_fraction") or 0.0)


def check_shares(val_fraction: Any, test_fraction: Any = 0.0) -> None:
    """Refuses shares of a data set that leave nothing to train on, or hold nothing out. None: no share of val is taken.

    Raises:
        OrnsteinError: a share is out of its range, or the two add up to everything.
    """
    if val_fraction is not None and not (_is_number(val_fraction) and 0 < val_fraction < 1):
        raise OrnsteinError(f"data.val_fraction={val_fraction}: give a number between 0 and 1, such as 0.1")
    if not (_is_number(test_fraction) and 0 <= test_fraction < 1):
        raise OrnsteinError(f"data.test_fraction={test_fraction}: give 0 for no test split, or a share such as 0.1")
    if (val_fraction or 0) + test_fraction >= 1:
        raise OrnsteinError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} leave nothing to train on: "
            "give two shares that add up to less than 1"
        )


def _is_whole(value: Any, least: int) -> bool:
    """An int of at least that, and no word of yes or no."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    """An int or float, and no word of yes or no."""
    return isinstance(value, int | float) and not isinstance(value, bool)
