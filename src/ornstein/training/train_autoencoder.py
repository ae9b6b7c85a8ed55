"""Train a KL autoencoder: ``python -m ornstein.training.train_autoencoder --data digits --out FILE``.

The first stage of latent diffusion: L1 reconstruction plus a small pull of the posterior towards N(0, I),
AdamW with a linear warm-up and decay, seeded. Weights are rounded to float16 as they are stored; the
latents' scale and the held-out PSNR are measured after that, so that both are true of the file. Run as it
stands it makes the file that the package carries (``codec=kl``), which the tests hold to the figures in its
own header.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ornstein.codecs import KLAutoencoder, bundled_path, save_kl
from ornstein.data import MNIST, Digits, FashionMNIST
from ornstein.data.base import ImageDataset
from ornstein.errors import OrnsteinError

DATA: dict[str, type[Any]] = {"digits": Digits, "mnist": MNIST, "fashion_mnist": FashionMNIST}
CHUNK = 256


def to_model(images: Tensor) -> Tensor:
    """Images, uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_pixels(x: Tensor) -> Tensor:
    """Float, about [-1, 1] -> uint8."""
    return ((x.clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


def images_of(data: ImageDataset) -> Tensor:
    """All images of a data set, uint8 (N, C, H, W)."""
    return data.batch(torch.arange(len(data)))["image"]


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of 8-bit images, (N,) in dB: ``10 log10(255**2 / max(MSE, 1e-3))``."""
    mse = (images.double() - others.double()).square().mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(255.0**2 / mse.clamp(min=1e-3))


@torch.inference_mode()
def posterior_means(model: KLAutoencoder, images: Tensor) -> Tensor:
    """Unscaled latents of uint8 images, (N, channels, *size)."""
    return torch.cat([model.posterior(to_model(chunk)).mean for chunk in images.split(CHUNK)])


@torch.inference_mode()
def reconstructions(model: KLAutoencoder, images: Tensor) -> Tensor:
    """What encode and decode make of uint8 images, uint8 (N, C, H, W)."""
    return torch.cat([to_pixels(model.decode(model.encode(to_model(chunk)))) for chunk in images.split(CHUNK)])


def train(model: KLAutoencoder, images: Tensor, *, steps: int, batch_size: int, lr: float, kl_weight: float) -> None:
    """Fit ``model`` to uint8 images in place; the global seed decides the batches and the draws."""
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    pixels = images[0].numel()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("autoencoder", total=steps)
        for step in range(steps):
            x = to_model(images[torch.randint(len(images), (batch_size,))])
            posterior = model.posterior(x)
            l1 = (model.reconstruct(posterior.sample()) - x).abs().mean()
            kl = posterior.kl().mean()
            optimizer.zero_grad(set_to_none=True)
            (l1 + kl_weight * kl / pixels).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / 50, 1.0 - step / steps)
            optimizer.step()
            if step % 50 == 0:
                progress.update(task, description=f"L1 {l1.item():.4f}  KL {kl.item():.0f} nats")
            progress.advance(task)


@torch.inference_mode()
def warn_of_collapse(model: KLAutoencoder, images: Tensor) -> None:
    """Say on stderr which latent channels hold more of the posterior's noise than of the images."""
    posterior = model.posterior(to_model(images[:CHUNK]))
    noisy = posterior.mean.std(dim=(0, 2, 3)) < posterior.std.mean(dim=(0, 2, 3))
    if noisy.any():
        print(
            f"warning: latent channels {noisy.nonzero().flatten().tolist()} hold more noise than signal; "
            "lower --kl-weight or --channels, or train longer",
            file=sys.stderr,
        )


def write_grid(images: Tensor, others: Tensor, path: Path, *, zoom: int = 3) -> None:
    """Write a PNG with rows of originals, each above its row of reconstructions."""
    from PIL import Image

    columns = 16
    rows = [
        torch.cat(list(row[:columns]), dim=2)
        for start in range(0, len(images) - columns + 1, columns)
        for row in (images[start : start + columns], others[start : start + columns])
    ]
    sheet = torch.cat(rows, dim=1).repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    pixels = sheet[0] if sheet.shape[0] == 1 else sheet.permute(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.contiguous().numpy()).save(path)


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, write; prints what the file's header holds."""
    parser = argparse.ArgumentParser(description="Train a KL autoencoder for latent diffusion.")
    parser.add_argument("--data", choices=sorted(DATA), default="digits")
    parser.add_argument("--root", help="folder of the data, for mnist and fashion_mnist")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="file to write; digits' default is the package's own")
    parser.add_argument("--grid", type=Path, help="also write held-out originals and reconstructions as a PNG")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=2e-3, help="against the mean L1, KL per pixel")
    parser.add_argument("--channels", type=int, default=4, help="latent channels")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.out is None and options.data != "digits":
        parser.error(f"--out is needed for --data {options.data}")
    if options.data == "digits" and options.root:
        parser.error("--root is for mnist and fashion_mnist; the digits come with scikit-learn")
    if options.steps < 1 or options.batch_size < 1:
        parser.error("--steps and --batch-size are at least 1")
    try:
        run(options)
    except OrnsteinError as error:
        raise SystemExit(str(error)) from error


def run(options: argparse.Namespace) -> None:
    """The work of :func:`main` on parsed options."""
    out: Path = options.out or bundled_path()
    where: dict[str, Any] = {"root": options.root} if options.root else {}
    data = {
        split: DATA[options.data](split=split, image_size=options.image_size, **where) for split in ("train", "val")
    }
    images, held_out = images_of(data["train"]), images_of(data["val"])
    torch.manual_seed(options.seed)
    model = KLAutoencoder(
        data["train"].channels,
        options.image_size,
        channels=options.channels,
        width=options.width,
        multipliers=options.multipliers,
    )
    train(
        model,
        images,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        kl_weight=options.kl_weight,
    )
    model.requires_grad_(False).eval().half().float()
    model.set_scale(posterior_means(model, images))
    warn_of_collapse(model, held_out)
    copies = reconstructions(model, held_out)
    metadata = {
        "data": options.data,
        "data_fingerprint": data["train"].fingerprint,
        "held_out_psnr": round(psnr(held_out, copies).mean().item(), 2),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "kl_weight": options.kl_weight,
        "seed": options.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    save_kl(model, out, metadata=metadata)
    for key, value in metadata.items():
        print(f"{key}: {value}")
    print(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB)")
    if options.grid is not None:
        write_grid(held_out[:64], copies[:64], options.grid)
        print(f"wrote {options.grid}")


if __name__ == "__main__":
    main()
