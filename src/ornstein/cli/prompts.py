"""What samples are asked to show on the command line: labels, prompts, and images to be conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from torch import Tensor

    from ornstein.training.conditions import HeldOut
    from ornstein.training.module import DiffusionModule


def conditions_of(
    module: DiffusionModule,
    cfg: DictConfig,
    *,
    labels: Sequence[int] | None,
    count: int,
    prompts: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Labels, prompts, negative prompt and images, as ``DiffusionModule.generate`` takes them: one a sample, what is
    given repeated as needed.

    Args:
        module: the run.
        cfg: ``prompts``, ``prompts_file``, ``negative_prompt`` and ``condition_images`` as the command has them.
        labels: class numbers.
        count: how many samples.
        prompts: instead of the config's.
        size: (height, width) that images are brought to; the data's own unless given.

    Raises:
        OrnsteinError: what this model does not take, or a file or folder that cannot be read.
    """
    from ornstein.cli.load import check_labels

    asked = read_prompts(cfg) if prompts is None else _texts(prompts)
    negative = cfg.get("negative_prompt")
    images = cfg.get("condition_images")
    given = {
        "labels": check_labels(labels, module, count),
        "prompts": _check_prompts(asked, module, count),
        "negative_prompt": negative,
        "images": None if images is None else read_images(images, module, cfg, count=count, size=size),
    }
    if negative is not None:
        _check_captions(module, f"negative_prompt={negative!r}")
    return given


def read_labels(cfg: DictConfig) -> list[Any] | None:
    """The class numbers of ``labels``, one of which may stand without brackets; None if none are given."""
    labels = cfg.get("labels")
    if labels is None:
        return None
    return list(labels) if OmegaConf.is_list(labels) else [labels]


def read_prompts(cfg: DictConfig) -> list[str] | None:
    """The prompts of ``prompts`` or of the lines of ``prompts_file``; None if neither is given.

    Raises:
        OrnsteinError: both, an empty list, or a file that cannot be read.
    """
    listed, file = cfg.get("prompts"), cfg.get("prompts_file")
    if listed is not None and file is not None:
        raise OrnsteinError("prompts and prompts_file were both given: leave one out.")
    if file is not None:
        try:
            lines = Path(str(file)).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OrnsteinError(
                f"prompts_file={file} cannot be read ({error}): name a text file, a prompt a line."
            ) from None
        listed = [line.strip() for line in lines if line.strip()]
        if not listed:
            raise OrnsteinError(f"prompts_file={file} holds no prompts: write one a line.")
    return None if listed is None else _texts(listed)


def read_images(
    folder: object, module: DiffusionModule, cfg: DictConfig, *, count: int, size: tuple[int, int] | None = None
) -> Tensor:
    """The images of a folder, sorted by name and repeated as needed, read as the data are: uint8 (count, C, H, W).

    Raises:
        OrnsteinError: a model that takes none, no folder, or no image in it.
    """
    import torch

    from ornstein.data.describe import image_files
    from ornstein.data.images import load_image

    needs = module.conditioner.needs
    if not {"image", "condition"} & set(needs):
        raise OrnsteinError(
            f"condition_images={folder} was given and this model is conditioned on no images: leave it out."
        )
    place = Path(str(folder)).expanduser()
    paths = list(image_files(place)) if place.is_dir() else []
    if not paths:
        raise OrnsteinError(f"condition_images={folder} holds no images: name a folder of images.")
    channels = int(cfg.data.condition_channels if "condition" in needs else cfg.data.channels)
    pictures = [
        torch.tensor(load_image(path, size=int(cfg.data.image_size) if size is None else size, channels=channels))
        for path in paths[:count]
    ]
    return torch.stack([pictures[place % len(pictures)] for place in range(count)])


def held_out_of(cfg: DictConfig) -> HeldOut:
    """Opens the run's held-out data when they are first asked for.

    Raises:
        OrnsteinError: when called: they are not at hand.
    """

    @cache
    def opened() -> Any:
        from ornstein.cli.build import build_data
        from ornstein.cli.launch import as_ours

        try:
            with as_ours():
                return build_data(cfg).val
        except OrnsteinError as error:
            raise OrnsteinError(
                "this run's samples take their conditions from its held-out data unless prompts= or condition_images= "
                f"gives them, and the data cannot be read: {error}"
            ) from error

    return opened


def _texts(prompts: Any) -> list[str]:
    listed = [prompts] if isinstance(prompts, str) else [str(prompt) for prompt in prompts]
    if not listed:
        raise OrnsteinError("prompts=[] is empty: give at least one, prompts='[a red heart,a dog]' say.")
    return listed


def _check_prompts(prompts: list[str] | None, module: DiffusionModule, count: int) -> list[str] | None:
    if prompts is None:
        return None
    _check_captions(module, f"prompts={prompts[:3]}")
    return [prompts[place % len(prompts)] for place in range(count)]


def _check_captions(module: DiffusionModule, typed: str) -> None:
    if "caption" not in module.conditioner.needs:
        raise OrnsteinError(
            f"{typed} was given and this model reads no captions: leave it out, or name a run that was trained with "
            "conditioner=text."
        )
