"""Every notebook: small, saved without outputs, and run from top to bottom."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest

import ornstein

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = 30 * 1024


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_small_and_without_outputs(path: Path) -> None:
    assert path.stat().st_size < SMALL
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            assert cell.outputs == [], f"cell {number} is saved with its outputs: clear them"
            assert cell.execution_count is None, f"cell {number} is saved with its count: clear it"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    # The kernel imports the package that is tested here, and what it leaves goes with the test's folder.
    source = str(Path(ornstein.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the tests' own shows no figure in a notebook
    notebook = nbformat.read(path, as_version=4)
    here = set(path.parent.iterdir())
    # Half a minute of training on a free machine; the limit is for a loaded one.
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    client.execute()
    assert set(path.parent.iterdir()) == here, "it writes beside itself"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == sum(ends_in_a_picture(cell) for cell in notebook.cells) > 0


def ends_in_a_picture(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell's last line of code shows a picture."""
    lines = str(cell.source).rstrip().splitlines()
    return cell.cell_type == "code" and lines[-1].startswith(("image_grid(", "display(Image(", "plt.show("))
