"""Train the small classifier behind a feature space: ``python -m ornstein.metrics.train_features --data NAME``.

Makes the files in ``ornstein/metrics/weights``: digits in under a minute, MNIST and Fashion-MNIST in a few minutes
on one core. The recipe is the plainest that reaches the accuracies asked for: AdamW, one cycle of the learning rate,
small random rotations, zooms and shifts, dropout on the features. Nothing is selected on the held-out images (last
epoch, one seed); they are only measured. The same seed on the same machine and thread count gives the same file.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ornstein.metrics.classifier import ClassifierNet, bundled_path, save_classifier
from ornstein.metrics.features import to_gray

if TYPE_CHECKING:
    from ornstein.data import ImageDataset


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one feature space is trained.

    ``rotate`` in degrees, ``zoom`` as a share, ``shift`` in pixels of the input: bounds of uniform draws.
    ``sizes`` are the image sizes whose enlarged forms are mixed in, so that a generator of larger digits is judged
    by a net that knows what enlarging does.
    """

    size: int
    widths: tuple[int, ...]
    epochs: int
    batch_size: int
    lr: float = 4e-3
    weight_decay: float = 0.02
    dropout: float = 0.2
    label_smoothing: float = 0.0
    rotate: float = 10.0
    zoom: float = 0.1
    shift: float = 1.0
    flip: bool = False
    sizes: tuple[int, ...] = ()


RECIPES = {
    "digits": Recipe(
        size=8, widths=(24, 56), epochs=100, batch_size=64, shift=0.7, label_smoothing=0.05, sizes=(16, 32)
    ),
    "mnist": Recipe(size=32, widths=(8, 16, 32), epochs=4, batch_size=128, shift=2.0),
    "fashion_mnist": Recipe(
        size=32, widths=(8, 16, 32), epochs=6, batch_size=128, rotate=4.0, zoom=0.05, shift=1.5, flip=True
    ),
}


def open_data(name: str, split: str, *, root: str | None = None, image_size: int | None = None) -> "ImageDataset":
    """The data set of a recipe, at its default size or at ``image_size``; raises ValueError where it is not found."""
    from ornstein.data import MNIST, Digits, FashionMNIST

    size: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    if name == "digits":
        return Digits(split=split, **size)
    return (MNIST if name == "mnist" else FashionMNIST)(split=split, root=root, **size)


def arrays(data: "ImageDataset", size: int) -> tuple[Tensor, Tensor]:
    """Gray images ``(N, 1, size, size)`` in [-1, 1] and labels ``(N,)`` of a whole data set."""
    images = torch.from_numpy(np.ascontiguousarray(data.images[np.arange(len(data))]))
    assert data.labels is not None
    return to_gray(images, size), torch.from_numpy(data.labels)


