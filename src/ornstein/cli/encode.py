"""``python -m ornstein.cli.encode``: a data set's latents, once, so that training never runs the encoder."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ornstein.cli.latents import choices, codec_is_identity, encode_command, latents_folder
from ornstein.cli.launch import launch, remove_untouched
from ornstein.cli.progress import rate_bar
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    import torch

    from ornstein.data.latents import Recipe
    from ornstein.data.latents_write import LatentWriter

POLL = 1.0  # seconds between looks at shards that other processes have


def main() -> None:
    """Entry point."""
    launch("encode", encode)


def encode(cfg: DictConfig) -> None:
    """Encodes both splits of a data set into memory-mapped shards, or goes on where it stopped.

    Raises:
        OrnsteinError: what cannot be encoded, or a folder that holds something else.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    from ornstein.cli.validate import check_codec, check_root, fill_facts

    check_root(cfg, choices())
    fill_facts(cfg)
    check_codec(cfg, choices())
    device = _checked_options(cfg)
    codec = instantiate(cfg.codec)
    store = _store(cfg, codec)
    out = Path(cfg.out).expanduser() if cfg.out is not None else latents_folder(cfg, codec)

    from ornstein.cli.build import build_data
    from ornstein.cli.quiet import quiet_libraries
    from ornstein.data.latents_write import LatentWriter

    quiet_libraries()
    # All images, themselves: a limit or other latents are a training's business.
    OmegaConf.update(cfg, "data.limit", None)
    OmegaConf.update(cfg, "data.latents", None)
    data = build_data(cfg)
    if getattr(data, "streams", False):
        data.open_latents()  # refuses, and says what to do instead
    data.setup()
    _scale(codec, data, out, device)
    recipe = recipe_of(cfg, data, codec, store=store)
    command, names = encode_command(cfg, out=cfg.out), data.train.class_names
    writer = LatentWriter(out, recipe, command=command, class_names=names)
    started = time.perf_counter()
    try:
        _announce(recipe, out, device)
        made = run(writer, codec.to(device).eval(), data, device=device, cfg=cfg)
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it stopped", file=sys.stderr)
        raise
    finally:
        writer.close()
    remove_empty(Path(HydraConfig.get().runtime.output_dir), root=Path(cfg.paths.output_root))
    seconds = time.perf_counter() - started
    found = sum(recipe.counts.values()) - made
    there = f"; {found:,} were there already" if found else ""
    print(f"encoded    {made:,} images in {seconds:.1f} s ({made / seconds:,.0f} images/s){there}")
    told = "auto" if cfg.out is None else out
    print(f"written to {out}: train on it by data.latents={told}")


def run(writer: LatentWriter, codec: Any, data: Any, *, device: torch.device, cfg: DictConfig) -> int:
    """Writes every shard that is not there and that no other process is about to write; waits for those that are.

    Returns:
        How many images this process encoded.
    """
    from ornstein.training.encode import fill

    made, pending = 0, writer.shards()
    with rate_bar("encoding", sum(len(shard.rows) for shard in pending)) as (advance, say):
        while pending:
            left = []
            for shard in pending:
                with writer.claim(shard) as mine:
                    if not mine:
                        left.append(shard)
                        continue
                    say(f"{shard.split}/{shard.number:05d}")
                    if writer.done(shard):
                        advance(len(shard.rows), False)
                        continue
                    images = data.train if shard.split == "train" else data.val
                    with writer.open(shard, images) as array:
                        fill(
                            array,
                            codec,
                            images,
                            shard.rows,
                            recipe=writer.recipe,
                            device=device,
                            batch_size=int(cfg.batch_size),
                            num_workers=int(cfg.data.num_workers),
                            advance=lambda count: advance(count, True),
                        )
                    made += len(shard.rows)
            if len(left) == len(pending):
                say(f"waiting for {len(left)} shards of other processes")
                time.sleep(POLL)
            pending = left
    return made


def _scale(codec: Any, data: Any, out: Path, device: torch.device) -> None:
    """Measures the scale of a codec that leaves it to be measured, or takes what other shards there have."""
    from types import SimpleNamespace

    from ornstein.cli.autoencoder import measure_codec
    from ornstein.data.latents import read_recipe, take_scale
    from ornstein.data.shards import INDEX

    if (out / INDEX).is_file():
        recipe = read_recipe(out)
        if recipe.codec_fingerprint == codec.fingerprint:
            take_scale(codec, recipe)
    measure_codec(SimpleNamespace(codec=codec), data, device)


