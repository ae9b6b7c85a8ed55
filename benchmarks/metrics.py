"""FID of two folders beside torch-fidelity's, and the memory that figures take whatever the number of samples.

::

    python benchmarks/metrics.py                          # 200 images a side of 64x64 on a CPU, about ten minutes
    python benchmarks/metrics.py --images 10000           # the whole of it, where there is a GPU
    python benchmarks/metrics.py --only memory            # peak memory from 1,000 to 50,000 samples

Both sides read the same PNG files, take features by the same Inception network (torch-fidelity's, of random weights in
the file that it downloads: the time does not depend on them), and build that network within the time, as a command
does. In every round each side takes its turn; figures are medians. ``benchmarks/README.md`` says what is held equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ornstein  # noqa: F401  (first: lets torchvision be imported beside any build of torch)

# isort: split
import torch
from common import environment, finite, markdown_table, median, show_table, use_threads, write
from rich.console import Console
from torch import Tensor

from ornstein.data.images import load_image
from ornstein.experiment.sample_files import NpzSamples, PngSamples
from ornstein.metrics import DigitsFeatures, GenerativeMetrics, InceptionFeatures, reference_statistics

MEMORY_COUNTS = (1_000, 10_000, 50_000)
BATCH = 50
DECODERS = 4  # threads that read PNG files beside the network, as torch-fidelity's workers do
TOLERANCE = 1e-3  # relative, between the two sides' FID
MEMORY_GROWTH = 64  # MB that 50,000 samples may take beyond 1,000, most of it the 10,000 kept features


class Folder:
    """PNG files as a data set of ours: decoded when they are asked for, a batch ahead of the network."""

    def __init__(self, path: Path, size: int) -> None:
        self.paths = sorted(path.glob("*.png"))
        self.image_size = size
        told = "".join(f"{each.name}{each.stat().st_size}{each.stat().st_mtime_ns}" for each in self.paths)
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W) of all files, in order."""
        with ThreadPoolExecutor(DECODERS) as pool:

            def begin(start: int) -> list[Any]:
                return [pool.submit(load_image, path, size=None) for path in self.paths[start : start + BATCH]]

            coming = begin(0)
            for start in range(BATCH, len(self.paths) + BATCH, BATCH):
                now, coming = coming, begin(start)
                yield torch.stack([torch.from_numpy(each.result()) for each in now])


