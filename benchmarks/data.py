"""Images a second that a loader hands to training: ours after `prepare`, torchvision, datasets and webdataset in turn.

::

    python benchmarks/data.py --markdown table.md
    python benchmarks/data.py --images 20000 --size 128 --workers 0,4,8

All read the same files, made here of two photographs that scikit-learn carries: 4,000 JPEGs of about 128 pixels in ten
classes. All give shuffled batches of uint8 images and labels, (B, 3, 64, 64) unless told otherwise: decoded, resized
and cropped by the peers as they go, by ours once beforehand (`python -m ornstein.cli.prepare`, whose time stands in
the note). No side normalises or mirrors, which ours leaves to the device. Each side runs a stretch of a second or two,
one after the other in rounds, after batches that are not counted (workers start, and have batches waiting); the figure
is the median over rounds. ``benchmarks/README.md`` says what is held equal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ornstein  # noqa: F401  (first: lets torchvision be imported beside any build of torch)

# isort: split
import numpy as np
import torch
from common import environment, finite, markdown_table, median, show_table, write
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from rich.console import Console

from ornstein.cli.launch import conf_dir, register_resolvers

Side = Callable[[int], Iterator[int]]
CLASSES = 10
SHARD = 500  # files in a tar
PROMISED = 3.0
OURS = "ours, prepared"
UNPREPARED = "ours, decoding"


def make_files(root: Path, count: int) -> None:
    """JPEGs of 100 to 160 pixels a side in ten folders: crops of two photographs."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % 2]
        width, height = (int(side) for side in rng.integers(100, 161, 2))
        left, top = rng.integers(0, photograph.width - 2 * width), rng.integers(0, photograph.height - 2 * height)
        place = root / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        crop = photograph.crop((left, top, left + 2 * width, top + 2 * height))
        crop.resize((width, height)).save(place, quality=90)


def prepare(root: Path, out: Path, size: int) -> float:
    """Runs the command; seconds it took, its start included."""
    command = [sys.executable, "-m", "ornstein.cli.prepare", "data=image_folder", f"data.root={root}"]
    options = [f"data.image_size={size}", "data.num_classes=auto", "data.val_fraction=0.001", f"out={out}"]
    began = time.perf_counter()
    subprocess.run([*command, *options], check=True, capture_output=True, cwd=out.parent)
    return time.perf_counter() - began


def ours(words: Sequence[str], batch: int) -> Side:
    """Our training batches, by the data module that `train.py` builds."""

    def side(workers: int) -> Iterator[int]:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            overrides = [*words, f"data.batch_size={batch}", f"data.num_workers={workers}", "data.sigma_data=null"]
            module = instantiate(compose("train", overrides=overrides).data)
        module.setup()
        for each in module.train_dataloader():
            yield len(each["image"])

    return side


def torchvision_side(root: Path, size: int, batch: int) -> Side:
    """ImageFolder and a DataLoader, as torchvision's own documentation has them."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    dataset = ImageFolder(str(root), transform=Compose([Resize(size), CenterCrop(size), PILToTensor()]))
    return lambda workers: _endless(dataset, batch, workers)


def datasets_side(root: Path, size: int, batch: int, cache: Path) -> Side:
    """`datasets` with an image column and a transform, and a DataLoader."""
    import datasets

    datasets.disable_progress_bars()
    table = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(cache))

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"image": [_tensor(image.convert("RGB"), size) for image in rows["image"]], "label": rows["label"]}

    table = table.with_transform(transform)
    return lambda workers: _endless(table, batch, workers)


def webdataset_side(root: Path, size: int, batch: int, folder: Path) -> Side:
    """Tar shards of the same files, shuffled through a buffer of 1,000, and webdataset's own loader."""
    import webdataset

    paths = sorted(root.rglob("*.jpg"), key=lambda path: path.name)
    folder.mkdir()
    for start in range(0, len(paths), SHARD):
        with tarfile.open(folder / f"{start // SHARD:05d}.tar", "w") as tar:
            for path in paths[start : start + SHARD]:
                tar.add(path, arcname=path.name)
                label = folder / "label"
                label.write_text(path.parent.name.removeprefix("class"))
                tar.add(label, arcname=f"{path.stem}.cls")
    shards = sorted(map(str, folder.glob("*.tar")))

    def side(workers: int) -> Iterator[int]:
        dataset = (
            webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False)
            .shuffle(1000)
            .decode("pil")
            .to_tuple("jpg", "cls")
            .map_tuple(lambda image: _tensor(image, size), lambda label: label)
            .batched(batch, partial=False)
            .repeat()
        )
        for images, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
            yield len(images)

    return side


