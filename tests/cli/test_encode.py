"""The encode command and ``data.latents=``: training on latents is training on images, without the encoder."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from ornstein.cli.encode import encode
from ornstein.cli.latents import encode_command
from ornstein.cli.launch import find_mistake
from ornstein.cli.validate import validate

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROOT = Path(__file__).parents[2]
DIGITS = ("data=digits", "codec=kl", "data.image_size=32")
TINY = (
    "model=latent_dit",
    "model.network.hidden_size=16",
    "model.network.depth=1",
    "model.network.heads=2",
    "data.batch_size=4",
    "data.limit=16",
    "trainer.max_steps=4",
    "trainer.enable_progress_bar=false",
    "sampler.steps=2",
    "metrics=none",
    "logger=csv",
    "callbacks.log.every=1",
    "callbacks.validation.every=4",
    "callbacks.validation.max_batches=2",
    "callbacks.sample_grid.samples_per_class=1",
    "~callbacks.trajectory",
    "~callbacks.schedule_plot",
)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, compose_config: Callable[..., DictConfig]) -> Iterator[Path]:
    """The digits' latents: means, without mirrored views; read only."""
    from hydra.core.hydra_config import HydraConfig

    folder = tmp_path_factory.mktemp("encoded")
    encode(compose_config(*DIGITS, f"out={folder / 'latents'}", run_dir=folder / "run", config_name="encode"))
    HydraConfig.instance().cfg = None
    yield folder / "latents"


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> list[float]:
    return [float(row[name]) for row in rows(run) for name in ("train/loss", "val/loss") if row.get(name)]


