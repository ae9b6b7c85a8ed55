"""Whether data, conditioner and network speak of the same conditions: told before anything is read or built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ornstein.data.captions import check_template
from ornstein.errors import OrnsteinError

# What a conditioner says of itself in the config, what it is in words, and which models take it.
_KEYS = {
    "text_dim": ("caption tokens", "model=text_unet or text_dit"),
    "pooled_dim": ("a caption's pooled vector", "model=text_unet or text_dit"),
    "concat_channels": ("an image beside the noisy one", "model=class_unet, pixel_unet or dit"),
    "num_classes": ("class labels", "model=class_unet or dit"),
}
_WITHOUT = {"pooled_dim": "conditioner.pooled_dim=null", "text_dim": "conditioner.text_dim=null"}
_OF_CLASSES = ("Digits", "MNIST", "FashionMNIST", "ImageFolder", "ImageZip", "ImageArrays")
_THAT_SAY = ("Prepared", "LatentFolder")  # whose files say whether they have captions


def check_conditions(cfg: DictConfig, choices: dict[str, Any]) -> None:
    """Refuses conditions that the data do not carry, and those that conditioner and network do not agree on.

    Networks of other packages are not looked into: nobody knows how their arguments are called.

    Raises:
        OrnsteinError: names both options and a way out.
    """
    conditioner, model = (str(choices.get(key) or "this one") for key in ("conditioner", "model"))
    _check_data(cfg, f"conditioner={conditioner}", str(choices.get("data") or "this one"))
    network = OmegaConf.select(cfg, "model.network")
    if network is None or not str(network.get("_target_")).startswith("ornstein."):
        return
    _check_channels(cfg, network, str(choices.get("codec") or "this one"))
    for key, (what, models) in _KEYS.items():
        given = OmegaConf.select(cfg, f"conditioner.{key}") or None
        taken = list(_values(network, key))
        if given is not None and not taken:
            leave = f"set {_WITHOUT[key]}, " if key in _WITHOUT and _gives_more(cfg, key) else ""
            raise OrnsteinError(
                f"conditioner={conditioner} gives {what} (conditioner.{key}={given}) and the network of model={model}, "
                f"{_class_name(network)}, takes none: {leave}choose {models}, or another conditioner."
            )
        if any((value or None) != given for value in taken):
            wanted = next(value for value in taken if (value or None) != given)
            raise OrnsteinError(
                f"model.network.{key}={wanted} and conditioner={conditioner} gives "
                f"{f'{key}={given}' if given is not None else f'no {what}'}: leave model.network.{key} as it is, or "
                f"choose a conditioner that gives it."
            )


def targets_of(node: Any) -> Iterator[str]:
    """Class names of a conditioner's config and of its parts."""
    if OmegaConf.is_dict(node):
        if node.get("_target_"):
            yield str(node._target_).rpartition(".")[2]
        for key in node:
            if OmegaConf.is_dict(node.get(key)):
                yield from targets_of(node[key])


def never_drops(node: Any) -> bool:
    """Whether a conditioner's config drops nothing in training, so that there is no null form to guide away from."""
    own = node.get("dropout")
    parts = node.get("parts")
    if parts:
        return not own and all(never_drops(part) for part in parts.values())
    return own == 0


def told_condition(conditioner: Any) -> str:
    """What a conditioner conditions on, in words: equal for two that give a network the same."""
    kinds = [
        f"conditional on {conditioner.num_classes} classes" if conditioner.num_classes else "",
        f"conditional on captions of size {conditioner.text_dim}" if conditioner.text_dim else "",
        f"conditional on captions' vectors of size {conditioner.pooled_dim}" if conditioner.pooled_dim else "",
        f"conditional on images of {conditioner.concat_channels} channels" if conditioner.concat_channels else "",
    ]
    return " and ".join(filter(None, kinds)) or "unconditional"


def _check_channels(cfg: DictConfig, network: Any, codec: str) -> None:
    """A network takes the channels that its codec makes and gives as many, or twice, with a learned variance."""
    channels = cfg.codec.channels
    outputs = int(OmegaConf.select(cfg, "objective.parameterization.outputs") or 1)
    for key, given in (("in_channels", channels), ("out_channels", channels * outputs)):
        for value in _values(network, key):
            if value is not None and value != given:
                raise OrnsteinError(
                    f"model.network.{key}={value}, where codec={codec} has {channels} channels and the objective asks "
                    f"for {outputs} output{'s' if outputs > 1 else ''} of each: leave model.network.{key} as it is, "
                    f"which is {given}."
                )


def _check_data(cfg: DictConfig, conditioner: str, data: str) -> None:
    kinds = set(targets_of(cfg.conditioner))
    dataset = OmegaConf.select(cfg, "data.dataset._target_", default="").rpartition(".")[2]
    own = dataset in _OF_CLASSES
    check_template(cfg.data.get("caption_template"))
    if "Text" in kinds and dataset in _THAT_SAY:
        from ornstein.data.facts import data_fact

        if not data_fact(cfg.data, "captions"):
            raise OrnsteinError(
                f"{conditioner} reads captions and data={data} data.root={cfg.data.root} has none: choose "
                "conditioner=class_label or none, or make the folder anew of data with captions."
            )
    if "Text" in kinds and own and not (cfg.data.get("caption_template") or cfg.data.get("caption_files")):
        way_out = "data.caption_files=true (a text file beside each image) or " if dataset == "ImageFolder" else ""
        raise OrnsteinError(
            f"{conditioner} reads captions and data={data} has none: set {way_out}data.caption_template='a photo of a "
            "{}' (from the classes' names), or choose conditioner=class_label or none."
        )
    if cfg.data.get("caption_template") and cfg.data.get("num_classes") is None and dataset == "ImageFolder":
        raise OrnsteinError(
            "data.caption_template makes captions of classes' names and data.num_classes is null: set "
            "data.num_classes=auto, or leave data.caption_template out."
        )
    root = cfg.data.get("condition_root")
    if root is not None and not Path(str(root)).expanduser().is_dir():
        raise OrnsteinError(
            f"data.condition_root={root}: there is no such folder; name one with an image for each image."
        )
    sources = [node.get("source") for node in _nodes(cfg.conditioner)]
    if "condition" in sources and own and root is None:
        raise OrnsteinError(
            f"{conditioner} with source=condition reads what the data carry beside their images, and data={data} "
            "carries nothing: add data.condition_root=FOLDER to data=image_folder, or choose "
            "conditioner.source=low_resolution, mask or grey."
        )


def _gives_more(cfg: DictConfig, key: str) -> bool:
    """Whether a caption is given in another form too, so that this one can be left out."""
    others = {"text_dim", "pooled_dim"} - {key}
    return any(OmegaConf.select(cfg, f"conditioner.{other}") for other in others)


def _values(node: Any, key: str) -> Iterator[Any]:
    """Every value of a key in a network's config, however deep it is wrapped."""
    for each in _nodes(node):
        if key in each:
            yield each.get(key)


def _nodes(node: Any) -> Iterator[Any]:
    if OmegaConf.is_dict(node):
        yield node
        for key in node:
            yield from _nodes(node.get(key))


def _class_name(node: Any) -> str:
    return str(node._target_).rpartition(".")[2]
