"""The prepare command: to train on what it wrote is to train on what it read."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from ornstein.cli.launch import find_mistake
from ornstein.cli.prepare import prepare
from ornstein.cli.validate import validate

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROOT = Path(__file__).parents[2]
TINY = (
    "model=class_unet",
    "data.batch_size=4",
    "trainer.max_steps=3",
    "trainer.enable_progress_bar=false",
    "sampler.steps=2",
    "metrics=none",
    "logger=csv",
    "callbacks.log.every=1",
    "callbacks.validation.every=3",
    "callbacks.validation.max_batches=2",
    "callbacks.sample_grid.samples_per_class=1",
    "~callbacks.trajectory",
    "~callbacks.schedule_plot",
)
Prepare = Callable[..., Path]


@pytest.fixture
def prepared(compose: Callable[..., DictConfig], tmp_path: Path) -> Prepare:
    """Runs the command in this process; the folder that it wrote."""

    def run(*words: str, out: Path | str = tmp_path / "out") -> Path:
        prepare(compose(*words, f"out={out}", config_name="prepare"))
        return Path(out)

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 24 pictures in two classes."""
    rng = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "pictures" / ("ant" if number % 2 else "bee") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


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


def test_training_on_prepared_images_is_training_on_the_data_set(prepared: Prepare, tmp_path: Path) -> None:
    """The same losses to the bit, from the folder's facts alone: classes, names, captions, sigma_data, no mirroring.
    And the run can be sampled when the folder is gone."""
    import ornstein

    folder = prepared("data=digits", "data.image_size=16", "data.sigma_data=0.698")
    plain = ornstein.train([*TINY, "data.image_size=16"], run_dir=tmp_path / "plain")
    cached = ornstein.train([*TINY, "data=prepared", f"data.root={folder}"], run_dir=tmp_path / "cached")
    assert losses(tmp_path / "cached") == losses(tmp_path / "plain") and len(losses(tmp_path / "cached")) == 4
    data = cached.config.data
    assert (data.image_size, data.channels, data.num_classes, data.flip, data.features) == (16, 1, 10, False, "digits")
    assert data.sigma_data == 0.698 and list(data.class_names) == [str(digit) for digit in range(10)]
    folder.rename(tmp_path / "gone")
    run = ornstein.load(tmp_path / "cached")
    assert torch.equal(run.sample(2, steps=2), plain.sample(2, steps=2))


