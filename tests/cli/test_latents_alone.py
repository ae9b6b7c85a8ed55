"""``data=latents``: training on the codec's cache alone, the images gone, and what cannot be done without them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ornstein.cli.launch import find_mistake
from ornstein.cli.validate import validate

if TYPE_CHECKING:
    from omegaconf import DictConfig

LATENT = ("model=latent_dit", "model.network.hidden_size=16", "model.network.depth=1", "model.network.heads=2")
TINY = (
    "data.batch_size=4",
    "data.limit=16",
    "trainer.max_steps=3",
    "trainer.enable_progress_bar=false",
    "sampler.steps=2",
    "logger=csv",
    "callbacks.log.every=1",
    "callbacks.validation.every=3",
    "callbacks.validation.max_batches=2",
    "callbacks.sample_grid.samples_per_class=1",
    "~callbacks.trajectory",
    "~callbacks.schedule_plot",
)


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row[name]) for row in rows for name in ("train/loss", "val/loss") if row.get(name)]


def told_by(call: Callable[[], object]) -> str:
    with pytest.raises(Exception) as caught:
        call()
    mistake = find_mistake(caught.value)
    assert mistake is not None, caught.value
    return " ".join(str(mistake).split())


def missing(told: str, words: str) -> list[str]:
    return [word for word in words.split() if word not in told]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, compose_config: Callable[..., DictConfig]) -> Iterator[Path]:
    """The digits' latents; read only."""
    from hydra.core.hydra_config import HydraConfig

    from ornstein.cli.encode import encode

    folder = tmp_path_factory.mktemp("encoded")
    words = ("data=digits", "codec=kl", "data.image_size=32", f"out={folder / 'latents'}")
    encode(compose_config(*words, run_dir=folder / "run", config_name="encode"))
    HydraConfig.instance().cfg = None
    yield folder / "latents"


@pytest.mark.slow
def test_training_on_latents_alone_is_training_beside_their_images(latents: Path, tmp_path: Path) -> None:
    """To the bit, on a part of them; classes and names come from the folder, and samples need none of it."""
    import ornstein

    words = [*LATENT, *TINY]
    ornstein.train([*words, "metrics=none", f"data.latents={latents}"], run_dir=tmp_path / "beside")
    alone = ornstein.train([*words, "data=latents", f"data.root={latents}"], run_dir=tmp_path / "alone")
    assert losses(tmp_path / "alone") == losses(tmp_path / "beside") and len(losses(tmp_path / "alone")) == 4
    assert (alone.config.data.num_classes, alone.config.data.image_size) == (10, 32)
    assert alone.sample(2, steps=2).shape == (2, 1, 32, 32)


ALONE = [
    ("metrics=digits", "holds no images, and metrics=digits metrics=none data.latents=FOLDER beside"),
    ("model=class_unet", "data=latents codec=identity model=latent_dit"),
    ("data.flip=true", "holds no mirrored views data.flip=false `python -m ornstein.cli.encode data=digits"),
    ("data.image_size=64", "image_size=32"),
    ("data.latents=/other", "data.latents=/other leave data.latents out"),
]


@pytest.mark.parametrize(("overrides", "words"), ALONE, ids=[row[0] for row in ALONE])
def test_what_latents_alone_cannot_do_is_refused(
    compose: Callable[..., DictConfig], latents: Path, overrides: str, words: str
) -> None:
    model = () if "model=" in overrides else LATENT
    told = told_by(lambda: validate(compose(*model, "data=latents", f"data.root={latents}", *overrides.split())))
    assert missing(told, words) == [], told
    assert len(told) < 450


def test_conditioners_on_images_are_refused_on_latents_alone(compose: Callable[..., DictConfig], latents: Path) -> None:
    words = ("data=latents", f"data.root={latents}", *LATENT, "conditioner=image", "conditioner.source=low_resolution")
    told = told_by(lambda: validate(compose(*words)))
    assert missing(told, "holds no images conditioner=image data.latents=FOLDER beside") == [], told


def test_whatever_looks_at_an_image_is_told_that_there_is_none(latents: Path) -> None:
    from ornstein.data import LatentFolder

    dataset = LatentFolder(split="train", root=str(latents)).subset([5, 3])
    assert len(dataset) == 2 and dataset.class_names == tuple("0123456789") and dataset.captions is not None
    assert "data=latents data.root=" in told_by(lambda: dataset.batch([0]))