def make_images(folder: Path, count: int, size: int, *, seed: int) -> None:
    """``images/`` and ``samples.npz`` of ``count`` smooth coloured pictures."""
    generator = torch.Generator().manual_seed(seed)
    files = (PngSamples(folder / "images", count), NpzSamples(folder / "samples.npz", count))
    for start in range(0, count, BATCH):
        index = torch.arange(start, min(start + BATCH, count))
        coarse = torch.rand(len(index), 3, 5, 5, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
        images = (smooth.clamp(0, 1) * 255).round().to(torch.uint8)
        files[0].add(images, None, index)
        files[1].add(images, None, index)
    for file in files:
        file.close()
        file.finish()


def make_weights(folder: Path) -> Path:
    """Inception of random weights, in the layout of the file that torch-fidelity downloads."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    extractor = module.FeatureExtractorInceptionV3
    load, module.load_state_dict_from_url = module.load_state_dict_from_url, lambda *_, **__: {}
    strict, extractor.load_state_dict = extractor.load_state_dict, lambda *_, **__: None
    try:
        torch.manual_seed(0)
        network = extractor("random", ["2048"])
    finally:
        module.load_state_dict_from_url, extractor.load_state_dict = load, strict
    path = folder / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    return path


class Sides:
    """The two sides' ways to the FID of ``fake`` against ``real``."""

    def __init__(self, root: Path, *, size: int, device: str) -> None:
        self.root, self.size, self.device = root, size, device
        self.weights = make_weights(root)

    def ours(self, cache: Path, *, npz: bool = False) -> float:
        """Reference statistics from ``cache`` or into it, samples through the metrics, and the distance."""
        metrics = GenerativeMetrics(
            InceptionFeatures(self.weights), kid=False, inception_score=False, label_accuracy=False, bootstrap=0
        ).to(self.device)
        real = Folder(self.root / "real" / "images", self.size)
        facts = {"data_fingerprint": real.fingerprint, "image_size": self.size, "split": "all"}
        metrics.set_reference(
            reference_statistics(metrics.features, real.batches(), folder=cache, batch_size=BATCH, **facts)
        )
        for images in self.stored() if npz else Folder(self.root / "fake" / "images", self.size).batches():
            metrics.update(images)
        return next(iter(metrics.compute(intervals=False).values()))

    def stored(self) -> Iterator[Tensor]:
        """The samples of ``samples.npz``."""
        import numpy as np

        with np.load(self.root / "fake" / "samples.npz", allow_pickle=False) as file:
            images = file["arr_0"]
        for start in range(0, len(images), BATCH):
            yield torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2)

    def theirs(self, cache: Path | None, *, npz: bool = False) -> float:
        """``torch_fidelity.calculate_metrics``, with the reference's statistics cached where a folder is named."""
        from torch_fidelity import calculate_metrics

        caching = {"cache": False}
        if cache is not None:
            caching = {"cache": True, "cache_root": str(cache), "input2_cache_name": "real"}
        found = calculate_metrics(
            input1=_Tensors(torch.cat(list(self.stored()))) if npz else str(self.root / "fake" / "images"),
            input2=str(self.root / "real" / "images"),
            fid=True,
            cuda=self.device == "cuda",
            batch_size=BATCH,
            feature_extractor_weights_path=str(self.weights),
            verbose=False,
            **caching,
        )
        return float(found["frechet_inception_distance"])


class _Tensors(torch.utils.data.Dataset[Tensor]):
    """Images as torch-fidelity takes them where they are no files: a data set of uint8 (3, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def compare(images: int, size: int, rounds: int, *, device: str, console: Console) -> dict[str, Any]:
    """Seconds of each side's FID, cold and with a cached reference, from PNG files and from an ``.npz``."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for seed, name in enumerate(("real", "fake")):
            make_images(root / name, images, size, seed=seed)
        sides = Sides(root, size=size, device=device)
        ours_cache, theirs_cache = root / "ours", root / "theirs"
        fresh = (root / f"fresh{number}" for number in range(1000))
        ways: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
            "PNG": (lambda: sides.ours(next(fresh)), lambda: sides.theirs(None)),
            "PNG, reference cached": (lambda: sides.ours(ours_cache), lambda: sides.theirs(theirs_cache)),
            "npz, reference cached": (
                lambda: sides.ours(ours_cache, npz=True),
                lambda: sides.theirs(theirs_cache, npz=True),
            ),
        }
        values = [sides.ours(ours_cache), sides.theirs(theirs_cache)]  # fills the caches, and warms both
        found: dict[str, Any] = {name: {"ours": [], "theirs": []} for name in ways}
        for number in range(rounds):
            console.print(f"round {number + 1} of {rounds} ...")
            for name, (ours, theirs) in ways.items():
                for side, work in (("ours", ours), ("theirs", theirs)):
                    began = time.perf_counter()
                    values.append(work())
                    found[name][side].append(time.perf_counter() - began)
    if max(values) / min(values) - 1 > TOLERANCE:
        raise SystemExit(f"the sides do not measure the same: {values}")
    return {
        "fid": values[0],
        "seconds": {name: {side: median(times) for side, times in each.items()} for name, each in found.items()},
    }