def test_a_folder_of_pictures(
    prepared: Prepare, pictures: Path, compose: Callable[..., DictConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Decoded as the data option decodes them, with a contact sheet; again it does nothing."""
    from ornstein.data import ImageFolder, Prepared

    words = (
        "data=image_folder",
        f"data.root={pictures}",
        "data.num_classes=auto",
        "data.crop=edm",
        "data.image_size=8",
    )
    folder = prepared(*words, "shard_images=7")
    there = ImageFolder(split="train", root=str(pictures), image_size=8, crop="edm")
    here = Prepared(split="train", root=str(folder))
    np.testing.assert_array_equal(here.images[np.arange(22)], there.images[np.arange(22)])
    assert here.class_names == ("ant", "bee") and here.batch([0])["label"] == there.batch([0])["label"]
    np.testing.assert_array_equal(here.content_keys, there.content_keys)
    with Image.open(folder / "preview.png") as sheet:
        assert sheet.width > 5 * 96
    out = capsys.readouterr().out
    assert "22 train, 2 val, 2 classes" in out and f"train on it by data=prepared data.root={folder}" in out
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    prepared(*words, "shard_images=7")
    assert "prepared   0 images" in (out := capsys.readouterr().out) and "24 were there already" in out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")} == before
    told = told_by(lambda: prepared(*words[:-1], "data.image_size=16", "shard_images=7"))
    assert missing(told, "out= images of another recipe (image_size=8 there and 16 here)") == [], told
    cfg = compose("data=prepared", f"data.root={folder}")
    validate(cfg)
    assert cfg.data.num_classes == 2
    told = told_by(lambda: validate(compose("model=text_unet", "data=prepared", f"data.root={folder}")))
    assert missing(told, f"reads captions and data=prepared data.root={folder} has none") == [], told


def test_bad_pictures_are_left_out_up_to_the_limit(prepared: Prepare, pictures: Path) -> None:
    """Found while decoding, counted over all splits and over runs; over the limit nothing counts as finished."""
    from ornstein.data import Prepared

    for name in ("ant/01.png", "bee/02.png"):
        (pictures / name).write_bytes((pictures / name).read_bytes()[:100])
    words = ("data=image_folder", f"data.root={pictures}", "data.image_size=8", "shard_images=4")
    told = told_by(lambda: prepared(*words, "data.max_bad=1"))
    assert missing(told, "2 images cannot be used ant/01.png bee/02.png data.max_bad=2") == [], told
    folder = Path(str(pictures.parent / "out"))
    assert "is not finished" in told_by(lambda: Prepared(split="train", root=str(folder)))
    with pytest.warns(UserWarning, match="2 images of .* left out"):
        prepared(*words, "data.max_bad=2")
    assert sum(len(Prepared(split=split, root=str(folder))) for split in ("train", "val")) == 22
    assert len(json.loads((folder / "bad.json").read_text())["bad"]) == 2
    told = told_by(lambda: prepared(*words))  # those of shards that are there count as well
    assert missing(told, "2 images ant/01.png data.max_bad=2") == [], told


# Overrides of the command, and the words of its refusal.
REFUSED = [
    ("out=null", "add out=FOLDER"),
    ("workers=-1", "workers=-1 whole number of at least 0"),
    ("shard_images=0", "shard_images=0 whole number of at least 1"),
    ("preview=x", "preview=x whole number"),
    ("data=prepared", "data=prepared is prepared already"),
    ("data=image_folder", "data=image_folder data.root=FOLDER"),
    ("data=zip data.root=/nowhere.zip", "/nowhere.zip does not exist"),
    ("out={file}", "is a file: name a folder"),
    ("out={foreign}", "holds something else (thesis.tex, say)"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_be_prepared_is_refused(
    compose: Callable[..., DictConfig], tmp_path: Path, overrides: str, words: str
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    filled = overrides.format(file=tmp_path / "file", foreign=foreign)
    cfg = compose(f"out={tmp_path / 'out'}", *filled.split(), config_name="prepare")
    told = told_by(lambda: prepare(cfg))
    assert missing(told, words) == [], told
    assert not (tmp_path / "out").exists() and [path.name for path in foreign.iterdir()] == ["thesis.tex"]


# ---- the other options that read what is on disk already -------------------------------------------------------------


def make_zip(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "a.zip", "w") as file:
        for number in range(12):
            picture = io.BytesIO()
            Image.new("RGB", (9, 9), (20 * number, 0, 0)).save(picture, format="PNG")
            file.writestr(f"{'xy'[number % 2]}/{number}.png", picture.getvalue())
    return [f"data.root={folder / 'a.zip'}", "data.num_classes=auto", "data.image_size=8"]


def make_npz(folder: Path) -> list[str]:
    np.savez(folder / "a.npz", arr_0=np.arange(12 * 192, dtype=np.uint8).reshape(12, 8, 8, 3), arr_1=np.arange(12) % 2)
    return [f"data.root={folder / 'a.npz'}"]


def make_raw(folder: Path) -> list[str]:
    (folder / "a.bin").write_bytes(bytes(range(192)) * 6 + bytes(reversed(range(192))) * 6)
    np.save(folder / "labels.npy", np.arange(12) // 6)
    return [f"data.root={folder / 'a.bin'}", "data.shape=[12,8,8,3]", f"data.label_root={folder / 'labels.npy'}"]


@pytest.mark.filterwarnings("ignore:data.sigma_data")
@pytest.mark.parametrize(("option", "make"), [("zip", make_zip), ("npz", make_npz), ("memmap", make_raw)])
def test_every_option_is_known_before_it_is_read(
    compose: Callable[..., DictConfig], prepared: Prepare, tmp_path: Path, option: str, make: Callable[..., list[str]]
) -> None:
    """A class-conditional model is validated on its size and classes, its data built, and it can be prepared."""
    from ornstein.cli.build import build_data
    from ornstein.data import Prepared

    words = [f"data={option}", *make(tmp_path)]
    cfg = compose("model=class_unet", *words)
    validate(cfg)
    assert (cfg.data.num_classes, cfg.data.image_size, cfg.data.channels) == (2, 8, 3)
    data = build_data(cfg)
    data.setup()
    folder = prepared(*words)
    here = Prepared(split="train", root=str(folder))
    np.testing.assert_array_equal(here.images[np.arange(len(here))], data.train.images[np.arange(len(here))])
    assert here.class_names == data.train.class_names


def make_pairs(folder: Path) -> list[str]:
    """Pictures of three shapes with text files beside them."""
    for number in range(12):
        size = ((24, 12), (12, 12), (12, 24))[number % 3]
        (folder / "p").mkdir(exist_ok=True)
        Image.new("RGB", size, (20 * number, 0, 0)).save(folder / "p" / f"{number:02d}.png")
        (folder / "p" / f"{number:02d}.txt").write_text(f"number {number}")
    return ["data=image_folder", f"data.root={folder / 'p'}", "data.caption_files=true", "data.image_size=8"]


def make_tars(folder: Path) -> list[str]:
    """The same pictures as shards."""
    pytest.importorskip("webdataset")
    make_pairs(folder)
    (folder / "tars").mkdir()
    for shard in range(3):
        with tarfile.open(folder / "tars" / f"{shard}.tar", "w") as file:
            for path in sorted((folder / "p").iterdir())[shard * 8 : shard * 8 + 8]:
                file.add(path, arcname=path.name)
    return ["data=webdataset", f"data.urls={folder / 'tars'}", "data.caption_column=txt", "data.image_size=8"]


MANY: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "captions": (make_pairs, []),
    "several shapes": (make_pairs, ["data.buckets=[[6,12],[8,8],[12,6]]"]),
    "conditions": (make_pairs, ["data.condition_root={root}"]),
    "a stream": (make_tars, []),
}


@pytest.mark.parametrize("kind", MANY)
def test_whatever_a_data_set_has_is_prepared(
    compose: Callable[..., DictConfig], prepared: Prepare, tmp_path: Path, kind: str
) -> None:
    """Captions, shapes, conditions; every image of a stream; again from where it stopped; and training can read it."""
    from ornstein.cli.build import build_data
    from ornstein.cli.validate import fill_facts

    make, more = MANY[kind]
    words = make(tmp_path)
    words += [word.format(root=tmp_path / "p") for word in more]
    folder = prepared(*words, "shard_images=3", "workers=0")
    shards = sorted(folder.rglob("0*.npy"))
    shards[0].unlink()
    prepared(*words, "shard_images=3", "workers=0")
    assert sorted(folder.rglob("0*.npy")) == shards
    cfg = compose("model=pixel_unet", "data=prepared", f"data.root={folder}", "data.overlap=allow")
    validate(cfg)
    fill_facts(cfg)
    data = build_data(cfg)
    data.setup()
    found = {}
    for dataset in (data.train, data.val):
        for rows in dataset.pieces(size=4):
            batch = dataset.batch(rows)
            found |= {
                text: image.float().mean(dim=(1, 2))[0]
                for text, image in zip(batch["caption"], batch["image"], strict=True)
            }
            if kind == "conditions":
                assert batch["condition"].shape[1:] == (1, 8, 8)
    assert found == {f"number {number}": 20 * number for number in range(12)}
    assert len(data.train.shapes) == (3 if kind == "several shapes" else 1)


UNKNOWN = [
    ("data=npz", "data=npz needs a file of images data.root=FILE"),
    ("data=memmap", "data=npz needs a file of images data.root=FILE"),
    ("data=zip", "data=zip needs a zip file data.root="),
    ("data=prepared", "data=prepared needs a folder python -m ornstein.cli.prepare data.root=FOLDER"),
    ("data=latents", "data=latents needs a folder python -m ornstein.cli.encode data.root=FOLDER"),
    ("data=prepared data.root=/nowhere", "data.root=/nowhere holds no prepared images"),
    ("data=latents data.root=/nowhere", "data.root=/nowhere holds no latents"),
]


@pytest.mark.parametrize(("overrides", "words"), UNKNOWN, ids=[row[0] for row in UNKNOWN])
def test_what_is_not_there_is_told_by_the_option_that_names_it(
    compose: Callable[..., DictConfig], overrides: str, words: str
) -> None:
    told = told_by(lambda: validate(compose(*overrides.split())))
    assert missing(told, words) == [], told
    assert len(told) < 300


# ---- as processes ----------------------------------------------------------------------------------------------------


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "ornstein.cli.prepare", *words],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def processes_in(folder: Path) -> list[str]:
    """Those whose working folder it is."""
    return [str(each) for each in Path("/proc").glob("[0-9]*/cwd") if os.path.realpath(each) == str(folder)]


def arrays(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("0*.npy"))}


def test_help_loads_neither_torch_nor_anything_else() -> None:
    code = "import sys; from ornstein.cli import main; sys.argv = ['ornstein', 'prepare', '--help']; " + (
        "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "False"
    assert "python -m ornstein.cli.prepare data=image_folder" in done.stdout and "data: " in done.stdout


@pytest.mark.slow
def test_killed_it_goes_on(tmp_path: Path) -> None:
    """The same bytes as an undisturbed run; what was there is not decoded again; the command mends what it names."""
    words = ("data=digits", "data.image_size=64", "shard_images=8", "data.num_classes=10", "workers=2")
    whole = command(tmp_path, *words, "out=whole")
    _, err = whole.communicate(timeout=120)
    assert whole.returncode == 0, err
    killed = command(tmp_path, *words, "out=parts")
    deadline = time.monotonic() + 60
    while len(arrays(tmp_path / "parts")) < 3 and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    deadline = time.monotonic() + 10  # workers look after their parent once a second
    while (left := processes_in(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    there = len(arrays(tmp_path / "parts"))
    assert 3 <= there < 200
    from ornstein.data import Prepared

    told = told_by(lambda: Prepared(split="train", root=str(tmp_path / "parts")))
    again = command(tmp_path, *shlex.split(told.split("`")[1])[3:])
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    made = int(out.split("\nprepared")[1].split()[0].replace(",", ""))
    assert 0 < made <= 1797 - 8 * (there - 1)
    assert arrays(tmp_path / "parts") == arrays(tmp_path / "whole")
    assert not [path for path in (tmp_path / "parts").rglob("*.tmp")]


@pytest.mark.slow
def test_a_full_disk_is_told_and_gone_on_with(
    prepared: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small file system of its own: refused where it cannot fit at all; one sentence where it fills up on the way,
    with every shard whole; and the same command goes on when there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mount.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mount.stderr.strip()}")
    try:
        words = ("data=digits", "data.image_size=16", "shard_images=100")
        (disk / "ballast").write_bytes(bytes(1_030_000))
        told = told_by(lambda: prepared(*words, "data.image_size=32", out=disk / "out"))
        assert "MB of images do not fit into the" in told
        small = command(tmp_path, *words, f"out={disk / 'out'}")  # its own JSONs take the room that it was promised
        _, err = small.communicate(timeout=120)
        assert small.returncode == 1 and len(err.splitlines()) == 1, err
        assert "the disk of out=" in err and "the same command again" in err, err
        there = len(arrays(disk / "out"))
        assert 0 < there < 15 and not list(disk.rglob("*.tmp"))
        (disk / "ballast").unlink()
        capsys.readouterr()
        prepared(*words, out=disk / "out")
        assert not list(disk.rglob("*.tmp")) and f"{there * 100:,} were there already" in capsys.readouterr().out
    finally:
        subprocess.run(["umount", str(disk)], check=True)
