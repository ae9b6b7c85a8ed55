"""``python -m ornstein.cli.export run=...``: a run's model for diffusers, as plain weights, or as a graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ornstein.cli.stored import StoredRun
    from ornstein.experiment.export.card import Facts, Made
    from ornstein.training.module import DiffusionModule

FORMATS = ("diffusers", "safetensors", "onnx", "torch_export")
HELP = """usage: python -m ornstein.cli.export run=FOLDER format=diffusers [key=value] ...

Writes a trained model for others to use, with a model card.

  run=FOLDER            a run's folder or a checkpoint
  format=diffusers      a folder for diffusers.DiffusionPipeline.from_pretrained: the same images for the same noise
  format=safetensors    network.safetensors and, of a latent model, codec.safetensors
  format=onnx           the network alone, for onnxruntime
  format=torch_export   the network alone, for torch.export.load
  out=FOLDER            where to; export/FORMAT in the run's folder unless given
  overwrite=true        replace an export that is there
  weights=ema           ema: averaged where the run has averages; model: as trained; 0.1: over that length (ema=power)
  checkpoint=last       last or best, where run is a folder
  merge=true            add adapters (LoRA) to the weights that they adapt; false keeps them apart
  evaluation=FOLDER     outputs/evaluate/DATE/TIME, whose figures go into the card
  trust_targets=[...]   prefixes of classes outside this package that the run's config may name
  sampler=ddpm ...      any option of ornstein sample: the pipeline's scheduler follows sampler, clip_x0 and guidance
"""


_OF_THE_MODEL = (  # of a run's config: what made the model, and what draws from it
    *("seed", "clip_x0", "dynamic_threshold", "codec", "conditioner", "scheduler", "objective", "sampler", "guidance"),
    *("model", "adapter", "optimizer", "lr_schedule", "ema", "metrics"),
)


@dataclass(frozen=True)
class Request:
    """What is asked for; the attributes are the command's keys."""

    run: str
    format: str
    out: str | None = None
    weights: str = "ema"
    checkpoint: str = "last"
    merge: bool = True
    overwrite: bool = False
    evaluation: str | None = None
    trust_targets: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def main() -> None:
    """Entry point."""
    from ornstein.cli.launch import fail, find_mistake

    if {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP, end="")
        return
    try:
        place = export(parse(sys.argv[1:]))
    except Exception as error:
        mistake = find_mistake(error)
        if mistake is None:
            raise
        fail(mistake)
    print(f"written to {place}")


def parse(words: Sequence[str]) -> Request:
    """The command line as a request; words that are not its own are overrides of the run's config.

    Raises:
        OrnsteinError: a word that is no key=value, a missing run or format, a format that does not exist.
    """
    given: dict[str, str] = {}
    overrides: list[str] = []
    own = set(Request.__dataclass_fields__) - {"overrides"}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise OrnsteinError(f"{word} is no key=value; python -m ornstein.cli.export --help lists the keys.")
        if key in own:
            given[key] = value.strip("'\"")
        else:
            overrides.append(word)
    for key, example in (("run", "run=outputs/train/<date>/<time>"), ("format", f"format={FORMATS[0]}")):
        if key not in given:
            raise OrnsteinError(f"{key}= is missing: add {example} say.")
    if given["format"] not in FORMATS:
        raise OrnsteinError(f"format={given['format']} is unknown: choose {', '.join(FORMATS)}.")
    trusted = given.pop("trust_targets", "").strip("[]")
    flags: dict[str, bool] = {}
    for key in ("merge", "overwrite"):
        if key in given:
            flags[key] = _flag(key, given.pop(key))
    prefixes = tuple(name.strip() for name in trusted.split(",") if name.strip())
    options: dict[str, Any] = {**given, **flags}
    return Request(**options, trust_targets=prefixes, overrides=tuple(overrides))


