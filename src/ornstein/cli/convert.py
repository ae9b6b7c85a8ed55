"""``ornstein convert SOURCE --out FOLDER``: a checkpoint of another library as a folder that samples and trains."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ornstein.networks.layouts import Converted

OPTION = "conf/model/network/converted.yaml"  # in the folder: the network as an option for training
# What the run around the network decides, in an option that fits other data too.
_FOLLOWS = {
    "in_channels": "${codec.channels}",
    "out_channels": "${mul:${codec.channels},${oc.select:objective.parameterization.outputs,1}}",
    "image_size": "${codec.size}",
    "num_classes": "${conditioner.num_classes}",
}
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


@dataclass(frozen=True)
class Report:
    """What was converted, and to where.

    Attributes:
        folder: where it lies.
        layout: the source's.
        converted: network, arguments and state dict.
        missing: weights that the source lacks, started at random; only with ``--partial``.
    """

    folder: Path
    layout: str
    converted: Converted
    missing: tuple[str, ...]


def main() -> None:
    """Entry point."""
    from ornstein.cli.launch import fail

    arguments = _parser().parse_args(sys.argv[1:])
    try:
        report = convert_file(
            arguments.source,
            arguments.out,
            layout=arguments.layout,
            partial=arguments.partial,
            weights=arguments.weights,
            facts=dict(map(_fact, arguments.fact)),
            overrides=arguments.set,
        )
    except OrnsteinError as error:
        fail(error)
    show(report)


def convert_file(
    source: str | Path,
    out: str | Path,
    *,
    layout: str = "auto",
    partial: bool = False,
    weights: str = "ema",
    facts: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Report:
    """Converts a checkpoint of another library; nothing but tensors is read of it.

    A network's folder has ``network.safetensors``, ``config.yaml`` (a run's, so that sample, evaluate, export and
    ``init.from=`` take the folder), ``conversion.json``, and the network as an option for training. An autoencoder's
    has ``codec.safetensors``.

    Args:
        source: a file of tensors, or a folder of diffusers.
        out: the folder to write.
        layout: ``auto``, or whose it is.
        partial: leave out tensors that have no place, and start at random those that are missing.
        weights: ``ema`` or ``model``, where a training checkpoint has both.
        facts: what the file does not say, by the names of the layout's ``convert``.
        overrides: of the config that is written, as on ``train.py``'s command line.

    Raises:
        OrnsteinError: nothing is there, it holds classes, no layout fits, or tensors are left over on either side.
    """
    from ornstein.networks.layouts import LAYOUTS, convert, find_layout
    from ornstein.networks.layouts.reading import read_foreign

    folder = Path(out)
    _check_out(folder)
    place = Path(source).expanduser()
    pipeline = place if (place / "model_index.json").is_file() else place.parent
    if pipeline == place:
        place = denoiser_of(place)
    foreign = read_foreign(place, weights=weights)
    name = find_layout(foreign.state, config=foreign.config) if layout == "auto" else layout
    try:
        converted = convert(foreign.state, layout=name or layout, config=foreign.config, **(facts or {}))
    except (ValueError, LookupError, RuntimeError) as error:
        # Who names a layout is taken at their word, and tensors of another library break its arithmetic.
        if layout == "auto" or isinstance(error, OrnsteinError):
            raise
        raise OrnsteinError(
            f"--layout {layout}: the tensors of {source} are not laid out so ({error!r}): leave it out, or name the "
            "right one."
        ) from error
    if converted.unmapped and not partial:
        from ornstein.networks.layouts import listed

        raise OrnsteinError(
            f"{source}: {len(converted.unmapped)} of its tensors have no place in layout {name} "
            f"({LAYOUTS[str(name)]}): {listed(converted.unmapped)}. Leave them out by --partial, if nothing that you "
            "need depends on them."
        )
    if converted.target.startswith("ornstein.codecs."):
        return _write_codec(folder, str(name), converted, partial=partial)
    arguments = converted.arguments
    learned = arguments.get("out_channels") == 2 * arguments["in_channels"]
    # What the pipeline tells takes the place of what the layout supposes.
    chosen = {text.partition("=")[0]: text for text in converted.suggest}
    told = _pipeline_suggestions(pipeline, learned=learned)
    if any(text.startswith("scheduler=") for text in told):
        chosen = {key: text for key, text in chosen.items() if not key.startswith("scheduler")}
    chosen |= {text.partition("=")[0]: text for text in told}
    converted = replace(converted, suggest=tuple(chosen.values()))
    converted, missing = _complete(converted, partial=partial)
    _write_network(folder, str(name), converted, overrides, place=place)
    return Report(folder, str(name), converted, missing)


def show(report: Report) -> None:
    """Prints what was made, what was left out, and what to do with it."""
    from rich.console import Console
    from rich.text import Text

    from ornstein.networks.layouts import LAYOUTS, listed

    made = report.converted
    numbers = sum(tensor.numel() for tensor in made.state.values())
    rows = {
        "layout": f"{report.layout} ({LAYOUTS[report.layout]})",
        "network": f"{made.target.rpartition('.')[2]}, {numbers:,} numbers in {len(made.state)} tensors",
        "dropped": listed(made.dropped) and f"{listed(made.dropped)}: no output depends on them",
        "left out": listed(made.unmapped),
        "missing": report.missing and f"{listed(report.missing)}: started at random",
        "settings": " ".join(made.suggest),
        "note": made.note,
        "written to": str(report.folder),
    }
    if made.target.startswith("ornstein.codecs."):
        rows["use it"] = f"codec=kl codec.weights={report.folder / 'codec.safetensors'}"
    else:
        rows["sample"] = f"ornstein sample run={report.folder}"
        rows["fine-tune"] = (
            f"ornstein train --config-dir {report.folder / 'conf'} model/network=converted init.from={report.folder}"
        )
    for title, text in rows.items():
        if text:
            Console(soft_wrap=True).print(Text.assemble((f"{title:<11}", "bold"), text), soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    from ornstein.networks.layouts import LAYOUTS

    parser = argparse.ArgumentParser(
        prog="ornstein convert",
        description="A checkpoint of another library as a folder that sample, evaluate, export and init.from= take.",
        epilog="layouts: " + ", ".join(f"{name} ({whose})" for name, whose in LAYOUTS.items()),
    )
    parser.add_argument("source", help="a file of tensors (.safetensors, .pt, .pth, .ckpt), or a folder of diffusers")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument("--layout", default="auto", choices=["auto", *LAYOUTS], help="whose it is (default: auto)")
    parser.add_argument(
        "--partial", action="store_true", help="leave out tensors without a place, start missing ones at random"
    )
    parser.add_argument(
        "--weights", default="ema", choices=["ema", "model"], help="of a training checkpoint (default: ema)"
    )
    parser.add_argument(
        "--fact", action="append", default=[], metavar="NAME=VALUE", help="what the file does not say: head_dim=64"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an override of the config: codec=identity"
    )
    return parser


def _fact(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not given:
        raise OrnsteinError(f"--fact {text}: write it as NAME=VALUE, head_dim=64 say.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _check_out(folder: Path) -> None:
    """A folder of another purpose is left alone; an earlier conversion is written anew."""
    held = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or "checkpoints" in held:
        raise OrnsteinError(
            f"--out {folder} {'is a file' if folder.is_file() else 'holds a run'}: name another folder."
        )
    if held and "conversion.json" not in held and held != {"codec.safetensors"}:
        raise OrnsteinError(f"--out {folder} holds something that is no conversion: name another folder.")


def denoiser_of(pipeline: Path) -> Path:
    """The folder of the network within a diffusers pipeline's folder.

    Raises:
        OrnsteinError: it has none, or two.
    """
    found = [pipeline / name for name in ("unet", "transformer") if (pipeline / name / "config.json").is_file()]
    if len(found) != 1:
        raise OrnsteinError(
            f"{pipeline} is a pipeline without a unet or transformer of its own: name one model's folder."
        )
    return found[0]


def _pipeline_suggestions(pipeline: Path, *, learned: bool) -> tuple[str, ...]:
    """Schedule, objective and codec that a diffusers pipeline's folder tells of; ``learned``: a variance is, too."""
    found: list[str] = []
    file = pipeline / "scheduler" / "scheduler_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        schedule = _BETAS.get(str(config.get("beta_schedule")))
        if schedule is not None:
            found += [f"scheduler={schedule}", f"scheduler.num_timesteps={config.get('num_train_timesteps', 1000)}"]
            ends = ("beta_start", "beta_end") if schedule != "cosine" else ()
            found += [f"scheduler.{end}={config[end]}" for end in ends if end in config]
        objective = _PREDICTIONS.get(str(config.get("prediction_type")))
        if objective is not None and not learned:
            found.append(f"objective={objective}")
    if (pipeline / "vae" / "config.json").is_file():
        found += ["codec=diffusers", f"codec.pretrained='{(pipeline / 'vae').resolve()}'"]
    return tuple(found)


