"""Train a classifier of noisy images: ``python -m ornstein.training.train_classifier --data digits --out FILE``.

What ``guidance=classifier`` follows. It sees x_t at unit scale and ln(sigma/alpha), so that one file serves every
noise schedule. Run as it stands it makes the file that the package carries (``guidance.weights=bundled``), in about a
minute on one core; its held-out accuracy by noise level stands in the file's header.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.data import MNIST, Digits, Emoji, FashionMNIST
from ornstein.data.base import ImageDataset
from ornstein.errors import OrnsteinError
from ornstein.networks.noisy_classifier import NoisyClassifier, bundled_path, save_classifier

DATA: dict[str, type[Any]] = {"digits": Digits, "mnist": MNIST, "fashion_mnist": FashionMNIST, "emoji": Emoji}
NOISIEST = 5.0  # |ln(sigma/alpha)| drawn in training, uniformly
REPORTED = (-3.0, -1.0, 0.0, 1.0)  # levels whose accuracy the header tells


def noisy(x0: Tensor, log_ratio: Tensor, eps: Tensor) -> Tensor:
    """x0 (B, C, H, W) with noise at ln(sigma/alpha) (B,), at alpha**2 + sigma**2 = 1."""
    alpha, sigma = (torch.sigmoid(sign * log_ratio).sqrt().reshape(-1, 1, 1, 1) for sign in (-2, 2))
    return alpha * x0 + sigma * eps


def arrays(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] and labels of a whole data set."""
    batch = dataset.batch(range(len(dataset)))
    return batch["image"].float() / 127.5 - 1.0, batch["label"]


def fit(network: nn.Module, x: Tensor, y: Tensor, *, steps: int, batch_size: int, lr: float) -> None:
    """Trains in place, by cross-entropy at all noise levels; the global seed decides batches and noise."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch_size,))
        log_ratio = (2 * torch.rand(batch_size) - 1) * NOISIEST
        logits = network(noisy(x[rows], log_ratio, torch.randn_like(x[rows])), 0.25 * log_ratio)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, y[rows]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor, log_ratio: float) -> float:
    """Share of images that are told right at one noise level, of noise that is the same every time."""
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    level = torch.full((len(x),), log_ratio)
    chunks = zip(noisy(x, level, eps).split(500), level.split(500), strict=True)
    logits = torch.cat([network(part, 0.25 * own) for part, own in chunks])
    return float((logits.argmax(1) == y).float().mean())


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, write; prints what the file's header holds."""
    parser = argparse.ArgumentParser(prog="python -m ornstein.training.train_classifier", description=__doc__)
    parser.add_argument("--data", choices=sorted(DATA), default="digits")
    parser.add_argument("--root", help="folder of the data, for all but digits")
    parser.add_argument("--image-size", type=int, default=None, help="side of the images; the data's own unless given")
    parser.add_argument("--out", type=Path, help="file to write; digits' default is the package's own")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--widths", type=int, nargs="+", default=[24, 48])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.out is None and options.data != "digits":
        parser.error(f"--out is needed for --data {options.data}")
    if options.steps < 1 or options.batch_size < 1:
        parser.error("--steps and --batch-size are at least 1")
    try:
        run(options)
    except OrnsteinError as error:
        raise SystemExit(str(error)) from error


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The work of :func:`main` on parsed options; returns the header."""
    where: dict[str, Any] = {"root": options.root} if options.root else {}
    where |= {"image_size": options.image_size} if options.image_size else {}
    training, held_out = (DATA[options.data](split=split, **where) for split in ("train", "val"))
    torch.manual_seed(options.seed)
    network = NoisyClassifier(training.channels, training.num_classes, widths=options.widths)
    x, y = arrays(training)
    fit(network, x, y, steps=options.steps, batch_size=options.batch_size, lr=options.lr)
    # Measured as it will be stored, rounded.
    network.half().float().eval()
    held_x, held_y = arrays(held_out)
    metadata = {
        "dataset": type(training).__name__,
        "data_fingerprint": training.fingerprint,
        "shape": list(x.shape[1:]),
        "num_classes": training.num_classes,
        "widths": options.widths,
        "accuracy": {f"{level:g}": round(accuracy(network, held_x, held_y, level), 4) for level in REPORTED},
        "steps": options.steps,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "seed": options.seed,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    out: Path = options.out or bundled_path()
    save_classifier(network, out, metadata=metadata)
    for name, value in metadata.items():
        print(f"{name}: {value}")
    print(f"wrote {out} ({out.stat().st_size / 1e3:.0f} kB)")
    return metadata


if __name__ == "__main__":
    main()
