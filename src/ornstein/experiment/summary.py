"""The figures that a run ends with."""

import resource
import sys
import time
from types import TracebackType
from typing import Any

from ornstein.errors import Pruned
from ornstein.experiment.run_dir import RunDirectory, Status


class Summary:
    """Writes ``summary.json``: the run's status, its final figures, what it cost.

    Used as a context manager it marks the run ``running``, then ``finished``, ``interrupted`` (Ctrl-C,
    SIGTERM's ``SystemExit``), ``pruned`` (by a search) or ``failed`` by how the block ends, with wall time and peak
    memory::

        with Summary(run) as summary:
            ...
            summary.update(fid=3.1, nfe=50, parameters=1_000_000)

    Figures of an earlier start of the same run stay until they are given again; wall time adds up over
    starts.
    """

    def __init__(self, run: RunDirectory) -> None:
        """``run``: the folder whose summary this is."""
        self.run = run
        self._started = time.monotonic()
        earlier = run.summary().get("wall_time_s")
        self._earlier = float(earlier) if isinstance(earlier, int | float) else 0.0

    def update(self, **figures: Any) -> None:
        """Add figures: numbers, text, lists or mappings of them; torch and numpy scalars become plain
        numbers.

        The project's names: ``parameters``, ``flops`` (per image and forward pass), ``nfe`` (per sample),
        ``images_seen``, ``samples_per_s`` (sampling), ``images_per_s`` (training), and the metrics' own
        names.

        Raises:
            TypeError: for a value that JSON cannot hold; ``summary.json`` is then what it was.
        """
        self.run.write_json(
            "summary.json",
            {
                **self.run.summary(),
                **figures,
                "wall_time_s": self.wall_time(),
                "peak_memory_mb": peak_memory_mb(),
            },
        )

    def wall_time(self) -> float:
        """Seconds that this run has taken, over all its starts that left a summary."""
        return round(self._earlier + time.monotonic() - self._started, 3)

    def finish(self, status: Status, *, error: str | None = None) -> None:
        """Write the last figures and the status. ``error``: one sentence, where there was one.

        Raises:
            ValueError: for a status that is not running, finished, failed, interrupted or pruned.
        """
        self.update(error=error)
        self.run.mark(status)

    def __enter__(self) -> "Summary":
        """Mark the run as running."""
        self.finish("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Mark how it ended; the exception goes on."""
        # Lightning's SIGTERMException is a SystemExit without a code too, and no end of the run's own.
        if error is None or (type(error) is SystemExit and not error.code):
            self.finish("finished")
        elif isinstance(error, Pruned):
            self.finish("pruned")
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self.finish("interrupted", error=f"{type(error).__name__}: {error}".rstrip(": "))
        else:
            self.finish("failed", error=f"{type(error).__name__}: {error}".rstrip(": "))


def peak_memory_mb() -> dict[str, float]:
    """Peak memory so far in MB (10**6 bytes): ``host`` (this process), ``device`` where a GPU is in use."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["device"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return peak
