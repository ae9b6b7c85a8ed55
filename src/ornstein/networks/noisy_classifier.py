"""A small classifier of noisy images, whose gradient ``guidance=classifier`` follows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.errors import OrnsteinError
from ornstein.networks.blocks import Downsample, ResNetBlock
from ornstein.networks.embeddings import sinusoidal_embedding

FORMAT = "ornstein.noisy_classifier.1"
_COND_LIMIT = 1.5  # of ln(sigma/alpha)/4: beyond it there is nothing left to tell apart
_POOLED = 4


class NoisyClassifier(nn.Module):
    """Residual blocks with noise conditioning, halved between, pooled to 4 x 4 and read out by one linear layer.

    Its input has unit scale, x_t / sqrt(alpha**2 + sigma**2), and its noise condition is ln(sigma/alpha)/4, so that one
    classifier serves every schedule.
    Source: Dhariwal & Nichol 2021 (arXiv 2105.05233), section 4, at a thousandth of the size.
    When: guidance=classifier on small images, or as a pattern for a classifier of your own.

    Args:
        in_channels: of the images (or latents).
        num_classes: width of the logits, at least 2.
        widths: channels of each level; the image is halved between them.

    Attributes:
        log_ratio_range: ln(sigma/alpha) between which its gradient can be trusted; ``guidance=classifier`` leaves it
            out elsewhere.

    Raises:
        OrnsteinError: fewer than two classes, or no level.
    """

    # A little less than what the trainer draws: at its very edge the slope is already three times too long.
    log_ratio_range: tuple[float, float] = (-5.0, 4.0)

    def __init__(self, in_channels: int, num_classes: int, *, widths: Sequence[int] = (24, 48)) -> None:
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 2 or not widths:
            raise OrnsteinError(
                f"a classifier needs two classes and one level, got {num_classes} and {list(widths)}: set "
                "guidance.network.num_classes and guidance.network.widths."
            )
        self.features = 32
        embedding = 2 * self.features
        self.mlp = nn.Sequential(nn.Linear(self.features, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResNetBlock(w, w, embedding_channels=embedding, groups=8) for w in widths)
        self.downs = nn.ModuleList(
            Downsample(w, after) for w, after in zip(widths, [*widths[1:], None], strict=True) if after is not None
        )
        self.norm = nn.GroupNorm(8, widths[-1])
        self.head = nn.Linear(widths[-1] * _POOLED**2, num_classes)

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        """Logits (B, num_classes) of x (B, C, H, W) under noise_cond (B,)."""
        cond = noise_cond.clamp(-_COND_LIMIT, _COND_LIMIT)
        embedding = F.silu(self.mlp(sinusoidal_embedding(10.0 * cond, self.features).to(x.dtype)))
        h = self.stem(x)
        for level, block in enumerate(self.blocks):
            h = block(h, embedding)
            if level < len(self.downs):
                h = self.downs[level](h)
        return self.head(F.adaptive_avg_pool2d(F.silu(self.norm(h)), _POOLED).flatten(1))


def bundled_path() -> Path:
    """The classifier of 8x8 digits that the package carries."""
    return Path(__file__).parent / "assets" / "noisy_classifier_digits.safetensors"


def save_classifier(network: nn.Module, path: str | Path, *, metadata: Mapping[str, Any]) -> None:
    """Writes the weights (float16) with a header of JSON values, atomically.

    ``metadata`` holds ``dataset`` (name of its class), ``shape`` of what is classified and ``num_classes``; the trainer
    adds what it measured.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().half().contiguous() for name, value in network.state_dict().items()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file(state, partial, metadata={FORMAT: json.dumps(dict(metadata), sort_keys=True)})
    os.replace(partial, path)


def read_metadata(weights: str | Path) -> dict[str, Any]:
    """The header of a file of :func:`save_classifier`; empty for other safetensors files. ``bundled`` is the package's.

    Raises:
        OrnsteinError: there is no such file, or it is damaged.
    """
    path = _path(weights)
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(FORMAT)
    except (SafetensorError, OSError) as error:
        raise OrnsteinError(
            f"guidance.weights={weights} is no safetensors file: train one with "
            "python -m ornstein.training.train_classifier --out FILE."
        ) from error
    return {} if header is None else dict(json.loads(header))


def load_classifier(network: nn.Module, weights: str | Path) -> nn.Module:
    """Puts a file's weights into ``network``, and makes it ready to guide: eval mode, frozen.

    Raises:
        OrnsteinError: there is no such file, it is damaged, or it is of another network.
    """
    read_metadata(weights)
    with safe_open(_path(weights), framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kept = {name: value.dtype for name, value in network.state_dict().items()}
    try:
        network.load_state_dict({name: value.to(kept.get(name, torch.float32)) for name, value in state.items()})
    except RuntimeError as error:
        raise OrnsteinError(
            f"guidance.weights={weights} is of another network than guidance.network describes: change one of the two."
        ) from error
    return network.eval().requires_grad_(False)


def _path(weights: str | Path) -> Path:
    path = bundled_path() if str(weights) == "bundled" else Path(weights).expanduser()
    if not path.is_file():
        raise OrnsteinError(
            f"guidance.weights={weights}: there is no such file; train one with "
            "python -m ornstein.training.train_classifier --out FILE."
        )
    return path
