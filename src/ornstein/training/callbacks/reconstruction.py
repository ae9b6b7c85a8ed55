"""Around the training of an autoencoder: the parts of its loss, what it makes of images, and the file it ends in."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from ornstein.codecs import FILE_NAME, Autoencoder, save_codec
from ornstein.errors import OrnsteinError
from ornstein.training.autoencoder import AutoencoderModule
from ornstein.training.autoencoder_scoring import (
    image_batches,
    paired_rows,
    reconstruct,
    score_reconstructions,
    to_model,
)
from ornstein.training.callbacks.lookup import data_of
from ornstein.training.callbacks.periodic import Periodic
from ornstein.training.callbacks.progress import progress_task
from ornstein.training.callbacks.show import show_image
from ornstein.training.limits import check_limits
from ornstein.training.pictures import image_grid, save_png
from ornstein.training.record import record

if TYPE_CHECKING:
    from ornstein.metrics.features import FeatureExtractor
    from ornstein.metrics.generative import GenerativeMetrics

log = logging.getLogger(__name__)
COLUMNS = 8


class LossTerms(Periodic):
    """Logs the parts of an autoencoder's loss as ``train/<name>``, unweighted, of the micro-batch just trained on.

    ``reconstruction``, ``perceptual``, ``kl`` (nats per number of an image) and ``kl_nats`` (per image),
    ``commitment``, ``codebook``, ``perplexity``; with a discriminator at work ``adversarial``, ``adversarial_weight``
    (the adaptive one), ``discriminator`` (its own loss), ``logits_real`` and ``logits_fake``.

    Args:
        every: optimizer steps between rows; null is never.

    Raises:
        OrnsteinError: every < 1.
    """

    def __init__(self, *, every: int | None = 10) -> None:
        check_limits("LossTerms", every=every)
        super().__init__(every=every, at_end=False)

    def act(self, trainer: pl.Trainer, module: AutoencoderModule) -> None:
        """Reads them off the device at once."""
        if module.last_output is not None:
            terms = module.last_output.terms
            values = torch.stack([value.float() for value in terms.values()]).tolist()
            record(trainer, {f"train/{name}": value for name, value in zip(terms, values, strict=True)})


class ReconstructionGrid(Periodic):
    """Draws ``samples/step_000400.png`` with the evaluation weights: held-out images, each above its reconstruction.

    Args:
        run_dir: the run's folder.
        every: optimizer steps between grids; null is only at the end.
        num_images: evenly spaced over the held-out split.
        at_end: also at the end of training.

    Raises:
        OrnsteinError: a number < 1.
    """

    pictures = True

    def __init__(
        self, run_dir: str | Path, *, every: int | None = 500, num_images: int = 32, at_end: bool = True
    ) -> None:
        check_limits("ReconstructionGrid", every=every, num_images=num_images)
        super().__init__(every=every, at_end=at_end)
        self.folder, self.num_images = Path(run_dir) / "samples", num_images

    def act(self, trainer: pl.Trainer, module: AutoencoderModule) -> None:
        """Draws, saves and logs the grid, on the first rank."""
        if not trainer.is_global_zero:
            return
        network = _evaluated(module)
        was_training = network.training
        network.eval()
        with progress_task(trainer, "reconstructions"):
            images = torch.cat(
                list(image_batches(data_of(trainer).val, batch_size=self.num_images, limit=self.num_images))
            )
            copies = reconstruct(network, images, module.device).cpu()
            picture = image_grid(paired_rows(images, copies, COLUMNS), COLUMNS)
            save_png(picture, self.folder / f"step_{trainer.global_step:06}.png")
            show_image(trainer, "reconstructions", picture)
        network.train(was_training)


class ReconstructionEvaluation(Periodic):
    """Logs ``val/psnr``, ``val/ssim`` and ``val/rfid`` of the evaluation weights on held-out images.

    rFID is in the feature space of the data's metrics; where its weights are not at hand, one line tells so. The newest
    figures stand in ``evaluation.json``.

    Args:
        run_dir: the run's folder.
        metrics: makes the metrics, whose feature space is taken, when they are first needed; may give None.
        every: optimizer steps between figures; null is only at the end.
        num_samples: held-out images, evenly spaced; null is all, 0 never measures.
        batch_size: images at once.
        at_end: also at the end of training.

    Raises:
        OrnsteinError: a number out of its range.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        metrics: Callable[[], GenerativeMetrics | None] | None,
        every: int | None = None,
        num_samples: int | None = None,
        batch_size: int = 256,
        at_end: bool = True,
    ) -> None:
        check_limits("ReconstructionEvaluation", every=every, num_samples=num_samples, batch_size=batch_size)
        super().__init__(every=every, at_end=at_end)
        self.path = Path(run_dir) / "evaluation.json"
        self.num_samples, self.batch_size = num_samples, batch_size
        self._factory = metrics
        self._features: FeatureExtractor | None = None

    def act(self, trainer: pl.Trainer, module: AutoencoderModule) -> None:
        """Scores and logs; every rank the same images, so that all agree on which state is best."""
        if self.num_samples == 0:
            return
        features = self._ready(trainer, module)
        held_out = data_of(trainer).val
        count = len(held_out) if self.num_samples is None else min(self.num_samples, len(held_out))
        with progress_task(trainer, "evaluation", -(-count // self.batch_size)) as advance:
            found = score_reconstructions(
                _evaluated(module),
                held_out,
                device=module.device,
                features=features,
                limit=self.num_samples,
                batch_size=self.batch_size,
                advance=advance,
            )
        record(trainer, {f"val/{name}": value for name, value in found.values.items()})
        if trainer.is_global_zero:
            facts = {"step": trainer.global_step, "images_seen": module.images_seen, "num_images": found.num_images}
            space = {} if features is None else {"extractor": features.name, "fingerprint": features.fingerprint}
            write_report(self.path, {"values": found.values, **facts, **space})

    def _ready(self, trainer: pl.Trainer, module: AutoencoderModule) -> FeatureExtractor | None:
        if self._factory is not None:
            from ornstein.metrics import WeightsMissing

            factory, self._factory = self._factory, None
            with progress_task(trainer, "loading metrics"):
                try:
                    metrics = factory()
                except WeightsMissing as error:
                    log.warning("no rFID of the reconstructions: %s", error)
                    return None
            self._features = None if metrics is None else metrics.to(module.device).features
        return self._features


class CodecFile(Periodic):
    """Writes ``codec.safetensors`` when training ends: the evaluation weights with the latents' scale.

    Scale and shift are measured once, on training images, with the weights as they are stored; so is the held-out PSNR
    in the file's header. ``codec=kl codec.weights=<the run's folder>`` (or vq) takes it. Latents that carry nothing are
    told of in one line, and no file is written.

    Args:
        run_dir: the run's folder.
        dtype: float32, or float16 for half the size.
        max_images: training images that the scale is measured on, evenly spaced.
        batch_size: images at once.

    Raises:
        OrnsteinError: a number < 1, or another dtype.
    """

    def __init__(
        self, run_dir: str | Path, *, dtype: str = "float32", max_images: int = 10_000, batch_size: int = 256
    ) -> None:
        check_limits("CodecFile", dtype=dtype, max_images=max_images, batch_size=batch_size)
        super().__init__(every=None, at_end=True)
        self.path = Path(run_dir) / FILE_NAME
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.max_images, self.batch_size = max_images, batch_size

    def act(self, trainer: pl.Trainer, module: AutoencoderModule) -> None:
        """Measures and writes, on the first rank."""
        if not trainer.is_global_zero:
            return
        data, network = data_of(trainer), _evaluated(module)
        # Another of the same architecture: what is trained keeps its precision and its scale of one.
        stored = type(network)(**network.config).to(module.device).eval()
        rounded = {
            name: value.to(self.dtype).to(value.dtype) if value.is_floating_point() else value
            for name, value in network.state_dict().items()
        }
        stored.load_state_dict(rounded)
        with progress_task(trainer, "codec"):
            batches = image_batches(data.train, batch_size=self.batch_size, limit=self.max_images)
            try:
                stored.measure(to_model(images.to(module.device)) for images in batches)
            except OrnsteinError as error:
                log.warning("no %s: %s", FILE_NAME, error)
                return
            found = score_reconstructions(stored, data.val, device=module.device, batch_size=self.batch_size)
        metadata: dict[str, Any] = {
            "data": data.train.name,
            "data_fingerprint": data.train.fingerprint,
            **{f"held_out_{name}": round(value, 4) for name, value in found.values.items()},
            "steps": trainer.global_step,
            "images_seen": module.images_seen,
            "seed": module.seed,
            "loss": asdict(module.loss),
            "parameters": sum(p.numel() for p in stored.parameters()),
        }
        save_codec(stored, self.path, metadata=metadata, dtype=self.dtype)


def write_report(path: Path, content: dict[str, Any]) -> None:
    """Figures as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def _evaluated(module: AutoencoderModule) -> Autoencoder:
    network = module.evaluation_network()
    assert isinstance(network, Autoencoder)
    return network