def _flag(key: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise OrnsteinError(f"{key}={value}: choose true or false.")
    return value.lower() == "true"


def export(request: Request) -> Path:
    """Writes the export, whole or not at all, and says where.

    Raises:
        OrnsteinError: no such run, something that the format cannot express, or a folder that is in use.
    """
    from ornstein.cli.launch import as_ours
    from ornstein.cli.load import compose_for, restore
    from ornstein.cli.stored import open_run
    from ornstein.experiment.export.folder import EXPORTED, check_free, new_folder

    stored = open_run(request.run)
    place = check_free(request.out or stored.folder / "export" / request.format, overwrite=request.overwrite)
    evaluation = _evaluation(request.evaluation, stored)
    quoted = request.run.replace("\\", "\\\\").replace("'", "\\'")
    with as_ours():
        cfg = compose_for(stored, "sample", [f"run='{quoted}'", *request.overrides])
        module = restore(
            stored,
            cfg,
            checkpoint=request.checkpoint,
            weights=request.weights,
            trust_targets=list(request.trust_targets),
            device="cpu",
        )
    merged = _merge(module, request)
    with new_folder(place) as folder:
        from ornstein.experiment.atomic import write_json

        facts = _facts(request, stored, cfg, module, evaluation)
        if merged:
            facts.config["adapter"] = None
        made = WRITERS[request.format](folder, module, facts)
        from ornstein.experiment.export.card import model_card

        (folder / "README.md").write_text(model_card(facts, made), encoding="utf-8")
        write_json(folder / EXPORTED, _record(facts))
    for line in _told(made):
        print(line)
    return place


def _merge(module: DiffusionModule, request: Request) -> bool:
    """Adds adapters to the weights that they adapt, and says whether there were any to add."""
    if not hasattr(module.network, "peft_config"):
        return False
    if request.merge:
        from ornstein.training.adapters import merge

        merge(module.network)
    elif request.format == "diffusers":
        raise OrnsteinError("format=diffusers takes no adapters beside a network of ours: leave merge=false out.")
    return request.merge


def _pipeline(folder: Path, module: DiffusionModule, facts: Facts) -> Made:
    from ornstein.cli.quiet import quiet_libraries
    from ornstein.codecs import Autoencoder
    from ornstein.experiment.export.pipelines import write_autoencoder, write_pipeline

    quiet_libraries()
    if isinstance(module.network, Autoencoder):
        return write_autoencoder(folder, module.network)
    return write_pipeline(folder, module, _arguments(facts))


def _arguments(facts: Facts) -> dict[str, Any]:
    node = facts.config["model"]["network"]
    return {str(key): value for key, value in node.items() if not str(key).startswith("_")}


def _tensors(folder: Path, module: DiffusionModule, facts: Facts) -> Made:
    from ornstein.codecs import Autoencoder
    from ornstein.experiment import RunDirectory
    from ornstein.experiment.atomic import write_json
    from ornstein.experiment.export.tensors import opens_by_itself, write_tensors

    write_json(folder / "config.json", facts.config)
    runs: list[str] = []
    if not isinstance(module.network, Autoencoder) and opens_by_itself(module):
        # With it, this folder is a run to sample, evaluate and ornstein.load.
        RunDirectory(folder).write_config({"task": "train", "name": facts.name, **facts.config})
        runs = ["config.yaml"]
    data = str(facts.config.get("data", {}).get("name", ""))
    metadata = {"format": "pt", "ornstein": facts.version, "weights": facts.weights, "data": data}
    return [*write_tensors(folder, module, metadata), *runs]


def _graph(folder: Path, module: DiffusionModule, facts: Facts) -> Made:
    from ornstein.codecs import Autoencoder
    from ornstein.experiment.export.card import noise_condition
    from ornstein.experiment.export.graphs import FILES, write_graph

    if isinstance(module.network, Autoencoder):
        raise OrnsteinError(
            f"format={facts.format} takes a denoising network, and this run is an autoencoder: choose format=diffusers "
            "or safetensors."
        )
    return write_graph(
        folder / FILES[facts.format],
        module.network,
        kind=facts.format,
        conditioner=module.conditioner,
        shape=module.latent_shape,
        metadata={"name": facts.name, "ornstein": facts.version, "noise_cond": noise_condition(facts.config)},
    )


WRITERS: dict[str, Callable[[Path, DiffusionModule, Facts], Made]] = {
    "diffusers": _pipeline,
    "safetensors": _tensors,
    "onnx": _graph,
    "torch_export": _graph,
}


def _facts(
    request: Request, stored: StoredRun, cfg: DictConfig, module: DiffusionModule, evaluation: Mapping[str, Any]
) -> Facts:
    from omegaconf import OmegaConf

    from ornstein import __version__
    from ornstein.cli.build import plain
    from ornstein.experiment import RunDirectory
    from ornstein.experiment.export.card import Facts
    from ornstein.networks import count_parameters

    name = str(stored.config.get("name") or stored.folder.name)
    # What a running command would ask Hydra for.
    OmegaConf.update(cfg, "paths.run_dir", str(stored.folder))
    OmegaConf.update(cfg, "name", name)
    resolved = plain(cfg)
    config = {key: value for key, value in resolved.items() if key in _OF_THE_MODEL}
    # Where things lie on this machine is nobody else's business.
    config["data"] = {key: value for key, value in resolved["data"].items() if key not in ("root", "latents")}
    config["trainer"] = {"max_steps": resolved["trainer"].get("max_steps")}
    config["init"] = {**(resolved.get("init") or {}), "from": None}
    kind = request.weights if config.get("ema") else "model"
    return Facts(
        name=name,
        format=request.format,
        config=config,
        parameters=count_parameters(module.network),
        weights=kind if kind in ("ema", "model") else f"ema (std {kind})",
        images_seen=module.images_seen,
        version=__version__,
        summary=RunDirectory(stored.folder, create=False).summary(),
        evaluation=evaluation,
    )


def _record(facts: Facts) -> dict[str, Any]:
    return {
        "name": facts.name,
        "format": facts.format,
        "ornstein": facts.version,
        "weights": facts.weights,
        "images_seen": facts.images_seen,
        "parameters": facts.parameters,
        "config": facts.config,
    }


def _evaluation(named: str | None, stored: StoredRun) -> dict[str, Any]:
    """``evaluation.json`` of the folder that was named, or of the run's own; empty where there is none.

    Raises:
        OrnsteinError: the folder that was named holds none.
    """
    from ornstein.experiment.atomic import read_json

    path = Path(named).expanduser() if named is not None else stored.folder
    file = path if path.is_file() else path / "evaluation.json"
    if named is not None and not file.is_file():
        raise OrnsteinError(f"evaluation={named} holds no evaluation.json: name a folder that ornstein evaluate made.")
    try:
        return read_json(file)
    except ValueError as error:
        raise OrnsteinError(f"{file} is not JSON ({error}): score the run again.") from error


def _told(made: Made) -> list[str]:
    """What was written, for the terminal."""
    from ornstein.experiment.export.graphs import Graph
    from ornstein.experiment.export.pipelines import Model, Pipeline

    if isinstance(made, Pipeline):
        trust = "" if made.native else ", trust_remote_code=True"
        lines = [
            f"{made.name} of {', '.join(made.components.values())}",
            f"largest difference of its outputs to the run's: {made.error:.1g} of their deviation",
        ]
        lines += [f"note: {sentence}" for sentence in made.notes]
        return [*lines, f"diffusers.DiffusionPipeline.from_pretrained(FOLDER{trust}) opens it"]
    if isinstance(made, Model):
        return [f"{made.name}; largest difference of its images to the run's: {made.error:.1g} of their deviation"]
    if isinstance(made, Graph):
        return [f"inputs {', '.join(made.inputs)}; largest difference to the network {made.error:.1g}"]
    return [", ".join(made)]


if __name__ == "__main__":
    main()