def _tensor(image: Image.Image, size: int) -> torch.Tensor:
    """The same square as torchvision's transforms make, without their dispatch."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1)


def _endless(dataset: Any, batch: int, workers: int) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    while True:
        for each in loader:
            yield len(each["image"] if isinstance(each, dict) else each[0])


def time_in_turn(sides: dict[str, Side], *, workers: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Images a second of each side in each round, one side after the other."""
    running = {name: side(workers) for name, side in sides.items()}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, batches in running.items():
            for _ in range(2 * workers + 2):  # those that wait since this side's last turn
                next(batches)
            images, count, began = 0, 0, time.perf_counter()
            while (spent := time.perf_counter() - began) < seconds:
                images, count = images + next(batches), count + 1
            if turn:  # the first fills caches
                rates[name].append(images / spent)
            # Workers read on until their queues are full: not in the next side's time.
            time.sleep(2 * workers * spent / count)
    return rates


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, shows and writes the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000, help="files (default: 4000)")
    parser.add_argument("--size", type=int, default=64, help="side of a loaded image (default: 64)")
    parser.add_argument("--batch", type=int, default=128, help="images a batch (default: 128)")
    parser.add_argument("--workers", default="0,2", help="numbers of worker processes, by commas (default: 0,2)")
    parser.add_argument("--rounds", type=int, default=5, help="timed stretches of each side (default: 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each stretch (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", metavar="FILE", help="write the table for RESULTS.md")
    parser.add_argument("--check", action="store_true", help=f"fail where ours is not {PROMISED:g} times a peer")
    parser.add_argument("--quick", action="store_true", help="one short round on few files: only to see that it runs")
    args = parser.parse_args(arguments)
    if args.quick:
        args.images, args.rounds, args.seconds, args.batch = 200, 1, 0.1, 16
    counts = [int(word) for word in args.workers.split(",")]

    torch.set_num_threads(args.threads)
    register_resolvers()
    console = Console()
    load = os.getloadavg()[0]
    found: dict[int, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root, out = Path(scratch) / "files", Path(scratch) / "prepared"
        make_files(root, args.images)
        spent = prepare(root, out, args.size)
        folder = ["data=image_folder", f"data.root={root}", f"data.image_size={args.size}", "data.num_classes=auto"]
        sides = {
            OURS: ours(["data=prepared", f"data.root={out}"], args.batch),
            UNPREPARED: ours([*folder[:3], "data.num_classes=10", "data.storage=unchecked"], args.batch),
        }
        makers: dict[str, Callable[[], Side]] = {
            "torchvision": lambda: torchvision_side(root, args.size, args.batch),
            "datasets": lambda: datasets_side(root, args.size, args.batch, Path(scratch) / "hub"),
            "webdataset": lambda: webdataset_side(root, args.size, args.batch, Path(scratch) / "tars"),
        }
        for name, make in makers.items():
            if importlib.util.find_spec(name) is None:
                console.print(f"{name} is not installed and left out: pip install {name}")
                continue
            sides[name] = make()
        for workers in counts:
            console.print(f"{workers} workers ...")
            found[workers] = time_in_turn(sides, workers=workers, rounds=args.rounds, seconds=args.seconds)

    setting = environment(args.threads)
    header = ["images/s", *(f"{workers} workers" for workers in counts)]
    header += [f"ours / it, {workers} workers" for workers in counts] + ["promised"]
    rows, met = [], True
    for name in sides:
        rates = [median(found[workers][name]) for workers in counts]
        ratios = [median(found[workers][OURS]) / rate for workers, rate in zip(counts, rates, strict=True)]
        peer = name in makers
        kept = min(ratios) >= PROMISED
        met &= kept or not peer
        cells = [f"{rate:,.0f}" for rate in rates] + [f"{ratio:.1f}" if name != OURS else "-" for ratio in ratios]
        rows.append([name, *cells, f"{PROMISED:.1f} {'met' if kept else 'NOT MET'}" if peer else "-"])
    note = (
        f"{args.images:,} JPEGs of about 128 px to 3x{args.size}x{args.size}, batches of {args.batch}, medians of "
        f"{args.rounds} stretches of {args.seconds:g} s in turn, {setting['cores']} cores (load before: {load:.1f}), "
        f"torch {setting['torch']}; preparing them took {spent:.1f} s, once."
    )
    console.print(note)
    show_table("what a loader hands to training", header, rows)
    if args.json:
        figures = {"prepare_s": spent, "load": load, "images_per_s": {str(key): each for key, each in found.items()}}
        write(args.json, json.dumps(finite({"environment": setting, **figures}), indent=2))
    if args.markdown:
        write(args.markdown, f"{note}\n\n{markdown_table(header, rows)}")
    return 0 if met or not args.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