def memory_of(count: int) -> float:
    """Peak memory of this process, in MB, after figures of ``count`` samples in the digits' feature space."""
    metrics = GenerativeMetrics(DigitsFeatures(), bootstrap=20)
    generator = torch.Generator().manual_seed(0)
    metrics.set_reference(torch.randint(0, 256, (1438, 1, 8, 8), generator=generator, dtype=torch.uint8))
    for start in range(0, count, 500):
        images = torch.randint(0, 256, (500, 1, 8, 8), generator=generator, dtype=torch.uint8)
        metrics.update(images, torch.arange(500) % 10, index=torch.arange(start, start + 500))
    metrics.compute()
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure_memory(counts: Sequence[int], threads: int) -> dict[str, float]:
    """:func:`memory_of` in a process of its own for each count: a process's peak only rises."""
    found = {}
    for count in counts:
        command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", str(count)]
        found[str(count)] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


HEADER = ("", "ours", "torch-fidelity", "theirs / ours", "promised")


def rows_of(record: dict[str, Any]) -> list[list[str]]:
    """The table's rows; the last but memory is ours with a cached reference beside theirs without."""
    rows = []
    seconds = record.get("seconds", {})
    pairs = [(name, each["ours"], each["theirs"], 1.0 if name == "PNG" else None) for name, each in seconds.items()]
    if seconds:
        cached, cold = seconds["PNG, reference cached"]["ours"], seconds["PNG"]["theirs"]
        pairs.append(("PNG, ours cached beside theirs without a cache", cached, cold, 2.0))
    for name, ours, theirs, bar in pairs:
        promised = "-" if bar is None else f"{bar:.2f} {'met' if theirs / ours >= bar else 'NOT MET'}"
        rows.append([name, f"{ours:.2f} s", f"{theirs:.2f} s", f"{theirs / ours:.2f}", promised])
    memory = record.get("memory", {})
    first = next(iter(memory.values()), 0.0)
    for count, peak in memory.items():
        met = "met" if peak - first <= MEMORY_GROWTH else "NOT MET"
        kept = "-" if peak == first else f"at most {MEMORY_GROWTH} MB more {met}"
        rows.append([f"peak memory, {int(count):,} samples", f"{peak:.0f} MB", "-", "-", kept])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="FID of two folders beside torch-fidelity's, and peak memory.")
    parser.add_argument("--only", help="some of fid,memory (default: both)")
    parser.add_argument("--images", type=int, help="images a side (default: 10,000 on a GPU, 200 on a CPU)")
    parser.add_argument("--size", type=int, default=64, help="of the images (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all cores)")
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", metavar="FILE", help="write the table for RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="a few images, one round: only to see that it runs")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    only = args.only.split(",") if args.only else ["fid", "memory"]
    if unknown := [name for name in only if name not in ("fid", "memory")]:
        parser.error(f"--only: {', '.join(unknown)} is not among fid, memory")
    threads = use_threads(args.threads)
    if args.memory_of is not None:
        print(memory_of(args.memory_of))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = args.images or (10_000 if device == "cuda" else 200)
    rounds, counts = args.rounds, MEMORY_COUNTS
    if args.quick:
        images, rounds, counts = 8, 1, (500, 1_000)
    record: dict[str, Any] = {"images": images, "size": args.size, "rounds": rounds, "device": device}
    record["environment"] = environment(threads)
    if "fid" in only:
        record |= compare(images, args.size, rounds, device=device, console=Console(stderr=True))
    if "memory" in only:
        record["memory"] = measure_memory(counts, threads)
    show_table("metrics", HEADER, rows_of(record))
    if args.json:
        write(args.json, json.dumps(finite(record), indent=2) + "\n")
    if args.markdown:
        how = (
            f"FID of {images:,} images of {args.size}x{args.size} and as many, medians of {rounds} rounds in turn on "
            f"{device}, {threads} threads, torch {record['environment']['torch']}."
        )
        write(args.markdown, f"{how}\n\n{markdown_table(HEADER, rows_of(record))}")


if __name__ == "__main__":
    main()
