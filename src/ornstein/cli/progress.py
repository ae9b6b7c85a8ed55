"""Progress of sample and evaluate: one bar with time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar over ``total`` steps; yields what advances it by one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not Console().is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
