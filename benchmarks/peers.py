"""The loops that ours is compared with: bare PyTorch + diffusers, and denoising-diffusion-pytorch.

Written as a practised user of those libraries writes them, with data held in memory and nothing logged, so
that they are no slower than they have to be. Imported by ``quality_vs_time.py`` and ``train_step.py``; not
part of the package.

denoising-diffusion-pytorch is not installed with the project. Put it in a folder of its own and name that
folder::

    pip install --target FOLDER --no-deps denoising-diffusion-pytorch==2.3.4 ema-pytorch==0.8.3 \\
        accelerate==1.15.0
    ORNSTEIN_PEERS=FOLDER python benchmarks/train_step.py
"""

import contextlib
import copy
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ornstein  # noqa: F401  (lets torchvision be imported beside any build of torch)

PEERS = "denoising-diffusion-pytorch==2.3.4 ema-pytorch==0.8.3 accelerate==1.15.0"


@dataclass(frozen=True)
class BareConfig:
    """What the bare diffusers loop trains: a network, an optimizer and a time budget."""

    image_size: int
    channels: int = 1
    num_classes: int = 10
    block_out_channels: tuple[int, ...] = (32, 64)
    layers_per_block: int = 2
    batch_size: int = 128
    lr: float = 2e-3
    warmup_steps: int = 0
    label_dropout: float = 0.1
    ema_decay: float = 0.999
    train_timesteps: int = 1000
    max_grad_norm: float = 1.0
    seconds: float = 110.0
    sample_steps: int = 50


DIGITS = BareConfig(image_size=8)  # 1.0 M parameters
FASHION_MNIST = BareConfig(  # 1.6 M parameters
    image_size=32, block_out_channels=(32, 64, 64), batch_size=64, seconds=600.0, sample_steps=25
)


@dataclass
class TrainReport:
    """Totals of training: ``seconds`` leaves set-up out, ``loss`` is the mean of the last 50 steps."""

    steps: int
    images: int
    seconds: float
    loss: float

    @property
    def images_per_second(self) -> float:
        """Training throughput."""
        return self.images / self.seconds


def bare_unet(config: BareConfig) -> Any:
    """The UNet2DModel of diffusers with class embedding (one row more than classes: the null class)."""
    from diffusers import UNet2DModel

    levels = len(config.block_out_channels)
    return UNet2DModel(
        sample_size=config.image_size,
        in_channels=config.channels,
        out_channels=config.channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        norm_num_groups=8,
        num_class_embeds=config.num_classes + 1,
    )


