"""Autoencoder files: the round trip, the bundled one's promises, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ornstein.codecs import (
    FILE_NAME,
    Autoencoder,
    KLAutoencoder,
    VQAutoencoder,
    bundled_path,
    load_kl,
    load_vq,
    read_metadata,
    save_codec,
)
from ornstein.codecs.weights import FORMAT, codec_fact
from ornstein.data import Digits
from ornstein.training.autoencoder_scoring import image_batches, score_reconstructions, to_model

LOADERS = {"kl": load_kl, "vq": load_vq}
TINY = {"width": 8, "multipliers": [1, 1, 1], "groups": 4}
FITTING = {
    "fits": ["digits"],
    "image_channels": 1,
    "image_size": 32,
    "downsample": 4,
    "channels": 4,
    "size": 8,
    "sigma_data": 1.0,
}


@pytest.fixture(scope="module")
def held_out() -> Digits:
    return Digits(split="val", image_size=32)


def tiny_file(path: Path, *, data: str = "digits", kind: str = "kl", dtype: torch.dtype = torch.float16) -> Autoencoder:
    torch.manual_seed(0)
    model: Autoencoder = KLAutoencoder(1, 16, **TINY) if kind == "kl" else VQAutoencoder(1, 16, codes=8, **TINY)
    model.measure([torch.randn(32, 1, 16, 16)])
    save_codec(model, path, metadata={"data": data, "held_out_psnr": 12.5}, dtype=dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_round_trip_keeps_everything_but_the_rounding(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    path = tmp_path / FILE_NAME
    model = tiny_file(path, kind=kind, dtype=dtype)
    option = {"kl": {"sample_posterior": True}, "vq": {"quantise_latents": True}}[kind]
    twin = LOADERS[kind](path, **option)
    assert twin.config == model.config and twin.stochastic == (kind == "kl")
    assert not twin.training and not any(p.requires_grad for p in twin.parameters())
    for name, value in model.state_dict().items():
        if name == "quantiser.share":
            continue
        exact = name in ("scale", "shift")
        assert twin.state_dict()[name].equal(value if exact else value.to(dtype).float()), name
    metadata = read_metadata(path)
    assert metadata["kind"] == kind and metadata["data"] == "digits" and metadata["held_out_psnr"] == 12.5
    torch.testing.assert_close(torch.tensor(metadata["scale"]), model.scale.flatten())
    assert list(tmp_path.iterdir()) == [path], "nothing half-written may stay behind"
    assert LOADERS[kind](tmp_path).config == model.config, "a run's folder names its file"
    assert (codec_fact(kind, tmp_path, "downsample"), codec_fact(kind, path, "channels")) == (4, 4)


SMALLEST_PSNR = {"kl": 46.18, "vq": 43.0}  # of kl: what the file held whose architecture was another
LARGEST = {"kl": 1_000_000, "vq": 500_000}


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_bundled_file_is_small_and_fits_its_config(kind: str) -> None:
    assert bundled_path(kind).stat().st_size < LARGEST[kind]
    codec = LOADERS[kind]("bundled", **FITTING)
    assert (codec.channels, codec.size, codec.sigma_data, codec.downsample) == (4, 8, 1.0, 4)
    assert read_metadata(bundled_path(kind))["data_fingerprint"] == Digits(split="train", image_size=32).fingerprint


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_bundled_latents_have_unit_variance_on_digits(kind: str, held_out: Digits) -> None:
    codec = LOADERS[kind]()
    # Measured on the training scans, up to rounding; 359 held-out scans differ by sampling error alone.
    for data, tolerance in ((Digits(split="train", image_size=32), 1e-3), (held_out, 0.1)):
        with torch.no_grad():
            z = torch.cat([codec.encode(to_model(images)) for images in image_batches(data, batch_size=256)])
        std, mean = torch.std_mean(z, dim=(0, 2, 3))
        torch.testing.assert_close(std, torch.ones(4), rtol=0, atol=tolerance)
        torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=tolerance)


def test_every_bundled_latent_channel_says_more_than_its_noise(held_out: Digits) -> None:
    posterior = load_kl().posterior(to_model(held_out.batch(range(len(held_out)))["image"]))
    spread = posterior.mean.std(dim=(0, 2, 3))
    # A collapsed channel has a posterior as wide as the prior and means that hardly move: scaled to unit
    # variance it would be pure noise for the diffusion model to learn.
    assert (spread > 2 * posterior.std.mean(dim=(0, 2, 3))).all()


def test_the_bundled_codebook_is_in_use(held_out: Digits) -> None:
    codec = load_vq()
    with torch.no_grad():
        found = codec.quantiser(codec.latents(to_model(held_out.batch(range(len(held_out)))["image"])))
    assert codec.quantiser.perplexity(found.indices) > 64, "of 256"


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_bundled_figures_are_what_the_header_says(kind: str, held_out: Digits) -> None:
    measured = score_reconstructions(LOADERS[kind](), held_out, device=torch.device("cpu")).values
    stated = read_metadata(bundled_path(kind))
    assert stated["held_out_psnr"] >= SMALLEST_PSNR[kind]
    # Other CPUs round differently: a grey level here and there, far below 0.1 dB; a code here and there.
    assert abs(measured["psnr"] - stated["held_out_psnr"]) < 0.1
    assert abs(measured["ssim"] - stated["held_out_ssim"]) < 0.005


REFUSALS = [
    ({"image_size": 28}, "trained with image_size=32, but data.image_size is 28"),
    ({"image_size": (32, 48)}, "data.image_size is"),
    ({"image_channels": 3}, "trained with image_channels=1, but data.channels is 3"),
    ({"channels": 8}, "trained with channels=4, but codec.channels is 8"),
    ({"downsample": 8}, "trained with downsample=4, but codec.downsample is 8"),
    ({"size": 4}, "latents of size 8, but codec.size is 4"),
    ({"sigma_data": 0.5}, r"codec\.sigma_data is 1\.0, not 0\.5"),
    ({"fits": ["emoji"]}, r"trained on digits, which codec\.fits=\['emoji'\] does not name"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSALS)
def test_a_config_that_does_not_fit_the_file_is_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_kl("bundled", **(FITTING | change))


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no autoencoder weights at .* train\.py model=autoencoder_kl"):
        load_kl(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=r"holds no codec\.safetensors, which a run of model=autoencoder_vq writes"):
        load_vq(tmp_path)
    with pytest.raises(ValueError, match="holds a vq autoencoder: choose codec=vq"):
        load_kl(bundled_path("vq"))
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match="holds no autoencoder of this package"):
        load_kl(foreign)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(bundled_path().read_bytes()[:10_000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_kl(damaged)


def test_tensors_that_do_not_fit_their_own_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    tiny_file(path)
    header = read_metadata(path)
    header["config"]["width"] = 16
    save_file(load_file(path), path, metadata={FORMAT: json.dumps(header)})
    with pytest.raises(ValueError, match="do not fit the architecture in its own header"):
        load_kl(path)
