"""Autoencoders in diffusers' format, by the name of a repository or from a local folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ornstein.codecs.codec import as_size, sides_of
from ornstein.codecs.posterior import DiagonalGaussian
from ornstein.codecs.scaled import ScaledCodec
from ornstein.errors import OrnsteinError

# diffusers' class -> the key of its config that has one entry a resolution.
CLASSES = {
    "AutoencoderKL": "block_out_channels",
    "AutoencoderTiny": "encoder_block_out_channels",
    "AutoencoderDC": "encoder_block_out_channels",
    "VQModel": "block_out_channels",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCALES = ("config", "measured")


@lru_cache(maxsize=8)
def pretrained_config(pretrained: str, subfolder: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """``config.json`` of a model in diffusers' format: of a folder, or fetched by the name of a repository.

    Raises: OrnsteinError if it is not at hand, or is of a class that is no codec here.
    """
    named = f"codec.pretrained={pretrained}" + (f" codec.subfolder={subfolder}" if subfolder else "")
    folder = Path(pretrained).expanduser()
    path = folder / (subfolder or "") / "config.json"
    if not path.is_file():
        if folder.is_dir():
            raise OrnsteinError(f"{named} holds no config.json: name the folder of the autoencoder itself.")
        try:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(pretrained, "config.json", subfolder=subfolder, revision=revision))
        except Exception as error:
            raise OrnsteinError(
                f"{named} is no folder here and could not be fetched ({type(error).__name__}): check the name, "
                "connect, or copy the autoencoder to this machine and name its folder."
            ) from error
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("_class_name") not in CLASSES:
        raise OrnsteinError(f"{named} is a {config.get('_class_name')}: codec=diffusers takes {', '.join(CLASSES)}.")
    return dict(config)


def pretrained_fact(pretrained: str, name: str, subfolder: str | None = None, revision: str | None = None) -> int:
    """``channels``, ``downsample`` or ``image_channels`` of an autoencoder, for a config to interpolate."""
    config = pretrained_config(pretrained, subfolder, revision)
    if name == "downsample":
        return int(2 ** (len(config[CLASSES[config["_class_name"]]]) - 1))
    if name == "image_channels":
        return int(config.get("in_channels", 3))
    return int(config.get("vq_embed_dim") or config["latent_channels"])


class DiffusersCodec(ScaledCodec):
    r"""A frozen ``AutoencoderKL``, ``AutoencoderTiny``, ``AutoencoderDC`` or ``VQModel`` of diffusers.

    Its weights stay where they are: a checkpoint of a run holds the latents' scale and shift, and the run's config the
    name. Whatever precision a run trains in, the codec computes in its own.

    Args:
        pretrained: a folder, or the name of a repository.
        image_channels, image_size: of the data; ``downsample`` must divide the size.
        channels, downsample, size: of the latents, where the config says them; checked.
        subfolder: of the folder or repository, such as vae.
        revision: of the repository.
        scale: ``config`` honours ``scaling_factor``, ``shift_factor``, ``latents_mean`` and ``latents_std``;
            ``measured`` leaves the scale to :meth:`measure`, which training calls before its first step.
        measured_images: training images that ``measured`` takes.
        sample_posterior: ``encode`` draws from the posterior (AutoencoderKL alone has one).
        dtype: float32, bfloat16 or float16, of its weights and computation.
        max_batch: images encoded or decoded at once.
        sigma_data: of the scaled latents.

    Raises: OrnsteinError, one sentence, for what is not at hand or does not fit.
    """

    def __init__(
        self,
        pretrained: str,
        image_channels: int,
        image_size: int | Sequence[int],
        *,
        channels: int | None = None,
        downsample: int | None = None,
        size: int | Sequence[int] | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        scale: str = "config",
        measured_images: int = 1024,
        sample_posterior: bool = False,
        dtype: str = "float32",
        max_batch: int = 32,
        sigma_data: float = 1.0,
    ) -> None:
        super().__init__()
        config = pretrained_config(pretrained, subfolder, revision)
        kind = config["_class_name"]
        if scale not in SCALES:
            raise OrnsteinError(f"codec.scale={scale} is unknown: choose {' or '.join(SCALES)}.")
        if dtype not in DTYPES:
            raise OrnsteinError(f"codec.dtype={dtype} is unknown: choose {', '.join(DTYPES)}.")
        if max_batch < 1 or measured_images < 2 or not sigma_data > 0:
            raise OrnsteinError(
                f"codec.max_batch={max_batch} must be at least 1, codec.measured_images={measured_images} at least 2 "
                f"and codec.sigma_data={sigma_data} positive."
            )
        if sample_posterior and kind != "AutoencoderKL":
            raise OrnsteinError(f"codec.sample_posterior=true and {kind} has no posterior to draw from: leave it out.")
        self.kind, self.image_channels, self.image_size = kind, int(image_channels), as_size(image_size)
        facts = {name: pretrained_fact(pretrained, name, subfolder, revision) for name in ("channels", "downsample")}
        facts["image_channels"] = pretrained_fact(pretrained, "image_channels", subfolder, revision)
        self._check(pretrained, facts, {"channels": channels, "downsample": downsample})
        self.channels, self.downsample = facts["channels"], facts["downsample"]
        height, width = sides_of(self.image_size)
        if height % self.downsample or width % self.downsample:
            raise OrnsteinError(
                f"{pretrained} shrinks images by {self.downsample}, which does not divide {height}x{width}; choose "
                f"data.image_size as a multiple of {self.downsample}."
            )
        self.size = as_size((height // self.downsample, width // self.downsample))
        if size is not None and as_size(size) != self.size:
            raise OrnsteinError(
                f"{pretrained} has latents of size {self.size}, but codec.size is {size}; leave codec.size out."
            )
        self.sigma_data, self.decode_range = float(sigma_data), (-1.0, 1.0)
        self.sample_posterior = self.stochastic = sample_posterior
        self.dtype, self.max_batch = DTYPES[dtype], max_batch
        self.measured_images = measured_images if scale == "measured" else 0
        shift_by, scale_by = (None, None) if scale == "measured" else config_scale(config, self.channels)
        self.register_buffer("scale", torch.ones(1, self.channels, 1, 1) if scale_by is None else scale_by)
        self.register_buffer("shift", torch.zeros(1, self.channels, 1, 1) if shift_by is None else shift_by)
        # Kept out of the module's registry: checkpoints name the weights, they do not copy them.
        self.__dict__["model"] = _load(kind, pretrained, subfolder, revision, self.dtype)

    def _check(self, pretrained: str, facts: dict[str, int], expected: dict[str, int | None]) -> None:
        for name, value in expected.items():
            if value is not None and value != facts[name]:
                raise OrnsteinError(
                    f"{pretrained} has {name}={facts[name]}, but codec.{name} is {value}; leave codec.{name} out."
                )
        if facts["image_channels"] != self.image_channels:
            raise OrnsteinError(
                f"{pretrained} takes images of {facts['image_channels']} channels, but data.channels is "
                f"{self.image_channels}; set data.channels={facts['image_channels']}."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffusersCodec:
        """Moves the frozen weights along with the module; their precision stays."""
        super()._apply(fn, recurse)
        self.__dict__["model"].to(device=fn(torch.empty(0, device=self.scale.device)).device)
        return self

    def encoding(self) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """Its class, its precision, and the frozen weights."""
        return {"kind": self.kind, "dtype": str(self.dtype)}, self.__dict__["model"].state_dict()

    def latents(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> unscaled latents (B, channels, \\*size), float32; a posterior's mean."""
        return self.posterior(x).mean if self.kind == "AutoencoderKL" else self._in_parts(x, self._plain)

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """q(h | x) of an AutoencoderKL, for images (B, C, H, W) in [-1, 1]; unscaled.

        Raises: OrnsteinError for any other class, which has none.
        """
        if self.kind != "AutoencoderKL":
            raise OrnsteinError(f"{self.kind} has no posterior: it encodes an image in one way.")
        parameters = self._in_parts(x, lambda part: self.__dict__["model"].encode(part).latent_dist.parameters)
        return DiagonalGaussian(*parameters.chunk(2, dim=1))

    def _plain(self, x: Tensor) -> Tensor:
        found = self.__dict__["model"].encode(x)
        latents: Tensor = found.latent if self.kind == "AutoencoderDC" else found.latents
        return latents

    def reconstruct(self, h: Tensor) -> Tensor:
        """Unscaled latents (B, channels, \\*size) -> images (B, C, H, W), float32."""
        self.check_latents(h, what="latents")
        return self._in_parts(h, lambda part: self.__dict__["model"].decode(part).sample)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> z (B, channels, \\*size); ``generator`` draws with ``sample_posterior``."""
        self.check_images(x, self.image_channels, self.image_size, what="images")
        h = self.posterior(x).sample(generator) if self.sample_posterior else self.latents(x)
        return (h - self.shift) * self.scale

    def _in_parts(self, x: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([work(part.to(self.dtype)).float() for part in x.split(self.max_batch)])


def config_scale(config: dict[str, Any], channels: int) -> tuple[Tensor, Tensor]:
    """Shift and scale (1, channels, 1, 1) that a config of diffusers means: z = (h - shift) * scale."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    factor = float(config.get("scaling_factor") or 1.0)
    if mean is not None and std is not None:
        shape = (1, channels, 1, 1)
        return torch.tensor(mean).float().reshape(shape), factor / torch.tensor(std).float().reshape(shape)
    shift = float(config.get("shift_factor") or 0.0)
    return torch.full((1, channels, 1, 1), shift), torch.full((1, channels, 1, 1), factor)


def _load(kind: str, pretrained: str, subfolder: str | None, revision: str | None, dtype: torch.dtype) -> nn.Module:
    import diffusers

    options = {name: value for name, value in (("subfolder", subfolder), ("revision", revision)) if value}
    try:
        model: nn.Module = getattr(diffusers, kind).from_pretrained(
            str(Path(pretrained).expanduser()), torch_dtype=dtype, low_cpu_mem_usage=False, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise OrnsteinError(
            f"the weights of codec.pretrained={pretrained} are missing or do not fit its config.json: fetch it again, "
            "or name another."
        ) from error
    return model.eval().requires_grad_(False)
