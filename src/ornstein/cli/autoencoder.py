"""``model=autoencoder_kl`` and ``autoencoder_vq``: what the commands do where an autoencoder is trained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.training.autoencoder import AutoencoderModule
    from ornstein.training.estimate import Cost

# What of the config an autoencoder has no use for: asking for it by name is a misunderstanding.
FOREIGN = ("scheduler", "objective", "sampler", "guidance", "conditioner", "codec", "adapter", "likelihood")
FOREIGN_KEYS = ("clip_x0", "dynamic_threshold", "labels", "prompts", "negative_prompt", "condition_images")
_DRAWS_SAMPLES = ("SampleGrid", "Trajectory", "SchedulePlot", "GenerativeEvaluation")
_RECONSTRUCTS = ("LossTerms", "ReconstructionGrid", "ReconstructionEvaluation", "CodecFile")


def trains_autoencoder(cfg: Any) -> bool:
    """Whether a config is that of an autoencoder rather than of a denoiser."""
    return bool(OmegaConf.select(cfg, "model.trains", default=None) == "autoencoder")


def check_words(words: Sequence[str], model: str) -> None:
    """Refuses overrides of what an autoencoder does not have.

    Raises:
        OrnsteinError: names the override.
    """
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        group = key.partition("@")[0].replace("/", ".").partition(".")[0]
        if group in (*FOREIGN, *FOREIGN_KEYS):
            raise OrnsteinError(
                f"{word}: model={model} is an autoencoder, which knows no {group}: leave it out, and give it to the "
                "model that diffuses the latents (model=latent_unet, say)."
            )


def check_own_callbacks(cfg: DictConfig) -> None:
    """Refuses an autoencoder's callbacks around a denoiser.

    Raises:
        OrnsteinError: names them.
    """
    if found := _callbacks_of(cfg, _RECONSTRUCTS):
        raise OrnsteinError(
            f"callbacks.{', callbacks.'.join(found)} look at an autoencoder, and this model is none: choose "
            "callbacks=default, or model=autoencoder_kl."
        )


def _callbacks_of(cfg: DictConfig, classes: Sequence[str]) -> list[str]:
    """Names of the callbacks that are one of these classes."""
    named = {str(name): str(node.get("_target_") if node else "") for name, node in (cfg.callbacks or {}).items()}
    return [name for name, target in named.items() if target.rpartition(".")[2] in classes]


def check_autoencoder(cfg: DictConfig, choices: dict[str, str], words: Sequence[str]) -> None:
    """Refuses what cannot train an autoencoder, before anything is read.

    Args:
        cfg: the composed config.
        choices: option of each group.
        words: the overrides as they were typed.

    Raises:
        OrnsteinError: names the option and a way out.
    """
    import torch

    from ornstein.codecs import Autoencoder
    from ornstein.codecs.codec import as_size, sides_of

    model = choices.get("model", "autoencoder")
    check_words(words, model)
    if cfg.data.get("latents") is not None:
        raise OrnsteinError(f"model={model} is trained on images, not on latents: leave data.latents out.")
    if found := _callbacks_of(cfg, _DRAWS_SAMPLES):
        raise OrnsteinError(
            f"callbacks.{found[0]} looks at samples or at noise, which model={model} has none of: choose "
            "callbacks=autoencoder or callbacks=none."
        )
    with torch.device("meta"):
        network = instantiate(cfg.model.network)
    if not isinstance(network, Autoencoder):
        raise OrnsteinError(
            f"model.network is {type(network).__name__}, no autoencoder: choose model/autoencoder=kl_tiny, vq_tiny, ..."
        )
    loss, sides = build_loss(cfg), sides_of(as_size(cfg.data.image_size))
    if loss.perceptual is not None:
        from ornstein.training.autoencoder_perceptual import check_perceptual

        check_perceptual(loss.perceptual, sides, int(cfg.data.channels))
    if loss.adversarial is None:
        return
    with torch.device("meta"):
        discriminator = instantiate(cfg.model.discriminator)
    smallest = getattr(discriminator, "smallest", 1)
    if min(sides) < smallest:
        raise OrnsteinError(
            f"model.discriminator.layers={cfg.model.discriminator.get('layers')} needs images of {smallest} pixels or "
            f"more and data.image_size is {min(sides)}: choose fewer layers, or model.loss.adversarial=null."
        )
    if str(cfg.trainer.get("precision", "")).startswith("16"):
        raise OrnsteinError(
            f"trainer.precision={cfg.trainer.precision} and model.loss.adversarial={loss.adversarial}: float16 loses "
            "the gradients that the two losses are weighed by; choose trainer.precision=bf16-mixed or 32-true."
        )


def typed_words() -> list[str]:
    """The overrides of the running command, as they were typed."""
    from hydra.core.hydra_config import HydraConfig

    return [str(word) for word in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []


def check_pretrained_named(cfg: DictConfig, choices: dict[str, str]) -> None:
    """A pretrained codec must be named, before anything interpolates what it says of itself.

    Raises:
        OrnsteinError: says how.
    """
    if OmegaConf.is_missing(cfg.codec, "pretrained"):
        raise OrnsteinError(
            f"codec={choices.get('codec', 'diffusers')} needs a pretrained autoencoder: add codec.pretrained=FOLDER, "
            "or a name such as stabilityai/sd-vae-ft-mse."
        )


def check_codec_fits(cfg: DictConfig, choices: dict[str, str]) -> None:
    """A codec with weights is used on the data that they were trained on, or that ``codec.fits`` names.

    Raises:
        OrnsteinError: says how to train one for these data.
    """
    option = choices.get("codec", "kl")
    name = choices.get("data") or cfg.data.get("name")
    if "weights" not in cfg.codec or name is None:
        return
    target = str(OmegaConf.select(cfg, "data.dataset._target_", default=""))
    if target in ("ornstein.data.Prepared", "ornstein.data.LatentFolder"):  # another data set's images, which it names
        from ornstein.data.facts import data_fact

        name = str(data_fact(cfg.data, "name"))
    fits = cfg.codec.get("fits")
    kind = "vq" if cfg.codec._target_.endswith("load_vq") else "kl"
    if fits is None and cfg.codec._target_ in ("ornstein.codecs.load_kl", "ornstein.codecs.load_vq"):
        from ornstein.codecs.weights import read_metadata, weights_path

        made_on = read_metadata(weights_path(cfg.codec.weights, kind))["data"]
        fits = None if made_on == "unknown" else [made_on]  # another library's file, converted, does not say
    if fits is not None and name not in fits:
        raise OrnsteinError(
            f"codec={option} holds weights for {', '.join(fits)}, not {name}: train one by python train.py "
            f"model=autoencoder_{kind} data={name} data.image_size={cfg.data.image_size} and pass codec.weights=FOLDER "
            "of its run, or choose a pixel model such as model=class_unet."
        )


def build_loss(cfg: DictConfig) -> Any:
    """``model.loss`` as an AutoencoderLoss.

    Raises:
        OrnsteinError: an unknown key, an unknown word or a number out of its range.
    """
    from dataclasses import fields

    from ornstein.training.autoencoder_losses import AutoencoderLoss

    given = {str(key): value for key, value in cfg.model.loss.items()}
    known = [field.name for field in fields(AutoencoderLoss)]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise OrnsteinError(f"model.loss has no {', '.join(unknown)}; it has {', '.join(known)}.")
    return AutoencoderLoss(**given)


def build_autoencoder(cfg: DictConfig, *, training: bool = True, fresh: bool = False) -> AutoencoderModule:
    """The LightningModule of an autoencoder, as ``build_module`` makes that of a denoiser."""
    import torch

    from ornstein.cli.build import plain
    from ornstein.cli.start import build_network
    from ornstein.codecs import Autoencoder
    from ornstein.diffusion.noise import derive_seed
    from ornstein.training.autoencoder import AutoencoderModule

    loss = build_loss(cfg)
    perceptual = None
    if training and loss.perceptual is not None:
        from ornstein.training.autoencoder_perceptual import load_perceptual

        perceptual = load_perceptual(loss.perceptual, loss.perceptual_weights)
    torch.manual_seed(derive_seed(int(cfg.seed), "init"))
    network = build_network(cfg, fresh=fresh)
    assert isinstance(network, Autoencoder)
    return AutoencoderModule(
        network,
        loss=loss,
        discriminator=instantiate(cfg.model.discriminator) if loss.adversarial is not None else None,
        perceptual=perceptual,
        optimizer=instantiate(cfg.optimizer) if training else None,
        lr_schedule=instantiate(cfg.lr_schedule) if training and cfg.lr_schedule else None,
        flip=bool(cfg.data.flip),
        seed=int(cfg.seed),
        compile=bool(cfg.model.get("compile", False)),
        config=plain(cfg) if training else None,
    )


def describe_autoencoder(module: AutoencoderModule, cost: Cost) -> dict[str, str]:
    """Rows of the announcement: what is trained, what it makes of an image, and by which losses."""
    from ornstein.codecs.codec import sides_of
    from ornstein.networks.cost import count_parameters

    network, loss = module.network, module.loss
    (height, width), (h, w) = sides_of(network.image_size), sides_of(network.size)
    numbers = network.image_channels * height * width / (network.channels * h * w)
    parts = [loss.reconstruction.upper()]
    parts += [f"{loss.perceptual_weight:g} LPIPS ({loss.perceptual})"] if loss.perceptual else []
    codebook = getattr(network, "quantiser", None)
    if codebook is None:
        parts.append(f"{loss.kl_weight:g} KL")
        coded = ""
    else:
        bits = (codebook.codes - 1).bit_length() * h * w
        parts.append(f"{loss.commitment_weight:g} commitment")
        coded = f", {codebook.codes:,} codes ({bits / (height * width):.3g} bits a pixel)"
    if module.discriminator is not None:
        adaptive = " adaptive" if loss.adaptive else ""
        parts.append(
            f"{loss.adversarial_weight:g}{adaptive} adversarial ({loss.adversarial}, from step {loss.start:,}, "
            f"{count_parameters(module.discriminator):,} parameters)"
        )
    return {
        "network": f"{type(network).__name__}, {count_parameters(network.encoder):,} parameters to encode and "
        f"{count_parameters(network.decoder):,} to decode, {cost.flops / 1e6:,.1f} MFLOPs an image (2 a multiply-add)",
        "latents": f"{network.channels}x{h}x{w}, {numbers:.3g} times fewer numbers than the image has{coded}",
        "loss": " + ".join(parts),
    }


def refuse_samples(cfg: Any) -> None:
    """An autoencoder makes no samples.

    Raises:
        OrnsteinError: says what its run is for.
    """
    if trains_autoencoder(cfg):
        target = str(OmegaConf.select(cfg, "model.network._target_", default=""))
        kind = "vq" if target.endswith("VQAutoencoder") else "kl"
        raise OrnsteinError(
            f"run={cfg.get('run', 'FOLDER')} is an autoencoder, which makes no samples by itself: score it by "
            f"evaluate.py, or train a model of its latents by model=latent_unet codec={kind} codec.weights=FOLDER."
        )


def evaluate_autoencoder(module: Any, cfg: DictConfig, *, words: Sequence[str] = ()) -> dict[str, float]:
    """PSNR, SSIM and rFID of held-out images; writes ``evaluation.json``, ``summary.json`` and a picture.

    Raises:
        OrnsteinError: fewer than two images, or options that an autoencoder has not.
    """
    from ornstein.cli.build import plain
    from ornstein.experiment import RunDirectory, Summary, describe_environment
    from ornstein.training.autoencoder_scoring import paired_rows
    from ornstein.training.callbacks.reconstruction import COLUMNS, write_report
    from ornstein.training.pictures import image_grid, save_png

    check_words(words, "autoencoder")
    run = RunDirectory(cfg.paths.run_dir)
    with run.lock(), Summary(run) as summary:
        run.write_config(plain(cfg))
        run.write_json("environment.json", describe_environment(seed=int(cfg.seed)))
        started = time.perf_counter()
        found, space = score_autoencoder(module, cfg)
        seconds = time.perf_counter() - started
        facts = {"images_seen": module.images_seen, "num_images": found.num_images, "weights": str(cfg.weights)}
        write_report(run.path / "evaluation.json", {"values": found.values, **facts, **space})
        pairs = paired_rows(found.originals, found.reconstructions, COLUMNS)
        save_png(image_grid(pairs, COLUMNS), run.samples / "reconstructions.png")
        summary.update(**found.values, **facts)
    print(f"{found.num_images} held-out images, {seconds:.1f} s")
    _show(found.values)
    print(f"written to {run.path}")
    return dict(found.values)


def score_autoencoder(module: Any, cfg: DictConfig) -> tuple[Any, dict[str, str]]:
    """The score on ``num_samples`` held-out images, and the feature space that rFID is of, if any."""
    from ornstein.cli.build import build_data, build_metrics
    from ornstein.cli.progress import bar
    from ornstein.training.autoencoder_scoring import score_reconstructions

    metrics = build_metrics(cfg.metrics)
    features = None if metrics is None else metrics.to(module.device).features
    data = build_data(cfg)
    data.setup()
    count = min(int(cfg.num_samples), len(data.val))
    with bar("evaluating", -(-count // int(cfg.batch_size))) as advance:
        found = score_reconstructions(
            module.network,
            data.val,
            device=module.device,
            features=features,
            limit=int(cfg.num_samples),
            batch_size=int(cfg.batch_size),
            advance=advance,
        )
    return found, {} if features is None else {"extractor": features.name, "fingerprint": features.fingerprint}


def measure_codec(module: Any, data: Any, device: Any) -> None:
    """Measures the scale of latents on training images, for a codec that leaves it to be measured.

    The same images on every rank; what was measured is part of the run's checkpoints.
    """
    count = getattr(module.codec, "measured_images", 0)
    if not count:
        return
    from ornstein.training.autoencoder_scoring import image_batches, to_model

    module.codec.to(device)
    batches = image_batches(data.train, batch_size=module.codec.max_batch, limit=count)
    module.codec.measure(to_model(images.to(device)) for images in batches)


def _show(values: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in values.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
