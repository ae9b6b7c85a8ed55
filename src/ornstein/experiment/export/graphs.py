"""The network alone as a graph that runs without this package: ONNX, and ``torch.export``'s ``.pt2``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.conditioning import Conditioner

FILES = {"onnx": "network.onnx", "torch_export": "network.pt2"}
TOLERANCE = 1e-3  # largest difference to the network, over its output's deviation, that an export may have
_TOKENS = 8  # of the caption that a graph is traced with; its length stays free


@dataclass(frozen=True)
class Graph:
    """What was written.

    Attributes:
        inputs: names of the inputs, in order, with shapes as text.
        error: largest difference to the network in this process, on another batch than it was traced with.
    """

    inputs: dict[str, str]
    error: float


class _Positional(nn.Module):
    """A network whose keyword tensors come by position, after the first two."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, tuple(names)

    def forward(self, x: Tensor, noise_cond: Tensor, *given: Tensor) -> Tensor:
        return self.network(x, noise_cond, **dict(zip(self.names, given, strict=True)))


def example_inputs(
    conditioner: Conditioner, shape: tuple[int, int, int], *, batch: int, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs of a network for ``batch`` samples of ``shape``, random but for their kinds and ranges."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "x": torch.randn(batch, *shape, generator=generator),
        "noise_cond": torch.rand(batch, generator=generator) * 999 + 1,
    }
    if conditioner.num_classes is not None:
        inputs["label"] = torch.randint(conditioner.num_classes, (batch,), generator=generator)
    if conditioner.text_dim is not None:
        inputs["text"] = torch.randn(batch, _TOKENS, conditioner.text_dim, generator=generator)
        inputs["text_mask"] = torch.ones(batch, _TOKENS, dtype=torch.bool)
    if conditioner.pooled_dim is not None:
        inputs["pooled"] = torch.randn(batch, conditioner.pooled_dim, generator=generator)
    if conditioner.concat_channels:
        inputs["concat"] = torch.randn(batch, conditioner.concat_channels, *shape[1:], generator=generator)
    return inputs


def write_graph(
    path: Path,
    network: nn.Module,
    *,
    kind: str,
    conditioner: Conditioner,
    shape: tuple[int, int, int],
    metadata: Mapping[str, Any],
) -> Graph:
    """Traces the network with a free batch size, writes it, reads it again and compares.

    Args:
        path: the file.
        network: on the CPU, in eval mode.
        kind: onnx or torch_export.
        conditioner: says what the network takes beside x and noise_cond.
        shape: (channels, height, width) of one sample; fixed in the graph.
        metadata: plain JSON values, stored in the file.

    Raises:
        OrnsteinError: a package is missing, the network cannot be traced, or the graph computes something else.
    """
    inputs = example_inputs(conditioner, shape, batch=2)
    names = list(inputs)
    wrapped = _Positional(network, names[2:]).eval()
    batch, length = torch.export.Dim("batch", min=1, max=65536), torch.export.Dim("length", min=2, max=4096)
    free = [{0: batch, 1: length} if name.startswith("text") else {0: batch} for name in names]
    shapes = (*free[:2], tuple(free[2:]))
    notes = {**metadata, "inputs": (described := _describe(inputs))}
    write = _write_onnx if kind == "onnx" else _write_export
    try:
        with torch.no_grad():
            write(path, wrapped, tuple(inputs.values()), shapes, names, notes)
    except (OrnsteinError, OSError):
        raise
    except Exception as error:  # what a tracer meets in a network of one's own is of any kind
        reason = str(error).strip().splitlines()
        raise OrnsteinError(
            f"format={kind}: {type(network).__name__} could not be traced ({type(error).__name__}: "
            f"{reason[0] if reason else ''}): choose format=safetensors."
        ) from error
    other = example_inputs(conditioner, shape, batch=3, seed=1)
    with torch.no_grad():
        expected = wrapped(*other.values())
    given = _run_onnx(path, other) if kind == "onnx" else _run_export(path, other)
    difference = float((given - expected).abs().max())
    if not difference <= TOLERANCE * max(float(expected.std()), 1e-3):
        raise OrnsteinError(
            f"format={kind}: the graph of {type(network).__name__} differs from the network by {difference:.2g}, so it "
            "was not written: choose format=safetensors."
        )
    return Graph(described, difference)


def _describe(inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Shape and type of each input, as text."""
    told = {}
    for name, value in inputs.items():
        sides = ["batch", *map(str, value.shape[1:])]
        if name.startswith("text"):
            sides[1] = "length"
        told[name] = f"({', '.join(sides)}{',' if len(sides) == 1 else ''}) {str(value.dtype).removeprefix('torch.')}"
    return told


def _write_onnx(
    path: Path, network: nn.Module, args: tuple[Tensor, ...], shapes: Any, names: list[str], notes: Mapping[str, Any]
) -> None:
    _need("onnxscript", "onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts, and that one name of an axis is used twice
        program = torch.onnx.export(
            network, args, dynamo=True, dynamic_shapes=shapes, input_names=names, output_names=["output"], verbose=False
        )
    assert program is not None
    for key, value in notes.items():
        program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    # Beside a file of over 2 GB, which protobuf cannot hold, its weights lie in one of their own.
    program.save(str(path))


def _run_onnx(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    _need("onnxruntime")
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def _write_export(
    path: Path, network: nn.Module, args: tuple[Tensor, ...], shapes: Any, names: list[str], notes: Mapping[str, Any]
) -> None:
    program = torch.export.export(network, args, dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={"ornstein.json": json.dumps(notes)})


def _run_export(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    module = torch.export.load(path).module()
    with torch.no_grad():
        return module(*inputs.values())


def _need(*packages: str) -> None:
    """Refuses a format whose packages are not installed."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise OrnsteinError(f'format=onnx needs {" and ".join(missing)}: pip install "ornstein[export]".')
