import os
from collections import Counter, OrderedDict, namedtuple
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.experiment.checkpoint_io import AtomicCheckpointIO
from ornstein.experiment.plain_state import to_plain

Pair = namedtuple("Pair", "a b")


class Colour(Enum):
    RED = "red"


PLAIN = [
    (OrderedDict(a=1), {"a": 1}),
    (Counter({100: 2}), {100: 2}),
    (np.float64(0.1), 0.1),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (np.str_("x"), "x"),
    (Path("a/b"), "a/b"),
    (Pair(1, (2, None)), (1, (2, None))),
    (torch.Size([2, 3]), (2, 3)),
    (Colour.RED, "red"),
    ({np.int64(1): [True]}, {1: [True]}),
    (float("inf"), float("inf")),
]


@pytest.mark.parametrize(("value", "plain"), PLAIN, ids=lambda v: type(v).__name__)
def test_harmless_things_become_plain_and_load(tmp_path: Path, value: Any, plain: Any) -> None:
    converted = to_plain(value)
    assert converted == plain and type(converted) is type(plain)
    AtomicCheckpointIO().save_checkpoint({"x": value}, tmp_path / "a.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt") == {"x": plain}


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (
            {"callbacks": [{"rng": np.zeros(3)}]},
            r"checkpoint\['callbacks'\]\[0\]\['rng'\] is a numpy.ndarray",
        ),
        ({"f": {"g": (1, len)}}, r"checkpoint\['f'\]\['g'\]\[1\] is a builtins.builtin_function"),
        ({"model": torch.nn.Linear(1, 1)}, r"checkpoint\['model'\] is a torch.nn.modules.linear.Linear"),
        ({"s": {1, 2}}, r"checkpoint\['s'\] is a builtins.set"),
        ({"k": {(1, 2): 3}}, r"checkpoint\['k'\] has a key of type tuple"),
    ],
)
def test_anything_else_is_refused_with_its_place(tmp_path: Path, value: Any, where: str) -> None:
    target = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"old": 1}, target)
    with pytest.raises(OrnsteinError, match=where):
        AtomicCheckpointIO().save_checkpoint(value, target)
    assert AtomicCheckpointIO().load_checkpoint(target) == {"old": 1}


def test_tensors_of_all_kinds_come_back(tmp_path: Path) -> None:
    state = {
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "bf16": torch.randn(3).bfloat16(),
        "view": torch.arange(6).reshape(2, 3).t(),
        "scalar": torch.tensor(2.0),
    }
    AtomicCheckpointIO().save_checkpoint(state, tmp_path / "a.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert all(torch.equal(loaded[key], state[key]) and type(loaded[key]) is torch.Tensor for key in state)


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    io, target = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"x": 1}, target)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OrnsteinError, match=r"No space left on device.*the last good checkpoint is .*last\.ckpt$"):
        io.save_checkpoint({"x": 2}, target)
    monkeypatch.undo()
    assert io.load_checkpoint(target) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("size", [0, 10, 300, 0.5, 0.99])
def test_a_cut_checkpoint_is_refused_naming_the_good_one(tmp_path: Path, size: float) -> None:
    io = AtomicCheckpointIO()
    for name in ("older.ckpt", "good.ckpt", "last.ckpt"):
        io.save_checkpoint({"x": torch.randn(1000)}, tmp_path / name)
    os.utime(tmp_path / "older.ckpt", (1, 1))
    whole = (tmp_path / "last.ckpt").stat().st_size
    os.truncate(tmp_path / "last.ckpt", int(size * whole) if 0 < size < 1 else int(size))
    with pytest.raises(OrnsteinError, match=r"last\.ckpt is cut short or damaged; the newest good .*good\.ckpt"):
        io.load_checkpoint(tmp_path / "last.ckpt")


def test_damage_inside_is_never_called_good(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    for name in ("only.ckpt", "last.ckpt"):
        io.save_checkpoint({"x": torch.randn(1000)}, tmp_path / name)
        with open(tmp_path / name, "r+b") as file:
            file.seek(1500)
            file.write(b"\xff" * 64)
    os.truncate(tmp_path / "last.ckpt", 2000)
    with pytest.raises(OrnsteinError, match="no other in its folder"):
        io.load_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda p: None, "there is no checkpoint .*no other in its folder"),
        (lambda p: torch.save({"m": torch.nn.Linear(1, 1)}, p), "more than tensors and plain types .*Linear"),
        (lambda p: torch.save([1], p), "holds a list, not a checkpoint"),
        (lambda p: p.write_text("hello"), "cut short or damaged"),
    ],
)
@pytest.mark.parametrize("weights_only", [None, True, False])
def test_what_cannot_be_read_is_told(tmp_path: Path, write: Any, sentence: str, weights_only: bool | None) -> None:
    write(tmp_path / "a.ckpt")
    with pytest.raises(OrnsteinError, match=sentence):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)


def test_names_and_options_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OrnsteinError, match="auto_insert_metric_name"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "step=3.ckpt")
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", storage_options={})