def _complete(converted: Converted, *, partial: bool) -> tuple[Converted, tuple[str, ...]]:
    """The state dict checked against the network that it is for; with ``partial`` what it lacks as it starts."""
    import torch
    from hydra.utils import get_class

    from ornstein.training.start import check_fit, fit

    make = get_class(converted.target)
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if partial else "meta"):
        torch.manual_seed(0)
        network = make(**converted.arguments)
    found = fit(network, converted.state)
    if not found.exact and not (partial and found.loaded and not found.misshaped):
        check_fit(network, found, source="the checkpoint")
    extra = {name: network.state_dict()[name] for name in found.missing}
    unmapped = (*converted.unmapped, *found.unexpected)
    state = {name: value for name, value in converted.state.items() if name not in found.unexpected}
    return replace(converted, state={**state, **extra}, unmapped=unmapped), found.missing


def _write_network(folder: Path, layout: str, converted: Converted, overrides: Sequence[str], *, place: Path) -> None:
    from omegaconf import OmegaConf

    from ornstein.cli.build import plain
    from ornstein.experiment import RunDirectory

    cfg = _config(converted, overrides, name=place.stem or layout)
    run = RunDirectory(folder)
    _save(converted.state, folder / "network.safetensors")
    run.write_config(plain(cfg))
    node = {"_target_": converted.target, **converted.arguments}
    option = {**node, **{key: value for key, value in _FOLLOWS.items() if key in node}}
    run.write_text(OPTION, f"# Converted from {layout}.\n{OmegaConf.to_yaml(OmegaConf.create(option))}")
    told = {
        "layout": layout,
        "source": place.name,
        "network": node,
        "settings": list(converted.suggest),
        "dropped": list(converted.dropped),
        "left_out": list(converted.unmapped),
        "note": converted.note,
    }
    run.write_json("conversion.json", told)


