import io
import socket
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from ornstein.metrics import inception
from ornstein.metrics.features import features_by_name
from ornstein.metrics.inception import (
    FILE_NAME,
    RESIZES,
    InceptionFeatures,
    WeightsMissing,
    inception_weights,
    resize,
)


@pytest.fixture(autouse=True)
def _empty_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def offline(monkeypatch):
    calls = []

    def refuse(request, timeout):
        calls.append(request.full_url)
        raise urllib.error.URLError(socket.gaierror("name resolution failed"))

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return calls


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A file of the layout that torch-fidelity downloads, with random weights."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
    patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    torch.manual_seed(0)
    net = module.FeatureExtractorInceptionV3("random", ["2048"])
    patch.undo()
    path = tmp_path_factory.mktemp("weights") / FILE_NAME
    torch.save(net.state_dict(), path)
    return path


def test_places_are_searched_in_order(tmp_path, monkeypatch, offline):
    folders = [tmp_path / name for name in ("given", "environment", "hub/checkpoints")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / FILE_NAME).write_bytes(b"weights")
    given, environment, hub = (folder / FILE_NAME for folder in folders)
    assert inception_weights() == hub
    monkeypatch.setenv("ORNSTEIN_WEIGHTS", str(folders[1]))
    assert inception_weights() == environment
    assert inception_weights(folders[0]) == given and inception_weights(given) == given
    environment.unlink()
    assert inception_weights() == hub
    assert offline == []


def test_without_weights_there_is_one_sentence_that_says_how(offline):
    with pytest.raises(WeightsMissing, match=r"(?s)fetch https://.*weights=FILE.*metrics=efficientnet.*metrics=none"):
        features_by_name("inception")
    assert offline == [inception.URL]
    with pytest.raises(WeightsMissing, match="switched off"):
        features_by_name("inception", download=False)
    assert len(offline) == 1
    assert issubclass(WeightsMissing, ValueError)


def test_a_named_place_that_is_empty_is_not_replaced_by_a_download(tmp_path, offline):
    with pytest.raises(WeightsMissing, match="names that place alone"):
        InceptionFeatures(tmp_path / "nowhere.pth")
    assert offline == []


@pytest.mark.parametrize("content, fits", [(b"the real file", True), (b"another file", False)])
def test_a_download_is_checked_against_its_checksum(tmp_path, monkeypatch, content, fits):
    import hashlib

    source = tmp_path / "release.pth"
    source.write_bytes(content)
    monkeypatch.setattr(inception, "URL", source.as_uri())
    monkeypatch.setattr(inception, "CHECKSUM", hashlib.sha256(b"the real file").hexdigest()[:8])
    target = tmp_path / "hub" / "checkpoints" / FILE_NAME
    if fits:
        assert inception_weights() == target and target.read_bytes() == content
    else:
        with pytest.raises(WeightsMissing, match="invalid hash"):
            inception_weights()
        assert not list(target.parent.iterdir())


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    class Broken(io.BytesIO):
        headers = {"Content-Length": "1000"}  # noqa: RUF012

        def read(self, size=-1):
            if self.tell():
                raise ConnectionResetError("reset by peer")
            return super().read(10)

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Broken(b"0123456789"))
    with pytest.raises(WeightsMissing, match="reset by peer"):
        inception_weights()
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


@pytest.mark.parametrize("shape", [(32, 32), (299, 299), (400, 310), (75, 600)])
@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
def test_resizing_is_clean_fids(mode, shape):
    build = pytest.importorskip("cleanfid.resize").build_resizer(mode)
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(np.ascontiguousarray(build(image.permute(1, 2, 0).numpy()))).permute(2, 0, 1)
    ours = resize(image[None], mode)[0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-4)  # grey levels, stored in float32


def test_resizing_as_tensorflow_is_left_to_the_network_by_clean_fid_and_is_torch_fidelitys():
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    for name in ("tf1", "legacy_tensorflow"):
        assert torch.equal(resize(images, name), theirs)
    others = [resize(images, name) for name in ("clean", "legacy_pytorch")]
    assert all((other - theirs).abs().mean() > 1 for other in others)  # grey levels: the names are not interchangeable


def test_a_resize_is_part_of_name_and_fingerprint(random_weights):
    spaces = {name: InceptionFeatures(random_weights, resize=name) for name in RESIZES}
    assert spaces["tf1"].fingerprint == spaces["legacy_tensorflow"].fingerprint
    assert len({space.fingerprint for space in spaces.values()}) == 3
    assert {space.name for space in spaces.values()} == {"inception", "inception_clean", "inception_legacy_pytorch"}
    with pytest.raises(ValueError, match=r"metrics\.features\.resize=pil is unknown; choose one of tf1,"):
        InceptionFeatures(random_weights, resize="pil")