def augment(x: Tensor, recipe: Recipe, *, generator: torch.Generator) -> Tensor:
    """``x (B, 1, S, S)`` turned, zoomed, shifted (and mirrored, if the recipe flips) by small random amounts."""
    draw = torch.rand(4, x.shape[0], generator=generator) * 2 - 1
    angle = draw[0] * math.radians(recipe.rotate)
    zoom = 1 + draw[1] * recipe.zoom
    mirror = torch.ones(x.shape[0])
    if recipe.flip:
        mirror = torch.where(torch.rand(x.shape[0], generator=generator) < 0.5, -1.0, 1.0)
    shift = 2 * recipe.shift / recipe.size  # affine_grid's coordinates span [-1, 1]
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    theta = torch.stack(
        [
            torch.stack([cos * mirror, -sin, draw[2] * shift], dim=1),
            torch.stack([sin * mirror, cos, draw[3] * shift], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # zeros beyond the edge are black: -1 here


@torch.no_grad()
def predict(net: ClassifierNet, x: Tensor, *, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
    """Features and logits of all of ``x``, in eval mode."""
    net.eval()
    parts = [net(chunk) for chunk in x.split(batch_size)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def fit(
    x: Tensor, y: Tensor, recipe: Recipe, *, seed: int, num_classes: int = 10, verbose: bool = True
) -> ClassifierNet:
    """A classifier trained on ``x (N, 1, S, S)`` in [-1, 1] and ``y (N,)``, frozen, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # initial weights and dropout
        net = ClassifierNet(recipe.size, recipe.widths, num_classes=num_classes, dropout=recipe.dropout).train()
        steps = recipe.epochs * (len(x) // recipe.batch_size)
        optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=steps, pct_start=0.2)
        start = time.perf_counter()
        for epoch in range(recipe.epochs):
            order = torch.randperm(len(x), generator=generator)
            total = 0.0
            for rows in order.split(recipe.batch_size)[: len(x) // recipe.batch_size]:
                batch = augment(x[rows], recipe, generator=generator)
                loss = F.cross_entropy(net(batch)[1], y[rows], label_smoothing=recipe.label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(rows)
            if verbose and (epoch + 1) % max(1, recipe.epochs // 10) == 0:
                seconds = time.perf_counter() - start
                print(f"epoch {epoch + 1}/{recipe.epochs}: loss {total / len(x):.4f}, {seconds:.0f} s", flush=True)
    return net.eval().requires_grad_(False)


def standardise(net: ClassifierNet, x: Tensor) -> None:
    """Scale the features so that their total variance over ``x`` is their number."""
    features, _ = predict(net, x)
    net.rescale(math.sqrt(features.shape[1] / features.double().var(dim=0).sum().item()))


def train(name: str, *, seed: int = 0, root: str | None = None, out: str | Path | None = None) -> dict[str, Any]:
    """Train the feature space ``name``, measure it on the held-out images, write it; returns the file's header.

    Args:
        name: digits, mnist or fashion_mnist.
        seed: of initial weights, order, augmentation and dropout.
        root: folder of the IDX files, for the two that need them.
        out: file to write; None replaces the one in the package.

    Raises: ValueError if the data are not found.
    """
    recipe = RECIPES[name]
    training, held_out = (open_data(name, split, root=root) for split in ("train", "val"))
    native, y = arrays(training, recipe.size)
    x = native
    for size in recipe.sizes:
        enlarged, labels = arrays(open_data(name, "train", root=root, image_size=size), recipe.size)
        x, y = torch.cat([x, enlarged]), torch.cat([y, labels])
    start = time.perf_counter()
    net = fit(x, y, recipe, seed=seed)
    seconds = time.perf_counter() - start
    standardise(net, native)
    test_x, test_y = arrays(held_out, recipe.size)
    correct = int((predict(net, test_x)[1].argmax(1) == test_y).sum())
    metadata: dict[str, Any] = {
        "name": name,
        "size": recipe.size,
        "widths": recipe.widths,
        "num_classes": 10,
        "accuracy": correct / len(test_y),
        "correct": correct,
        "held_out": len(test_y),
        "seed": seed,
        "data_fingerprint": training.fingerprint,
    }
    path = bundled_path(name) if out is None else Path(out)
    save_classifier(net, path, metadata=metadata)
    print(
        f"{name}: {correct} of {len(test_y)} held-out images right ({100 * correct / len(test_y):.2f} %), "
        f"{seconds:.0f} s of training, {path.stat().st_size / 1024:.0f} KB in {path}"
    )
    return metadata


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of :func:`train`."""
    parser = argparse.ArgumentParser(prog="python -m ornstein.metrics.train_features", description=__doc__)
    parser.add_argument("--data", choices=sorted(RECIPES), default="digits", help="the data set and its feature space")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", help="folder of the IDX files (mnist, fashion_mnist)")
    parser.add_argument("--out", help="file to write; default: the package's own")
    arguments = parser.parse_args(argv)
    train(arguments.data, seed=arguments.seed, root=arguments.root, out=arguments.out)


if __name__ == "__main__":
    main()
