"""Where data lives on this machine, and how it gets here: whole, checked, or not at all."""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from http.client import HTTPException
from pathlib import Path

from ornstein.errors import OrnsteinError

TIMEOUT_S = 15
BLOCK = 1 << 18


def cache_dir() -> Path:
    """Where fetched and prepared data lie: `ornstein/data` below `$XDG_CACHE_HOME` or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ornstein" / "data"


def home_of(name: str) -> Path:
    """Where a data set is kept when no root is named: `$ORNSTEIN_DATA/<name>`, else the cache folder's."""
    base = os.environ.get("ORNSTEIN_DATA")
    return (Path(base).expanduser() if base else cache_dir()) / name


def places(name: str, root: str | Path | None, *, npm_package: str | None = None) -> list[Path]:
    """The folders where a data set may lie, best first.

    A named root is the only place: data of the same name elsewhere may be other data. Without one:
    `$ORNSTEIN_DATA/<name>`, the cache folder, `share/datasets/<name>` of this Python and of every folder of
    `$XDG_DATA_DIRS` (distribution packages), and `node_modules` of the current folder.
    """
    if root is not None:
        return [Path(root).expanduser()]
    data_dirs = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    shares = [Path(sys.prefix) / "share", *(Path(folder) for folder in data_dirs.split(":") if folder)]
    folder = name.replace("_", "-")
    found = [home_of(name), cache_dir() / name, *(share / "datasets" / folder for share in shares)]
    if npm_package is not None:
        found.append(Path("node_modules") / npm_package)
    return list(dict.fromkeys(found))


def announce(what: str, target: Path) -> None:
    """Says on standard error what is about to be brought here, and into which folder."""
    print(f"fetching {what} into {target.absolute()}", file=sys.stderr, flush=True)


def download(
    urls: Sequence[str],
    target: Path,
    *,
    sha256: str | None,
    unpack: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Bring a file here from the first address that has it, with a progress bar.

    Written beside `target` first and moved in place once its digest is right, so that no half file is ever
    found there; safe when several processes do it at once.

    Args:
        urls: addresses of the same content, best first.
        target: the file to make; its folder is made too.
        sha256: of the file, or of what it unpacks to; None where its owner has published none.
        unpack: ungzip on arrival.
        check: whatever else must hold of the file; raises OSError or ValueError (an OrnsteinError, say) where it does
            not.

    Raises:
        OrnsteinError: no address gave the right content; every failure is named.
    """
    failures = []
    target.parent.mkdir(parents=True, exist_ok=True)
    for url in urls:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        part = Path(name)
        try:
            _stream(url, part, label=target.name)
            if unpack:
                part.write_bytes(gzip.decompress(part.read_bytes()))
            if sha256 is not None:
                check_sha256(part, sha256)
            if check is not None:
                check(part)
            part.chmod(0o644)
            part.replace(target)
            return
        except (OSError, EOFError, ValueError, zlib.error, HTTPException) as error:
            failures.append(f"{url}: {error}")
        finally:
            part.unlink(missing_ok=True)
    raise OrnsteinError(f"could not fetch {target.name} ({'; '.join(failures)})")


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose sha256 is not the expected one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise OrnsteinError(f"its sha256 is {found[:16]}... where {expected[:16]}... was expected")


def _stream(url: str, target: Path, *, label: str) -> None:
    """Write what an address gives into a file, showing how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, target.open("wb") as file:
        length = response.headers.get("Content-Length")
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(label, total=int(length) if length else None)
            while block := response.read(BLOCK):
                file.write(block)
                progress.advance(task, len(block))


def npm_members(package: str, version: str, *, sha256: str, wanted: Callable[[str], bool], target: Path) -> None:
    """Unpack the files of an npm package that `wanted(path in package)` picks into `target`, paths kept.

    Through `npm pack` where npm is installed (it knows the machine's registry), else from the public
    registry's address.

    Raises:
        OrnsteinError: the package cannot be had or is not the one with this digest.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        archive = _npm_archive(package, version, sha256=sha256, scratch=Path(scratch))
        unpacked = Path(scratch) / "files"
        with tarfile.open(archive) as tar:
            picked = [member for member in tar.getmembers() if wanted(member.name.removeprefix("package/"))]
            tar.extractall(unpacked, members=picked, filter="data")
        _move_in(unpacked / "package", target)


def _npm_archive(package: str, version: str, *, sha256: str, scratch: Path) -> Path:
    """The package's .tgz, checked."""
    archive = scratch / f"{package}-{version}.tgz"
    npm = shutil.which("npm")
    if npm is None:
        url = f"https://registry.npmjs.org/{package}/-/{archive.name}"
        download([url], archive, sha256=sha256)
        return archive
    # npm's own retries would keep an offline machine waiting for more than a minute.
    options = ["--silent", "--fetch-retries=0", "--pack-destination", str(scratch)]
    command = [npm, "pack", f"{package}@{version}", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
    if done.returncode != 0 or not archive.is_file():
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["is this machine offline?"]
        raise OrnsteinError(f"npm pack {package}@{version} failed ({reason[0]})")
    check_sha256(archive, sha256)
    return archive


def unzip(archive: Path, target: Path) -> None:
    """Unpack a zip into a folder whose files appear once all are there. Raises OSError, zipfile.BadZipFile."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".unzip-") as scratch, zipfile.ZipFile(archive) as opened:
        opened.extractall(scratch)
        for entry in sorted(Path(scratch).iterdir()):
            if entry.is_dir():
                _move_in(entry, target / entry.name)
            else:
                entry.replace(target / entry.name)


def _move_in(source: Path, target: Path) -> None:
    """Move a finished folder to its place; where one is already there, fill it file by file."""
    try:
        source.rename(target)
    except OSError:
        for file in _files(source):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)


def _files(folder: Path) -> Iterable[Path]:
    """All files beneath a folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
