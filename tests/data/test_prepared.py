"""Prepared images: what is written is what was read, and what is damaged, missing or another's is told."""

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ornstein.data import DataModule, Digits, ImageDataset, Prepared
from ornstein.data.bucketed import BucketedImages
from ornstein.data.contact_sheet import CELL, GAP, contact_sheet
from ornstein.data.prepare import joined, plan, read, read_rows, shard_size
from ornstein.data.prepared import ShardedImages
from ornstein.data.prepared_write import Piece, PreparedWriter
from ornstein.errors import OrnsteinError

Make = Callable[..., Path]
RNG = np.random.default_rng(0)


def some(count: int, *, split: str = "train", size: int = 8, captions: bool = True, **options: Any) -> ImageDataset:
    """Random images with labels and captions, the same for equal arguments."""
    rng = np.random.default_rng([count, size, len(split)])
    return ImageDataset(
        rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8),
        name="some",
        split=split,  # type: ignore[arg-type]
        labels=np.arange(count) % 3,
        class_names=("a", "b", "c"),
        captions=[f"number {row}\nof {split}" for row in range(count)] if captions else None,
        **options,
    )


def write(folder: Path, sets: dict[Any, ImageDataset], *, shard_images: int = 7, workers: int = 0) -> list[str]:
    """Prepares splits as the command does; the shards that were made."""
    from ornstein.data.prepare import condition_channels, image_bytes, shapes_of, source_of

    train = sets["train"]
    sizes = {
        "image_size": train.image_size,
        "channels": train.channels,
        "condition_channels": condition_channels(train),
    }
    recipe = {
        "config": {"root": "here"},
        **sizes,
        "shard_images": shard_images,
        "images": {split: {"count": len(each), "source": source_of(each)} for split, each in sets.items()},
    }
    needed = sum(len(each) * image_bytes(each) for each in sets.values())
    writer = PreparedWriter(folder, recipe, needed=needed, command="make it again")
    with writer.alone():
        shards = plan(sets, shard_images=shard_images)
        facts = {(shard.below, shard.number): writer.done(shard) for shard in shards}
        missing = [shard for shard in shards if facts[shard.below, shard.number] is None]
        for shard, piece in read(sets, missing, workers=workers, advance=lambda count: None):
            facts[shard.below, shard.number] = writer.write(shard, piece)
        counts = [facts[shard.below, shard.number]["images"] for shard in shards]  # type: ignore[index]
        told = {"name": train.name, "class_names": list(train.class_names), "num_classes": train.num_classes}
        buckets = [list(shape) for shape in shapes_of(train)] or None
        rest = {"flip": False, "features": None, "sigma_data": 0.5, "buckets": buckets, "captions": True}
        writer.finish(writer.index(shards, counts, **told, **sizes, **rest), shards)
    return [f"{shard.below}/{shard.number}" for shard in missing]


def both(folder: Path, **options: Any) -> tuple[dict[Any, ImageDataset], dict[str, Prepared]]:
    sets: dict[Any, ImageDataset] = {"train": some(23), "val": some(10, split="val"), "test": some(8, split="test")}
    write(folder, sets, **options)
    return sets, {split: Prepared(split=split, root=str(folder)) for split in sets}


@pytest.mark.parametrize("options", [{}, {"shard_images": 100}, {"shard_images": 1}, {"workers": 2}], ids=str)
def test_what_is_written_is_what_was_read(tmp_path: Path, options: dict[str, int]) -> None:
    """Pixels, labels, captions, keys and names of every split, in order and out of it, whatever the shards."""
    sets, found = both(tmp_path, **options)
    for split, there in sets.items():
        here = found[split]
        assert (here.split, here.name, here.class_names) == (split, "some", ("a", "b", "c"))
        assert here.images.shape == there.images.shape and (here.image_size, here.channels) == (8, 3)
        rows = [*range(len(there)), -1, 0, 3, 3]
        ours, theirs = here.batch(rows), there.batch(rows)
        assert ours.keys() == theirs.keys() and ours["caption"] == theirs["caption"]
        for key in ("image", "label", "index"):
            assert torch.equal(ours[key], theirs[key])
        np.testing.assert_array_equal(here.content_keys, there.content_keys)
    with pytest.raises(IndexError, match="rows 23 to 23 of 23"):
        found["train"].batch([23])


def test_training_sees_the_same_batches(tmp_path: Path) -> None:
    """Through the data module, with workers, without labels: what the data set itself gives."""
    write(tmp_path, {split: Digits(split=split, image_size=8) for split in ("train", "val")}, shard_images=100)
    modules = [
        DataModule(Digits, batch_size=16, seed=3, image_size=8, num_classes=None),
        *(DataModule(Prepared, batch_size=16, seed=3, num_workers=n, num_classes=None, root=tmp_path) for n in (0, 2)),
    ]
    first = [next(iter(module.train_dataloader())) for module in modules]
    assert "label" not in first[1] and "label" in Prepared(split="train", root=str(tmp_path)).batch([0])
    for batch in first[1:]:
        assert torch.equal(batch["image"], first[0]["image"]) and torch.equal(batch["index"], first[0]["index"])


