"""Fit the map from images to sentences: ``python -m ornstein.metrics.train_text_alignment``.

Ridge regression in closed form, on the training split of the emoji (each image at two sizes, so that samples of small
models are understood as well), from EfficientNet's features to MiniLM's embeddings of the names. The split is that of
``data=emoji``: by the content of base emoji, without skin tones, so that neither a variant of a held-out emoji nor an
image that equals one is trained on, and generator and map are kept from the same emoji. Those that show a held-out one
in another gender (a woman climbing, of a man climbing) are not trained on either. The penalty is chosen by
cross-validation among the training emoji; the held-out ones are only measured.

As measured for the shipped file, among the names of the 192 held-out emoji (chance: R@1 0.005, R@10 0.052):

=============  =====  =====
real images    R@1    R@10
=============  =====  =====
64 pixels      0.286  0.620
32 pixels      0.286  0.641
=============  =====  =====
"""

import argparse
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ornstein.metrics.efficientnet import EfficientNetFeatures
from ornstein.metrics.images import extract
from ornstein.metrics.text_alignment import AT, BUNDLED, AlignmentMap, embed, ranks, save_map

if TYPE_CHECKING:
    from ornstein.data import ImageDataset

PROMPT = "a picture of {}"  # what a name or caption becomes before it is embedded
SIZES = (64, 32)
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
FOLDS = 5
_GENDERS = frozenset(("man", "men", "woman", "women", "person", "people", "male", "female"))


def ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    r"""The ``W`` that minimises ``mean |x W - y|^2 + penalty * v |W|^2``, v the mean variance of ``x``'s columns.

    .. math:: W = (X^T X / n + \lambda v I)^{-1} X^T Y / n

    Args:
        x: ``(n, D)``, centred.
        y: ``(n, E)``, centred.
        penalty: lambda > 0.
    """
    wide, target = x.double(), y.double()
    gram = wide.T @ wide / len(wide)
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    return torch.linalg.solve(gram, wide.T @ target / len(wide))


def fit(x: Tensor, y: Tensor, penalty: float, **kept: Any) -> AlignmentMap:
    """The map of image features ``x (n, D)`` and sentence embeddings ``y (n, E)`` of length 1."""
    image_mean, text_mean = x.mean(0), y.mean(0)
    weight = ridge(x - image_mean, y - text_mean, penalty).float()
    return AlignmentMap(weight=weight, image_mean=image_mean, text_mean=text_mean, **kept)


def recall(found: AlignmentMap, x: Tensor, y: Tensor) -> dict[str, float]:
    """``r1`` and ``r10`` of images ``x (n, D)`` among their own captions ``y (n, E)``."""
    rank = ranks(found.images(x), found.texts(y), torch.arange(len(x)))
    return {f"r{k}": float((rank < k).double().mean()) for k in AT}


def choose_penalty(x: Tensor, y: Tensor, *, seed: int) -> float:
    """The penalty with the best R@10 over folds that keep the sizes of an emoji together.

    Args:
        x: ``(S, n, D)``, the features of n emoji at S sizes.
        y: ``(n, E)``.
    """
    fold = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed)) % FOLDS
    empty: dict[str, Any] = {"gallery": y[:0], "captions": (), "facts": {}}
    hits = dict.fromkeys(PENALTIES, 0.0)
    for number in range(FOLDS):
        inside, outside = fold == number, fold != number
        for penalty in PENALTIES:
            found = fit(x[:, outside].flatten(0, 1), y[outside].repeat(len(x), 1), penalty, **empty)
            hits[penalty] += sum(recall(found, size, y[inside])["r10"] for size in x[:, inside])
    return max(hits, key=hits.__getitem__)


def open_emoji(split: str, size: int, *, root: str | None) -> "ImageDataset":
    """The emoji of a split; raises OrnsteinError where they are not found and cannot be fetched."""
    from ornstein.data import Emoji

    return Emoji(split=split, image_size=size, root=root)


def stem(name: str) -> str:
    """A name without the gender of whom it shows: what near-duplicates among the emoji share."""
    return " ".join(word for word in name.split() if word not in _GENDERS)


def apart(names: Sequence[str], held_out: Sequence[str]) -> list[int]:
    """Which of ``names`` are no near-duplicates of any of ``held_out``."""
    taken = {stem(name) for name in held_out}
    return [row for row, name in enumerate(names) if stem(name) not in taken]


def train(*, root: str | None = None, seed: int = 0, out: str | Path | None = None) -> AlignmentMap:
    """Fit the map, measure it on the held-out emoji, write it.

    Args:
        root: the unpacked npm package of the emoji; None looks where ``data=emoji`` looks.
        seed: of the folds of the cross-validation; nothing else is random.
        out: file to write; None replaces the one in the package.

    Raises: OrnsteinError if the emoji, EfficientNet or MiniLM are not to be had.
    """
    start = time.perf_counter()
    net = EfficientNetFeatures()
    training, held_out = ([open_emoji(split, size, root=root) for size in SIZES] for split in ("train", "val"))
    names, gallery = (list(sets[0].captions or ()) for sets in (training, held_out))
    rows = apart(names, gallery)
    names, training = [names[row] for row in rows], [data.subset(rows) for data in training]
    x = torch.stack([extract(net, data)[0] for data in training])
    y, texts = embed(names, PROMPT), embed(gallery, PROMPT)
    penalty = choose_penalty(x, y, seed=seed)
    facts: dict[str, Any] = {
        "prompt": PROMPT,
        "image_size": net.image_size,
        "features": net.fingerprint,
        "encoder": "minilm",
        "penalty": penalty,
        "seed": seed,
        "trained_on": len(names),
        "split": hashlib.sha256("\0".join([*names, "", *gallery]).encode()).hexdigest(),
        "chance": {f"r{k}": k / len(gallery) for k in AT},
    }
    found = fit(x.flatten(0, 1), y.repeat(len(SIZES), 1), penalty, gallery=texts, captions=tuple(gallery), facts=facts)
    facts["real"] = {
        str(size): recall(found, extract(net, data)[0], texts) for size, data in zip(SIZES, held_out, strict=True)
    }
    path = BUNDLED if out is None else Path(out)
    save_map(found, path)
    print(
        f"{len(names)} emoji, penalty {penalty}, {time.perf_counter() - start:.0f} s; {len(gallery)} held-out ones: "
        + "; ".join(f"{size} px R@1 {at['r1']:.3f}, R@10 {at['r10']:.3f}" for size, at in facts["real"].items())
        + f"; chance {facts['chance']['r1']:.4f}, {facts['chance']['r10']:.4f}. {path.stat().st_size / 2**20:.2f} MB "
        f"in {path}"
    )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of :func:`train`."""
    parser = argparse.ArgumentParser(prog="python -m ornstein.metrics.train_text_alignment", description=__doc__)
    parser.add_argument("--root", help="the unpacked npm package of the emoji; default: where data=emoji looks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="file to write; default: the package's own")
    arguments = parser.parse_args(argv)
    train(root=arguments.root, seed=arguments.seed, out=arguments.out)


if __name__ == "__main__":
    main()
