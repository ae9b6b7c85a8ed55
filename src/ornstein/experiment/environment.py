"""What a run ran on: enough to repeat it, gathered without loading anything."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "ornstein",
    "torch",
    "lightning",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
    "safetensors",
    "diffusers",
    "transformers",
    "torchvision",
    "torch-fidelity",
    "wandb",
)


def describe_environment(*, seed: int | None = None) -> dict[str, Any]:
    """What ``environment.json`` holds: plain JSON types only.

    ``git`` (``revision``, ``dirty``; None where the package does not come from a git checkout),
    ``versions`` of the packages that decide a result, ``python``, ``platform``, ``device``, ``threads``,
    ``seed``, ``argv``. Torch is asked for its device only where it is already loaded: this function imports
    no library.
    """
    return {
        "git": git_state(Path(__file__).resolve().parents[1]),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(),
        "threads": _threads(),
        "seed": seed,
        "argv": list(sys.argv),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_state(package: Path) -> dict[str, Any] | None:
    """Revision and dirty flag of the repository that tracks ``package``; None where none does.

    A package installed into an environment inside some other project's checkout is not tracked by it, and
    that project's revision would be a lie: so the package's own ``__init__.py`` must be among the tracked
    files.
    """

    if run_git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = run_git(package, "rev-parse", "HEAD")
    status = run_git(package, "status", "--porcelain")
    if revision is None or status is None:
        return None
    return {"revision": revision, "dirty": bool(status)}


def run_git(folder: Path, *arguments: str) -> str | None:
    """What a git command in ``folder`` prints; None where it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):  # no git here, or a file system that hangs
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _device() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        count = torch.cuda.device_count()
        return {
            "type": "cuda",
            "names": [torch.cuda.get_device_name(index) for index in range(count)],
            "cuda": torch.version.cuda,
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }
    return {"type": "cpu", "names": [platform.processor() or platform.machine()]}


def _threads() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpus": os.cpu_count(),
        "usable": usable,
        "torch": torch.get_num_threads() if torch is not None else None,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }
