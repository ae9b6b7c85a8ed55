"""The export command: its words, what it refuses, and that nothing half-written stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from ornstein.cli.export import HELP, Request, export, parse
from ornstein.errors import OrnsteinError
from ornstein.experiment.export.folder import EXPORTED, check_free, new_folder


def test_words_become_a_request() -> None:
    words = ["run='a b/run'", "format=onnx", "weights=model", "merge=false", "overwrite=True", "trust_targets=[x.y,z]"]
    request = parse([*words, "sampler=ddpm", "clip_x0=1"])
    assert request == Request(
        run="a b/run",
        format="onnx",
        weights="model",
        merge=False,
        overwrite=True,
        trust_targets=("x.y", "z"),
        overrides=("sampler=ddpm", "clip_x0=1"),
    )


def test_help_names_every_key() -> None:
    for key in set(Request.__dataclass_fields__) - {"overrides"}:
        assert f"\n  {key}=" in HELP, key


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("format=onnx", "run= is missing"),
        ("run=x", "format= is missing"),
        ("run=x format=pickle", "format=pickle is unknown diffusers safetensors onnx torch_export"),
        ("run=x format=onnx merge=yes", "merge=yes true or false"),
        ("run=x format=onnx -m", "-m is no key=value"),
        ("run=nowhere format=onnx", "run=nowhere there is no such folder"),
    ],
)
def test_words_that_cannot_be_meant_are_refused(words: str, told: str) -> None:
    with pytest.raises(OrnsteinError) as error:
        export(parse(words.split()))
    assert [word for word in told.split() if word not in str(error.value)] == [], str(error.value)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    used, exported, file = tmp_path / "used", tmp_path / "exported", tmp_path / "file"
    for folder, name in ((used, "notes.txt"), (exported, EXPORTED)):
        folder.mkdir()
        (folder / name).write_text("{}")
    file.write_text("")
    assert check_free(tmp_path / "new", overwrite=False) == tmp_path / "new"
    assert check_free(exported, overwrite=True) == exported
    for place, overwrite, word in (
        (used, False, "overwrite=true"),
        (used, True, "no export"),
        (exported, False, "overwrite=true"),
        (file, True, "is a file"),
    ):
        with pytest.raises(OrnsteinError, match=word):
            check_free(place, overwrite=overwrite)


def test_nothing_stays_of_an_export_that_failed(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), new_folder(place) as folder:
        (folder / "half.bin").write_text("half")
        raise RuntimeError
    assert list(place.parent.iterdir()) == []


def test_an_export_takes_the_place_of_the_one_before_when_it_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "out"
    for text in ("old", "new"):
        with new_folder(place) as folder:
            (folder / text).write_text(text)
            assert not place.exists() or [path.name for path in place.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in place.iterdir()] == ["new"]


def test_a_disk_that_refuses_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OrnsteinError, match="could not be written"), new_folder(tmp_path / "file" / "out"):
        pass