def test_training_on_latents_is_training_on_images_without_the_encoder(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same losses, to rounding, of training and of validation; and all that follows from the labels."""
    import ornstein
    from ornstein.codecs import KLAutoencoder

    plain = ornstein.train(TINY, run_dir=tmp_path / "plain")
    encoded = KLAutoencoder.encode

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(KLAutoencoder, "encode", refuse)
    monkeypatch.setattr(KLAutoencoder, "posterior", refuse)
    capsys.readouterr()
    cached = ornstein.train([*TINY, f"data.latents={latents}"], run_dir=tmp_path / "cached")
    assert f"latents from {latents}" in capsys.readouterr().out
    monkeypatch.setattr(KLAutoencoder, "encode", encoded)
    ours, theirs = losses(tmp_path / "cached"), losses(tmp_path / "plain")
    assert len(ours) == 5
    # Latents encoded in batches of 256 rather than 4 differ in the last bits; four steps carry that on.
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert cached.module.images_seen == plain.module.images_seen == 16


def test_a_resumed_run_on_latents_is_an_undisturbed_one_to_the_bit(latents: Path, tmp_path: Path) -> None:
    import ornstein

    words = [*TINY, f"data.latents={latents}", "lr_schedule=constant"]
    whole = ornstein.train(words, run_dir=tmp_path / "whole")
    ornstein.train([*words, "trainer.max_steps=2"], run_dir=tmp_path / "parts")
    parts = ornstein.train([f"resume={tmp_path / 'parts'}", "trainer.max_steps=4"])
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, parts.module.state_dict()[name]), name


def told_by(call: Callable[[], object]) -> str:
    with pytest.raises(Exception) as caught:
        call()
    mistake = find_mistake(caught.value)
    assert mistake is not None, caught.value
    return " ".join(str(mistake).split())


# Overrides of train.py beside model=latent_dit and data.latents=FOLDER, and the words of the refusal; {folder} is it.
REFUSED = [
    ("codec.sample_posterior=true", "holds the posterior's means draws codec.sample_posterior=false"),
    ("data.flip=true", "holds no mirrored views data.flip=false"),
    ("model=class_unet data.image_size=32", "codec=identity no latents leave data.latents out model=latent_dit"),
    ("data.latents=/nowhere", "data.latents=/nowhere holds no latents out=/nowhere"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_run_that_does_not_fit_its_latents_is_refused(
    compose: Callable[..., DictConfig], latents: Path, overrides: str, words: str
) -> None:
    model = () if "model=" in overrides else ("model=latent_dit",)
    cfg = compose(*model, f"data.latents={latents}", *overrides.split())
    told = told_by(lambda: validate(cfg))
    wanted = [*words.split(), *(() if "identity" in words else ("`python -m ornstein.cli.encode data=digits",))]
    assert [word for word in wanted if word not in told] == [], told
    assert len(told) < 450


def test_other_images_are_refused_before_the_run_begins(
    compose: Callable[..., DictConfig], latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ornstein.cli.train import train
    from ornstein.data import digits

    scans, labels = digits.read_scans()
    scans[:, 0] ^= 1
    monkeypatch.setattr(digits, "read_scans", lambda: (scans, labels))
    run = tmp_path / "run"
    told = told_by(lambda: train(compose(*TINY, f"data.latents={latents}", run_dir=run)))
    assert "was made of other train images (1,438 of digits at 32x32)" in told and f"out={latents}" in told
    assert not (run / "config.yaml").exists()


@pytest.mark.parametrize("overrides", ["data.flip=true", "codec.sample_posterior=true"])
def test_the_command_that_a_refusal_names_makes_what_is_missing(
    compose: Callable[..., DictConfig],
    compose_config: Callable[..., DictConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: str,
) -> None:
    """And ``auto`` finds it: first refused with the command, then taken."""
    monkeypatch.setenv("ORNSTEIN_CACHE", str(tmp_path / "cache"))
    words = ("model=latent_dit", "data.latents=auto", *overrides.split())
    told = told_by(lambda: validate(compose(*words)))
    command = shlex.split(told.split("`")[1])
    assert command[:3] == ["python", "-m", "ornstein.cli.encode"] and overrides in command
    encode(compose_config(*command[3:], run_dir=tmp_path / "run", config_name="encode"))
    cfg = compose(*words)
    validate(cfg)
    assert Path(cfg.data.latents).parent == tmp_path / "cache" / "latents"
    plain = compose("model=class_unet", "data.latents=auto")
    validate(plain)
    assert plain.data.latents is None


def test_auto_names_one_folder_for_what_has_the_same_latents(compose: Callable[..., DictConfig]) -> None:
    """Not the batch, the classes or the captions, but the image size, the mirroring and the codec make another."""
    from hydra.utils import instantiate

    from ornstein.cli.latents import latents_folder

    def folder(*overrides: str) -> Path:
        cfg = compose("model=latent_dit", *overrides)
        return latents_folder(cfg, instantiate(cfg.codec))

    same = [(), ("data.batch_size=7", "data.limit=9", "conditioner=none", "data.num_classes=null", "seed=4")]
    other = [("data.flip=true",), ("codec.sample_posterior=true",), ("+data.val_fraction=0.3",)]
    assert len({folder(*words) for words in same}) == 1
    assert len({folder(*words) for words in [*same, *other]}) == 1 + len(other)


def test_the_command_repeats_what_was_changed_in_data_and_codec(compose: Callable[..., DictConfig]) -> None:
    cfg = compose("model=latent_dit", "data.flip=true", "codec.fits=[digits,other]", "data.batch_size=3", "seed=5")
    assert shlex.split(encode_command(cfg, out="my folder")) == [
        *("python", "-m", "ornstein.cli.encode", "data=digits", "data.image_size=32", "data.flip=true"),
        *("codec=kl", "codec.fits=[digits,other]", "out='my folder'"),
    ]


# Overrides of the encode command, and the words of its refusal.
ENCODE_REFUSED = [
    ("data.image_size=8", "image_size=32 data.image_size is 8"),
    ("codec=identity", "codec=identity nothing to encode codec=kl"),
    ("data=emoji", "codec=kl digits emoji"),
    ("store=mean codec.sample_posterior=true", "store=mean codec=kl draws store=moments codec.sample_posterior=false"),
    ("store=sample", "store=sample codec=kl mean codec.sample_posterior=true"),
    ("store=std", "store=std unknown auto mean sample moments"),
    ("dtype=int8", "dtype=int8 unknown float32 float16"),
    ("precision=float16 device=cpu", "precision=float16 needs a GPU bfloat16"),
    ("precision=half", "precision=half unknown float32 bfloat16 float16"),
    ("device=tpu7", "device=tpu7 unknown cpu cuda"),
    ("batch_size=0", "batch_size=0 at least 1"),
    ("shard_images=1.5", "shard_images=1.5 whole number"),
]


@pytest.mark.parametrize(("overrides", "words"), ENCODE_REFUSED, ids=[row[0] for row in ENCODE_REFUSED])
def test_what_cannot_be_encoded_is_refused(
    compose: Callable[..., DictConfig], tmp_path: Path, overrides: str, words: str
) -> None:
    cfg = compose(*DIGITS, f"out={tmp_path / 'out'}", *overrides.split(), config_name="encode")
    told = told_by(lambda: encode(cfg))
    assert [word for word in words.split() if word not in told] == [], told
    assert not (tmp_path / "out").exists()


def test_again_does_nothing_and_another_recipe_is_refused(
    compose: Callable[..., DictConfig], latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in latents.rglob("*.npy")}
    encode(compose(*DIGITS, f"out={latents}", config_name="encode"))
    assert "encoded    0 images" in (out := capsys.readouterr().out) and "1,797 were there already" in out
    told = told_by(lambda: encode(compose(*DIGITS, f"out={latents}", "dtype=float16", config_name="encode")))
    assert "another recipe (dtype float32 there and float16 here)" in told
    assert {path: path.stat().st_mtime_ns for path in latents.rglob("*.npy")} == before


def test_help_loads_neither_torch_nor_anything_else() -> None:
    code = "import sys; from ornstein.cli import main; sys.argv = ['ornstein', 'encode', '--help']; " + (
        "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "False"
    assert "python -m ornstein.cli.encode data=digits" in done.stdout and "codec: " in done.stdout


# ---- as processes ----------------------------------------------------------------------------------------------------


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "ornstein.cli.encode", *DIGITS, "shard_images=16", *words],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def arrays(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npy"))}


@pytest.mark.slow
def test_killed_it_goes_on_and_two_share_the_work(tmp_path: Path) -> None:
    """The same bytes as one undisturbed process writes; what is asked for a second time is not encoded again."""
    whole = command(tmp_path, "out=whole")
    out, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    assert "encoded    1,797 images" in out and not list((tmp_path / "outputs").rglob("*"))
    killed = command(tmp_path, "out=parts")
    deadline = time.monotonic() + 120
    while len(arrays(tmp_path / "parts")) < 3 and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    there = len(arrays(tmp_path / "parts"))
    assert 3 <= there < 113 + 1
    pair = [command(tmp_path, "out=parts") for _ in range(2)]
    told = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    encoded = [int(out.split("\nencoded")[1].split()[0].replace(",", "")) for out, _ in told]
    assert 0 < sum(encoded) <= 1797 - 16 * (there - 1)
    assert arrays(tmp_path / "parts") == arrays(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_train_on_latents_as_on_images(latents: Path, tmp_path: Path) -> None:
    found = []
    for name, words in {"plain": [], "cached": [f"data.latents={latents}"]}.items():
        ddp = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp", f"hydra.run.dir={name}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *TINY, *ddp, *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(losses(tmp_path / name))
    assert len(found[0]) == 5 and found[0] == pytest.approx(found[1], rel=1e-4)
