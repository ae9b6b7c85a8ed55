"""Latents on disk: what is written is what the codec gives, what is damaged or foreign is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ornstein.codecs import Codec, DiagonalGaussian
from ornstein.data import DataModule, ImageDataset
from ornstein.data.latents import Latents, Recipe, array_path, check_codec, facts_path, scale_of, shape_of, take_scale
from ornstein.data.latents_write import LatentWriter
from ornstein.errors import OrnsteinError
from ornstein.training.encode import encode_images, fill
from ornstein.training.latents import clean_latents

COUNTS = {"train": 23, "val": 7}
SHARD = 5
CPU = torch.device("cpu")


class Tiny(Codec):
    """4x4 grey images to 3x2x2 latents by a convolution under which mirroring an image does not mirror its latent."""

    def __init__(self, *, stochastic: bool = False, scale: float = 2.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.encoder = nn.Conv2d(1, 6, 2, stride=2)
        self.register_buffer("scale", torch.full((1, 3, 1, 1), scale))
        self.register_buffer("shift", torch.tensor([0.1, -0.2, 0.3]).reshape(1, 3, 1, 1))
        self.channels, self.size, self.sigma_data, self.stochastic = 3, 2, 1.0, stochastic
        self.decode_range = (-1.0, 1.0)
        self.requires_grad_(False)

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(*self.encoder(x).chunk(2, dim=1))

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        posterior = self.posterior(x)
        return ((posterior.sample(generator) if self.stochastic else posterior.mean) - self.shift) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        return z[:, :1].repeat_interleave(2, -1).repeat_interleave(2, -2)


def dataset(*, split: str, labels: bool = True, seed: int = 0) -> ImageDataset:
    rng = np.random.default_rng([seed, COUNTS[split]])
    return ImageDataset(
        rng.integers(0, 256, (COUNTS[split], 1, 4, 4), dtype=np.uint8),
        name="tiny",
        split=split,  # type: ignore[arg-type]
        labels=rng.integers(0, 3, COUNTS[split]) if labels else None,
        class_names=["a", "b", "c"],
        captions=[f"{split} {row}" for row in range(COUNTS[split])],
    )


def recipe_for(codec: Codec, **changes: Any) -> Recipe:
    splits = {split: dataset(split=split) for split in COUNTS}
    scale, shift = scale_of(codec)
    whole = Recipe(
        data="tiny",
        image_size=4,
        channels=1,
        images={split: images.images_fingerprint for split, images in splits.items()},
        counts=COUNTS,
        codec=type(codec).__name__,
        codec_fingerprint=codec.fingerprint,
        scale=scale,
        shift=shift,
        stochastic=codec.stochastic,
        shape=shape_of(codec),
        store="moments" if codec.stochastic else "mean",
        flip=False,
        dtype="float32",
        precision="float32",
        seed=0,
        shard_images=SHARD,
    )
    return dataclasses.replace(whole, **changes)


def write(folder: Path, codec: Codec, **changes: Any) -> list[str]:
    """Encodes what is not there; gives the shards that were."""
    writer, made = LatentWriter(folder, recipe_for(codec, **changes), command="make it"), []
    try:
        for shard in writer.shards():
            images = dataset(split=shard.split)
            with writer.claim(shard) as mine:
                assert mine
                if writer.done(shard):
                    continue
                with writer.open(shard, images) as array:
                    fill(array, codec, images, shard.rows, recipe=writer.recipe, device=CPU, batch_size=2)
                made.append(f"{shard.split}/{shard.number}")
    finally:
        writer.close()
    return made


def module(folder: Path | None, **options: Any) -> DataModule:
    return DataModule(dataset, batch_size=6, seed=5, latents=None if folder is None else str(folder), **options)


def pixels(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


# ---- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("store", "stochastic"), [("mean", False), ("moments", True), ("moments", False)])
def test_planes_are_what_the_codec_gives(tmp_path: Path, store: str, stochastic: bool, flip: bool, dtype: str) -> None:
    codec = Tiny(stochastic=stochastic)
    write(tmp_path, codec, store=store, flip=flip, dtype=dtype)
    latents, images = Latents(tmp_path, "train"), dataset(split="train")
    rows = [22, 0, 7, 7, -1, 12]  # over several shards, out of order, twice, from the end
    found = latents.batch(rows, flip=flip)
    x = pixels(images.batch(rows)["image"])
    views = {"latent": x} | ({"latent_flipped": x.flip(-1)} if flip else {})
    expected = {}
    for name, view in views.items():
        posterior = codec.posterior(view)
        expected[name] = (posterior.mean - codec.shift) * codec.scale
        if store == "moments":
            expected[f"{name}_std"] = posterior.std * codec.scale
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # Encoded in other batches (1e-6), or rounded to the 11 bits of float16.
        assert value.dtype == getattr(torch, dtype) and value.is_contiguous()
        torch.testing.assert_close(value.float(), expected[name], rtol=1e-3 if dtype == "float16" else 0, atol=1e-6)
    if flip:  # what makes it worth while to keep both
        assert not torch.allclose(found["latent_flipped"].float(), found["latent"].flip(-1).float(), atol=0.1)


def test_labels_captions_and_checksums_are_kept(tmp_path: Path) -> None:
    codec = Tiny()
    write(tmp_path, codec)
    for split in COUNTS:
        latents, images = Latents(tmp_path, split), dataset(split=split)  # type: ignore[arg-type]
        assert len(latents) == len(images)
        assert np.array_equal(latents.labels, images.labels) and latents.captions == images.captions
    facts = json.loads(facts_path(tmp_path, "train", 4).read_text())
    assert (facts["split"], facts["first_image"], facts["images"]) == ("train", 20, 3)
    assert len(facts["sha256"]) == 64
    assert array_path(tmp_path, "train", 4).stat().st_size == facts["bytes"]
    assert [entry.name for entry in tmp_path.rglob("*.tmp")] == []


def test_a_draw_depends_on_seed_image_and_view_alone(tmp_path: Path) -> None:
    """Two shard sizes, two batch sizes: the same draws; another seed: others, of the posterior's spread."""
    codec = Tiny(stochastic=True)
    rows = np.arange(23)
    batches = []
    for name, changes in {"a": {}, "b": {"shard_images": 9}, "c": {"seed": 1}}.items():
        write(tmp_path / name, codec, store="sample", flip=True, **changes)
        batches.append(Latents(tmp_path / name, "train").batch(rows, flip=True))
    torch.testing.assert_close(batches[0], batches[1], rtol=0, atol=1e-6)
    posterior = codec.posterior(pixels(dataset(split="train").batch(rows)["image"]))
    mean, std = (posterior.mean - codec.shift) * codec.scale, posterior.std * codec.scale
    for batch in batches:
        z = (batch["latent"] - mean) / std
        # 276 standard normal values: their mean is within 4/sqrt(276), their variance within 4 sqrt(2/276).
        assert abs(z.mean()) < 0.24 and abs(z.var() - 1) < 0.35
    assert (batches[0]["latent"] - batches[2]["latent"]).abs().max() > 0.1


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OrnsteinError, match=r"train image \d+ reaches .* beyond dtype=float16: set dtype=float32"):
        write(tmp_path, Tiny(scale=1e6), dtype="float16")
    with pytest.raises(OrnsteinError, match="no finite latent for train image 0"):
        write(tmp_path / "inf", Tiny(scale=float("inf")))