def _write_codec(folder: Path, layout: str, converted: Converted, *, partial: bool) -> Report:
    from hydra.utils import get_class

    from ornstein.codecs import save_codec

    codec = get_class(converted.target)(**converted.arguments)
    result = codec.load_state_dict(converted.state, strict=False)
    if (result.missing_keys or result.unexpected_keys) and not partial:
        raise OrnsteinError(
            f"the autoencoder's tensors do not fit: missing {result.missing_keys[:10]}, without a place "
            f"{result.unexpected_keys[:10]}."
        )
    save_codec(codec, folder / "codec.safetensors", metadata={"data": "unknown"})
    return Report(folder, layout, converted, tuple(result.missing_keys))


def _config(converted: Converted, overrides: Sequence[str], *, name: str) -> DictConfig:
    """A run's config around the network, with what fits it beside it."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from ornstein.cli.launch import as_ours, conf_dir, register_resolvers

    register_resolvers()
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with as_ours(), initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            # Another option of a group takes along what was said of the one that it replaces.
            groups = {text.partition("=")[0] for text in overrides if "." not in text.partition("=")[0]}
            facts = [text for text in _facts(converted) if re.split(r"[=./]", text)[0] not in groups]
            cfg = compose("train", overrides=[*facts, *overrides])
    finally:
        GlobalHydra.instance().hydra = outer
    OmegaConf.update(cfg, "name", name)
    OmegaConf.update(cfg, "paths.run_dir", "outputs")
    cfg.model.network = {"_target_": converted.target, **converted.arguments}
    return cfg


def _facts(converted: Converted) -> list[str]:
    """Overrides for what the network is: its data, latents, classes; then what its layout and its pipeline suggest."""
    arguments, given = converted.arguments, {text.partition("=")[0] for text in converted.suggest}
    channels, size, classes = arguments["in_channels"], arguments.get("image_size") or 32, arguments.get("num_classes")
    size = size if isinstance(size, int) else max(size)
    latent = channels not in (1, 3)
    facts = [
        "data=image_folder",
        "logger=none",  # nothing is trained, and its names would be of a run's choices
        f"data.num_classes={'null' if classes is None else classes}",
        f"model={'pixel_unet' if classes is None else 'class_unet'}",
    ]
    if latent and channels == 4:
        facts += [f"data.image_size={8 * size}", "data.channels=3", "codec=diffusers"]
        facts += [] if "codec.pretrained" in given else ["codec.pretrained=stabilityai/sd-vae-ft-ema"]
        facts += ["codec.downsample=8", "codec.channels=4"]
    else:
        facts += [f"data.image_size={size}", f"data.channels={channels}"]
    if latent and "objective=hybrid" in converted.suggest:
        facts.append("objective.last=gaussian")  # latents have no 8-bit pixels
    # A later choice of an option or a value takes the place of an earlier one.
    chosen = {text.partition("=")[0]: text for text in (*facts, *converted.suggest)}
    return [chosen[key] for key in sorted(chosen, key=lambda key: ("." in key, "/" in key))]


def _save(state: Mapping[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    # Copies, as some may be parts of one tensor.
    save_file({name: value.detach().clone().contiguous() for name, value in state.items()}, partial)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
