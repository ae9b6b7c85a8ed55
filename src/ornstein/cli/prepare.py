"""``python -m ornstein.cli.prepare``: any data set as memory-mapped uint8 shards, decoded and resized once."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ornstein.cli.autoencoder import typed_words
from ornstein.cli.encode import remove_empty
from ornstein.cli.latents import choices
from ornstein.cli.launch import launch
from ornstein.cli.progress import rate_bar
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.data.bad import Bad
    from ornstein.data.prepared_write import Piece, PreparedWriter, Shard

# What of a data group decides neither the images nor what is known of them.
_WITHOUT_EFFECT = {
    "balanced",
    "batch_size",
    "download",
    "eval_batch_size",
    "exact_resume",
    "features",
    "flip",
    "latents",
    "limit",
    "limit_reference",
    "max_bad",
    "num_images",
    "num_workers",
    "overlap",
    "reference_images",
    "seed",
    "shuffle_buffer",
    "sigma_data",
    "storage",
    "val_limit",
}
PREVIEW = "preview.png"
REPORT = "bad.json"


@dataclass(frozen=True)
class Source:
    """What is prepared.

    Attributes:
        images: digests and counts of the splits, for the recipe.
        total: number of images, None where it is not known beforehand.
        facts: what a config is to know of the data, for the index.
        bytes: that the images will take.
        shards: reads them: given what advances the bar and what says whether a shard is there already.
        plan: the shards, where they are known beforehand.
    """

    images: dict[str, Any]
    total: int | None
    facts: dict[str, Any]
    bytes: int
    shard_images: int
    shards: Callable[[list[Shard], Callable[[int], None]], Iterator[tuple[Shard, Piece]]]
    plan: list[Shard] | None


def main() -> None:
    """Entry point."""
    launch("prepare", prepare)


def prepare(cfg: DictConfig) -> None:
    """Prepares every split of a data set, or goes on where it stopped.

    Raises:
        OrnsteinError: a data set that cannot be read, more bad images than ``data.max_bad``, a full disk, or a folder
            that holds something else.
    """
    from hydra.core.hydra_config import HydraConfig

    from ornstein.cli.validate import check_root, fill_facts

    _check_options(cfg)
    check_root(cfg, choices())
    fill_facts(cfg)
    _fill_buckets(cfg)

    from ornstein.cli.build import build_data
    from ornstein.cli.quiet import quiet_libraries
    from ornstein.data.bad import Bad
    from ornstein.data.base import ImageDataset
    from ornstein.data.describe import measure_sigma_data
    from ornstein.data.prepared import opened
    from ornstein.data.prepared_write import PreparedWriter

    quiet_libraries()
    config = _config(cfg)
    flip, features, max_bad = bool(cfg.data.get("flip")), cfg.data.get("features"), int(cfg.data.get("max_bad") or 0)
    _all_images(cfg)
    data = build_data(cfg)
    source = _stream(data, cfg) if getattr(data, "streams", False) else _map_style(data, cfg)
    keys = ("image_size", "channels", "condition_channels")
    recipe = {
        "config": config,
        **{key: source.facts[key] for key in keys},
        "shard_images": source.shard_images,
        "images": source.images,
    }
    out = Path(str(cfg.out)).expanduser()
    writer = PreparedWriter(out, recipe, needed=source.bytes, command=_command())
    bad = Bad(max_bad, where=f"{source.facts['name']} ({_named(cfg)})")
    started = time.perf_counter()
    try:
        with writer.alone():
            _announce(source, out)
            shards, counts, made = run(writer, source, bad)
            bad.settle(out / REPORT)
            index = writer.index(shards, counts, flip=flip, features=features, **source.facts)
            train = ImageDataset(split="train", **opened(out, "train", index))
            if cfg.preview:
                _preview(train, out / PREVIEW, count=int(cfg.preview))
            told = {"sigma_data": round(measure_sigma_data(train), 3), "captions": train.captions is not None}
            writer.finish(index | told, shards)
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it stopped", file=sys.stderr)
        raise
    remove_empty(Path(HydraConfig.get().runtime.output_dir), root=Path(cfg.paths.output_root))
    seconds = time.perf_counter() - started
    there = f"; {sum(counts) - made:,} were there already" if sum(counts) > made else ""
    print(f"prepared   {made:,} images in {seconds:.1f} s ({made / seconds:,.0f} images/s){there}")
    if cfg.preview:
        print(f"look at    {out / PREVIEW}")
    print(f"written to {out}: train on it by data=prepared data.root={shlex.quote(str(cfg.out))}")


def run(writer: PreparedWriter, source: Source, bad: Bad) -> tuple[list[Shard], list[int], int]:
    """Writes every shard that is not there, whole and of the same images.

    Returns:
        All shards, how many images each holds, and how many images were made now.

    Raises:
        OrnsteinError: more bad images than may be, as soon as a shard has them; or a full disk.
    """
    facts: dict[tuple[str, int], tuple[Shard, dict[str, Any]]] = {}
    made = 0
    with rate_bar("preparing", source.total) as (advance, say):
        missing: list[Shard] = []
        for shard in source.plan or []:
            found = writer.done(shard)
            if found is None:
                missing.append(shard)
            else:
                facts[shard.below, shard.number] = (shard, found)
                advance(len(shard.rows), False)
        for shard, piece in source.shards(missing, lambda count: advance(count, True)):
            say(f"{shard.below}/{shard.number:05d}")
            for name, reason in piece.bad:
                bad.add(name, reason)
            if bad.count > bad.limit:
                bad.settle()
            found = writer.done(shard) if source.plan is None else None
            if found is None:
                found = writer.write(shard, piece)
                made += len(piece.rows)
            facts[shard.below, shard.number] = (shard, found)
    every = [facts[shard.below, shard.number] for shard in source.plan] if source.plan else list(facts.values())
    for _, each in every:  # those of shards that were there already count as well
        for name, reason in each["bad"]:
            bad.add(name, reason)
    return [shard for shard, _ in every], [each["images"] for _, each in every], made


def _map_style(data: Any, cfg: DictConfig) -> Source:
    """A data set whose images have numbers."""
    from ornstein.data import prepare as reading

    data.setup()
    sets: dict[Any, Any] = {"train": data.train, "val": data.val}
    if data.test is not None:
        sets["test"] = data.test
    train = sets["train"]
    shard_images = cfg.shard_images or reading.shard_size(train)
    shapes = {shape for each in sets.values() for shape in reading.shapes_of(each)}
    return Source(
        images={split: {"count": len(each), "source": reading.source_of(each)} for split, each in sets.items()},
        total=sum(len(each) for each in sets.values()),
        facts=_facts(train, reading.condition_channels(train), shapes),
        bytes=sum(len(each) for each in sets.values()) * reading.image_bytes(train),
        shard_images=shard_images,
        shards=lambda shards, advance: reading.read(sets, shards, workers=cfg.workers, advance=advance),
        plan=reading.plan(sets, shard_images=shard_images),
    )


def _stream(data: Any, cfg: DictConfig) -> Source:
    """A data set that can only be gone through."""
    from ornstein.data import prepare as reading

    data.setup()
    train = data.train
    shard_images = cfg.shard_images or reading.shard_size(train)
    splits = [split for split in ("train", "val", "test") if getattr(data, split) is not None]

    def shards(_: list[Shard], advance: Callable[[int], None]) -> Iterator[tuple[Shard, Piece]]:
        for split in splits:
            yield from reading.read_stream(data, split, shard_images=shard_images, advance=advance)  # type: ignore[arg-type]

    return Source(
        images={"stream": data.fingerprint},
        total=None,
        facts=_facts(train, None, set()),
        bytes=0,
        shard_images=shard_images,
        shards=shards,
        plan=None,
    )


def _facts(train: Any, condition_channels: int | None, shapes: set[tuple[int, int]]) -> dict[str, Any]:
    return {
        "name": train.name.partition(",")[0],  # of a stream that is "its first 1"
        "class_names": list(train.class_names),
        "num_classes": train.num_classes,
        "image_size": train.image_size,
        "channels": train.channels,
        "condition_channels": condition_channels,
        # As `data.buckets` has them, from wide to high.
        "buckets": [list(shape) for shape in sorted(set(shapes), key=lambda shape: (shape[0] / shape[1], shape))]
        or None,
    }


def _all_images(cfg: DictConfig) -> None:
    """Every image, undecoded until its turn: a limit, a balance or an order are a training's business, and what its val
    may not hold is found anew among the prepared images."""
    few = {"reference_images": 64, "val_limit": 64}  # of a stream: what it has decoded beforehand
    for key, value in {"limit": None, "latents": None, "balanced": False, "sigma_data": None, **few}.items():
        if key in cfg.data:
            OmegaConf.update(cfg, f"data.{key}", value)
    if cfg.data.get("storage") in ("auto", "lazy"):
        OmegaConf.update(cfg, "data.storage", "unchecked")
    if cfg.data.get("overlap") == "drop":
        OmegaConf.update(cfg, "data.overlap", "allow")


def _fill_buckets(cfg: DictConfig) -> None:
    """The shapes that ``data.buckets=auto`` means, in multiples of 8 where squares are: no network is known here, and
    most halve no side more often than that."""
    if cfg.data.get("buckets") is None:
        return
    from ornstein.data.buckets import AutoBuckets, bucket_shapes, parse_buckets

    size = int(cfg.data.image_size)
    plain = OmegaConf.to_container(cfg.data.buckets) if OmegaConf.is_config(cfg.data.buckets) else cfg.data.buckets
    parsed = parse_buckets(plain)
    ours = isinstance(parsed, AutoBuckets) and parsed.step is None and size % 8 == 0
    shapes = bucket_shapes(plain, image_size=size, factor=8 if ours else 1)
    cfg.data.buckets = [list(shape) for shape in shapes or ()]


def _check_options(cfg: DictConfig) -> None:
    if cfg.out is None:
        raise OrnsteinError("the prepared images need a place: add out=FOLDER.")
    for key, least in (("workers", 0), ("shard_images", 1), ("preview", 0)):
        value = cfg[key]
        if key != "preview" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OrnsteinError(f"{key}={value} must be a whole number of at least {least}.")
    if choices().get("data") in ("prepared", "latents"):
        raise OrnsteinError(
            f"data={choices()['data']} is prepared already: name the data set that it was made of, image_folder say."
        )


def _config(cfg: DictConfig) -> dict[str, Any]:
    """How the data set was asked for, in plain JSON types."""
    from ornstein.cli.build import plain

    return {key: value for key, value in plain(cfg)["data"].items() if key not in _WITHOUT_EFFECT}


def _command() -> str:
    """What a shell has to be told to do this again."""
    return shlex.join(["python", "-m", "ornstein.cli.prepare", *typed_words()])


def _named(cfg: DictConfig) -> str:
    root = cfg.data.get("root")
    return f"data={choices().get('data', 'DATA')}" if root is None else f"data.root={root}"


def _announce(source: Source, out: Path) -> None:
    facts = source.facts
    counts = [f"{each['count']:,} {split}" for split, each in source.images.items() if isinstance(each, dict)]
    classes = "" if facts["num_classes"] is None else f", {facts['num_classes']} classes"
    size = f"{facts['channels']}x{facts['image_size']}x{facts['image_size']}"
    count = len(facts["buckets"] or ())
    shapes = f" in {count} shape{'s' if count > 1 else ''}" if count else ""
    print(f"data       {facts['name']}: {', '.join(counts) or 'a stream'}{classes}")
    print(f"images     {size}{shapes}" + (f", {source.bytes / 1e6:,.1f} MB" if source.bytes else ""))
    print(f"folder     {out}", flush=True)


def _preview(train: Any, path: Path, *, count: int) -> None:
    from ornstein.data.contact_sheet import contact_sheet
    from ornstein.data.shards_write import replace

    sheet = contact_sheet(train, count=count)
    replace(path, lambda place: sheet.save(place, format="PNG"))


if __name__ == "__main__":
    main()
