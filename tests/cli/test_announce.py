"""What the announcement says of a network before the first step."""

from __future__ import annotations

import pytest
import torch

from ornstein.cli.announce import _describe_denoiser
from ornstein.cli.build import build_module
from ornstein.networks import count_parameters
from ornstein.training.estimate import Cost, measure_cost


@pytest.mark.parametrize(("words", "experts"), [(("model=experts",), 2), (("model=class_unet",), None)])
def test_a_mixture_tells_how_many_parameters_one_evaluation_uses(compose, words, experts):
    module = build_module(compose(*words))
    count = count_parameters(module.network)
    cost = Cost(parameters=count, flops=2_000_000, state_bytes=0, activation_bytes=0, step_seconds=1.0)
    told = _describe_denoiser(module, cost)["network"]
    active = "" if experts is None else f", {count // experts:,} active"
    assert (
        told == f"{type(module.network).__name__}, {count:,} parameters{active}, 2.0 MFLOPs a sample (2 a multiply-add)"
    )


@pytest.mark.parametrize(
    ("words", "latents", "condition"),
    [
        (("model=pixel_unet",), None, None),
        (("model=class_unet",), None, "one of 10 classes (10 % dropped)"),
        (("model=latent_unet",), "4x8x8, of KLAutoencoder", "one of 10 classes (10 % dropped)"),
        (
            ("model=class_unet", "conditioner=class_image"),
            None,
            "one of 10 classes (10 % dropped); low_resolution images, 1 channels (0 % dropped)",
        ),
        (
            ("model=text_unet", "conditioner.dropout=0.25"),
            None,
            "captions by minilm, 32 tokens of 384 and a vector of 384 (25 % dropped)",
        ),
    ],
)
def test_conditions_and_latents_are_told(compose, words, latents, condition):
    module = build_module(compose(*words))
    cost = Cost(parameters=1, flops=1, state_bytes=0, activation_bytes=0, step_seconds=1.0)
    told = _describe_denoiser(module, cost)
    assert (told.get("latents"), told.get("condition")) == (latents, condition)


def test_frozen_weights_have_no_gradients_moments_and_averages(compose):
    module = build_module(compose("model=pixel_unet"))
    batch = {"image": torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "index": torch.arange(2)}
    whole = measure_cost(module, batch)
    frozen = count_parameters(module.network.encoder)
    module.network.encoder.requires_grad_(False)
    cost = measure_cost(module, batch)
    assert (whole.state_bytes, cost.state_bytes) == (20 * whole.parameters, 20 * whole.parameters - 16 * frozen)
    assert cost.parameters == whole.parameters - frozen
    assert f" {whole.parameters:,} parameters" in _describe_denoiser(module, cost)["network"]


def test_final_figures_are_told_with_their_intervals(capsys):
    from types import SimpleNamespace

    from ornstein.cli.announce import conclude

    figures = {"val/fid_1k": 3.25, "val/kid": 0.5, "val/fid_1k_low": 3.0, "val/fid_1k_high": 3.5, "train/loss": 1.0}
    conclude(SimpleNamespace(path="outputs/x"), figures)
    told = capsys.readouterr().out
    assert "fid_1k 3.25 [3, 3.5], kid 0.5\n" in told and "loss" not in told
