"""The model card of an export: what the model is, how to draw from it, what it scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ornstein.experiment.export.graphs import FILES, Graph
from ornstein.experiment.export.pipelines import Model, Pipeline

_TENSORS = {
    "prompt_embeds": "(B, L, D), what the run's conditioner gives for B captions",
    "pooled_prompt_embeds": "(B, P), the same captions' vectors",
    "conditioning": "(B, C, H, W) in [-1, 1]",
}
# Figures that a reader looks for first; others follow in the order of the file.
_FIRST = ("fid", "kid", "inception_score", "label_accuracy", "bits_per_dim", "nfe")
_NOT_FIGURES = ("wall_time_s", "steps", "images_seen", "parameters", "flops", "effective_batch", "num_samples")


@dataclass(frozen=True)
class Facts:
    """What a card says of a run.

    Attributes:
        name: of the run.
        format: of the export.
        config: the run's resolved config.
        parameters: of the network.
        weights: ema or model.
        images_seen: in training.
        summary: ``summary.json``.
        evaluation: ``evaluation.json`` of a scored run; empty where there is none.
        version: of the package.
    """

    name: str
    format: str
    config: dict[str, Any]
    parameters: int
    weights: str
    images_seen: int
    version: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)


Made = Pipeline | Model | Graph | Sequence[str]


def model_card(facts: Facts, made: Made) -> str:
    """The card as Markdown, with the front matter that the Hub reads.

    Args:
        facts: the run.
        made: what the export's writer gave: a pipeline, an autoencoder, a graph, or names of files.
    """
    parts = [_front_matter(facts, made), f"# {facts.name}", _opening(facts), "## Use", _use(facts, made)]
    if isinstance(made, Pipeline) and made.notes:
        parts += ["What the pipeline does otherwise than the run's own sampler:", _bullets(made.notes)]
    parts += ["## Settings", _table(("setting", "value"), _settings(facts))]
    figures = _figures(facts)
    told = (
        _table(("figure", "value"), figures) if figures else "None were taken: `ornstein evaluate run=...` takes them."
    )
    parts += ["## Figures", told, "## Data and licence", _licence(facts)]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Facts, made: object) -> str:
    library = {"diffusers": "diffusers", "onnx": "onnx"}.get(facts.format, "pytorch")
    lines = ["---", f"library_name: {library}"]
    conditioned = _target(facts.config, "conditioner")
    if conditioned == "NoConditioning":
        lines.append("pipeline_tag: unconditional-image-generation")
    elif "Text" in conditioned or "Caption" in conditioned:
        lines.append("pipeline_tag: text-to-image")
    lines += ["tags:", "- ornstein", "- diffusion", "- image-generation"]
    if isinstance(made, Pipeline):
        lines.append(f"- diffusers:{made.name}")
    lines += ["# license: name the one that you share these weights under, and remove the sign before it", "---"]
    return "\n".join(lines)


def _opening(facts: Facts) -> str:
    network, data = _target(facts.config, "model.network"), _data(facts.config)
    size = _get(facts.config, "data.image_size")
    classes = _get(facts.config, "conditioner.num_classes")
    kind = f"{classes} classes" if classes else "no labels"
    what = "An autoencoder" if network.endswith("Autoencoder") else "A diffusion model"
    return (
        f"{what} of {data} ({size} pixels, {kind}): {network} with {facts.parameters:,} parameters, trained with "
        f"Ornstein {facts.version} on {facts.images_seen:,} images, repeats counted. "
        + ("These are its averaged (EMA) weights." if facts.weights == "ema" else "These are its weights as trained.")
    )


def _use(facts: Facts, made: Made) -> str:
    if isinstance(made, Pipeline):
        return _use_pipeline(made)
    if isinstance(made, Model):
        return _use_model(made)
    if isinstance(made, Graph):
        return _use_graph(facts, made)
    files = ", ".join(f"`{name}`" for name in made)
    told = (
        f"Weights under the package's own names: {files}; `config.json` is the run's config. A run of the same network "
        "starts from them by `ornstein train init.from=FOLDER`, and in Python:"
    )
    if "config.yaml" in made:
        code = _code("import ornstein", "", 'images = ornstein.load(".").sample(4)  # uint8 (4, C, H, W)')
        return f"{told}\n\n{code}\n\n`ornstein sample run=FOLDER` and `ornstein evaluate run=FOLDER` take it as well."
    return f"{told}\n\n" + _code("from safetensors.torch import load_file", "", f'state = load_file("{made[0]}")')


def _use_pipeline(made: Pipeline) -> str:
    trust = "" if made.native else ", trust_remote_code=True"
    arguments = [f"{key}={value!r}" for key, value in made.call.items()]
    if made.num_classes is not None:
        arguments.insert(0, f"class_labels={[i % made.num_classes for i in range(4)]}")
    elif not made.takes:
        arguments.insert(0, "batch_size=4")
    arguments += [f"{name}={name}" for name in made.takes]
    lines = ["from diffusers import DiffusionPipeline", "import torch", ""]
    lines += [f"{name} = torch.load({name + '.pt'!r})  # {_TENSORS[name]}" for name in made.takes]
    lines += [
        f'pipeline = DiffusionPipeline.from_pretrained("."{trust})  # this folder',
        f"images = pipeline({', '.join(arguments)}, generator=torch.Generator().manual_seed(0)).images",
        'images[0].save("sample.png")',
    ]
    text = _code(*lines)
    if not made.native:
        text += "\n\n`pipeline.py` in this folder does the sampling; read it before you trust it."
    return f"{text}\n\nFor the same noise it gives the images of `ornstein sample`; outputs agree to {made.error:.1g}."


def _use_model(made: Model) -> str:
    code = _code(
        f"from diffusers import {made.name}",
        "",
        f'autoencoder = {made.name}.from_pretrained(".")  # this folder',
    )
    return f"{code}\n\nIts images agree with the run's own to {made.error:.1g}.\n\n{_bullets(made.notes)}"


def _use_graph(facts: Facts, made: Graph) -> str:
    file = FILES[facts.format]
    given = [f'    "{name}": {_example_array(shape)},' for name, shape in made.inputs.items()]
    if facts.format == "onnx":
        lines = ["import numpy", "import onnxruntime", "", f'session = onnxruntime.InferenceSession("{file}")']
        lines += ["inputs = {", *given, "}", "(output,) = session.run(None, inputs)"]
    else:
        lines = ["import numpy", "import torch", "", f'network = torch.export.load("{file}").module()']
        lines += ["inputs = {", *given, "}", "output = network(*map(torch.from_numpy, inputs.values()))"]
    return "\n\n".join(
        [
            "The denoising network alone, with a free batch size; schedule, sampler and guidance are the caller's.",
            _code(*lines),
            "Inputs, in order:",
            "\n".join(f"- `{name}` {shape}" for name, shape in made.inputs.items()),
            "`x` is the noisy sample as the network sees it and `noise_cond` its noise condition: "
            f"{noise_condition(facts.config)}. Outputs agree with the run's network to {made.error:.1g}.",
        ]
    )


def _example_array(shape: str) -> str:
    """A call that makes an input of two samples, of its shape and type as :class:`Graph` tells them."""
    sides, _, kind = shape.rpartition(" ")
    numbers = [{"batch": "2", "length": "8"}.get(side, side) for side in sides.strip("(),").split(", ")]
    return f"numpy.{'zeros' if kind == 'int64' else 'ones'}(({', '.join(numbers)},), dtype=numpy.{kind})"


def noise_condition(config: Mapping[str, Any]) -> str:
    """What the network's second input means."""
    if _target(config, "objective.parameterization") == "EDMPreconditioned":
        return "ln(sigma/alpha)/4, and x is divided by sqrt(sigma^2 + (alpha sigma_data)^2)"
    return "1000 t, with t = 0 at data and t = 1 at noise; step i of a table of 1000 is t = (i + 1)/1000"


