"""CONTRIBUTING.md's recipe for a noise schedule, followed to the letter in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = re.compile(r"^\d\. .*?`((?:src|conf|tests)/[^`]+)`.*?^```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def follow(folder: Path) -> list[str]:
    """Does in ``folder`` what the recipe says; the files it names."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.partition("### A noise schedule")[2].partition("\n### ")[0]
    for name, block in RECIPE.findall(section):
        path = folder / name
        if path.suffix == ".yaml":
            path.write_text(block)
        elif name.startswith("src/"):
            path.write_text(f"{path.read_text()}\n\n{block}")
        else:
            importing, row = block.splitlines()
            text = path.read_text().replace("annotations\n", f"annotations\n\n{importing}\n", 1)
            path.write_text(text.replace("\nSCHEDULES = {\n", f"\nSCHEDULES = {{\n    {row}\n"))
    return [name for name, _ in RECIPE.findall(section)]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("src", "conf", "tests/diffusion"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "train.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def output_of(*arguments: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(cwd / "src")}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_recipe_for_a_schedule(copy: Path) -> None:
    names = follow(copy)
    assert [name.split("/")[0] for name in names] == ["src", "conf", "tests"]
    selected = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/diffusion", "-k", "log_linear")
    assert int(re.search(r"(\d+) passed", output_of(*selected, cwd=copy))[1]) > 20
    output_of("train.py", "scheduler=log_linear", "debug=fast_dev_run", cwd=copy)
    (config,) = copy.glob("outputs/train/*/*/config.yaml")
    assert "ornstein.diffusion.schedules.continuous.LogLinear" in config.read_text()
