"""Autoencoder files: the round trip, the bundled one's promises, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ornstein.codecs import KLAutoencoder, bundled_path, load_kl, read_metadata, save_kl
from ornstein.codecs.weights import FORMAT
from ornstein.data import Digits
from ornstein.training.train_autoencoder import images_of, main, posterior_means, psnr, reconstructions

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
def held_out() -> torch.Tensor:
    return images_of(Digits(split="val", image_size=32))


def tiny_file(path: Path, *, data: str = "digits") -> KLAutoencoder:
    torch.manual_seed(0)
    model = KLAutoencoder(1, 16, **TINY)
    with torch.no_grad():
        model.set_scale(model.posterior(torch.randn(32, 1, 16, 16)).mean)
    save_kl(model, path, metadata={"data": data, "held_out_psnr": 12.5})
    return model


def test_the_round_trip_keeps_everything_but_the_rounding_to_float16(tmp_path: Path) -> None:
    path = tmp_path / "codec.safetensors"
    model = tiny_file(path)
    twin = load_kl(path, sample_posterior=True)
    assert twin.config == model.config and twin.stochastic
    assert not twin.training and not any(p.requires_grad for p in twin.parameters())
    for name, value in model.state_dict().items():
        exact = name in ("scale", "shift")
        assert twin.state_dict()[name].equal(value if exact else value.half().float()), name
    metadata = read_metadata(path)
    assert metadata["data"] == "digits" and metadata["held_out_psnr"] == 12.5
    torch.testing.assert_close(torch.tensor(metadata["scale"]), model.scale.flatten())
    assert list(tmp_path.iterdir()) == [path], "nothing half-written may stay behind"


def test_the_bundled_file_is_small_and_fits_its_config() -> None:
    assert bundled_path().stat().st_size < 1_000_000
    codec = load_kl("bundled", **FITTING)
    assert (codec.channels, codec.size, codec.sigma_data, codec.downsample) == (4, 8, 1.0, 4)


def test_the_bundled_latents_have_unit_variance_on_digits(held_out: torch.Tensor) -> None:
    codec = load_kl()
    for split, tolerance in (("train", 1e-3), ("val", 0.05)):
        # Measured on the training scans, up to rounding; 359 held-out scans differ by sampling error alone.
        images = held_out if split == "val" else images_of(Digits(split="train", image_size=32))
        z = (posterior_means(codec, images) - codec.shift) * codec.scale
        std, mean = torch.std_mean(z, dim=(0, 2, 3))
        torch.testing.assert_close(std, torch.ones(4), rtol=0, atol=tolerance)
        torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=tolerance)


def test_every_bundled_latent_channel_says_more_than_its_noise(held_out: torch.Tensor) -> None:
    codec = load_kl()
    posterior = codec.posterior(held_out.float() / 127.5 - 1)
    spread = posterior.mean.std(dim=(0, 2, 3))
    # A collapsed channel has a posterior as wide as the prior and means that hardly move: scaled to unit
    # variance it would be pure noise for the diffusion model to learn.
    assert (spread > 2 * posterior.std.mean(dim=(0, 2, 3))).all()


def test_the_bundled_psnr_is_what_its_header_says(held_out: torch.Tensor) -> None:
    measured = psnr(held_out, reconstructions(load_kl(), held_out)).mean().item()
    stated = read_metadata(bundled_path())["held_out_psnr"]
    assert stated > 26
    # Other CPUs round differently: a grey level here and there, far below 0.1 dB.
    assert abs(measured - stated) < 0.1


def test_the_bundled_file_knows_the_scans_that_it_was_trained_on() -> None:
    train = Digits(split="train", image_size=32)
    assert read_metadata(bundled_path())["data_fingerprint"] == train.fingerprint


REFUSALS = [
    ({"image_size": 28}, "trained with image_size=32, but data.image_size is 28"),
    ({"image_size": (32, 48)}, "data.image_size is"),
    ({"image_channels": 3}, "trained with image_channels=1, but data.channels is 3"),
    ({"channels": 8}, "trained with channels=4, but codec.channels is 8"),
    ({"downsample": 8}, "trained with downsample=4, but codec.downsample is 8"),
    ({"size": 4}, "latents of size 8, but codec.size is 4"),
    ({"sigma_data": 0.5}, "codec.sigma_data is 1.0, not 0.5"),
    ({"fits": ["emoji"]}, r"trained on digits, which codec\.fits=\['emoji'\] does not name"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSALS)
def test_a_config_that_does_not_fit_the_file_is_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_kl("bundled", **(FITTING | change))


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no autoencoder weights at"):
        load_kl(tmp_path / "nowhere.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match="holds no autoencoder of this package"):
        load_kl(foreign)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(bundled_path().read_bytes()[:10_000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_kl(damaged)


def test_tensors_that_do_not_fit_their_own_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "codec.safetensors"
    tiny_file(path)
    header = read_metadata(path)
    header["config"]["width"] = 16
    save_file(load_file(path), path, metadata={FORMAT: json.dumps(header)})
    with pytest.raises(ValueError, match="do not fit the architecture in its own header"):
        load_kl(path)


def test_psnr_is_its_closed_form() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    # An error of 51 = 255 / 5 everywhere: 10 log10(25).
    assert psnr(images, images + 51).tolist() == pytest.approx([13.979400086720377] * 2)


def test_the_trainer_writes_a_file_that_loads_and_repeats_itself(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    tiny = ["--data", "digits", "--image-size", "8", "--steps", "2", "--batch-size", "4", "--width", "8"]
    for file in files:
        main([*tiny, "--multipliers", "1", "1", "--out", str(file), "--grid", str(tmp_path / "grid.png")])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert load_kl(files[0], fits=["digits"], image_size=8, downsample=2, size=4).size == 4
    assert (tmp_path / "grid.png").stat().st_size > 0


def test_the_trainer_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--data", "mnist"])
    assert stop.value.code == 2 and "--out is needed" in capsys.readouterr().err