def _settings(facts: Facts) -> list[tuple[str, str]]:
    config = facts.config
    rows = [
        ("data", _data(config)),
        ("network", _target(config, "model.network")),
        ("codec", _target(config, "codec")),
        ("conditioning", _target(config, "conditioner")),
        ("noise schedule", _target(config, "scheduler")),
        ("objective", _target(config, "objective")),
        ("the network predicts", _target(config, "objective.parameterization")),
        ("sampler", f"{_target(config, 'sampler')}, {_get(config, 'sampler.steps')} steps"),
        ("guidance", _target(config, "guidance")),
        ("optimizer", f"{_target(config, 'optimizer')}, learning rate {_get(config, 'optimizer.lr')}"),
        ("batch size", _get(config, "data.batch_size")),
        ("training steps", facts.summary.get("steps") or _get(config, "trainer.max_steps")),
        ("images seen", f"{facts.images_seen:,}"),
        ("seed", _get(config, "seed")),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _figures(facts: Facts) -> list[tuple[str, str]]:
    values = {**_numbers(facts.summary), **_numbers(facts.evaluation.get("values") or {})}
    # Figures of few samples bear their number: fid_1k stands where fid would.
    order = {name: re.sub(r"_\d+k?$", "", name) for name in values}
    names = sorted(values, key=lambda name: (_FIRST.index(order[name]) if order[name] in _FIRST else len(_FIRST), name))
    return [(name, f"{values[name]:.5g}") for name in names]


def _numbers(mapping: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in mapping.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if key not in _NOT_FIGURES}


def _licence(facts: Facts) -> str:
    return (
        f"Trained on {_data(facts.config)}; whoever shares these weights names their licence, in the front matter "
        "above and here, with what that data set's own licence asks for."
    )


def _data(config: Mapping[str, Any]) -> str:
    return str(_get(config, "data.name") or _target(config, "data.dataset") or "data of one's own")


def _target(config: Mapping[str, Any], path: str) -> str:
    node = _get(config, path)
    return str(node.get("_target_", "")).rpartition(".")[2] if isinstance(node, Mapping) else ""


def _get(config: Mapping[str, Any], path: str) -> Any:
    node: Any = config
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in [head, ("---", "---"), *rows])


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}." for sentence in sentences)


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
