"""``data.latents=``: where latents lie, the command that makes them, and whether they are those of a run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ornstein.cli.launch import conf_dir
from ornstein.errors import OrnsteinError

# What of a data or codec group decides neither the images nor their latents.
_WITHOUT_EFFECT = {
    "batch_size",
    "caption_template",
    "class_names",
    "download",
    "eval_batch_size",
    "features",
    "latents",
    "limit",
    "num_classes",
    "num_workers",
    "seed",
    "sigma_data",
    "storage",
}


WAY_OUT = "name the data set that was encoded, with data.latents=FOLDER beside it"


def latents_folder(cfg: DictConfig, codec: Any) -> Path:
    """Where the latents of a config lie unless told: below ``$ORNSTEIN_CACHE``, or ``~/.cache/ornstein``.

    Its name follows from how the data set is built, from the codec, and from whether images are mirrored.
    """
    from ornstein.data.latents import is_unmeasured, scale_of

    data = {key: value for key, value in _plain(cfg.data).items() if key not in _WITHOUT_EFFECT}
    scale = "measured" if is_unmeasured(codec) else scale_of(codec)
    parts = [data, codec.fingerprint, scale, bool(codec.stochastic)]
    digits = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    base = os.environ.get("ORNSTEIN_CACHE")
    root = Path(base).expanduser() if base else Path.home() / ".cache" / "ornstein"
    name = choices().get("data") or str(OmegaConf.select(cfg, "data.dataset._target_", default="")).rpartition(".")[2]
    return root / "latents" / f"{name}-{cfg.data.image_size}-{digits}"


def encode_command(cfg: DictConfig, *, out: str | Path | None = None) -> str:
    """What a shell has to be told to make the latents that a config asks for."""
    if are_alone(cfg):
        from ornstein.data.encoded import command_of

        return command_of(cfg.data.root)
    chosen = choices()
    words = ["python", "-m", "ornstein.cli.encode"]
    for group, placeholder in (("data", "DATA"), ("codec", "CODEC")):
        option = chosen.get(group)
        words.append(f"{group}={option or placeholder}")
        words += [f"{group}.{key}={_word(value)}" for key, value in _changed(cfg[group], group, option)]
    if out is not None:
        words.append(f"out={_word(str(out))}")
    return shlex.join(words)


def are_alone(cfg: DictConfig) -> bool:
    """Whether the latents stand for a data set whose images are gone."""
    return str(OmegaConf.select(cfg, "data.dataset._target_", default="")) == "ornstein.data.LatentFolder"


def check_alone(cfg: DictConfig) -> None:
    """Refuses what ``data=latents`` cannot be used with (OrnsteinError): pixels, other latents, and figures."""
    if not are_alone(cfg):
        return
    where = f"data=latents data.root={cfg.data.root} holds no images"
    if cfg.data.latents != cfg.data.root:
        raise OrnsteinError(
            f"{where}, and data.latents={cfg.data.latents} names other latents: leave data.latents out."
        )
    if str(cfg.codec.get("_target_")).endswith(".Identity"):
        raise OrnsteinError(
            f"{where}, and codec={choices().get('codec', 'identity')} diffuses pixels: name the codec that made the "
            "latents, by model=latent_dit (which brings codec=kl), say, or codec=kl codec.weights=FILE."
        )
    if OmegaConf.select(cfg, "metrics.features") is not None and _features_named(cfg):
        named = choices().get("metrics", "auto")
        raise OrnsteinError(f"{where}, and metrics={named} compares samples to them: set metrics=none, or {WAY_OUT}.")


def _features_named(cfg: DictConfig) -> bool:
    """Whether the metrics have a feature space: that of the data by name, null for none, or any other."""
    node = cfg.metrics.features
    return not OmegaConf.is_config(node) or "name" not in node or node.name not in (None, "none")


def check_latents(cfg: DictConfig, codec: Any, conditioner: Any = None) -> None:
    """Whether ``data.latents=FOLDER`` holds latents of the config's codec, at its image size, and with mirrored views
    where it mirrors; ``auto`` becomes the folder that the encode command writes. The images are looked at later.

    Args:
        cfg: a composed training config.
        codec: of the config, built.
        conditioner: likewise, where there is one.

    Raises:
        OrnsteinError: names the command that makes the right ones.
    """
    if are_alone(cfg) and conditioner is not None and "image" in conditioner.needs:
        named = choices().get("conditioner", type(conditioner).__name__)
        raise OrnsteinError(
            f"data=latents data.root={cfg.data.root} holds no images, and conditioner={named} looks at them: choose "
            f"class_label or none, or {WAY_OUT}."
        )
    asked = cfg.data.get("latents")
    if asked is None:
        return
    if codec_is_identity(codec):
        if asked != "auto":
            raise OrnsteinError(
                f"data.latents={asked} and codec={choices().get('codec', 'identity')}: pixels have no latents, so "
                "leave data.latents out, or choose a latent model such as model=latent_dit."
            )
        cfg.data.latents = None
        return
    if asked == "auto":
        cfg.data.latents = asked = str(latents_folder(cfg, codec))
        command = encode_command(cfg)
    else:
        command = encode_command(cfg, out="FOLDER")
    from ornstein.data.latents import check_codec, read_recipe

    recipe = read_recipe(asked, command=encode_command(cfg, out=asked))
    for key in ("image_size", "channels"):
        there, here = getattr(recipe, key), cfg.data[key]
        if there != here:
            raise OrnsteinError(
                f"data.latents={asked} was made of images with {key}={there} and data.{key} is {here}: set "
                f"data.{key}={there}, or make others by `{command}`."
            )
    check_codec(recipe, codec, folder=asked, flip=bool(cfg.data.flip), command=command)


def open_latents(cfg: DictConfig, data: Any) -> None:
    """Opens the latents of a run's data, if it has any, and checks that they are those of its images.

    Raises:
        OrnsteinError: missing or damaged ones, or those of other images; names the command that mends them.
    """
    if cfg.data.get("latents") is None:
        return
    data.latents_command = encode_command(cfg, out=cfg.data.latents)
    data.open_latents()


def codec_is_identity(codec: Any) -> bool:
    """Whether a codec changes nothing."""
    from ornstein.codecs import Identity

    return isinstance(codec, Identity)


def choices() -> dict[str, str]:
    """The options chosen on this command line, by group; empty where Hydra does not run."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return {}
    return {str(key): str(value) for key, value in HydraConfig.get().runtime.choices.items() if value is not None}


def _changed(node: DictConfig, group: str, option: str | None) -> Iterator[tuple[str, Any]]:
    """Keys of a group with another value than its file has, those that decide the latents."""
    path = conf_dir() / group / f"{option}.yaml"
    if not path.is_file():
        return
    written = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(written, dict)
    for key, value in _plain(node).items():
        stated = written.get(key)
        follows = isinstance(stated, str) and "${" in stated
        if key not in _WITHOUT_EFFECT and not follows and not isinstance(value, dict) and value != stated:
            yield key, value


def _plain(node: DictConfig) -> dict[str, Any]:
    found = OmegaConf.to_container(node, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _word(value: Any) -> str:
    """A value as Hydra's command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    text = str(value)
    if not isinstance(value, str) or re.fullmatch(r"[\w./-]+", text):
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
