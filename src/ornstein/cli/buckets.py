"""``data.buckets=`` and ``size=``: which shapes a run has, and whether its network, codec and conditioner take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from torch import nn

    from ornstein.training.module import DiffusionModule

Shape = tuple[int, int]


def fill_buckets(
    cfg: DictConfig, choices: dict[str, str], network: nn.Module, *, codec: Any = None, conditioner: Any = None
) -> None:
    """Checks ``data.buckets`` and writes the shapes that ``auto`` means into the config, before any data are read.

    Args:
        cfg: a composed training config.
        choices: the options of its groups.
        network: of the config, on any device.
        codec: of the config; None where an autoencoder is what is trained.
        conditioner: of the config.

    Raises:
        OrnsteinError: names the shape, and the option that cannot have it.
    """
    option = cfg.data.get("buckets")
    if option is None:
        return
    if codec is None:
        raise OrnsteinError(
            f"data.buckets={_typed(option)} and model={choices.get('model', 'autoencoder_kl')}: an autoencoder is "
            "trained on squares, and then takes any shape, so leave data.buckets out here and name it when a latent "
            "model is trained."
        )
    from ornstein.data.buckets import bucket_shapes, checked_buckets
    from ornstein.networks.checks import side_factor

    size = int(cfg.data.image_size)
    plain = OmegaConf.to_container(option, resolve=True) if OmegaConf.is_config(option) else option
    checked_buckets(plain, image_size=size, balanced=bool(cfg.data.get("balanced")), latents=cfg.data.get("latents"))
    if cfg.data.get("crop") is not None:
        from ornstein.data.bucket_files import check_crop

        check_crop(str(cfg.data.crop))
    own = side_factor(network)
    shapes = bucket_shapes(plain, image_size=size, factor=(own or 1) * codec.downsample)
    assert shapes is not None
    check_conditioner(conditioner, shapes, option=f"data.buckets={_typed(option)}")
    if own is None:
        _try_shapes(network, codec, conditioner, shapes, name=choices.get("model", type(network).__name__))
    cfg.data.buckets = [list(shape) for shape in shapes]


def check_conditioner(conditioner: Any, shapes: Sequence[Shape], *, option: str) -> None:
    """A conditioner that shrinks images by a factor must be able to shrink these.

    Raises:
        OrnsteinError: names the shape and the factor.
    """
    for part in conditioner.modules() if conditioner is not None else ():
        if getattr(part, "source", None) != "low_resolution":
            continue
        for height, width in shapes:
            if height % part.factor or width % part.factor:
                raise OrnsteinError(
                    f"conditioner.factor={part.factor} does not divide {height}x{width} of {option}: choose a factor "
                    "that divides all sides, or other shapes."
                )


def _try_shapes(network: nn.Module, codec: Any, conditioner: Any, shapes: Sequence[Shape], *, name: str) -> None:
    """Of a network that does not say which sizes it takes: one pass without numbers for each."""
    import torch

    network = network.to("meta").eval()
    for shape in shapes:
        x = torch.zeros(1, *codec.latent_shape(*shape), device="meta")
        cond = {key: value.to("meta") for key, value in conditioner.null_form(1, torch.device("cpu")).items()}
        if "concat" in cond:
            cond["concat"] = x.new_zeros(1, cond["concat"].shape[1], *x.shape[2:])
        try:
            found = network(x, torch.zeros(1, device="meta"), **cond)
        except Exception as error:  # whatever a network of the user's raises
            raise _no_network(name, shape, str(error) or type(error).__name__) from error
        if tuple(found.shape[2:]) != tuple(x.shape[2:]):
            raise _no_network(name, shape, f"its output is {'x'.join(map(str, found.shape[2:]))}")


def _no_network(name: str, shape: Shape, reason: str) -> OrnsteinError:
    return OrnsteinError(
        f"model={name} does not take images of {shape[0]}x{shape[1]}, one of data.buckets ({reason}): choose a U-Net "
        "or a DiT of this package, or leave data.buckets out."
    )


def sample_size(module: DiffusionModule, cfg: DictConfig) -> Shape | None:
    """``size=48`` or ``size=[48,32]`` of sample and evaluate as (height, width); None where it is not given.

    Raises:
        OrnsteinError: no size, or one that the run's network, codec or conditioner cannot have.
    """
    size = cfg.get("size")
    if size is None:
        return None
    asked = OmegaConf.to_container(size) if OmegaConf.is_config(size) else size
    return check_size(module, asked)


def check_size(module: DiffusionModule, size: Any) -> Shape:
    """A size as given, one side or [height, width], as a pair that the model can sample at.

    Raises:
        OrnsteinError: as :func:`sample_size`.
    """
    from ornstein.networks.checks import side_factor

    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, Sequence) else []
    whole = [side for side in sides if isinstance(side, int) and not isinstance(side, bool) and side >= 1]
    if len(sides) != 2 or len(whole) != 2 or isinstance(size, str | bool):
        raise OrnsteinError(f"size={_typed(size)} is one side in pixels, or [height,width]: size=[48,32] say.")
    height, width = whole
    factor = (side_factor(module.network) or 1) * module.codec.downsample
    if height % factor or width % factor:
        fit = ",".join(str(max(1, round(side / factor)) * factor) for side in whole)
        raise OrnsteinError(
            f"size={_typed(size)}: this run's network takes sides that are multiples of {factor}, so choose "
            f"size=[{fit}]."
        )
    check_conditioner(module.conditioner, [(height, width)], option=f"size={_typed(size)}")
    return height, width


def check_kept_sizes(cfg: DictConfig) -> None:
    """Samples of several shapes do not fit into one array.

    Raises:
        OrnsteinError: ``keep_samples=npz`` of a run with ``data.buckets``, at the shapes of its data.
    """
    if cfg.get("keep_samples") == "npz" and cfg.data.get("buckets") is not None and cfg.get("size") is None:
        raise OrnsteinError(
            "keep_samples=npz holds images of one size, and this run's data.buckets has several: choose "
            "keep_samples=png, or one size by size=[HEIGHT,WIDTH]."
        )


def _typed(option: Any) -> str:
    """A value as the command line has it."""
    plain = OmegaConf.to_container(option, resolve=True) if OmegaConf.is_config(option) else option
    return str(plain).replace(" ", "").replace("'", "").replace("None", "null")