def test_workers_are_handed_paths_not_arrays(tmp_path: Path) -> None:
    _, found = both(tmp_path)
    images = found["train"].images
    assert isinstance(images, ShardedImages)
    first = images[np.arange(20)]
    pickled = pickle.dumps(images)
    assert len(pickled) < 2000 < first.nbytes
    np.testing.assert_array_equal(pickle.loads(pickled)[np.arange(20)], first)


def test_fingerprints_come_from_hashes_and_tell_contents_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets, found = both(tmp_path / "a")
    write(tmp_path / "b", {**sets, "train": some(23, size=8).subset(np.arange(22))})
    monkeypatch.setattr(ShardedImages, "__getitem__", lambda self, rows: pytest.fail("pixels were read"))
    prints = [found[split].fingerprint for split in ("train", "val")]
    again = Prepared(split="train", root=str(tmp_path / "a"))
    unlabelled = Prepared(split="train", root=str(tmp_path / "a"), labels=False)
    assert again.fingerprint == prints[0] != prints[1]
    assert unlabelled.fingerprint != prints[0] and unlabelled.images_fingerprint == found["train"].images_fingerprint
    assert Prepared(split="train", root=str(tmp_path / "b")).images_fingerprint != found["train"].images_fingerprint


def test_conditions_and_several_shapes(tmp_path: Path) -> None:
    """A second array beside each shard, and a folder of shards a shape: read back in the data set's order."""
    paired = some(23, conditions=RNG.integers(0, 256, (23, 1, 8, 8), dtype=np.uint8))
    write(tmp_path / "paired", {"train": paired, "val": paired})
    assert torch.equal(
        Prepared(split="val", root=str(tmp_path / "paired")).batch([5, 22])["condition"],
        paired.batch([5, 22])["condition"],
    )
    parts = [RNG.integers(0, 256, (n, 3, h, w), dtype=np.uint8) for n, h, w in ((9, 8, 4), (11, 4, 8))]
    order = RNG.permutation(20)
    images = BucketedImages(parts, [order[:9], order[9:]], image_size=6)
    shaped = ImageDataset(images, name="shaped", split="train", labels=np.arange(20) % 2, class_names=("x", "y"))
    write(tmp_path / "shaped", {"train": shaped, "val": shaped}, shard_images=4)
    assert len(list((tmp_path / "shaped/train/8x4").glob("*.npy"))) == 3
    again = Prepared(split="train", root=str(tmp_path / "shaped"))
    assert again.labels is not None and again.labels.tolist() == (np.arange(20) % 2).tolist()
    for row in range(20):
        np.testing.assert_array_equal(again.images[np.array([row])], shaped.images[np.array([row])])


def test_again_makes_only_what_is_missing_damaged_or_changed(tmp_path: Path) -> None:
    sets, _ = both(tmp_path)
    assert write(tmp_path, sets) == []
    (tmp_path / "train/00001.npy").unlink()
    path = tmp_path / "val/00000.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (tmp_path / "test/00001.json").write_text("{")
    for split, place in (("train", "train/00001.npy"), ("val", "val/00000.npy"), ("test", "test/00001.npy")):
        with pytest.raises(OrnsteinError, match=f"1 of the . shards of {split}.*{place} among them.*`make it again`"):
            Prepared(split=split, root=str(tmp_path))
    assert write(tmp_path, sets) == ["train/1", "val/0", "test/1"]
    np.testing.assert_array_equal(Prepared(split="val", root=str(tmp_path)).images[np.arange(10)], sets["val"].images)


def test_an_unfinished_folder_follows_its_images_a_finished_one_does_not(tmp_path: Path) -> None:
    sets, _ = both(tmp_path)
    pixels = np.array(sets["train"].images[np.arange(23)])
    pixels[8] ^= 1
    changed = dict(sets) | {"train": some(23)}
    changed["train"].images = pixels
    with pytest.raises(OrnsteinError, match="holds the same data set with other images"):
        write(tmp_path, changed)
    index = tmp_path / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"complete": False}))
    with pytest.raises(OrnsteinError, match="is not finished: `make it again` goes on"):
        Prepared(split="train", root=str(tmp_path))
    assert write(tmp_path, changed) == ["train/1"]
    fewer = dict(sets) | {"test": some(8, split="test").subset(np.arange(5))}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"complete": False}))
    write(tmp_path, fewer)
    assert sorted(path.name for path in (tmp_path / "test").iterdir()) == ["00000.json", "00000.npy"]


