"""A clock that can be stopped while something other than training goes on."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds since it was made, without those between ``pause`` and ``resume`` (which may be nested)."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._depth = 0

    def seconds(self) -> float:
        """Seconds so far."""
        return (self._paused_at if self._depth else time.perf_counter()) - self._started

    def pause(self) -> None:
        """Stops the clock."""
        if self._depth == 0:
            self._paused_at = time.perf_counter()
        self._depth += 1

    def resume(self) -> None:
        """Undoes one ``pause``."""
        self._depth -= 1
        if self._depth == 0:
            self._started += time.perf_counter() - self._paused_at