class BareDiffusersLoop:
    """A bare class-conditional loop: UNet2DModel, DDPMScheduler (cosine, v), AdamW, EMA, label dropout.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,) in [0, num_classes).
        config: one of :data:`DIGITS`, :data:`FASHION_MNIST`, or another.
        seed: of the weights, the order of the data, the noise and the label drops.
    """

    def __init__(self, images: Tensor, labels: Tensor, config: BareConfig, *, seed: int = 0) -> None:
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        torch.manual_seed(seed)
        self.config = config
        self.images = images.float() / 127.5 - 1.0
        self.labels = labels.long()
        self.unet: Any = bare_unet(config)
        self.scheduler: Any = DDPMScheduler(
            num_train_timesteps=config.train_timesteps,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
        )
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=config.lr, fused=True)
        # EMAModel's own warm-up, (1 + n) / (10 + n) up to the decay, keeps short runs from averaging in the
        # start.
        self.ema: Any = EMAModel(self.unet.parameters(), decay=config.ema_decay, foreach=True)
        self.batches = self._batches()
        self.steps = 0
        self.seconds = 0.0
        self.losses: list[float] = []

    @property
    def parameters(self) -> int:
        """Number of trained weights."""
        return sum(p.numel() for p in self.unet.parameters())

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for index in torch.randperm(len(self.images)).split(self.config.batch_size):
                if len(index) == self.config.batch_size:
                    yield self.images[index], self.labels[index]

    def _step(self) -> Tensor:
        config = self.config
        x0, label = next(self.batches)
        label = label.masked_fill(torch.rand(len(label)) < config.label_dropout, config.num_classes)
        eps = torch.randn_like(x0)
        t = torch.randint(0, config.train_timesteps, (len(x0),))
        x_t = self.scheduler.add_noise(x0, eps, t)
        target = self.scheduler.get_velocity(x0, eps, t)
        loss = F.mse_loss(self.unet(x_t, t, class_labels=label).sample, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (self.steps + 1) / max(1, config.warmup_steps))
        self.optimizer.step()
        self.ema.step(self.unet.parameters())
        return loss.detach()

    def train(self, seconds: float | None = None) -> TrainReport:
        """Train for ``seconds`` more (the config's if None), not counting set-up; call again to go on."""
        budget = self.config.seconds if seconds is None else seconds
        self.unet.train()
        begin = time.perf_counter()
        while time.perf_counter() - begin < budget:
            self.losses.append(float(self._step()))
            self.steps += 1
        self.seconds += time.perf_counter() - begin
        recent = self.losses[-50:]
        return TrainReport(
            steps=self.steps,
            images=self.steps * self.config.batch_size,
            seconds=self.seconds,
            loss=sum(recent) / len(recent),
        )

    @torch.inference_mode()
    def sample(
        self,
        n: int,
        labels: Tensor,
        *,
        steps: int | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        batch_size: int = 256,
    ) -> Tensor:
        """Images by DDIM from the EMA weights, uint8 (n, C, H, W).

        ``guidance`` 1 is off and costs no unconditional evaluation; ``labels`` is int64 (n,), ``steps`` the
        number of network evaluations a sample (the config's if None).
        """
        from diffusers import DDIMScheduler

        config = self.config
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(config.sample_steps if steps is None else steps)
        unet = copy.deepcopy(self.unet).eval()
        self.ema.copy_to(unet.parameters())
        shape = (n, config.channels, config.image_size, config.image_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        done = []
        for x, label in zip(noise.split(batch_size), labels.long().split(batch_size), strict=True):
            null = torch.full_like(label, config.num_classes)
            for t in scheduler.timesteps:
                out = unet(x, t, class_labels=label).sample
                if guidance != 1.0:
                    uncond = unet(x, t, class_labels=null).sample
                    out = uncond + guidance * (out - uncond)
                x = scheduler.step(out, t, x).prev_sample
            done.append(x)
        return ((torch.cat(done).clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


def bare_train_step(
    unet: Any, scheduler: Any, optimizer: torch.optim.Optimizer, *, ema: Any | None = None
) -> Callable[..., Tensor]:
    """One training step as in diffusers' unconditional image generation example, without its accelerator.

    ``unet`` is called as ``unet(x_t, t, **kwargs)`` and returns a tensor or diffusers' output;
    ``scheduler`` a DDPMScheduler with epsilon- or v-prediction; ``ema`` a diffusers EMAModel or None. The
    step that comes back takes images (B, C, H, W) in [-1, 1] and the network's keyword tensors, and returns
    the detached loss.
    """
    steps = scheduler.config.num_train_timesteps
    velocity = scheduler.config.prediction_type == "v_prediction"

    def step(images: Tensor, **kwargs: Tensor) -> Tensor:
        noise = torch.randn_like(images)
        t = torch.randint(0, steps, (images.shape[0],), device=images.device)
        noisy = scheduler.add_noise(images, noise, t)
        output = unet(noisy, t, **kwargs)
        target = scheduler.get_velocity(images, noise, t) if velocity else noise
        loss = F.mse_loss(output if isinstance(output, Tensor) else output.sample, target)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(unet.parameters())
        return loss.detach()

    return step


class DenoisingDiffusionPeer:
    """denoising-diffusion-pytorch's own Unet, GaussianDiffusion and Trainer, on the given images.

    Its Trainer reads a folder of image files with one worker a core, so the images are written out as PNG
    first. ``in_memory`` hands it ready batches instead, which leaves its loop's arithmetic alone to be
    timed.

    Args:
        images: uint8 (N, C, H, W), square.
        dim, dim_mults: of its Unet.
        batch_size: images a step (the Trainer refuses fewer than 16).
        in_memory: feed batches from memory rather than from files.

    Raises: ModuleNotFoundError, saying how to install it, if it is not at hand.
    """

    def __init__(
        self,
        images: Tensor,
        *,
        dim: int = 32,
        dim_mults: tuple[int, ...] = (1, 2),
        batch_size: int = 128,
        in_memory: bool = False,
        seed: int = 0,
    ) -> None:
        library = _denoising_diffusion_pytorch()
        torch.manual_seed(seed)
        self._folder = tempfile.TemporaryDirectory()
        root = Path(self._folder.name)
        _write_pngs(images, root / "images")
        self.unet = library.Unet(dim=dim, dim_mults=dim_mults, channels=images.shape[1])
        self.trainer = library.Trainer(
            library.GaussianDiffusion(self.unet, image_size=images.shape[-1]),
            str(root / "images"),
            train_batch_size=batch_size,
            augment_horizontal_flip=False,
            calculate_fid=False,
            save_and_sample_every=10**9,
            results_folder=str(root / "results"),
        )
        if in_memory:
            self.trainer.dl = _ready_batches(images.float() / 255.0, batch_size)

    @property
    def parameters(self) -> int:
        """Number of trained weights."""
        return sum(p.numel() for p in self.unet.parameters())

    def train(self, steps: int) -> TrainReport:
        """That many steps of ``Trainer.train``, timed; may be called again to go on."""
        trainer = self.trainer
        trainer.train_num_steps = trainer.step + steps
        begin = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        seconds = time.perf_counter() - begin
        return TrainReport(steps=steps, images=steps * trainer.batch_size, seconds=seconds, loss=float("nan"))


def _denoising_diffusion_pytorch() -> Any:
    folder = os.environ.get("ORNSTEIN_PEERS")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        import denoising_diffusion_pytorch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed: run `pip install --target FOLDER --no-deps {PEERS}` "
            "and set ORNSTEIN_PEERS=FOLDER."
        ) from error
    return denoising_diffusion_pytorch


def _write_pngs(images: Tensor, folder: Path) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        pixels = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:06d}.png")


def _ready_batches(images: Tensor, batch_size: int) -> Iterator[Tensor]:
    while True:
        for index in torch.randperm(len(images)).split(batch_size):
            if len(index) == batch_size:
                yield images[index]