REFUSED = [
    ({"index.json": "{}"}, "its index.json is damaged .*'format'"),
    ({"index.json": '{"format": "ornstein.latents.1"}'}, "holds ornstein.latents.1 and no .*: name another folder"),
    ({"index.json": '{"format": "ornstein.images.0"}'}, "is of the format ornstein.images.0 and this version reads"),
    ({"index.json": '{"format": "ornstein.images.1", "complete": true, "command": "c"}'}, "is damaged .*'splits'"),
    ({"readme.txt": ""}, "holds no prepared images .no index.json.: make them by `python -m ornstein.cli.prepare"),
]


@pytest.mark.parametrize(("files", "told"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_prepared_folder_is_refused(tmp_path: Path, files: dict[str, str], told: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(OrnsteinError, match=f"data.root=.*{told}"):
        Prepared(split="train", root=str(tmp_path))


def test_another_size_and_a_missing_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"train": some(9), "val": some(4, split="val")})
    with pytest.raises(OrnsteinError, match=r"data.image_size=16 .* was prepared with image_size=8.*`make it again`"):
        Prepared(split="train", root=str(tmp_path), image_size=16)
    assert DataModule(Prepared, batch_size=2, num_classes=3, root=tmp_path).test is None
    with pytest.raises(OrnsteinError, match="data=prepared needs a folder"):
        Prepared(split="train", root=None)


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:
    """Locks are a process's own, so that the other writer is one."""
    import multiprocessing

    recipe = {"config": {}, "condition_channels": None}
    writer = PreparedWriter(tmp_path, recipe, needed=1, command="c")

    def other(queue: Any) -> None:
        try:
            with PreparedWriter(tmp_path, recipe, needed=1, command="c").alone():
                queue.put("wrote")
        except OrnsteinError as error:
            queue.put(str(error))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with writer.alone(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        process = context.Process(target=other, args=(queue,))
        process.start()
        assert "another process writes into out=" in queue.get(timeout=30)
        process.join()


class Holed:
    """Images of which some cannot be read."""

    def __init__(self, images: np.ndarray, bad: set[int]) -> None:
        self.images, self.bad, self.shape = images, bad, images.shape

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        if broken := self.bad & set(np.asarray(rows).tolist()):
            raise OrnsteinError(f"picture {min(broken)} is torn")
        return self.images[rows]


@pytest.mark.parametrize("bad", [{3}, {0, 1, 2}, set(range(7, 14)), set(range(23))], ids=str)
def test_bad_images_are_left_out_and_named(tmp_path: Path, bad: set[int]) -> None:
    whole = some(23)
    holed = some(23)
    _ = holed.content_keys
    holed.images = Holed(whole.images, bad)  # type: ignore[arg-type]
    kept = [row for row in range(23) if row not in bad]
    piece = joined([read_rows(holed, np.arange(start, min(start + 5, 23))) for start in range(0, 23, 5)])
    assert piece.rows.tolist() == kept
    assert sorted(name for name, _ in piece.bad) == sorted(f"train image {row}" for row in bad)
    assert all("is torn" in reason for _, reason in piece.bad)
    if kept:
        write(tmp_path, {"train": holed, "val": whole})
        found = Prepared(split="train", root=str(tmp_path))
        assert found.batch(range(len(kept)))["caption"] == whole.batch(kept)["caption"]
        assert torch.equal(found.batch(range(len(kept)))["image"], whole.batch(kept)["image"])


def test_pieces_join_without_their_empty_ones() -> None:
    empty = Piece(
        np.empty((0, 3, 9, 9), np.uint8), np.empty(0, np.int64), np.empty((0, 16), np.uint8), bad=(("a", "b"),)
    )
    one = read_rows(some(3, captions=False), np.arange(3))
    assert joined([empty, one]).images.shape == (3, 3, 8, 8) and joined([empty, one]).bad == (("a", "b"),)


def test_shards_are_about_64_megabytes() -> None:
    assert shard_size(some(1, size=8)) * 192 == pytest.approx(1 << 26, rel=0.001)


def test_contact_sheet_shows_images_with_their_names() -> None:
    images = some(23, size=8, captions=False)
    sheet = contact_sheet(images, count=9)
    side = CELL // 8 * 8
    assert sheet.width == GAP + 3 * (side + GAP) and sheet.height > sheet.width
    pixels = np.asarray(sheet)
    np.testing.assert_array_equal(
        pixels[GAP : GAP + side : side // 8, GAP : GAP + side : side // 8], images.images[0].transpose(1, 2, 0)
    )
    below = pixels[GAP + side : GAP + side + 15, GAP : GAP + side]
    assert (below < 128).any()  # something is written there
