"""What stands around a network in a pipeline of our own: captions, class tokens, conditioning images, codecs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ornstein.codecs import Codec, DiffusersCodec, Identity, VQAutoencoder
from ornstein.conditioning import Conditioner
from ornstein.diffusion.guidance import ClassifierFree
from ornstein.diffusion.objectives import Objective
from ornstein.diffusion.parameterizations import V
from ornstein.diffusion.samplers import DDIM
from ornstein.diffusion.schedules import Cosine
from ornstein.errors import OrnsteinError
from ornstein.experiment.export.models import codec_spec, network_spec
from ornstein.experiment.export.pipelines import write_autoencoder, write_pipeline
from ornstein.networks import DiffusersUNet2D, DiffusersUNet2DCondition, UNet
from ornstein.training.module import DiffusionModule

STEPS = 5
CONDITION = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
PLAIN = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


class Told(Conditioner):
    """Conditions that are given as the network takes them; zeros are the null form."""

    def __init__(self, **sizes: int | None) -> None:
        super().__init__()
        self.has_null = True
        for name, size in sizes.items():
            setattr(self, name, size)

    def training_cond(self, batch: Mapping[str, Any], *, generator: torch.Generator | None) -> dict[str, Tensor]:
        raise NotImplementedError

    def cond(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        return dict(given)

    def null_form(self, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
        return {}


def perturbed(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(False)


def module_of(network: nn.Module, conditioner: Conditioner, codec: Codec | None = None) -> DiffusionModule:
    return DiffusionModule(
        perturbed(network),
        schedule=Cosine(),
        objective=Objective(parameterization=V()),
        codec=codec if codec is not None else Identity(1, 8, sigma_data=1.0),
        conditioner=conditioner,
        sampler=DDIM(steps=STEPS),
        guidance=ClassifierFree(scale=2.5),
    )


def opened(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(module: DiffusionModule, start: Tensor, cond: dict[str, Tensor], null: dict[str, Tensor]) -> Tensor:
    class Nothing:
        def expect(self, steps: int) -> Nothing:
            return self

    denoiser = module.guidance(module.denoiser(evaluation=True).bind(cond), null)
    x = module.sampler.sample(denoiser, Nothing(), start=start).x
    return (module.codec.decode(x) / 2 + 0.5).clamp(0, 1)


@pytest.fixture(autouse=True)
def own_modules_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import diffusers.utils.dynamic_modules_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_captions_go_in_as_embeddings(tmp_path: Path) -> None:
    sizes = {"text_dim": 8, "pooled_dim": 6}
    arguments = {"in_channels": 1, "image_size": 8, **sizes, **CONDITION}
    module = module_of(DiffusersUNet2DCondition(**arguments), Told(**sizes))
    made = write_pipeline(tmp_path / "out", module, arguments)
    assert made.takes == ("prompt_embeds", "pooled_prompt_embeds")
    text, start = torch.randn(2, 5, 8), torch.randn(2, 1, 8, 8)
    mask, pooled = torch.tensor([[True] * 5, [True] * 3 + [False] * 2]), torch.randn(2, 6)
    cond = {"text": text, "text_mask": mask, "pooled": pooled}
    null = {"text": 0 * text, "text_mask": mask, "pooled": 0 * pooled}
    images = opened(tmp_path / "out")(
        latents=start,
        prompt_embeds=text,
        prompt_mask=mask,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=0 * text,
        negative_prompt_mask=mask,
        negative_pooled_prompt_embeds=0 * pooled,
        output_type="pt",
    ).images
    assert (images - ours(module, start, cond, null)).abs().max() < 1e-4


@pytest.mark.parametrize("options", [{}, {"label_mode": "add"}], ids=["tokens", "added"])
def test_class_tokens_go_out_with_the_pipeline(options: dict[str, str], tmp_path: Path) -> None:
    arguments = {"in_channels": 1, "image_size": 8, "num_classes": 3, **options, **CONDITION}
    module = module_of(DiffusersUNet2DCondition(**arguments), Told(num_classes=3))
    write_pipeline(tmp_path / "out", module, arguments)
    start, label = torch.randn(2, 1, 8, 8), torch.tensor([2, 0])
    images = opened(tmp_path / "out")(latents=start, class_labels=label, output_type="pt").images
    expected = ours(module, start, {"label": label}, {"label": torch.tensor([3, 3])})
    assert (images - expected).abs().max() < 1e-4


def test_cross_attention_without_anything_to_attend_to(tmp_path: Path) -> None:
    arguments = {"in_channels": 1, "image_size": 8, **CONDITION}
    module = module_of(DiffusersUNet2DCondition(**arguments), Told())
    module.guidance = ClassifierFree(scale=1.0)
    write_pipeline(tmp_path / "out", module, arguments)
    start = torch.randn(2, 1, 8, 8)
    images = opened(tmp_path / "out")(latents=start, output_type="pt").images
    assert (images - ours(module, start, {}, {})).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [UNet, DiffusersUNet2D])
def test_conditioning_images_are_joined(kind: type[nn.Module], tmp_path: Path) -> None:
    small = {"base_channels": 8, "channel_mults": [1, 2], "groups": 4, "patch_size": 2}
    arguments = {"in_channels": 1, "image_size": 8, "concat_channels": 2, **(small if kind is UNet else PLAIN)}
    module = module_of(kind(**arguments), Told(concat_channels=2))
    made = write_pipeline(tmp_path / "out", module, arguments)
    assert not made.native and made.takes == ("conditioning",)
    start, image = torch.randn(2, 1, 8, 8), torch.rand(2, 2, 8, 8) * 2 - 1
    images = opened(tmp_path / "out")(latents=start, conditioning=image, guidance_scale=1.0, output_type="pt").images
    module.guidance = ClassifierFree(scale=1.0)
    assert (images - ours(module, start, {"concat": image}, {})).abs().max() < 1e-4


def codecs(folder: Path) -> dict[str, Codec]:
    """Codecs with latents (4, 8, 8) of images (1, 16, 16), and scales far from 1."""
    import diffusers

    shared = {"in_channels": 1, "out_channels": 1, "latent_channels": 4}
    down, up = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    blocks = {"block_out_channels": [8, 8], "norm_num_groups": 4, "down_block_types": down, "up_block_types": up}
    tiny = {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8]}
    tiny |= {"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]}
    diffusers.AutoencoderKL(**shared, **blocks, use_post_quant_conv=False).save_pretrained(folder / "kl")
    diffusers.AutoencoderTiny(**shared, **tiny).save_pretrained(folder / "tiny")
    small = {"width": 8, "multipliers": [1, 2], "groups": 4, "codes": 16}
    made: dict[str, Codec] = {
        "kl": DiffusersCodec(str(folder / "kl"), 1, 16, scale="measured"),
        "tiny": DiffusersCodec(str(folder / "tiny"), 1, 16, scale="measured"),
        "vq": perturbed(VQAutoencoder(1, 16, **small)),
    }
    for codec in made.values():
        codec.scale.copy_(torch.tensor([0.5, 2.0, 3.0, 0.7])[None, :, None, None])
        codec.shift.copy_(torch.tensor([1.0, -2.0, 0.3, 0.0])[None, :, None, None])
    return made


@pytest.mark.parametrize(("kind", "name"), [("kl", "AutoencoderKL"), ("tiny", "AutoencoderTiny"), ("vq", "VQModel")])
def test_codecs_decode_what_is_diffused(kind: str, name: str, tmp_path: Path) -> None:
    codec = codecs(tmp_path)[kind]
    arguments = {"in_channels": 4, "image_size": 8, "base_channels": 8, "channel_mults": [1, 2], "groups": 4}
    module = module_of(UNet(**arguments), Told(), codec)
    module.guidance = ClassifierFree(scale=1.0)
    made = write_pipeline(tmp_path / "out", module, arguments)
    assert made.components["vae"] == name
    start = torch.randn(2, 4, 8, 8)
    images = opened(tmp_path / "out")(latents=start, output_type="pt").images
    expected = ours(module, start, {}, {})
    # Half of a codebook's edges: a rounding that tips one latent to another code changes a patch of the image.
    assert ((images - expected).abs() < 1e-4).float().mean() > 0.99


def test_an_autoencoder_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ornstein.networks.layouts import kl

    codec = codecs(tmp_path)["vq"]
    right = kl.vq_to_diffusers

    def wrong(*given: Any) -> Any:
        config, state = right(*given)
        return config, {**state, "decoder.conv_out.bias": state["decoder.conv_out.bias"] + 0.1}

    monkeypatch.setattr(kl, "vq_to_diffusers", wrong)
    with pytest.raises(OrnsteinError, match="differs from the run's own by"):
        write_autoencoder(tmp_path / "out", codec)


def test_what_has_no_counterpart_is_named() -> None:
    with pytest.raises(OrnsteinError, match=r"model.network=Conv2d has no counterpart"):
        network_spec(nn.Conv2d(1, 1, 1), {}, noise_offset=1.0)

    class Own(Identity):
        pass

    assert codec_spec(Own(1, 8, sigma_data=1.0)) is None
    with pytest.raises(OrnsteinError, match="codec=Linear has no counterpart"):
        codec_spec(nn.Linear(1, 1))  # type: ignore[arg-type]
