"""Sample number i is sample number i: whatever the batch, the company, or the way it was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ornstein
from ornstein.cli.load import Run
from ornstein.cli.ranks import Ranks, spread
from ornstein.cli.sample import prepare_run, sample
from ornstein.errors import OrnsteinError

COUNT = 16


@pytest.fixture(scope="module")
def run(trained: Path) -> Run:
    return ornstein.load(trained)


def draw(run: Run, count: int = COUNT, **options: Any) -> tuple[Tensor, dict[int, Tensor]]:
    """Images, and the noise of every step by its number: what each sample drew, in order."""
    noise: dict[int, list[Tensor]] = {}

    def watch(step: int, state: Any) -> None:
        for number in (0, step + 1):
            noise.setdefault(number, []).append(state.noise(number)) if number or step == 0 else None

    images = run.sample(count, watch=watch, **options)
    return images, {number: torch.cat(parts) for number, parts in noise.items()}


def assert_equal_to_rounding(ours: Tensor, theirs: Tensor) -> None:
    """Convolutions and matrix products of another batch size add up in another order: in float32 about 1e-6 of a value,
    so that a pixel changes by a level only where it lies that near to the middle between two."""
    apart = (ours.int() - theirs.int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


CASES = [
    {"sampler": "ddim", "steps": 4},
    {"sampler": "ddpm", "steps": 6},
    {"sampler": "heun", "steps": 3, "guidance": "cfg", "scale": 2.0},
    {"sampler": "dpmpp_2m", "steps": 4, "labels": [3, 1, 4]},
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: options["sampler"])
def test_neither_batch_size_nor_company_changes_a_sample(run, options):
    images, noise = draw(run, **options)
    assert images.dtype == torch.uint8 and images.shape == (COUNT, 1, 8, 8)
    for batch_size in (1, 3, 16):
        again, same = draw(run, batch_size=batch_size, **options)
        assert_equal_to_rounding(again, images)
        assert same.keys() == noise.keys()
        assert all(torch.equal(same[number], noise[number]) for number in noise)
    # Labels go by place in what was asked for, balanced ones by the sample's number.
    labels = options.get("labels")
    for first, count in [(5, 3), (15, 1), (2, 9)]:
        shifted = None if labels is None else [labels[(first + i) % len(labels)] for i in range(count)]
        part, drawn = draw(run, count, first_index=first, **{**options, "labels": shifted})
        assert_equal_to_rounding(part, images[first : first + count])
        assert all(torch.equal(drawn[number], noise[number][first : first + count]) for number in noise)


def test_the_seed_and_the_number_both_count(run):
    images = run.sample(4, steps=3)
    assert torch.equal(images, run.sample(4, steps=3))
    assert not torch.equal(images, run.sample(4, steps=3, seed=1))
    assert len({bytes(image.numpy().tobytes()) for image in images}) == 4


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``shares.py``, which the processes that it starts import by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return import_module("shares")


@pytest.mark.slow
def test_noise_and_labels_are_the_same_to_the_bit_over_processes(trained, shares):
    alone = shares.drawn_noise(Ranks(), str(trained), COUNT, 4)
    assert [number for number, _, _ in alone] == list(range(COUNT))
    assert [label for _, label, _ in alone] == [i % 10 for i in range(COUNT)]
    assert len({digest for _, _, digest in alone}) == COUNT
    assert shares.drawn_noise(Ranks(), str(trained), COUNT, 5) == alone
    assert spread(shares.drawn_noise, 2, str(trained), COUNT, 5) == alone
    with pytest.raises(OrnsteinError, match=r"^sampler=x cannot: choose y\.$"):
        spread(shares.refuse, 2)


@pytest.mark.slow
def test_the_figures_do_not_depend_on_how_they_were_taken(command, trained, tmp_path, compose):
    """Other batches, loading processes, and drawing processes: started by the command, and by torchrun."""
    words = [f"run={trained}", "metrics=digits", "num_samples=80", "sampler.steps=4", "keep_samples=npz"]
    ways = {
        "plain": [],
        "batches": ["batch_size=7", "data.num_workers=2", "data.eval_batch_size=11"],
        "processes": ["devices=2", "batch_size=16"],
    }
    for name, more in ways.items():
        result = command("evaluate.py", *words, *more, f"hydra.run.dir={name}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).parents[2] / "evaluate.py")
    result = subprocess.run(
        [sys.executable, *torchrun, script, *words, "hydra.run.dir=${oc.env:RANK}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(ornstein.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "1").exists(), "only the first process leaves a folder"
    assert (tmp_path / "0" / "metric_card.png").is_file() and result.stdout.count("written to") == 1
    reports = {
        name: json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("plain", *list(ways)[1:], "0")
    }
    stored = {name: np.load(tmp_path / name / "samples.npz") for name in reports}
    for name, report in reports.items():
        assert report["sampling"]["processes"] == (1 if name in ("plain", "batches") else 2)
        assert report["values"].keys() == reports["plain"]["values"].keys()
        for figure, value in reports["plain"]["values"].items():
            # A sample rounds by its batch: a pixel in a hundred moves by a level (assert_equal_to_rounding).
            # KID is a difference of means near 0, so it is held to a share of the kernel's own size.
            assert report["values"][figure] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, figure)
        assert np.array_equal(stored[name]["arr_1"], stored["plain"]["arr_1"])
        both = [torch.from_numpy(stored[which]["arr_0"]) for which in (name, "plain")]
        assert both[0].shape == (80, 8, 8, 3)
        assert_equal_to_rounding(*both)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["sampler=dpmpp_2m", "sampler.steps=5", "guidance=cfg", "guidance.scale=2"],
        ["labels=[3]", "seed=7", "first_index=20", "batch_size=5"],
        ["weights=model", "checkpoint=best"],
    ],
    ids=lambda overrides: " ".join(overrides) or "the run's own",
)
def test_the_command_and_python_give_the_same(compose, trained, tmp_path, overrides):
    argv = [f"run={trained}", "num_samples=12", *overrides]
    prepare_run(argv)
    folder = tmp_path / "samples"
    sample(compose(*argv, config_name="sample", run_dir=folder))
    stored = np.load(folder / "samples.npz")

    given = dict(override.split("=") for override in overrides)
    loaded = ornstein.load(trained, checkpoint=given.get("checkpoint", "last"), weights=given.get("weights", "ema"))
    options: dict[str, Any] = {key: given[key] for key in ("sampler", "guidance") if key in given}
    options |= {key: int(given[key]) for key in ("seed", "first_index", "batch_size") if key in given}
    options |= {"steps": int(given["sampler.steps"])} if "sampler.steps" in given else {}
    options |= {"scale": float(given["guidance.scale"])} if "guidance.scale" in given else {}
    options |= {"labels": [3]} if "labels" in given else {}
    images = loaded.sample(12, **options)
    assert np.array_equal(stored["arr_0"], images.permute(0, 2, 3, 1).numpy())
    first = options.get("first_index", 0)
    assert stored["arr_1"].tolist() == ([3] * 12 if "labels" in given else [i % 10 for i in range(first, first + 12)])
    assert sorted(path.name for path in (folder / "samples").iterdir()) == sorted(
        ["grid.png", *(f"{i:06d}.png" for i in range(first, first + 12))]
    )


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_samples_are_kept_for_others_evaluators(compose, trained, run, tmp_path, kind):
    argv = [f"run={trained}", "num_samples=5", "first_index=3", "batch_size=2", f"keep_samples={kind}"]
    prepare_run(argv)
    folder = tmp_path / "kept"
    sample(compose(*argv, config_name="sample", run_dir=folder))
    images = run.sample(5, first_index=3, batch_size=2).permute(0, 2, 3, 1).numpy()
    if kind == "npz":
        stored = np.load(folder / "samples.npz", allow_pickle=False)
        assert stored["arr_1"].tolist() == [3, 4, 5, 6, 7]
        assert np.array_equal(stored["arr_0"], images.repeat(3, axis=-1))
    else:
        from PIL import Image

        files = sorted((folder / "images").iterdir())
        assert [file.name for file in files] == [f"{i:06d}.png" for i in range(3, 8)]
        assert all(
            np.array_equal(np.asarray(Image.open(file)), image[..., 0])
            for file, image in zip(files, images, strict=True)
        )
    assert not (folder / "samples").exists()


def test_checkpoints_and_weights_are_those_that_were_asked_for(trained):
    last, best = (torch.load(trained / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
    assert best["global_step"] < last["global_step"] == 60
    samples = {}
    for checkpoint, state in [("last", last), ("best", best)]:
        for weights, expected in [
            ("ema", state["callbacks"]["EMA"]["network"]),
            ("model", {key.removeprefix("network."): value for key, value in state["state_dict"].items()}),
        ]:
            run = ornstein.load(trained, checkpoint=checkpoint, weights=weights)
            for name, value in run.module.network.state_dict().items():
                assert torch.equal(value, expected[name]), name
            samples[checkpoint, weights] = run.sample(4, steps=3)
    kinds = list(samples)
    for i, one in enumerate(kinds):
        for other in kinds[:i]:
            assert not torch.equal(samples[one], samples[other]), (one, other)
    file = ornstein.load(trained / "checkpoints" / "best.ckpt")
    assert torch.equal(file.sample(4, steps=3), samples["best", "ema"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": "nope"}, "Could not find 'sampler/nope'"),
        ({"steps": 0}, "sampler.steps=0"),
        ({"scale": 2.0}, "guidance.scale"),
        ({"labels": [10]}, "0 to 9"),
        ({"labels": []}, "0 to 9"),
        ({"sampler": "ddim", "steps": -1}, "sampler.steps=-1"),
    ],
)
def test_what_a_run_cannot_do_is_told(run, options, words):
    from ornstein.cli.launch import find_mistake

    with pytest.raises(Exception) as caught:
        run.sample(2, **options)
    mistake = find_mistake(caught.value)
    assert mistake is not None and words in str(mistake)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpoint": "newest"}, "choose last or best"),
        ({"weights": "average"}, "choose ema, model, or the length"),
    ],
)
def test_what_cannot_be_loaded_is_told(trained, options, words):
    with pytest.raises(OrnsteinError, match=words):
        ornstein.load(trained, **options)


def test_a_damaged_or_missing_run_is_told(trained, tmp_path):
    with pytest.raises(OrnsteinError, match="no such folder"):
        ornstein.load(tmp_path / "nowhere")
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
    with pytest.raises(OrnsteinError, match="has no last checkpoint"):
        ornstein.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    whole = (trained / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    for run in (tmp_path, tmp_path / "checkpoints" / "last.ckpt"):
        with pytest.raises(OrnsteinError, match="damaged"):
            ornstein.load(run)