def recipe_of(cfg: DictConfig, data: Any, codec: Any, *, store: Any) -> Recipe:
    """What decides the latents of a config's data under its codec."""
    from ornstein.data.latents import Recipe, scale_of, shape_of

    splits = {"train": data.train, "val": data.val}
    scale, shift = scale_of(codec)
    return Recipe(
        data=data.train.name,
        image_size=data.train.image_size,
        channels=data.train.channels,
        images={split: images.images_fingerprint for split, images in splits.items()},
        counts={split: len(images) for split, images in splits.items()},
        codec=type(codec).__name__,
        codec_fingerprint=codec.fingerprint,
        scale=scale,
        shift=shift,
        stochastic=bool(codec.stochastic),
        shape=shape_of(codec),
        store=store,
        flip=bool(cfg.data.flip),
        dtype=str(cfg.dtype),
        precision=str(cfg.precision),
        seed=int(cfg.seed) if store == "sample" else 0,
        shard_images=int(cfg.shard_images),
    )


def _checked_options(cfg: DictConfig) -> torch.device:
    """The device to encode on.

    Raises:
        OrnsteinError: an option of this command that does not exist, is out of its range, or asks for a GPU in vain.
    """
    for key in ("batch_size", "shard_images"):
        if isinstance(cfg[key], bool) or not isinstance(cfg[key], int) or cfg[key] < 1:
            raise OrnsteinError(f"{key}={cfg[key]} must be a whole number of at least 1.")
    import torch

    from ornstein.data.latents import DTYPES, STORES
    from ornstein.training.encode import PRECISIONS

    for key, known in (("store", ("auto", *STORES)), ("dtype", DTYPES), ("precision", tuple(PRECISIONS))):
        if cfg[key] not in known:
            raise OrnsteinError(f"{key}={cfg[key]} is unknown: choose {', '.join(known)}.")
    try:
        device = torch.device(str(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    except RuntimeError as error:
        raise OrnsteinError(f"device={cfg.device} is unknown: choose cpu, cuda or cuda:1, say.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OrnsteinError(f"device={cfg.device} and this machine has no GPU that torch can use: choose device=cpu.")
    if cfg.precision == "float16" and device.type == "cpu":
        raise OrnsteinError("precision=float16 needs a GPU: choose precision=float32, or bfloat16.")
    return device


def _store(cfg: DictConfig, codec: Any) -> str:
    """What to store; ``auto`` is what serves the codec: what it gives, or where it draws the moments to draw from.

    Raises:
        OrnsteinError: what the codec has not, or what no run could read.
    """
    named = f"codec={choices().get('codec', type(codec).__name__)}"
    if cfg.data.get("buckets") is not None:
        raise OrnsteinError(
            "data.buckets has images of several shapes and latents are kept of squares: leave data.buckets out, or "
            "train without data.latents, where the codec encodes each batch as it comes."
        )
    if codec_is_identity(codec):
        raise OrnsteinError(f"{named} changes nothing, so that there is nothing to encode: choose codec=kl, say.")
    posterior = _has_posterior(codec, cfg)
    store = str(cfg.store)
    if store == "auto":
        store = "moments" if codec.stochastic else "mean"
    if store == "mean" and codec.stochastic:
        raise OrnsteinError(
            f"store=mean and {named} draws from its posterior: choose store=moments or sample, or "
            "codec.sample_posterior=false."
        )
    if store != "mean" and not posterior:
        raise OrnsteinError(f"store={store} and {named} has no posterior: choose store=mean.")
    if store == "sample" and not codec.stochastic:
        raise OrnsteinError(
            f"store=sample and {named} takes its posterior's mean: choose store=mean, or codec.sample_posterior=true."
        )
    return store


def _has_posterior(codec: Any, cfg: DictConfig) -> bool:
    """Whether a codec tells the mean and the spread of what it encodes; one of diffusers may have the method alone."""
    import torch

    if not all(hasattr(codec, name) for name in ("posterior", "scale", "shift")):
        return False
    try:
        with torch.no_grad():
            codec.posterior(torch.zeros(1, cfg.data.channels, cfg.data.image_size, cfg.data.image_size))
    except OrnsteinError:
        return False
    return True


def _announce(recipe: Recipe, out: Path, device: torch.device) -> None:
    shape = "x".join(map(str, recipe.shape))
    size = (recipe.nbytes("train") + recipe.nbytes("val")) / 1e6
    mirrored = ", train mirrored too" if recipe.flip else ""
    print(f"data       {recipe.data}: {recipe.counts['train']:,} train, {recipe.counts['val']:,} held out{mirrored}")
    print(f"latents    {shape} {recipe.dtype}, {recipe.store} of {recipe.codec}, {size:,.1f} MB, encoded on {device}")
    print(f"folder     {out}", flush=True)


def remove_empty(folder: Path, *, root: Path) -> None:
    """Removes the run folder that Hydra made, which holds nothing here, and below the outputs' root those above it."""
    remove_untouched(folder)
    with suppress(OSError):  # not empty any more, or gone: another command was here
        for above in folder.parents:
            if root.absolute() not in above.parents or any(above.iterdir()):
                return
            above.rmdir()


if __name__ == "__main__":
    main()
