"""What figures are called: by the feature space, and by the number of images where it is too few to compare."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ornstein.metrics.features import FeatureExtractor

COUNTED = ("fid", "sfid", "inception_score")
"""The figures whose expectation depends on the number of images."""
_COUNT = r"(?:_\d+k?)?"
_FRECHET = re.compile(rf"(?:fid|fd_(?!.*(?:_floor|_low|_high|_infinity)$)[a-z0-9_]+?){_COUNT}")


def count_suffix(count: int, agreed: int) -> str:
    """``_1k`` for 1,000 images, ``_2500`` for 2,500; empty from the agreed number on."""
    if count >= agreed:
        return ""
    return f"_{count // 1000}k" if count and count % 1000 == 0 else f"_{count}"


def figure_name(base: str, space: FeatureExtractor, count: int) -> str:
    """The full name of figure ``base`` (``fid``, ``sfid``, ``kid``, ``inception_score``, ``precision``, ``cmmd``, ...).

    ``fid`` is ``fid_1k`` of 1,000 images, ``fd_dinov2`` in a space with a suffix; ``cmmd`` is CLIP's own by that name
    alone, and bears the space's name elsewhere.
    """
    number = count_suffix(count, space.agreed_samples) if base in COUNTED else ""
    if base == "cmmd":
        return base if space.suffix == "_clip" else f"cmmd_{space.name}"
    if space.suffix and base in ("fid", "fid_infinity"):
        return f"fd{space.suffix}{number}" if base == "fid" else f"fd{space.suffix}_infinity"
    return f"{base}{space.suffix}{number}"


def floor_name(space: FeatureExtractor) -> str:
    """What real images' own Fréchet distance is called in a space: ``fid_floor``, or ``fd_dinov2_floor``."""
    return f"fd{space.suffix}_floor" if space.suffix else "fid_floor"


def main_figure(names: Iterable[str]) -> str | None:
    """The first Fréchet distance among names of figures (``fid``, ``fid_1k``, ``fd_dinov2_1k``, ...); None without."""
    return next((name for name in names if _FRECHET.fullmatch(name)), None)


def same_figure(asked: str, names: Iterable[str]) -> str | None:
    """Which of ``names`` is the figure ``asked`` for; None if there is none.

    That very name, or it with a count (``val/fid`` finds ``val/fid_1k``); and ``fid``, where there is none, is the
    run's main Fréchet distance, whatever its space (``val/fd_efficientnet_1k``).
    """
    found = list(names)
    if asked in found:
        return asked
    counted = next((name for name in found if re.fullmatch(re.escape(asked) + r"_\d+k?", name)), None)
    prefix, slash, base = asked.rpartition("/")
    if counted is not None or base != "fid":
        return counted
    bare = {name.removeprefix(prefix + slash): name for name in found if name.startswith(prefix + slash)}
    main = main_figure(bare)
    return None if main is None else bare[main]