# ---- going on, sharing, and damage ---------------------------------------------------------------------------------


def test_whole_shards_are_kept_and_damaged_ones_made_again(tmp_path: Path) -> None:
    codec = Tiny()
    assert len(write(tmp_path, codec)) == 7
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*.npy")}
    assert write(tmp_path, codec) == []
    flipped = bytearray(array_path(tmp_path, "train", 2).read_bytes())
    flipped[-1] ^= 1
    array_path(tmp_path, "train", 2).write_bytes(flipped)
    array_path(tmp_path, "train", 3).write_bytes(b"cut short")
    facts_path(tmp_path, "val", 1).write_text("{")
    facts_path(tmp_path, "val", 0).unlink()
    for split, named in {"train": "2 of the 5 shards of train.*train/00002.npy", "val": "2 of the 2 shards"}.items():
        with pytest.raises(OrnsteinError, match=f"{named}.*python -m ornstein.cli.encode.*goes on"):
            Latents(tmp_path, split)  # type: ignore[arg-type]
    assert write(tmp_path, codec) == ["train/2", "train/3", "val/0", "val/1"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.npy")} == whole


def test_a_shard_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """Stopped in the middle: nothing under the final name; what a killed process leaves is swept up."""
    writer = LatentWriter(tmp_path, recipe_for(Tiny()), command="")
    shard, images = writer.shards()[0], dataset(split="train")
    with pytest.raises(KeyboardInterrupt), writer.open(shard, images) as array:
        array[:] = 1
        raise KeyboardInterrupt
    assert not list((tmp_path / "train").iterdir()) and not writer.done(shard)
    (tmp_path / "train" / ".00000.npy.1-abc.tmp").write_bytes(b"half")
    with writer.open(shard, images) as array:
        array[:] = 1
    assert writer.done(shard)
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["00000.json", "00000.npy"]
    writer.close()


HOLDER = """
import sys
sys.path.insert(0, {tests!r})
import test_latents as here
from pathlib import Path
writer = here.LatentWriter(Path({folder!r}), here.recipe_for(here.Tiny()), command="")
with writer.claim(writer.shards()[1]) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def test_a_shard_belongs_to_one_process_until_it_dies(tmp_path: Path) -> None:
    code = HOLDER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "True"
        writer = LatentWriter(tmp_path, recipe_for(Tiny()), command="")
        claims = []
        for shard in writer.shards()[:3]:
            with writer.claim(shard) as mine:
                claims.append(mine)
        assert claims == [True, False, True]
    finally:
        holder.kill()
        holder.wait()
    with writer.claim(writer.shards()[1]) as mine:
        assert mine
    writer.close()


@pytest.mark.parametrize("what", ["recipe", "foreign", "file", "full"])
def test_a_folder_that_cannot_take_them_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    folder = tmp_path / "out"
    if what == "recipe":
        write(folder, Tiny())
        told = r"another recipe \(store mean there and moments here, dtype float32 there and float16 here\)"
        changes = {"store": "moments", "dtype": "float16"}
    elif what == "foreign":
        folder.mkdir()
        (folder / "thesis.txt").write_text("dear")
        told, changes = r"something else \(thesis.txt, say\)", {}
    elif what == "file":
        folder.write_text("dear")
        told, changes = "is a file", {}
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        told, changes = "do not fit.*dtype=float16", {}
    before = sorted(tmp_path.rglob("*.npy"))
    with pytest.raises(OrnsteinError, match=told):
        LatentWriter(folder, recipe_for(Tiny(), **changes), command="")
    assert sorted(tmp_path.rglob("*.npy")) == before


# ---- whose latents they are ----------------------------------------------------------------------------------------


def other_weights() -> Codec:
    codec = Tiny()
    codec.encoder.weight.data[0, 0, 0, 0] += 1e-6
    return codec


class Other(Tiny):
    """The same weights under another name."""


class Unmeasured(Tiny):
    """Whose scale is to be measured on training images; one and zero until then."""

    def __init__(self, *, scale: float = 1.0, measured_images: int = 9) -> None:
        super().__init__(scale=scale)
        self.measured_images = measured_images


# The codec that wrote, how, the codec that reads, whether it flips, and the words of the refusal (None: taken).
MATCHES: list[tuple[Codec, dict[str, Any], Codec, bool, str | None]] = [
    (Tiny(), {}, Tiny(), False, None),
    (Tiny(), {"flip": True}, Tiny(), False, None),
    (Tiny(), {"flip": True}, Tiny(), True, None),
    (Tiny(), {"store": "moments"}, Tiny(), False, None),
    (Tiny(stochastic=True), {}, Tiny(), False, None),
    (Tiny(), {"store": "moments"}, Tiny(stochastic=True), False, None),
    (Tiny(stochastic=True), {"store": "sample"}, Tiny(stochastic=True), False, None),
    (Tiny(), {}, Tiny(), True, "no mirrored views data.flip=true data.flip=false"),
    (Tiny(), {}, Tiny(stochastic=True), False, "means draws codec.sample_posterior=false"),
    (Tiny(stochastic=True), {"store": "sample"}, Tiny(), False, "draws mean codec.sample_posterior=true"),
    (Tiny(), {}, Tiny(scale=1.5), False, "Tiny with another scale or shift"),
    (Tiny(), {}, other_weights(), False, "Tiny with other weights"),
    (Tiny(), {}, Other(), False, "another codec (Tiny, and this run's is Other)"),
]


def test_a_scale_that_was_to_be_measured_is_the_one_of_the_latents() -> None:
    recipe, codec = recipe_for(Unmeasured(scale=3.7, measured_images=0)), Unmeasured()
    check_codec(recipe, codec, folder="here")
    take_scale(codec, recipe)
    assert codec.measured_images == 0 and scale_of(codec) == (recipe.scale, recipe.shift)
    assert torch.equal(codec.scale, torch.full((1, 3, 1, 1), 3.7))
    with pytest.raises(OrnsteinError, match="another scale"):
        check_codec(recipe, Unmeasured(measured_images=0), folder="here")


@pytest.mark.parametrize(("wrote", "how", "reads", "flip", "told"), MATCHES)
def test_whether_latents_are_those_of_a_codec(
    wrote: Codec, how: dict[str, Any], reads: Codec, flip: bool, told: str | None
) -> None:
    recipe = recipe_for(wrote, **how)
    if told is None:
        check_codec(recipe, reads, folder="here", flip=flip)
        return
    with pytest.raises(OrnsteinError) as caught:
        check_codec(recipe, reads, folder="here", flip=flip, command="encode THIS")
    words = [*told.split(), "data.latents=here", "`encode", "THIS`"]
    assert [word for word in words if word not in str(caught.value)] == []


def test_whether_they_are_those_of_the_images(tmp_path: Path) -> None:
    """Labels do not matter: they come from the data set."""
    write(tmp_path, Tiny())
    unlabelled = module(tmp_path, num_classes=None)
    assert "label" not in next(iter(unlabelled.train_dataloader()))
    other = DataModule(lambda **given: dataset(**given, seed=1), batch_size=6, latents=str(tmp_path))
    other.setup()  # to evaluate needs no latents
    with pytest.raises(OrnsteinError, match=r"other train images \(23 of tiny at 4x4\).*make theirs by"):
        other.train_dataloader()


@pytest.mark.parametrize(
    ("index", "told"),
    [
        (None, "no latents.*make them by"),
        ("{", "index.json is damaged"),
        ('{"format": "ornstein.latents.0"}', "format ornstein.latents.0.*reads ornstein.latents.1"),
        ('{"format": "ornstein.latents.1", "recipe": {"data": "x"}}', "index.json is damaged"),
    ],
)
def test_what_is_no_latents_is_refused(tmp_path: Path, index: str | None, told: str) -> None:
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    with pytest.raises(OrnsteinError, match=told):
        Latents(tmp_path, "train")


# ---- reading -------------------------------------------------------------------------------------------------------


def test_workers_are_handed_paths_not_arrays(tmp_path: Path) -> None:
    write(tmp_path, Tiny())
    latents = Latents(tmp_path, "train")
    first = latents.batch([1, 2])
    again = pickle.loads(pickle.dumps(latents))
    assert latents._maps and not again._maps
    assert torch.equal(again.batch([1, 2])["latent"], first["latent"])
    with pytest.raises(IndexError):
        latents.batch([23])


def same_but_for_pixels(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() - theirs.keys() == {"latent"} and theirs.keys() - ours.keys() == {"image"}
    for key in ours.keys() & theirs.keys():
        assert torch.equal(ours[key], theirs[key]) if isinstance(ours[key], Tensor) else ours[key] == theirs[key]


@pytest.mark.parametrize("options", [{}, {"limit": 9}, {"num_workers": 1}, {"num_workers": 2}], ids=str)
def test_batches_are_those_of_the_images_in_the_same_order(tmp_path: Path, options: dict[str, int]) -> None:
    """Two epochs and a half of training, and validation."""
    codec = Tiny()
    write(tmp_path, codec)
    cached, plain = module(tmp_path, **options), module(None, limit=options.get("limit"))
    loaders: list[Callable[[DataModule], Any]] = [lambda m: islice(m.train_dataloader(), 10), DataModule.val_dataloader]
    for batches in loaders:
        count = 0
        for ours, theirs in zip(batches(cached), batches(plain), strict=True):
            same_but_for_pixels(ours, theirs)
            torch.testing.assert_close(ours["latent"], codec.encode(pixels(theirs["image"])), rtol=0, atol=1e-6)
            count += 1
        assert count in (10, 2)
    assert torch.equal(cached.train.batch([3])["image"], plain.train.batch([3])["image"])  # for statistics


def test_ranks_and_resumed_runs_read_their_share(tmp_path: Path) -> None:
    write(tmp_path, Tiny())
    whole = [batch["index"] for batch in islice(module(tmp_path).train_dataloader(), 8)]
    for rank in (0, 1):
        shard = module(tmp_path)
        shard.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        shard.start_batch = 1
        found = [batch["index"] for batch in islice(shard.train_dataloader(), 3)]
        assert all(torch.equal(a, b) for a, b in zip(found, whole[2 + rank :: 2], strict=True))


def test_images_come_along_where_a_conditioner_looks_at_them(tmp_path: Path) -> None:
    write(tmp_path, Tiny())
    data = module(tmp_path)
    data.latents_with_images = True
    batch = next(iter(data.val_dataloader()))
    assert {"latent", "image", "label", "index", "caption"} == batch.keys()
    assert torch.equal(batch["image"], data.val.batch(batch["index"])["image"])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_step_sees_what_encoding_now_would_give(tmp_path: Path, stochastic: bool, flip: bool) -> None:
    """The same draws from the same generator: which images are mirrored, and what is drawn from the posterior."""
    codec = Tiny(stochastic=stochastic)
    write(tmp_path, codec, flip=flip)
    rows = np.arange(23)
    mirrored = torch.arange(23) % 3 == 0 if flip else None
    found = []
    for batch in (dataset(split="train").batch(rows), Latents(tmp_path, "train").batch(rows, flip=flip)):
        generator = torch.Generator().manual_seed(1)
        x0 = clean_latents(batch, codec, flip=mirrored, generator=generator)
        found.append((x0, torch.randn(3, generator=generator)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    if stochastic:  # and anew at every visit
        other = clean_latents(batch, codec, flip=mirrored, generator=torch.Generator().manual_seed(2))
        assert not torch.allclose(other, found[1][0], atol=0.1)


def test_reduced_precision_runs_the_codec_in_it() -> None:
    codec, images = Tiny(), dataset(split="train").batch(range(23))
    found = [
        encode_images(
            codec, images["image"], images["index"], recipe=recipe_for(codec, precision=name), planes=("latent",)
        )
        for name in ("float32", "bfloat16")
    ]
    assert found[1].dtype == torch.float32
    error = (found[0] - found[1]).abs().max()
    assert 1e-4 < error < 0.1  # bfloat16 keeps 8 bits


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told in a sentence, and gone on with when there is room."""

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OrnsteinError, match=r"the disk of out=.* is full"):
            write(tmp_path, Tiny())
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"index.json", ".lock"}
    write(tmp_path, Tiny())
    assert len(Latents(tmp_path, "train")) == 23
