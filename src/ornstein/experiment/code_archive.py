"""The code that a run ran, in one file: what the package's repository and the user's own modules hold now."""

from __future__ import annotations

import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ornstein.experiment.environment import git_state, run_git

_KINDS = (".py", ".yaml", ".yml", ".toml", ".sh", ".css", ".html", ".js")
_LARGEST = 1_000_000  # bytes of a source; what is larger is data
_LARGEST_DIFF = 5_000_000
_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal sources make equal archives, whenever


def write_code(path: Path, *, package: Path, config: Mapping[str, Any]) -> None:
    """Writes a zip archive of the sources of ``package`` and of what the config's ``_target_``s name outside of it.

    From a git checkout: all that git tracks or would (tests, benchmarks and notebooks left out), and
    ``uncommitted.diff`` where that differs from the last commit. Elsewhere: the package's own files. The user's modules
    stand under ``user/`` unless they are in the checkout too.

    Raises:
        OSError: from the file system.
    """
    root, files = _sources(package)
    own = {file: f"user/{name}" for name, file in user_modules(config).items()}
    named = own | {file: file.relative_to(root).as_posix() for file in files}
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, name in sorted(named.items(), key=lambda pair: pair[1]):
            if file.is_file() and file.stat().st_size <= _LARGEST:
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), file.read_bytes(), zipfile.ZIP_DEFLATED)
        if difference := _difference(package):
            archive.writestr(zipfile.ZipInfo("uncommitted.diff", _EPOCH), difference, zipfile.ZIP_DEFLATED)


def _sources(package: Path) -> tuple[Path, list[Path]]:
    """A folder and the sources in it."""
    top = run_git(package, "rev-parse", "--show-toplevel") if git_state(package) is not None else None
    if top is None:
        return package.parent, [file for file in package.rglob("*") if file.suffix in _KINDS]
    root = Path(top)
    wanted = [f"*{kind}" for kind in _KINDS]
    left_out = [f":!{folder}" for folder in ("tests", "benchmarks", "notebooks")]
    listed = run_git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *wanted, *left_out)
    return root, [root / name for name in (listed or "").split("\0") if name]


def _difference(package: Path) -> str | None:
    state = git_state(package)
    if state is None or not state["dirty"]:
        return None
    difference = run_git(package, "diff", "HEAD", "--no-ext-diff", "--no-color")
    return difference if difference and len(difference) <= _LARGEST_DIFF else None


def user_modules(config: Mapping[str, Any]) -> dict[str, Path]:
    """Name in an archive -> file of each module that a ``_target_`` of the config names, libraries and this package
    left out; only modules that are loaded are known.
    """
    found: dict[str, Path] = {}
    libraries = [Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")]
    for target in set(_targets(config)):
        parts = target.split(".")
        names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        module = next((sys.modules[name] for name in names if name in sys.modules), None)
        file = getattr(module, "__file__", None)
        if module is None or file is None or module.__name__.partition(".")[0] == "ornstein":
            continue
        place = Path(file).resolve()
        if not any(place.is_relative_to(library) for library in libraries):
            found["/".join(module.__name__.split(".")) + place.suffix] = place
    return found


def _targets(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if isinstance(value.get("_target_"), str):
            yield value["_target_"]
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    items: Iterable[Any] = value
    for item in items:
        yield from _targets(item)
