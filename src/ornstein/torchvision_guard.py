"""Lets torchvision be imported where its native library does not fit the installed torch.

torchvision's Python parts (transforms, datasets, models) work without its native library, but importing them
registers extra behaviour for the operators ``nms`` and ``qnms``, which only that library declares: beside a torch of
another build (a CPU torch, while torchvision is published for CUDA) ``import torchvision`` raises ``operator
torchvision::nms does not exist``, and Lightning, torchmetrics, diffusers and torch-fidelity fail with it.

:func:`install` places a hook that acts once, just before torchvision's own code runs: it tries the library as
torchvision will, and declares the two operators, without any kernel, only where that fails. Where the library loads,
nothing is changed. Nothing is imported before torchvision itself is. ``torchvision.ops.nms`` and
``torchvision.io.read_image`` stay unusable without the library.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""The operators that torchvision's Python code refers to at import, with their schemas."""

_declared: list[Any] = []  # a torch.library.Library takes its operators back when it is collected


def native_library_loads(package: Path) -> bool:
    """Whether the native library in torchvision's folder ``package`` can be loaded beside the installed torch.

    A library that loads stays loaded: torchvision's own attempt right after finds it again.
    """
    import torch

    library = next((path for suffix in EXTENSION_SUFFIXES if (path := package / f"_C{suffix}").is_file()), None)
    if library is None:
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return True


def declare_operators() -> None:
    """Declare the operators of ``OPERATORS`` that nobody has declared yet, without kernels."""
    import torch

    missing = [schema for name, schema in OPERATORS.items() if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in missing:
            library.define(schema)
        _declared.append(library)


class _GuardedLoader(SourceFileLoader):
    """Loads torchvision's ``__init__.py`` as usual, after the check."""

    def exec_module(self, module: ModuleType) -> None:
        if not native_library_loads(Path(self.path).parent):
            declare_operators()
        super().exec_module(module)


class _Finder:
    """Finds torchvision, and nothing else, where Python finds it, and hands it to the guarded loader."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _GuardedLoader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Place the hook in front of Python's own finders; a second call changes nothing."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
