import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from ornstein.metrics.module_features import ModuleFeatures


class Outputs(nn.Module):
    """Gives what a test asks for: a bare map, a mapping, a tuple, an object."""

    def __init__(self, form: str = "map") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.form = form

    def forward(self, x):
        maps = self.norm(self.conv(x))
        pooled = maps.mean((2, 3))
        named = {"maps": maps, "pooled": pooled, "logits": pooled[:, :2], "words": "none"}
        return {
            "map": maps,
            "mapping": named,
            "tuple": (maps, pooled),
            "object": type("Found", (), named)(),
            "scalar": maps.mean(),
        }[self.form]


IMAGES = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "form, output",
    [("map", None), ("mapping", "maps"), ("mapping", "pooled"), ("tuple", 1), ("tuple", 0), ("object", "pooled")],
)
def test_features_are_the_modules_output_pooled(form, output):
    module = Outputs(form)
    features = ModuleFeatures(module, image_size=None, output=output, name="mine")
    assert features.num_features == 5 and features.num_logits is None and features.name == "mine"
    x = (IMAGES.float() / 255 - torch.tensor(features.mean).view(3, 1, 1)) / torch.tensor(features.std).view(3, 1, 1)
    expected = module.norm(module.conv(x)).mean((2, 3))
    torch.testing.assert_close(features(IMAGES), expected, rtol=1e-5, atol=1e-6)


def test_logits_are_picked_and_not_taken_for_the_datas_classes():
    features = ModuleFeatures(Outputs("mapping"), image_size=16, output="pooled", logits="logits")
    assert features.num_logits == 2 and features.num_classes is None
    torch.testing.assert_close(features.logits(IMAGES), features(IMAGES)[:, :2])


def test_images_of_any_size_reach_the_module_at_its_own():
    seen = []

    class Looks(Outputs):
        def forward(self, x):
            seen.append((tuple(x.shape), float(x.min()), float(x.max())))
            return super().forward(x)

    features = ModuleFeatures(Looks(), image_size=12, mean=[0.5] * 3, std=[0.5] * 3)
    features(torch.full((2, 1, 30, 20), 255, dtype=torch.uint8))
    assert seen == [((1, 3, 12, 12), -1.0, -1.0), ((2, 3, 12, 12), 1.0, 1.0)]


def test_it_is_frozen_and_its_fingerprint_follows_weights_and_preparation():
    module = Outputs()
    features = ModuleFeatures(module, image_size=8)
    nn.Sequential(features).train()
    assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    same = ModuleFeatures(Outputs(), image_size=8)
    assert same.fingerprint == features.fingerprint
    for other in ({"image_size": 16}, {"image_size": 8, "mean": (0.5,) * 3}):
        assert ModuleFeatures(Outputs(), **other).fingerprint != features.fingerprint
    module.conv.weight.data += 1e-3
    assert ModuleFeatures(module, image_size=8).fingerprint != features.fingerprint


@pytest.mark.parametrize(
    "options, message",
    [
        ({"module": 3}, r"must be a torch\.nn\.Module, not int"),
        (
            {"module": Outputs("mapping")},
            r"gives a dict of maps, pooled, logits, words .* metrics\.features\.output=KEY",
        ),
        ({"module": Outputs("mapping"), "output": "cls"}, r"output=cls: .* a dict of maps, .* holds nothing"),
        ({"module": Outputs("mapping"), "output": "words"}, "gives a str where"),
        ({"module": Outputs("scalar")}, r"Tensor of shape \(\) where"),
        ({"module": Outputs("tuple"), "output": 7}, "tuple of 2, holds nothing"),
        ({"module": Outputs(), "mean": (0.5,)}, r"mean=\[0\.5\] must name three channels"),
        ({"module": Outputs(), "image_size": 0}, "image_size=0"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ModuleFeatures(**options)


def test_a_target_on_the_command_line_is_built():
    config = OmegaConf.create(
        {
            "_target_": "ornstein.metrics.ModuleFeatures",
            "module": {"_target_": "torch.nn.AvgPool2d", "kernel_size": 4},
            "name": "pooled_pixels",
            "image_size": 8,
        }
    )
    features = instantiate(config)
    # nn.AvgPool2d has no parameters: its extractor must still be usable by whoever asks for its device.
    assert features.num_features == 3 and next(features.parameters()).device.type == "cpu"


def test_a_stored_config_may_name_foreign_modules_only_if_they_are_trusted():
    """``evaluate.py``'s list of targets: ours pass, another's ask for trust_targets."""
    from ornstein.cli.trust import check_targets

    def stored(target):
        features = {"_target_": "ornstein.metrics.ModuleFeatures", "module": {"_target_": target}}
        return OmegaConf.create({"metrics": {"features": features}})

    check_targets(stored("ornstein.metrics.classifier.ClassifierNet"))
    with pytest.raises(ValueError, match=r"names elsewhere\.nets\.Mine, .* trust_targets=\[elsewhere\.nets\]"):
        check_targets(stored("elsewhere.nets.Mine"))
    check_targets(stored("elsewhere.nets.Mine"), ["elsewhere.nets"])  # and nothing is imported
    for target in ("EfficientNetFeatures", "InceptionFeatures", "DinoFeatures", "ClipFeatures"):
        check_targets(OmegaConf.create({"metrics": {"features": {"_target_": f"ornstein.metrics.{target}"}}}))
