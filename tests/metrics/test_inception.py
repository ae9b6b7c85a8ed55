import socket
import urllib.error

import pytest
import torch

from ornstein.metrics import inception
from ornstein.metrics.features import features_by_name
from ornstein.metrics.inception import FILE_NAME, InceptionFeatures, WeightsMissing, inception_weights


@pytest.fixture(autouse=True)
def _empty_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def offline(monkeypatch):
    calls = []

    def refuse(request, timeout):
        calls.append(request.full_url)
        raise urllib.error.URLError(socket.gaierror("name resolution failed"))

    monkeypatch.setattr(inception.urllib.request, "urlopen", refuse)
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
    with pytest.raises(WeightsMissing, match=r"(?s)fetch https://.*metrics\.features\.weights=FILE.*metrics=none"):
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


def test_the_real_architecture_gives_torch_fidelitys_features(random_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    features = InceptionFeatures(random_weights)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(random_weights)
    )
    expected, logits = theirs(images)
    features.train()  # must change nothing
    found, found_logits = features.features_and_logits(images)
    assert found.shape == (2, 2048) and found_logits.shape == (2, 1008)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(found_logits, logits, rtol=0, atol=0)
    assert expected.std() > 0 and not torch.equal(found[0], found[1])
    gray = images[:, :1]
    torch.testing.assert_close(features(gray), features(gray.expand(-1, 3, -1, -1)), rtol=0, atol=0)
    assert features.num_classes is None and not features.official and len(features.fingerprint) == 64


def test_it_scores_through_torchmetrics(random_weights, monkeypatch):
    from ornstein.metrics.generative import GenerativeMetrics

    monkeypatch.setenv("ORNSTEIN_WEIGHTS", str(random_weights.parent))
    features = features_by_name("inception")
    # The real width makes eigenvalues of 2048 x 2048 take half a minute: the first 32 features stand for them.
    whole = features.features_and_logits
    monkeypatch.setattr(features, "features_and_logits", lambda x: (whole(x)[0][:, :32], whole(x)[1]))
    features.num_features = 32
    generator = torch.Generator().manual_seed(1)
    real, fake = (torch.randint(0, high, (3, 3, 16, 16), dtype=torch.uint8, generator=generator) for high in (256, 128))
    metrics = GenerativeMetrics(features, kid_subsets=2, label_accuracy=True)
    metrics.set_reference(real)
    metrics.update(fake, torch.tensor([0, 1, 2]))
    values = metrics.compute()
    assert values["fid"] > 0 and values["inception_score"] >= 1
    assert "label_accuracy" not in values  # ImageNet's classes are not the data's


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
