"""The Lightning data module: order, resuming, facts, and every data config."""

import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ornstein.data import DataModule, Digits, ImageFolder
from ornstein.errors import OrnsteinError

Make = Callable[..., Path]

CONF = Path(__file__).parents[2] / "conf" / "data"
FACTS = {"image_size", "channels", "num_classes", "class_names", "sigma_data", "flip", "features"}
LOADING = {"batch_size", "eval_batch_size", "num_workers", "seed"}
CHOOSING = {"limit", "limit_reference", "balanced", "overlap"}
# Those of which this file makes small copies; the others have tests of their own: test_published.py, test_hf.py, ...
COPIED = {"digits", "emoji", "fashion_mnist", "image_folder", "mnist"}
STREAMED = {"webdataset"}


def made(name: str, **overrides: Any) -> DataModule:
    """The data module of `data=<name>` under seed 7."""
    group = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), overrides)
    config = OmegaConf.create({"seed": 7, "data": group})
    module = instantiate(config.data)
    assert isinstance(module, DataModule)
    return module


def indices(module: DataModule, count: int) -> list[list[int]]:
    """The images of the first batches of training."""
    return [batch["index"].tolist() for batch in islice(module.train_dataloader(), count)]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_config_says_what_a_data_module_wants(name: str) -> None:
    """The facts of the data and how they are served; the first line a comment, no key without a default."""
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    group = OmegaConf.create(text)
    assert text.startswith("#") and "???" not in text
    assert set(group) >= FACTS | LOADING | (set() if name in STREAMED else CHOOSING)
    if name not in STREAMED:
        # Latents alone show no images to compare.
        overlap = "allow" if name == "latents" else "drop"
        assert (group.balanced, group.overlap, group.limit_reference, group.limit) == (False, overlap, "whole", None)


@pytest.mark.parametrize("name", sorted(COPIED))
def test_every_config(
    name: str, bare_machine: Path, idx_folder: Make, picture_folder: Make, emoji_package: Path
) -> None:
    """Each config builds its data module, whose facts agree with made data of that kind."""
    roots = {
        "mnist": lambda: idx_folder(),
        "fashion_mnist": lambda: idx_folder(),
        "emoji": lambda: emoji_package,
        "image_folder": lambda: picture_folder({"": 40}),
    }
    overrides = {"root": str(roots[name]()), "download": False} if name in roots else {}
    if name == "image_folder":
        del overrides["download"]
    group = OmegaConf.load(CONF / f"{name}.yaml")
    with warnings.catch_warnings():
        # Noise has another spread than the real data whose sigma_data the config states.
        warnings.filterwarnings("ignore", message="data.sigma_data")
        module = made(name, **overrides)
        module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (group.batch_size, group.channels, group.image_size, group.image_size)
    assert ("label" in batch) == (group.num_classes is not None)
    captions = 0 if name == "image_folder" else group.batch_size  # one folder has no names to make them of
    assert len(batch.get("caption", [])) == captions
    assert module.seed == 7
    assert sum(len(val["index"]) for val in module.val_dataloader()) == len(module.val)


def test_digits_facts_are_the_measured_ones() -> None:
    """The figure in the config is the measured one to its three digits; no warning."""
    from ornstein.data.describe import measure_sigma_data

    module = made("digits")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.setup("fit")
    assert module.sigma_data == round(measure_sigma_data(module.train), 3)


@pytest.mark.parametrize("batch_size", [128, 2000])
def test_order_does_not_depend_on_workers(batch_size: int) -> None:
    """0, 1 and 2 processes read the same batches, those of the sampler."""
    expected = indices(DataModule(Digits, batch_size=batch_size, seed=2), 6)
    for workers in (1, 2):
        assert indices(DataModule(Digits, batch_size=batch_size, seed=2, num_workers=workers), 6) == expected


def test_lazy_folder_with_workers(picture_folder: Make) -> None:
    """Decoding in workers gives what decoding here gives."""
    options = {"root": str(picture_folder({"": 20})), "image_size": 8, "storage": "lazy"}
    here, there = (DataModule(ImageFolder, batch_size=6, num_workers=n, **options) for n in (0, 2))
    for ours, theirs in islice(zip(here.train_dataloader(), there.train_dataloader(), strict=False), 5):
        assert torch.equal(ours["image"], theirs["image"]) and torch.equal(ours["index"], theirs["index"])


def test_start_batch_goes_on() -> None:
    """A new data module at batch 20 reads what the first reads after 20 batches."""
    whole = indices(DataModule(Digits, batch_size=100, seed=1), 25)
    resumed = DataModule(Digits, batch_size=100, seed=1)
    resumed.start_batch = 20
    assert indices(resumed, 5) == whole[20:]


