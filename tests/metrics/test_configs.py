from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ornstein.metrics import ClassifierFeatures, DigitsFeatures, GenerativeMetrics

CONF = Path(__file__).parents[2] / "conf" / "metrics"
BUILT = {"digits": DigitsFeatures, "mnist": ClassifierFeatures, "fashion_mnist": ClassifierFeatures}


def _config(option: str, features: str = "digits"):
    metrics = OmegaConf.load(CONF / f"{option}.yaml")
    return OmegaConf.create({"data": {"features": features}, "metrics": metrics}).metrics


@pytest.mark.parametrize("option, features", [*((name, "none") for name in BUILT), *(("auto", name) for name in BUILT)])
def test_an_option_builds_its_features_and_its_metrics(option, features):
    config = _config(option, features)
    built = instantiate(config.features)
    name = features if option == "auto" else option
    assert type(built) is BUILT[name] and built.name == name
    settings = {key: value for key, value in OmegaConf.to_container(config).items() if key != "features"}
    metrics = GenerativeMetrics(built, **settings)
    assert metrics.num_samples == (1438 if name == "digits" else 1000)


def test_without_features_there_is_nothing_to_build():
    assert instantiate(_config("none").features) is None and _config("none").num_samples == 0
    assert instantiate(_config("auto", "none").features) is None


def test_all_options_have_the_same_keys():
    keys = {path.stem: set(OmegaConf.load(path)) for path in CONF.glob("*.yaml") if path.stem not in ("none", "run")}
    assert len(keys) == 5 and len(set(map(frozenset, keys.values()))) == 1
    assert set(OmegaConf.load(CONF / "none.yaml")) <= keys["digits"]
