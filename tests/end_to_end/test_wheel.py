"""The wheel in a fresh environment outside the repository: the command, a user's own configs and own classes."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

MY_SCHEDULE = '''
from ornstein.diffusion.schedules import Cosine


class Gentle(Cosine):
    """The cosine schedule with a larger offset."""

    def __init__(self, offset: float = 0.05) -> None:
        super().__init__(offset=offset)
'''


def output_of(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints, run without the variables that would lead it back to the repository."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [os.fspath(part) for part in command], cwd=cwd, env=clean | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build", reason="needs the dev extra")
    folder = tmp_path_factory.mktemp("wheel")
    output_of(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("ornstein-*.whl")
    return built


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel in it, and this environment's libraries but not its ornstein.

    A path in a .pth file adds a folder without reading the .pth files in it, so an editable install stays out.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    where = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    (Path(where["purelib"]) / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    python = Path(where["scripts"]) / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    output_of(*pip, "--ignore-installed", wheel, cwd=folder)
    imported = output_of(python, "-c", "import ornstein; print(ornstein.__file__)", cwd=folder).strip()
    assert Path(imported).is_relative_to(folder)
    return python.parent


def config_of_the_run(folder: Path) -> dict:
    (config,) = folder.glob("outputs/train/*/*/config.yaml")
    assert (config.parent / "checkpoints" / "last.ckpt").is_file()
    return yaml.safe_load(config.read_text())


def test_wheel_carries_configs_weights_and_types(wheel: Path) -> None:
    source = ROOT / "src"
    kept = [path for path in source.rglob("*") if path.suffix in (".py", ".typed", ".safetensors", ".txt")]
    expected = {path.relative_to(source).as_posix() for path in kept}
    expected |= {f"ornstein/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected <= names, expected - names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"ornstein", "hydra_plugins"}


def test_train_in_an_empty_folder(commands: Path, tmp_path: Path) -> None:
    output_of(commands / "ornstein", "train", "debug=fast_dev_run", cwd=tmp_path)
    assert config_of_the_run(tmp_path)["scheduler"]["_target_"].startswith("ornstein.")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_a_users_own_option_and_class(commands: Path, tmp_path: Path) -> None:
    (tmp_path / "my_library.py").write_text(MY_SCHEDULE)
    option = tmp_path / "my_conf" / "scheduler" / "gentle.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("_target_: my_library.Gentle\noffset: 0.1\n")
    arguments = ("--config-dir", "my_conf", "scheduler=gentle", "debug=fast_dev_run")
    output_of(commands / "ornstein", "train", *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert config_of_the_run(tmp_path)["scheduler"] == {"_target_": "my_library.Gentle", "offset": 0.1}
    (run,) = tmp_path.glob("outputs/train/*/*")
    trusted = ("trust_targets=[my_library]", "num_samples=4", "sampler.steps=2")
    output_of(commands / "ornstein", "sample", f"run={run}", *trusted, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert list(tmp_path.glob("outputs/sample/*/*/**/*.png"))
