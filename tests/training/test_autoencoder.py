"""Training an autoencoder: what each side's gradient is, when the discriminator begins, resuming, the codec's file."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ornstein.codecs import FILE_NAME, KLAutoencoder, PatchDiscriminator, VQAutoencoder, load_kl, load_vq, read_metadata
from ornstein.data import DataModule, ImageDataset
from ornstein.errors import OrnsteinError
from ornstein.training.autoencoder import AutoencoderModule
from ornstein.training.autoencoder_losses import AutoencoderLoss, discriminator_loss
from ornstein.training.callbacks import (
    Checkpoint,
    CodecFile,
    LossTerms,
    NonFiniteGuard,
    ReconstructionEvaluation,
    ReconstructionGrid,
    Throughput,
    TrainingLog,
    Validation,
)
from ornstein.training.ema import EMA
from ornstein.training.estimate import measure_cost

SIDE = 16
NETWORKS = {
    "kl": partial(KLAutoencoder, 1, SIDE, channels=2, width=4, multipliers=(1, 2), groups=2),
    "vq": partial(VQAutoencoder, 1, SIDE, channels=2, codes=8, width=4, multipliers=(1, 2), groups=2),
    "vq_ema": partial(VQAutoencoder, 1, SIDE, channels=2, codes=8, width=4, multipliers=(1, 2), groups=2, update="ema"),
}
ADVERSARIAL = AutoencoderLoss(adversarial="hinge", start=2, discriminator_lr=0.003, kl_weight=1e-3)


def dataset(*, split: str, labels: bool = True) -> ImageDataset:
    pixels = np.random.default_rng(0 if split == "train" else 1).integers(0, 256, (24, 1, SIDE, SIDE))
    return ImageDataset(pixels.astype(np.uint8), name="noise", split=split)  # type: ignore[arg-type]


def data() -> DataModule:
    return DataModule(dataset, batch_size=4, num_classes=None)


def module(kind: str = "kl", *, loss: AutoencoderLoss = ADVERSARIAL, lr: float = 0.01, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoencoderModule(
        NETWORKS[kind](),
        loss=loss,
        discriminator=PatchDiscriminator(1, width=8, layers=1) if loss.adversarial else None,
        optimizer=partial(torch.optim.AdamW, lr=lr),
        lr_schedule=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
        flip=True,
        **options,
    )


def batch(count: int = 4) -> dict[str, Any]:
    return dataset(split="train").batch(range(count))


def test_each_side_gets_the_gradient_of_its_own_loss() -> None:
    ours = module(loss=AutoencoderLoss(adversarial="hinge", adaptive=False, adversarial_weight=0.7, kl_weight=1e-3))
    ours.flip = False
    twin = copy.deepcopy(ours)
    ours.training_step(batch(), 0).backward()

    x = batch()["image"].float() / 127.5 - 1
    coded = twin.network.code(x, twin._generator("train", 0))
    twin_loss = (coded.images - x).abs().mean() + 1e-3 * coded.terms["kl"].mean()
    twin_loss = twin_loss + 0.7 * -twin.discriminator(coded.images).mean()
    generator_grads = torch.autograd.grad(twin_loss, list(twin.network.parameters()), retain_graph=True)
    own = discriminator_loss(twin.discriminator(x), twin.discriminator(coded.images.detach()), "hinge")
    own_grads = torch.autograd.grad(own, list(twin.discriminator.parameters()))

    found = [p.grad for p in (*ours.network.parameters(), *ours.discriminator.parameters())]
    for grad, expected in zip(found, (*generator_grads, *own_grads), strict=True):
        # The same products in another order.
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_the_adaptive_weight_balances_the_gradients_at_the_last_layer() -> None:
    ours = module(loss=AutoencoderLoss(adversarial="hinge", kl_weight=0.0))
    ours.training_step(batch(), 0)
    terms = ours.last_output.terms
    assert {"adversarial", "adversarial_weight", "discriminator", "logits_real", "logits_fake"} <= set(terms)
    assert 0 < terms["adversarial_weight"].item() <= 1e4 and not terms["adversarial_weight"].requires_grad


def trained(fit: Any, ours: Any, callbacks: list[Any], steps: int, **options: Any) -> Any:
    return fit(callbacks, module=ours, data=data(), steps=steps, gradient_clip_val=1.0, **options)


def test_the_discriminator_begins_at_its_step_and_stays_untouched_before(fit: Any) -> None:
    ours = module()
    before = copy.deepcopy(ours.discriminator.state_dict())
    trainer = trained(fit, ours, [], steps=2)
    assert trainer.global_step == 2
    assert all(value.equal(before[name]) for name, value in ours.discriminator.state_dict().items())
    state = trainer.optimizers[0].state_dict()["state"]
    count = len(list(ours.network.parameters()))
    assert set(state) == set(range(count)), "no moments of the discriminator either"
    ours = module()
    trainer = trained(fit, ours, [], steps=3)
    assert not all(value.equal(before[name]) for name, value in ours.discriminator.state_dict().items())
    assert [group["initial_lr"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.003]


def test_the_sides_are_clipped_each_by_itself(fit: Any) -> None:
    ours = module(loss=AutoencoderLoss(adversarial="hinge"), lr=0.0)
    ours.trainer = fit([], module=ours, data=data(), steps=1)
    for p in ours.network.parameters():
        p.grad = torch.full_like(p, 100.0)
    for p in ours.discriminator.parameters():
        p.grad = torch.full_like(p, 1e-5)
    ours.configure_gradient_clipping(ours.trainer.optimizers[0], 1.0)
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in part.parameters()])
        for part in (ours.network, ours.discriminator)
    ]
    assert norms[0].item() == pytest.approx(1.0, rel=1e-4)
    assert norms[1].item() < 0.01, "what is small stays as it is"
    assert all(p.grad.eq(1e-5).all() for p in ours.discriminator.parameters())


def surroundings(folder: Path) -> list[Any]:
    return [
        EMA(decay=0.9),
        NonFiniteGuard(),
        TrainingLog(every=1),
        LossTerms(every=1),
        Validation(every=3),
        ReconstructionGrid(folder, every=3, num_images=8),
        ReconstructionEvaluation(folder, metrics=None, every=3),
        CodecFile(folder),
        Throughput(),
        Checkpoint(folder, every=3, monitor="val/psnr", mode="max"),
    ]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(
    fit: Any, rows: Any, tmp_path: Path, kind: str, accumulate: int
) -> None:
    whole, first, second = rows(), rows(), rows()
    undisturbed = module(kind)
    trained(
        fit,
        undisturbed,
        surroundings(tmp_path / "a"),
        steps=6,
        logger=whole,
        accumulate_grad_batches=accumulate,
    )
    trained(fit, module(kind), surroundings(tmp_path / "b"), steps=3, logger=first, accumulate_grad_batches=accumulate)
    resumed = module(kind)
    torch.manual_seed(99)
    trained(
        fit,
        resumed,
        surroundings(tmp_path / "b"),
        steps=6,
        logger=second,
        ckpt=tmp_path / "b" / "checkpoints" / "last.ckpt",
        accumulate_grad_batches=accumulate,
    )
    for name, value in undisturbed.state_dict().items():
        assert resumed.state_dict()[name].equal(value), name
    ends = [torch.load(tmp_path / each / "checkpoints" / "last.ckpt", weights_only=True) for each in "ab"]
    averages = [end["callbacks"]["EMA"]["network"] for end in ends]
    assert all(averages[1][name].equal(value) for name, value in averages[0].items())
    assert first.without_times() | second.without_times() == whole.without_times()
    assert (tmp_path / "a" / FILE_NAME).read_bytes() == (tmp_path / "b" / FILE_NAME).read_bytes()


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_what_a_run_leaves(fit: Any, rows: Any, tmp_path: Path, kind: str) -> None:
    logger, ours = rows(), module(kind, config={"name": "mine"})
    trained(fit, ours, surroundings(tmp_path), steps=3, logger=logger)
    row = logger.rows[3]
    own = {"kl": {"train/kl", "train/kl_nats"}, "vq": {"train/commitment", "train/codebook", "train/perplexity"}}
    assert own[kind] | {"train/reconstruction", "train/loss", "val/loss", "val/psnr", "val/ssim"} <= row.keys()
    assert "train/adversarial_weight" in row and "train/adversarial_weight" not in logger.rows[1]
    assert {"step_000003.png"} == {path.name for path in (tmp_path / "samples").iterdir()}
    metadata = read_metadata(tmp_path / FILE_NAME)
    assert (metadata["data"], metadata["steps"], metadata["kind"]) == ("noise", 3, kind)
    codec = {"kl": load_kl, "vq": load_vq}[kind](tmp_path, fits=["noise"], image_size=SIDE)
    with torch.no_grad():
        z = codec.encode(batch(24)["image"].float() / 127.5 - 1)
    # Measured on these very images: rounding of some thousand numbers.
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std(dim=(0, 2, 3), correction=0), torch.ones(2), rtol=1e-4, atol=0)
    # The averaged weights, and their figures.
    psnr = row["val/psnr"]
    assert metadata["held_out_psnr"] == pytest.approx(psnr, abs=0.05)


def test_latents_that_carry_nothing_cost_the_file_and_not_the_run(
    fit: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = module(loss=AutoencoderLoss())
    with torch.no_grad():
        ours.network.quant.weight.zero_()
    ours.network.quant.requires_grad_(False)
    trained(fit, ours, [CodecFile(tmp_path), Checkpoint(tmp_path, monitor=None)], steps=1)
    assert "a latent channel carries nothing" in caplog.text
    assert not (tmp_path / FILE_NAME).exists() and (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_a_loss_that_is_no_number_stops_the_run(fit: Any) -> None:
    ours = module(loss=AutoencoderLoss())
    with torch.no_grad():
        ours.network.last_layer.fill_(float("nan"))
    with pytest.raises(OrnsteinError, match="the loss is not finite at step 1"):
        trained(fit, ours, [NonFiniteGuard()], steps=2)


def test_measuring_the_cost_leaves_no_trace() -> None:
    ours = module("vq_ema", loss=AutoencoderLoss(adversarial="hinge"))
    before = copy.deepcopy(ours.state_dict())
    cost = measure_cost(ours, batch())
    assert all(value.equal(before[name]) for name, value in ours.state_dict().items())
    assert ours.images_seen == 0 and all(p.grad is None for p in ours.parameters())
    assert cost.flops > 0 and cost.activation_bytes > 0


def test_validation_draws_the_same_every_time_and_leaves_training_as_it_is() -> None:
    ours = module().train()
    first = ours.validation_step(batch(), 0)
    assert ours.validation_step(batch(), 0).equal(first) and ours.network.training
    assert not ours.validation_step(batch(), 1).equal(first)


def test_an_autoencoder_learns_to_give_its_images_back(fit: Any) -> None:
    ours = module(loss=AutoencoderLoss(kl_weight=1e-6), lr=0.01)
    ours._lr_schedule = None
    before = float(ours.validation_step(batch(24), 0))
    trained(fit, ours, [], steps=150)
    assert float(ours.validation_step(batch(24), 0)) < 0.9 * before, "noise of 256 numbers through 128"
