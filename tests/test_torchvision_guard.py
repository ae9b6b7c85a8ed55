"""The torchvision guard: what it changes where the native library does not load, and that it changes nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARIES = "import torchvision.transforms, lightning.pytorch, torch_fidelity, torchmetrics.image.fid"

FAKE_TORCHVISION = """
import torch
nms = hasattr(torch.ops.torchvision, "nms")
from . import part
"""


def python(source: str, *path: Path) -> str:
    """What ``source`` prints, run by a fresh interpreter that looks in ``path`` first."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, *filter(None, sys.path)]))}
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A package called torchvision that says whether the operators were declared when its code ran."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE_TORCHVISION)
    (package / "part.py").touch()
    return tmp_path


@pytest.mark.parametrize("first", ["", "import torch; "], ids=["alone", "after_torch"])
def test_libraries_import_after_ornstein(first: str) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    source = f"{first}import ornstein; {LIBRARIES}; print(torchvision.transforms.CenterCrop(2).size)"
    assert python(source) == "(2, 2)"


def test_import_of_ornstein_imports_neither_torch_nor_torchvision() -> None:
    assert python("import sys, ornstein; print({'torch', 'torchvision'} & set(sys.modules))") == "set()"


def test_looking_torchvision_up_does_not_import_torch(fake: Path) -> None:
    source = "import sys, importlib.util, ornstein; print(bool(importlib.util.find_spec('torchvision')), end=' '); "
    assert python(source + "print('torch' in sys.modules)", fake) == "True False"


@pytest.mark.parametrize("library", [None, b"not a shared library"], ids=["absent", "does_not_load"])
def test_operators_are_declared_where_the_library_does_not_load(fake: Path, library: bytes | None) -> None:
    if library is not None:
        (fake / "torchvision" / "_C.so").write_bytes(library)
    source = "import ornstein, torchvision, torch; print(torchvision.nms, torch.ops.torchvision.qnms.default._schema)"
    declared, schema = python(source, fake).split(" ", 1)
    assert declared == "True"
    assert schema == "torchvision::qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def test_nothing_is_declared_where_the_library_loads(fake: Path) -> None:
    # Any shared library that loads will do for the check: an extension module of this Python's own, or of numpy's.
    import numpy

    extension = next(Path(numpy.__file__).parent.rglob("_multiarray_umath*.so"))
    (fake / "torchvision" / "_C.so").symlink_to(extension)
    assert python("import ornstein, torchvision; print(torchvision.nms)", fake) == "False"


def test_operators_that_somebody_declared_stay_theirs(fake: Path) -> None:
    source = (
        "import torch; theirs = torch.library.Library('torchvision', 'DEF'); theirs.define('nms(Tensor x) -> Tensor'); "
        "import ornstein, torchvision; print(torch.ops.torchvision.nms.default._schema)"
    )
    assert python(source, fake) == "torchvision::nms(Tensor x) -> Tensor"


def test_torchvision_absent_is_an_ordinary_import_error(tmp_path: Path) -> None:
    source = (
        "import sys, ornstein; sys.path[:] = []\n"
        "try:\n    import torchvision\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    assert python(source) == "No module named 'torchvision'"
