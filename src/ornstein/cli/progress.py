"""Progress of commands: one bar with time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TOLD_EVERY = 30.0  # seconds between lines where nobody looks at a bar


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar over ``total`` steps; yields what advances it by one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not Console().is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


@contextmanager
def rate_bar(title: str, total: int | None) -> Iterator[tuple[Callable[[int, bool], None], Callable[[str], None]]]:
    """A bar over images with rate and time left, or a line now and then where there is no terminal.

    Yields what advances it by a number of images, made now (True) or found made (False), and what changes its title.
    ``total`` is None where it is not known.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s"),
        TimeRemainingColumn(),
    )
    on_terminal = Console().is_terminal
    started = told = time.perf_counter()
    seen = made = 0
    with Progress(*columns, disable=not on_terminal) as progress:
        task = progress.add_task(title, total=total, rate="")

        def advance(count: int, new: bool) -> None:
            nonlocal seen, made, told
            seen, made = seen + count, made + count * new
            now = time.perf_counter()
            rate = made / max(now - started, 1e-6)
            progress.update(task, advance=count, rate=f"{rate:,.0f}")
            if not on_terminal and now - told > TOLD_EVERY and rate > 0:
                told = now
                left = "" if total is None else f", {(total - seen) / rate:,.0f} s left"
                of = "" if total is None else f" of {total:,}"
                print(f"{seen:,}{of} images, {rate:,.0f} images/s{left}", flush=True)

        yield advance, lambda text: progress.update(task, description=text)
