"""The one exception that a user is meant to read."""


class OrnsteinError(ValueError):
    """A mistake in what the user asked for, told in one sentence: what is wrong, where, and what to do.

    The command line prints that sentence without a traceback and exits with status 1.
    """
