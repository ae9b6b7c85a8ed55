import logging
from pathlib import Path

import pytest
import torch

from ornstein.metrics.paired import PairedScore, lpips_at_hand, psnr, ssim


@pytest.fixture(autouse=True)
def _empty_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def _images(size: int, *, count: int = 6, channels: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Originals, and the same with noise of another strength on each."""
    generator = torch.Generator().manual_seed(seed)
    originals = torch.randint(0, 256, (count, channels, size, size), generator=generator)
    noise = torch.randn(originals.shape, generator=generator) * torch.linspace(2, 60, count).view(-1, 1, 1, 1)
    return (originals + noise).round().clamp(0, 255).byte(), originals.byte()


@pytest.fixture
def alex(tmp_path, monkeypatch) -> Path:
    """AlexNet in torchvision's file layout and under its file name, random weights, in $ORNSTEIN_WEIGHTS."""
    torchvision = pytest.importorskip("torchvision")
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.manual_seed(0)
    path = folder / torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    state = torchvision.models.alexnet(weights=None).state_dict()
    torch.save({key: value for key, value in state.items() if key.startswith("features.")}, path)
    monkeypatch.setenv("ORNSTEIN_WEIGHTS", str(folder))
    return path


def test_psnr_and_ssim_are_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    images, originals = _images(24)
    for i, (image, original) in enumerate(zip(images, originals, strict=True)):
        pair = image[None].float(), original[None].float()
        assert float(psnr(images, originals)[i]) == pytest.approx(
            float(peak_signal_noise_ratio(*pair, data_range=255.0)), rel=1e-5
        )
        assert float(ssim(images, originals)[i]) == pytest.approx(
            float(structural_similarity_index_measure(*pair, data_range=255.0)), rel=1e-4
        )
    found = PairedScore(lpips=False)
    found.update(images, originals)
    values = found.compute()
    assert list(values) == ["psnr", "ssim"]
    assert values["psnr"] == pytest.approx(float(psnr(images, originals).mean()))
    assert values["ssim"] == pytest.approx(float(ssim(images, originals).mean()), rel=1e-6)


def test_lpips_is_torchmetrics_with_the_same_weights(alex):
    from torchmetrics.functional.image.lpips import _LPIPS

    images, originals = _images(40)
    theirs = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    state = torch.load(alex, weights_only=True)
    theirs.net.load_state_dict({key: state[f"features.{key.partition('.')[2]}"] for key in theirs.net.state_dict()})
    found = PairedScore()
    found.update(images, originals)
    with torch.no_grad():
        expected = theirs(images.float() / 127.5 - 1, originals.float() / 127.5 - 1).mean()
    assert found.compute()["lpips"] == pytest.approx(float(expected), rel=1e-4)  # float32, sums in another order


def test_every_image_counts_alike_whatever_the_batches(alex):
    images, originals = _images(32)
    whole, parts = PairedScore(), PairedScore()
    whole.update(images, originals)
    for rows in torch.arange(len(images)).split([1, 3, 2]):
        parts.update(images[rows], originals[rows])
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-5)
    assert parts.compute(collective=True) == parts.compute()  # one process is all of them
    parts.reset()
    assert parts.compute() == {}


@pytest.mark.parametrize("size, names", [(8, {"psnr"}), (16, {"psnr", "ssim"}), (32, {"psnr", "ssim", "lpips"})])
def test_small_images_have_fewer_figures(alex, size, names):
    found = PairedScore()
    found.update(*_images(size, channels=1))
    assert set(found.compute()) == names


def test_equal_images_are_at_the_ends_of_the_scales(alex):
    _, originals = _images(32)
    found = PairedScore()
    found.update(originals, originals)
    values = found.compute()
    # A squared error below 1e-3 counts as 1e-3: a mean over images stays a number.
    assert values == pytest.approx(
        {"psnr": 10 * torch.log10(torch.tensor(255.0**2 / 1e-3)).item(), "ssim": 1, "lpips": 0}
    )


def test_without_weights_lpips_is_left_out_with_one_line_that_says_how(caplog):
    found = PairedScore()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            found.update(*_images(32))
    assert "lpips" not in found.compute()
    assert len(caplog.records) == 1
    assert "no LPIPS" in caplog.text and "fetch https://" in caplog.text and "$ORNSTEIN_WEIGHTS" in caplog.text


def test_a_file_that_is_no_weights_costs_the_figure_and_a_warning(alex, caplog):
    alex.write_bytes(b"no weights")
    assert lpips_at_hand() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "does not hold torchvision's weights of alex" in caplog.text


def test_what_does_not_pair_is_refused():
    images, originals = _images(8)
    with pytest.raises(ValueError, match=r"\(6, 3, 8, 8\) are compared with originals \(5, 3, 8, 8\)"):
        PairedScore().update(images, originals[:5])
    with pytest.raises(ValueError, match="uint8"):
        PairedScore().update(images.float(), originals)
