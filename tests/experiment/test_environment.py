import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ornstein.errors import OrnsteinError
from ornstein.experiment.environment import describe_environment, git_state


def _git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *who, "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_revision_and_dirty_flag(tmp_path: Path) -> None:
    package = tmp_path / "src" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert git_state(package) is None, "no repository"
    _git(tmp_path, "init", "-q")
    assert git_state(package) is None, "a repository that does not track the package"
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-qm", "first")
    assert git_state(package) == {"revision": _git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("x = 1")
    state = git_state(package)
    assert state is not None and state["dirty"] is True


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_environment_is_plain_and_complete() -> None:
    found = describe_environment(seed=7)
    assert json.loads(json.dumps(found)) == found
    assert found["seed"] == 7 and found["argv"] == sys.argv
    assert {"torch", "lightning", "numpy"} <= set(found["versions"])
    assert found["python"].startswith("3.") and found["device"]["type"] in ("cpu", "cuda")
    assert found["threads"]["usable"] >= 1


def test_the_floor_is_light() -> None:
    script = """
        import sys
        import ornstein.experiment as e
        e.describe_environment()
        e.RunDirectory, e.Summary, e.identity, e.find_unfinished, e.read_metrics
        print(sorted({"torch", "lightning", "wandb", "numpy", "hydra", "omegaconf"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_unknown_names_are_told() -> None:
    import ornstein.experiment

    assert all(getattr(ornstein.experiment, name) for name in ("RunDirectory", "identity", "Summary"))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ornstein.experiment.nothing  # noqa: B018


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_told(seed: int) -> None:
    from ornstein.experiment.seeding import set_determinism

    with pytest.raises(ValueError, match="seed must lie in"):
        set_determinism(seed)


def test_a_seed_repeats_every_stream() -> None:
    import random

    import numpy as np
    import torch

    from ornstein.experiment.seeding import set_determinism

    def draw() -> tuple[float, float, float]:
        set_determinism(5, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    assert draw() == draw()
    set_determinism(5)
    assert not torch.are_deterministic_algorithms_enabled()


def test_tensorboard_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ornstein.experiment import logger_options, tensorboard_log

    monkeypatch.setattr(logger_options, "find_spec", lambda name: None)
    with pytest.raises(OrnsteinError, match=r"pip install 'ornstein\[tensorboard\]'"):
        tensorboard_log.tensorboard_logger(tmp_path)
