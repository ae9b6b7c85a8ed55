"""What a dashboard draws, by the keys that runs log: the table behind its panels. Knows nothing of W&B's classes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """An x axis of curves: the key of a row that it is, and what it is called."""

    key: str
    title: str


AXES = {
    "steps": Axis("trainer/global_step", "optimizer steps"),
    "images": Axis("images_seen", "images seen"),
    "time": Axis("time/wall_s", "seconds of training"),
}


@dataclass(frozen=True)
class Curves:
    """A panel of curves.

    Attributes:
        title: above it.
        keys: of the rows that runs log; a run that logs one of them not has no such curve.
        regex: instead of keys, where their number or names are the runs' own. RE2, which knows no lookahead.
        log_y: on a logarithmic scale.
    """

    title: str
    keys: tuple[str, ...] = ()
    regex: str | None = None
    log_y: bool = False


SPACES = ("", "_efficientnet", "_dinov2", "_clip")  # suffixes of figures in the feature spaces of the package


def in_spaces(*figures: str) -> tuple[str, ...]:
    """Figures of samples under the names that they have in every feature space."""
    return tuple(f"val/{figure}{space}" for figure in figures for space in SPACES)


TRAINING = (
    Curves("Loss", ("train/loss", "val/loss"), log_y=True),
    Curves("Gradient norm, before clipping", ("train/grad_norm",), log_y=True),
    Curves("Learning rate", ("train/lr",)),
    Curves("EMA decay", ("train/ema_decay",)),
    Curves("Loss by log-SNR", regex="^loss_by_log_snr/.+$", log_y=True),
    Curves(
        "Terms of an autoencoder's loss",
        tuple(
            f"train/{term}"
            for term in ("reconstruction", "perceptual", "kl", "commitment", "codebook", "adversarial", "discriminator")
        ),
    ),
)

# Counted figures (fid_1k) and those of a user's own feature space have names that nobody knows beforehand.
QUALITY = (
    Curves(
        "Fréchet distance, with what as many real images score", regex="^val/(fid|fd_[a-z0-9]+)(_[0-9]+k?|_floor)?$"
    ),
    Curves("KID", in_spaces("kid")),
    Curves("Inception Score, with the real images' own", regex="^val/(real_)?inception_score(_[0-9]+k?)?$"),
    Curves("Precision and recall", in_spaces("precision", "recall")),
    Curves("Density and coverage", in_spaces("density", "coverage")),
    Curves("CLIP score", ("val/clip_score",)),
    Curves("Samples that show what was asked for", ("val/label_accuracy", "val/text_r1", "val/text_r10")),
    Curves("Samples nearer to training images than held-out ones", ("val/memorised_share",)),
    Curves("Loss on held-out images", ("val/loss",), log_y=True),
    Curves("Against originals: PSNR in dB", ("val/psnr",)),
    Curves("Against originals: SSIM and LPIPS", ("val/ssim", "val/lpips")),
    Curves("Fréchet distance of reconstructions", ("val/rfid",)),
)

SPEED = (
    Curves("Images a second", ("time/images_per_s",)),
    Curves("Share of time that waits for data", ("time/data_wait_share",)),
    Curves("Share of the devices in use", ("system/gpu_share", "system/cpu_share")),
    Curves("Memory in MB", ("system/gpu_memory_mb", "system/gpu_memory_peak_mb", "system/memory_mb")),
    Curves("Model FLOPs utilisation", ("time/mfu",)),
    Curves("TFLOP a second", ("time/tflops",)),
    Curves("Samples a second, of evaluations", ("time/samples_per_s",)),
)


@dataclass(frozen=True)
class Pictures:
    """A panel of pictures, films or tables that runs log under one key."""

    title: str
    key: str
    by_step: bool = False  # a column a step and a row a run, beside the slider


SAMPLES = (
    Pictures("Samples of the same seeds: a row a run, a column a step", "samples", by_step=True),
    Pictures("Samples of the same seeds: the slider goes through the steps", "samples"),
    Pictures("The most and the least realistic samples, with the nearest training images", "samples/best_and_worst"),
    Pictures("Samples and the training images nearest to them", "samples/nearest_training_images"),
    Pictures("Denoising: what the network makes of it on the way", "trajectory"),
    Pictures("Denoising as a film", "denoising"),
    Pictures("Originals and their reconstructions", "reconstructions", by_step=True),
    Pictures("Originals through a latent model's codec", "codec"),
)
EXTREMES = "samples/best_and_worst_table"  # a table: the most and the least realistic samples
NOISE = (
    Pictures("Schedule: alpha, sigma, log-SNR, and the effective weighting of the loss", "schedule"),
    Pictures("Loss by log-SNR over training", "loss_by_log_snr"),
)
EVALUATION_PICTURES = (
    Pictures("Quality against cost, of a grid of evaluations", "pareto"),
    Pictures("Metric cards", "metric_card"),
)
GRID = "results"  # a table: a row an evaluation of a grid, best first

# What a single evaluation leaves in its W&B summary beside its figures.
NFE, STEPS, SAMPLER, GUIDANCE, SCALE = "nfe", "steps", "sampler", "guidance", "guidance_scale"
UNGUIDED = "NoGuidance"

# Config keys that sweeps go over most, for parallel coordinates where nothing is known of the runs.
SWEPT = (
    *(f"choices.{group}" for group in ("data", "model", "scheduler", "objective", "sampler")),
    *("optimizer.lr", "data.batch_size", "seed"),
)

_HIGHER = (
    *("inception_score", "precision", "recall", "density", "coverage", "clip_score", "label_accuracy"),
    *("psnr", "ssim", "text_r"),
)


def lower_is_better(figure: str) -> bool:
    """Whether the smaller of two values of a figure (``val/fid_1k``, ``precision``) is the better one."""
    return not figure.removeprefix("val/").startswith(_HIGHER)
