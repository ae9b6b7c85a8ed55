"""How many samples the shards of a stream hold and which classes: counted once, kept beside their names and sizes."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ornstein.data.bad import write_json
from ornstein.data.fetch import cache_dir
from ornstein.data.streaming import label_text
from ornstein.data.streaming_tar import TarFiles, groups, scheme
from ornstein.errors import OrnsteinError

BAR_FROM = 8
MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Index:
    """What was counted: samples of each shard, and the classes as they are written there, in order."""

    counts: tuple[int, ...]
    classes: tuple[str, ...]


def index_of(files: TarFiles) -> Index:
    """The index of tar shards on a disk, from the cache or counted now.

    Raises:
        OrnsteinError: shards that would have to be fetched to be counted.
    """
    far = next((name for name in files.shards if scheme(name)), None)
    if far is not None:
        raise OrnsteinError(
            f"{far} would have to be fetched to count its images and classes: say data.num_classes=N (null for none), "
            "and leave data.limit out"
        )
    column = None if files.label is None else files.label.spec
    facts = repr(("index", "1", column, [files.identity(shard) for shard in range(len(files.shards))]))
    place = cache_dir() / "streams" / f"index-{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"
    found = _read(place, shards=len(files.shards))
    if found is None:
        found = _count(files)
        write_json(place, {"counts": list(found.counts), "classes": list(found.classes)})
    return found


def class_table(written: Sequence[str], *, count: int | None = None) -> tuple[str, ...]:
    """Names of the classes of what labels say: numbers are the classes 0 to the largest, words the words in order."""
    numbers = [int(text) for text in written if text.isdecimal()]
    if len(numbers) < len(written):
        return tuple(sorted(written))
    return tuple(str(number) for number in range(max(max(numbers, default=-1) + 1, count or 0)))


def _read(place: Path, *, shards: int) -> Index | None:
    """The cached index; None where there is none that fits."""
    try:
        stored = json.loads(place.read_text(encoding="utf-8"))
        found = Index(tuple(map(int, stored["counts"])), tuple(map(str, stored["classes"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if len(found.counts) == shards else None


def _count(files: TarFiles) -> Index:
    """Read the heads of all members, and the labels."""
    from rich.console import Console
    from rich.progress import track

    wanted = frozenset(() if files.label is None else files.label.members)

    def one(shard: int) -> tuple[int, set[str]]:
        count, classes = 0, set()
        try:
            for _, members, _ in groups(files.shards[shard], 0, wanted=wanted):
                count += 1
                label = None if files.label is None else label_text(files.label.value(members))
                if label is not None:
                    classes.add(label)
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error):
            pass  # whoever reads its samples meets the fault, and counts it among the bad ones
        return count, classes

    console = Console(stderr=True)
    quiet = len(files.shards) < BAR_FROM or not console.is_terminal
    with ThreadPoolExecutor() as pool:
        found = pool.map(one, range(len(files.shards)))
        shown = track(found, "counting images", total=len(files.shards), console=console, transient=True, disable=quiet)
        counts, classes = zip(*shown, strict=True)
    every = sorted(set().union(*classes))
    if len(every) > MOST_CLASSES:
        raise OrnsteinError(
            f"data.label_column={files.label.spec if files.label else None} has {len(every):,} values, {every[0]!r} "
            "among them: it is no class; name another, or set data.num_classes=null"
        )
    return Index(tuple(counts), tuple(every))