def test_iterating_leaves_the_global_stream_alone() -> None:
    """A loader that drew its base seed from torch's stream would make resumed runs differ."""
    module = DataModule(Digits, batch_size=10, num_workers=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(module.train_dataloader()))
    next(iter(module.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_is_everything_once_in_order() -> None:
    """359 images in batches of 100: the last one short."""
    loader = DataModule(Digits, batch_size=128, eval_batch_size=100).val_dataloader()
    found = [batch["index"] for batch in loader]
    assert [len(batch) for batch in found] == [100, 100, 100, 59] and len(loader) == 4
    assert torch.equal(torch.cat(found), torch.arange(359))


class Watcher(lightning.LightningModule):
    """Trains one number and notes which images it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.validated = 0

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        """Note the images."""
        self.seen.append(batch["index"].tolist())
        return self.weight**2

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Count the images."""
        self.validated += len(batch["index"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("options", [{}, {"overfit_batches": 4}], ids=["plain", "overfit_batches"])
def test_lightning_reads_our_order(options: dict[str, Any]) -> None:
    """The trainer sees one endless epoch, validates in between, and never swaps the sampler for its own."""
    module, watcher = DataModule(Digits, batch_size=500, seed=4), Watcher()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=8,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(watcher, datamodule=module)
    order = indices(DataModule(Digits, batch_size=500, seed=4), 8)
    assert watcher.seen == (order if not options else order[:4] * 2)
    if not options:
        assert trainer.current_epoch <= 1 and watcher.validated == 2 * 359


@pytest.mark.parametrize(
    ("key", "value", "is_so"),
    [("num_classes", 9, "10"), ("class_names", ["a", "b"], r"\[0,1,2,3,4,5,6,7,8,9\]")],
)
def test_facts_that_disagree_are_refused(key: str, value: Any, is_so: str) -> None:
    """The sentence names the key, both values, and the override to use."""
    module = DataModule(Digits, batch_size=4, **{key: value})
    with pytest.raises(OrnsteinError, match=rf"data\.{key}.*say data\.{key}={is_so}"):
        module.setup("fit")


def test_unlabelled_folder_with_classes_asked_for(picture_folder: Make) -> None:
    """`data.num_classes=3` on a flat folder."""
    module = made("image_folder", root=str(picture_folder({"": 10})), num_classes=3)
    with pytest.raises(OrnsteinError, match=r"say data\.num_classes=null"):
        module.setup("fit")


@pytest.mark.parametrize(("num_classes", "found"), [(None, None), ("auto", 2), (2, 2)])
def test_num_classes(picture_folder: Make, num_classes: Any, found: int | None) -> None:
    """None hides the labels, auto takes what is found, a number is checked."""
    root = str(picture_folder({"a": 9, "b": 9}))
    module = DataModule(ImageFolder, batch_size=4, num_classes=num_classes, root=root, image_size=8)
    assert module.train.num_classes == found
    assert ("label" in next(iter(module.train_dataloader()))) == (found is not None)


def test_unknown_option_is_refused() -> None:
    """A key that the data set does not know is named."""
    with pytest.raises(OrnsteinError, match="val_fractoin"):
        DataModule(Digits, batch_size=4, val_fractoin=0.1).setup("fit")


def test_wrong_sigma_data_is_warned_about() -> None:
    """With the measured figure at hand."""
    with pytest.warns(UserWarning, match=r"say data\.sigma_data=0\.7"):
        DataModule(Digits, batch_size=4, sigma_data=0.5).setup("fit")


def test_limit() -> None:
    """Eight images, spread over the set; validation keeps all."""
    module = DataModule(Digits, batch_size=20, limit=8)
    assert len(module.train) == 8 and len(module.val) == 359
    assert all(set(batch) == set(range(8)) for batch in indices(module, 3))


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": 1, "limit": 0}])
def test_numbers_are_checked(arguments: dict[str, int]) -> None:
    """Before anything is loaded."""
    with pytest.raises(OrnsteinError, match="at least 1"):
        DataModule(Digits, **arguments)


def test_describe_needs_no_torch() -> None:
    """Counting classes while a config is validated must not cost the import of torch or Lightning."""
    import subprocess
    import sys

    heavy = ("torch", "lightning", "PIL")
    code = f"import sys, ornstein.data.describe; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_without_workers_gives_what_torch_would_give():
    """Without workers the loader is passed over; the batches are its own, tensor by tensor."""
    module = made("digits", batch_size=5)
    batches = module.train_dataloader()
    for ours, theirs in zip(islice(batches, 400), batches.loader, strict=False):
        assert ours.pop("caption") == theirs.pop("caption")
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
