"""What is found wrong is judged once: silence, a warning with a report, or a refusal."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch._utils import ExceptionWrapper

from ornstein.data.bad import Bad, BadImage, plainly, write_json
from ornstein.errors import OrnsteinError


def filled(limit: int, count: int) -> Bad:
    """`count` bad images."""
    bad = Bad(limit, where="data.root=pictures")
    for number in range(count):
        bad.add(f"{number:02d}.png", f"reason\n  {number}")
    return bad


def test_nothing_bad_is_silence(tmp_path: Path) -> None:
    """No warning, no file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled(0, 0).settle(tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (3, 2), (20, 12)])
def test_up_to_the_limit_is_one_warning_and_a_report(tmp_path: Path, limit: int, count: int) -> None:
    """The warning names ten and where all are listed; the report says each with its reason."""
    report = tmp_path / "folder" / "report.json"
    with pytest.warns(UserWarning) as caught:
        filled(limit, count).settle(report)
    (told,) = (str(warning.message) for warning in caught)
    assert f"{count} image" in told and str(report) in told and f"data.max_bad={limit}" in told and "\n" not in told
    assert told.count(".png: reason") == min(count, 10)
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["where"] == "data.root=pictures" and found["limit"] == limit
    assert found["bad"] == {f"{number:02d}.png": f"reason {number}" for number in range(count)}
    assert list(report.parent.iterdir()) == [report]


@pytest.mark.parametrize(("limit", "count"), [(0, 1), (0, 13), (11, 12)])
def test_above_the_limit_is_refused(tmp_path: Path, limit: int, count: int) -> None:
    """The first ten by name, how many, and the option that would take them; no report is written."""
    with pytest.raises(OrnsteinError) as caught:
        filled(limit, count).settle(tmp_path / "report.json")
    told = str(caught.value)
    assert told.startswith(f"{count} image") and f"data.max_bad={count}" in told
    assert [f"{number:02d}.png" in told for number in range(count)] == [number < 10 for number in range(count)]
    assert ("and 3 more" in told) == (count == 13)
    assert not list(tmp_path.iterdir())


def test_threads_add_at_once_and_a_name_counts_once() -> None:
    """Sorted names, whatever the order; the first reason stays."""
    bad = Bad(5, where="here")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: bad.add(f"{number % 50:02d}", "same"), range(1000)))
    bad.add("00", "another")
    assert bad.count == 50 and bad.names == [f"{number:02d}" for number in range(50)]
    with pytest.raises(OrnsteinError, match="00: same"):
        bad.settle()


@pytest.mark.parametrize("limit", [-1, 1.5, "3", None, True])
def test_limits_are_whole_numbers(limit: object) -> None:
    with pytest.raises(OrnsteinError, match=r"data\.max_bad="):
        Bad(limit, where="here")  # type: ignore[arg-type]


def test_names_that_are_no_utf_8_are_written_as_escapes(tmp_path: Path) -> None:
    """Linux allows any bytes in a file's name."""
    bad = Bad(1, where="here")
    bad.add(b"caf\xe9.png".decode("utf-8", "surrogateescape"), "broken")
    with pytest.warns(UserWarning):
        bad.settle(tmp_path / "report.json")
    assert list(json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["bad"]) == ["caf\udce9.png"]


def test_a_report_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """One sentence; what was there stays."""
    (tmp_path / "file").write_text("in the way")
    report = tmp_path / "file" / "report.json"
    with pytest.raises(OrnsteinError, match=r"file.report\.json cannot be written"):
        write_json(report, {})
    with pytest.warns(UserWarning, match=r"1 image .*The list of all is missing: .*report\.json cannot be written"):
        filled(1, 1).settle(report)
    write_json(tmp_path / "whole.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "whole.json", object())
    assert json.loads((tmp_path / "whole.json").read_text()) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "whole.json"]


def test_a_workers_error_comes_out_as_its_sentence() -> None:
    """Torch wraps what a worker raises into a traceback; errors of this process pass as they are."""

    def of_a_worker():
        yield 1
        try:
            try:
                raise ValueError("Error: deep down")
            except ValueError as cause:
                raise BadImage("a.png: it is empty", name="a.png", reason="it is empty") from cause
        except BadImage:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    batches = plainly(of_a_worker())
    assert next(batches) == 1
    with pytest.raises(OrnsteinError) as caught:
        next(batches)
    assert str(caught.value) == "a.png: it is empty"

    def of_ours():
        raise BadImage("b.png: gone", name="b.png", reason="gone")
        yield

    with pytest.raises(BadImage) as own:
        next(plainly(of_ours()))
    assert own.value.name == "b.png" and str(own.value) == "b.png: gone"
