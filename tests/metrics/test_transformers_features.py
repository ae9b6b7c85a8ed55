import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ornstein  # noqa: F401  (its guard comes before transformers')
from ornstein.metrics.features import WeightsMissing, features_by_name
from ornstein.metrics.transformers_features import ClipFeatures, DinoFeatures

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = torch.randint(0, 256, (3, 3, 50, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A folder as ``save_pretrained`` leaves it: DINOv2's architecture, two layers, random weights."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    net = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, image_size=70, patch_size=14))
    torch.nn.init.normal_(net.embeddings.position_embeddings)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A whole CLIP, with its text half, as hub models have it."""
    folder = tmp_path_factory.mktemp("clip")
    text = {**SMALL, "vocab_size": 10, "max_position_embeddings": 8}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    transformers.CLIPModel(config).save_pretrained(folder)
    preparation = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return folder


def _pillow(image: torch.Tensor, size: int, *, crop: bool = False) -> torch.Tensor:
    """One image as the papers' code prepares it, before normalisation: (3, size, size) in [0, 1]."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    if crop:
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    picture = picture.resize((size, size), resample=Image.BICUBIC)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


def test_dino_gives_the_normed_class_token_of_stretched_images(dino):
    features = DinoFeatures(dino)
    assert (features.num_features, features.num_logits, features.suffix, features.name) == (
        16,
        None,
        "_dinov2",
        "dinov2",
    )
    x = torch.stack([_pillow(image, 224) for image in IMAGES])
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    net = transformers.Dinov2Model.from_pretrained(dino).eval()
    with torch.no_grad():
        expected = net(pixel_values=x).last_hidden_state[:, 0]  # transformers norms the whole sequence
    torch.testing.assert_close(features(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert expected.std(0).min() > 0
    gray = IMAGES[:, :1]
    torch.testing.assert_close(features(gray), features(gray.expand(-1, 3, -1, -1)))


def test_clip_gives_its_image_embedding_at_length_one_of_the_middle_square(clip):
    features = ClipFeatures(clip)
    assert (features.num_features, features.suffix, features.agreed_samples) == (12, "_clip", 30_000)
    x = torch.stack([_pillow(image, 32, crop=True) for image in IMAGES])
    x = (x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    net = transformers.CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        expected = net.visual_projection(net.vision_model(pixel_values=x).pooler_output)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    found = features(IMAGES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_they_are_built_by_name_from_a_folder_and_have_a_fingerprint(name, dino, clip, tmp_path):
    folder = {"dinov2": dino, "clip": clip}[name]
    features = features_by_name(name, weights=folder)
    again = features_by_name(name, weights=str(folder))
    assert features.fingerprint == again.fingerprint and len(features.fingerprint) == 64
    features.train()
    assert not any(module.training for module in features.modules())
    assert not any(parameter.requires_grad for parameter in features.parameters())
    with pytest.raises(ValueError, match="has no logits"):
        features.logits(IMAGES)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_the_option_takes_a_folder(name, dino, clip):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(Path(__file__).parents[2] / "conf" / "metrics" / f"{name}.yaml")
    config.features.weights = str({"dinov2": dino, "clip": clip}[name])
    features = instantiate(config.features)
    assert features.name == name and features(IMAGES).shape == (3, features.num_features)


def test_the_preparation_is_in_the_fingerprint(dino):
    assert DinoFeatures(dino, image_size=112).fingerprint != DinoFeatures(dino).fingerprint
    with pytest.raises(ValueError, match="image_size=100 must be a multiple of DINOv2's 14"):
        DinoFeatures(dino, image_size=100)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_what_is_not_there_is_told_at_once_and_in_one_sentence(name, dino, clip, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    other = {"dinov2": clip, "clip": dino}[name]
    for weights, reason in ((tmp_path, "config.json"), (other, "it is a"), ("nobody/no-such-model", "HF_HUB_OFFLINE")):
        with pytest.raises(WeightsMissing, match=f"no model could be loaded from .*{reason}.*give a folder") as error:
            features_by_name(name, weights=weights)
        assert "\n" not in str(error.value)


def test_both_figures_come_of_them(dino, clip):
    """FD-DINOv2 and CMMD through the metrics, with the names that go with the spaces."""
    from ornstein.metrics.generative import GenerativeMetrics

    images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    also = {"clip": str(clip), "efficientnet": False}
    metrics = GenerativeMetrics(features_by_name("dinov2", weights=dino), also=also, bootstrap=0)
    for space in metrics.spaces:
        metrics.set_reference(images[:12], space=space.features)
    metrics.update(images[12:])
    values = metrics.compute()
    assert values["fd_dinov2_12"] > 0 and values["fd_clip_12"] > 0 and "cmmd" in values
