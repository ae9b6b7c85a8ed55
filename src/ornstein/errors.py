"""The one exception that a user is meant to read, and the one that tells of no mistake."""

from collections.abc import Mapping
from types import MappingProxyType


class OrnsteinError(ValueError):
    """A mistake in what the user asked for, told in one sentence: what is wrong, where, and what to do.

    The command line prints that sentence without a traceback and exits with status 1.
    """


class Pruned(Exception):
    """A search has stopped this training early, after a checkpoint: no mistake of anybody's, and no failure.

    Attributes:
        figures: the run's by then, once they are known.
    """

    figures: Mapping[str, float] = MappingProxyType({})
