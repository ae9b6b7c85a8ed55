"""Adapter that makes diffusers' UNet2DModel a network of ours; diffusers is imported when one is made."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ornstein.errors import OrnsteinError
from ornstein.networks.checks import check_divisible, image_size_pair, join_concat
from ornstein.networks.embeddings import check_labels


def diffusers_config(
    name: str, config: Mapping[str, Any], *, noise_embedding: str, own: Collection[str]
) -> dict[str, Any]:
    """Return the arguments that an adapter hands on to diffusers, lists as tuples.

    Args:
        name: of the adapter, for its sentences.
        config: what was given.
        noise_embedding: `sinusoidal` only: diffusers' Fourier form divides its output by the condition.
        own: arguments that the adapter sets itself.

    Raises:
        OrnsteinError: another `noise_embedding`, or one of `own`.
    """
    if noise_embedding != "sinusoidal":
        raise OrnsteinError(
            f"{name} takes noise_embedding 'sinusoidal' only, got '{noise_embedding}': "
            "use ornstein.networks.UNet for conditions of order one, such as EDM's."
        )
    taken = set(own) & config.keys()
    if taken:
        raise OrnsteinError(
            f"{name} sets {', '.join(sorted(taken))} itself: use its own arguments, such as image_size, num_classes "
            "and noise_embedding."
        )
    # A config file gives lists; diffusers wants tuples where it compares them.
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


@contextmanager
def their_arguments(name: str) -> Iterator[None]:
    """Turn what diffusers' class `name` says against its arguments into an OrnsteinError that says whose they are."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise OrnsteinError(
            f"diffusers' {name} refuses its arguments, which are keys of model.network: {error}"
        ) from error


class DiffusersUNet2D(nn.Module):
    """diffusers' `UNet2DModel` behind our signature; its state dict is diffusers' under `model.`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        image_size: int | Sequence[int] | None = None,
        num_classes: int | None = None,
        concat_channels: int = 0,
        noise_embedding: str = "sinusoidal",
        **config: Any,
    ) -> None:
        """Make the network.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output; None: as many as the input.
            image_size: side or `(height, width)`, checked at once and passed on as `sample_size`.
            num_classes: classes, or None for an unconditional network; the null class is one row more.
            concat_channels: channels of a conditioning image joined to the input.
            noise_embedding: `sinusoidal` only: diffusers' Fourier form divides its output by the condition.
            config: all other arguments of `UNet2DModel`, such as `block_out_channels`.

        Raises:
            OrnsteinError: another `noise_embedding`, an argument that this adapter sets itself, or an
                `image_size` that does not divide.
        """
        super().__init__()
        own = ("sample_size", "num_class_embeds", "class_embed_type", "time_embedding_type")
        config = diffusers_config("DiffusersUNet2D", config, noise_embedding=noise_embedding, own=own)
        from diffusers import UNet2DModel

        size = image_size_pair(image_size)
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.num_classes = num_classes
        self.concat_channels = concat_channels
        self.image_size = size
        with their_arguments("UNet2DModel"):
            model: Any = UNet2DModel(
                sample_size=size,
                in_channels=in_channels + concat_channels,
                out_channels=self.out_channels,
                num_class_embeds=None if num_classes is None else num_classes + 1,
                **config,
            )
        self.model = model
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)
        if size is not None:
            self._check_size(*size)

    def _check_size(self, height: int, width: int) -> None:
        check_divisible(height, width, self.factor, why=f"a U-Net of {self.factor} x downsampling")

    def forward(
        self, x: Tensor, noise_cond: Tensor, *, label: Tensor | None = None, concat: Tensor | None = None
    ) -> Tensor:
        """Return the output `(B, out_channels, H, W)`; arguments and errors as in `UNet.forward`."""
        self._check_size(x.shape[-2], x.shape[-1])
        check_labels(label, self.num_classes)
        x = join_concat(x, concat, self.concat_channels)
        return self.model(x, noise_cond, class_labels=label, return_dict=False)[0]
