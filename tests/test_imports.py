"""The floors of the house: who may import whom, read from the source without running it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "ornstein"

# Each floor and the floors below it that it may know.
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "lazy": set(),
    "torchvision_guard": set(),
    "diffusion": set(),
    "networks": {"diffusion"},
    "codecs": {"diffusion"},
    "conditioning": {"diffusion"},
    "data": {"diffusion", "networks", "codecs", "conditioning"},
    "metrics": {"diffusion", "networks", "codecs", "conditioning"},
    "training": {"diffusion", "networks", "codecs", "conditioning", "data", "metrics"},
    "experiment": {"diffusion", "networks", "codecs", "conditioning", "data", "metrics", "training"},
    "cli": {"diffusion", "networks", "codecs", "conditioning", "data", "metrics", "training", "experiment"},
}
# A committed script that makes bundled weights reads a data set: a program of its own, which nothing imports.
SCRIPT, SCRIPT_MAY_KNOW = "train_", {"data"}

# Libraries that only some floors may know.
ONLY_IN: dict[str, set[str]] = {
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "lightning": {"data", "training", "experiment", "cli"},
    "pytorch_lightning": {"data", "training", "experiment", "cli"},
    "torchmetrics": {"metrics", "training", "experiment", "cli"},
}
# Libraries that cost seconds: imported where they are used, never with the module.
HEAVY = {
    *("wandb", "diffusers", "transformers", "peft", "torchvision", "torch_fidelity", "matplotlib", "sklearn"),
    "pandas",
}


@dataclass(frozen=True)
class Import:
    """One imported name: ``module`` in full, its line, and whether it runs with the importing module."""

    module: str
    line: int
    at_import: bool


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import in ``source``, a module of ``package``; relative ones are made absolute."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from ornstein import cli` names the module only together.
            yield from (Import(f"{module}.{alias.name}", node.lineno, at_import) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield Import(str(node.args[0].value), node.lineno, at_import)
        within_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import and not within_function and not for_types_only)

    yield from visit(ast.parse(source), True)


def violations(source: str, name: str) -> list[str]:
    """What the imports of the module ``name`` (such as ``ornstein.data.mnist``) break, a sentence each."""
    parts = name.split(".")
    floor, script = parts[1], parts[-1].startswith(SCRIPT)
    found = []
    for item in imports(source, name.rpartition(".")[0]):
        where, (root, *inner) = f"{name}:{item.line}", item.module.split(".")
        if root == "ornstein" and inner and inner[0] in BELOW:
            allowed = BELOW[floor] | {floor, "errors", "lazy", *(SCRIPT_MAY_KNOW if script else ())}
            if inner[0] not in allowed:
                found.append(f"{where} {floor} must not know {inner[0]} ({item.module})")
        if floor not in ONLY_IN.get(root, {floor}):
            found.append(f"{where} {floor} must not know {root}")
        if root in HEAVY and item.at_import:
            found.append(f"{where} {root} must be imported where it is used")
    return found


def modules() -> list[tuple[str, Path]]:
    """Every module of the package below its root, with its full name (a package's name ends in ``__init__``)."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(".".join(("ornstein", *path.relative_to(PACKAGE).with_suffix("").parts)), path) for path in paths]


def test_every_floor_is_known() -> None:
    floors = {name.split(".")[1] for name, _ in modules()} - {"__init__"}
    assert floors == set(BELOW)


def test_imports_point_down_only() -> None:
    found = [
        v for name, path in modules() if path != PACKAGE / "__init__.py" for v in violations(path.read_text(), name)
    ]
    assert not found, "\n".join(found)


# One row a rule: a module, a line in it, and whether the rules allow it.
ROWS = [
    ("ornstein.diffusion.x", "from ornstein.networks import unet", False),
    ("ornstein.diffusion.x", "from ornstein import networks", False),
    ("ornstein.diffusion.x", "from ..networks import unet", False),
    ("ornstein.diffusion.samplers.x", "from ...networks import unet", False),
    ("ornstein.diffusion.samplers.x", "from ..schedules import Linear", True),
    ("ornstein.diffusion.__init__", "from .schedules import Linear", True),
    ("ornstein.diffusion.x", "def f():\n    from ornstein.data import base", False),
    ("ornstein.diffusion.x", "from importlib import import_module\nimport_module('ornstein.cli.train')", False),
    ("ornstein.diffusion.x", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ornstein.data", False),
    ("ornstein.diffusion.x", "from ornstein.errors import OrnsteinError", True),
    ("ornstein.networks.x", "from ornstein.codecs import codec", False),
    ("ornstein.data.x", "from ornstein.metrics import fid", False),
    ("ornstein.metrics.x", "from ornstein.data import digits", False),
    ("ornstein.metrics.train_x", "from ornstein.data import digits", True),
    ("ornstein.metrics.train_x", "from ornstein.training import module", False),
    ("ornstein.experiment.x", "from ornstein.cli import train", False),
    ("ornstein.errors", "from ornstein.diffusion import schedules", False),
    ("ornstein.training.x", "import hydra", False),
    ("ornstein.experiment.x", "def f():\n    from omegaconf import OmegaConf", False),
    ("ornstein.cli.x", "from hydra.utils import instantiate", True),
    ("ornstein.metrics.x", "import lightning.pytorch as pl", False),
    ("ornstein.networks.x", "from pytorch_lightning import LightningModule", False),
    ("ornstein.data.x", "from lightning.pytorch import LightningDataModule", True),
    ("ornstein.data.x", "import torchmetrics", False),
    ("ornstein.training.x", "import wandb", False),
    ("ornstein.training.x", "def f():\n    import wandb", True),
    ("ornstein.training.x", "class A:\n    import matplotlib.pyplot as plt", False),
    (
        "ornstein.networks.x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from diffusers import UNet2DModel",
        True,
    ),
]


@pytest.mark.parametrize(("name", "source", "allowed"), ROWS)
def test_the_rules_see_what_they_forbid(name: str, source: str, allowed: bool) -> None:
    assert (not violations(source, name)) == allowed


@pytest.mark.parametrize("module", ["ornstein", "ornstein.cli"])
def test_importing_the_package_and_its_command_line_is_light(module: str) -> None:
    source = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert module.split(".")[0] in loaded
    assert not loaded & (HEAVY | {"torch", "lightning", "pytorch_lightning", "torchmetrics", "hydra"})