def test_other_resizes_reach_the_same_network(random_weights):
    """clean-fid's own path, with these weights: resize, then (x - 128) / 128 or pytorch-fid's scaling, then blocks."""
    images = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for mode in ("clean", "legacy_pytorch"):
        features = InceptionFeatures(random_weights, resize=mode)
        x = resize(images, mode)
        x = 2 * (x / 255) - 1 if mode == "legacy_pytorch" else (x - 128) / 128
        with torch.no_grad():
            expected = torch.nn.Sequential(*list(features.net.children())[:-1])(x).flatten(1)
        torch.testing.assert_close(features(images), expected, rtol=0, atol=0)


def test_the_real_architecture_gives_torch_fidelitys_features(random_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    features = InceptionFeatures(random_weights)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(random_weights)
    )
    maps = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: maps.append(output))
    expected, logits = theirs(images)
    features.train()  # must change nothing
    found, found_logits, spatial = features.all_features(images)
    assert found.shape == (2, 2048) and found_logits.shape == (2, 1008)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(found_logits, logits, rtol=0, atol=0)
    assert expected.std() > 0 and not torch.equal(found[0], found[1])
    gray = images[:, :1]
    torch.testing.assert_close(features(gray), features(gray.expand(-1, 3, -1, -1)), rtol=0, atol=0)
    assert features.num_classes is None and not features.official and len(features.fingerprint) == 64
    # sFID: TensorFlow's `mixed_6/conv`, as (row, column, channel), the first seven channels.
    assert spatial.shape == (2, features.num_spatial) == (2, 2023) and spatial.std() > 0
    picked = spatial.view(2, 17, 17, 7)
    for row, column, channel in ((0, 0, 0), (0, 1, 0), (3, 16, 6), (16, 2, 5)):
        assert torch.equal(picked[:, row, column, channel], maps[0][:, channel, row, column])


def test_it_scores_with_all_figures(random_weights, monkeypatch):
    from ornstein.metrics.generative import GenerativeMetrics

    monkeypatch.setenv("ORNSTEIN_WEIGHTS", str(random_weights.parent))
    features = features_by_name("inception")
    # The real width makes eigenvalues of 2048 x 2048 take half a minute: the first 32 features stand for them.
    whole = features.all_features

    def narrow(x):
        found = whole(x)
        return found._replace(features=found.features[:, :32], spatial=found.spatial[:, :16])

    monkeypatch.setattr(features, "all_features", narrow)
    features.num_features, features.num_spatial = 32, 16
    generator = torch.Generator().manual_seed(1)
    real, fake = (torch.randint(0, high, (3, 3, 16, 16), dtype=torch.uint8, generator=generator) for high in (256, 128))
    metrics = GenerativeMetrics(features, kid_subsets=2, sfid=True, bootstrap=0)
    metrics.set_reference(real)
    metrics.update(fake, torch.tensor([0, 1, 2]))
    values = metrics.compute()
    assert values["fid_3"] > 0 and values["sfid_3"] > 0 and values["inception_score_3"] >= 1
    assert "label_accuracy" not in values  # ImageNet's classes are not the data's


@pytest.mark.slow
def test_figures_are_those_of_torch_fidelitys_own_command_on_folders(random_weights, tmp_path):
    """End to end: PNGs on disk, its loader, network and formulas, against ours; relative 1e-3 (KID: 1e-3 of itself)."""
    from torch_fidelity import calculate_metrics

    from ornstein.metrics.generative import GenerativeMetrics

    count, generator = 24, torch.Generator().manual_seed(2)
    sets = {}
    for name, low in (("fake", 60), ("real", 0)):
        # Smooth blobs: noise that is averaged away would leave all features alike.
        small = torch.randint(low, 256, (count, 3, 4, 4), generator=generator).float()
        sets[name] = torch.nn.functional.interpolate(small, (40, 40), mode="bilinear").round().byte()
        (tmp_path / name).mkdir()
        for i, image in enumerate(sets[name]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:03}.png")
    theirs = calculate_metrics(
        input1=str(tmp_path / "fake"),
        input2=str(tmp_path / "real"),
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        isc_splits=1,
        kid_subsets=1,
        kid_subset_size=count,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(random_weights),
        batch_size=12,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    metrics = GenerativeMetrics(
        InceptionFeatures(random_weights),
        kid_subsets=1,
        kid_subset_size=count,
        inception_splits=1,
        precision_recall=True,
        bootstrap=0,
    )
    metrics.set_reference(sets["real"])
    metrics.update(sets["fake"])
    ours = metrics.compute()
    pairs = {
        "fid_24": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "inception_score_24": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for name, key in pairs.items():
        assert ours[name] == pytest.approx(theirs[key], rel=1e-3), name


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_files_that_are_no_weights_are_named(tmp_path, content):
    path = tmp_path / "broken.pth"
    if content is None:
        torch.save({"conv.weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pth does not hold torch-fidelity's Inception weights"):
        InceptionFeatures(path)


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="does not hold"):
        InceptionFeatures(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()
