"""Images as one array: .npz, .npy and raw files in every layout, their labels and splits, and what is refused."""

import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ornstein.data import DataModule, ImageArrays
from ornstein.data.array_files import ChannelsFirst, Found, check_pixels
from ornstein.data.images import resize_array
from ornstein.errors import OrnsteinError

Save = Callable[..., Path]
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
LABELS = np.arange(40) % 4


@pytest.fixture
def save(tmp_path: Path, bare_machine: Path) -> Save:
    """Writes arrays by the ending of a name: one .npy, an .npz of several, or bare numbers."""

    def write(name: str, first: np.ndarray | None = None, /, **arrays: np.ndarray) -> Path:
        path = tmp_path / name
        if name.endswith(".npy"):
            np.save(path, first)  # type: ignore[arg-type]
        elif name.endswith(".npz"):
            np.savez(path, **arrays)  # type: ignore[arg-type]
        else:
            assert first is not None
            path.write_bytes(b"head" + first.tobytes())
        return path

    return write


def everything(root: Path, **options: Any) -> dict[bytes, Any]:
    """Both splits: each image's pixels and its label."""
    found: dict[bytes, Any] = {}
    for split in ("train", "val"):
        dataset = ImageArrays(split=split, root=str(root), **options)
        labels = [None] * len(dataset) if dataset.labels is None else dataset.labels.tolist()
        images = dataset.images[np.arange(len(dataset))]
        found |= {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    return found


EXPECTED = {image.transpose(2, 0, 1).tobytes(): int(label) for image, label in zip(IMAGES, LABELS, strict=True)}
CHANNELS_FIRST = np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))
FILES: dict[str, tuple[str, dict[str, np.ndarray], dict[str, Any]]] = {
    "adm": ("a.npz", {"arr_0": IMAGES, "arr_1": LABELS}, {}),
    "names": ("a.npz", {"images": CHANNELS_FIRST, "labels": LABELS[:, None].astype(np.uint8)}, {}),
    "said": ("a.npz", {"u": IMAGES, "v": IMAGES[:2], "w": LABELS}, {"images": "u", "label_array": "w"}),
    "npy": ("a.npy", {"": IMAGES, "labels": LABELS}, {}),
    "npy nchw": ("a.npy", {"": CHANNELS_FIRST, "labels": LABELS}, {"layout": "nchw"}),
    "raw": ("a.bin", {"": IMAGES, "labels": LABELS}, {"shape": [40, 6, 6, 3], "offset": 4}),
    "raw, counted": ("a.bin", {"": CHANNELS_FIRST, "labels": LABELS}, {"shape": [-1, 3, 6, 6], "offset": 4}),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_same_images(save: Save, kind: str) -> None:
    name, arrays, options = FILES[kind]
    if "" in arrays:
        root = save(name, arrays[""])
        options = options | {"label_root": str(save("labels.npy", arrays["labels"]))}
    else:
        root = save(name, **arrays)
    assert everything(root, **options) == EXPECTED
    assert set(everything(root, labels=False, **options).values()) == {None}
    config = {"root": str(root), **options}
    facts = [ImageArrays.fact(config, fact) for fact in ("image_size", "channels", "num_classes")]
    assert facts == [6, 3, 4] and ImageArrays.count_classes(config) == 4


def test_a_file_on_disk_stays_there(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are handed its path; hashing is done once; an .npz is an array in memory."""
    root = save("a.npy", IMAGES)
    train = ImageArrays(split="train", root=str(root))
    assert isinstance(train.images, ChannelsFirst) and train.images.mapped
    assert len(pickle.dumps(train.images)) < 2000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(train.images))[np.arange(5)], train.images[np.arange(5)])
    from ornstein.data import arrays

    monkeypatch.setattr(arrays, "row_keys", lambda images: pytest.fail("hashed again"))
    np.testing.assert_array_equal(ImageArrays(split="train", root=str(root)).content_keys, train.content_keys)
    modules = [DataModule(ImageArrays, batch_size=4, num_workers=n, root=str(root)) for n in (0, 2)]
    for ours, theirs in islice(zip(*(module.train_dataloader() for module in modules), strict=False), 3):
        assert torch.equal(ours["image"], theirs["image"])


def test_splits(save: Save) -> None:
    """By content, by files of their own, and a test split of either kind."""
    root = str(save("a.npz", arr_0=np.concatenate([IMAGES, IMAGES]), arr_1=np.concatenate([LABELS, LABELS])))
    train, val = (ImageArrays(split=split, root=root, val_fraction=0.25) for split in ("train", "val"))
    assert (len(train), len(val)) == (60, 20)  # copies stay together
    assert DataModule(ImageArrays, batch_size=2, root=root).test is None
    shared = DataModule(ImageArrays, batch_size=2, root=root, test_fraction=0.25)
    assert shared.test is not None and (len(shared.test), len(shared.train)) == (20, 52)
    own = {"val_root": str(save("v.npz", arr_0=IMAGES[:7])), "test_root": str(save("t.npz", arr_0=IMAGES[7:10]))}
    module = DataModule(ImageArrays, batch_size=2, num_classes=None, root=root, overlap="allow", **own)
    assert module.test is not None and [len(module.train), len(module.val), len(module.test)] == [80, 7, 3]
    np.testing.assert_array_equal(module.val.images[np.arange(7)], CHANNELS_FIRST[:7])
    with pytest.raises(OrnsteinError, match=r"data.test_root without data.val_root"):
        ImageArrays(split="val", root=root, test_root=root)


def test_sizes_and_channels(save: Save) -> None:
    grey = str(save("grey.npy", IMAGES[..., 0]))
    train = ImageArrays(split="train", root=grey)
    assert train.images.shape[1:] == (1, 6, 6)
    larger = ImageArrays(split="train", root=grey, image_size=12, channels=3)
    assert larger.images.shape[1:] == (3, 12, 12)
    rows = np.arange(len(train))
    np.testing.assert_array_equal(larger.images[rows][:, :1], resize_array(train.images[rows], 12))
    with pytest.raises(OrnsteinError, match=r"data.channels=1 and .* is RGB"):
        ImageArrays(split="train", root=str(save("a.npy", IMAGES)), channels=1)


def test_class_names_and_captions(save: Save) -> None:
    root = str(save("a.npz", arr_0=IMAGES, arr_1=LABELS))
    names = ("ant", "bee", "cat", "dog")
    train = ImageArrays(split="train", root=root, class_names=names, caption_template="a {}")
    assert train.captions is not None and train.labels is not None and train.class_names == names
    assert train.captions == [f"a {names[label]}" for label in train.labels]
    with pytest.raises(OrnsteinError, match=r"data.class_names has 2 names and there is a label 3"):
        ImageArrays(split="train", root=root, class_names=names[:2])


def mixed() -> np.ndarray:
    """Images of two sizes, as numpy keeps them."""
    found = np.empty(2, dtype=object)
    found[:] = [IMAGES[0], IMAGES[1, :4]]
    return found


BAD_ARRAYS: dict[str, tuple[np.ndarray, dict[str, Any], str]] = {
    "floats": (IMAGES / 255.0, {}, r"is float64, and images are uint8 in 0..255: save it so \(np.rint"),
    "wide": (IMAGES.astype(np.int64), {}, "is int64, and images are uint8"),
    "objects": (mixed(), {}, "is an array of Python objects, as images of mixed sizes become, and is never unpickled"),
    "rank": (IMAGES[..., None], {}, "has the shape 40x6x6x3x1, and images are"),
    "oblong": (IMAGES[:, :4], {}, "holds images of 4x6"),
    "either": (IMAGES[:, :3], {}, "both the second and the last axis could be channels.: say data.layout"),
    "neither": (np.zeros((4, 6, 6, 6), np.uint8), {}, "no axis of 1, 3 or 4 channels"),
    "alpha": (np.zeros((4, 6, 6, 4), np.uint8), {}, "has 4 channels .*transparency"),
    "layout": (IMAGES, {"layout": "hwc"}, "data.layout=hwc does not exist: choose one of auto, nhwc, nchw"),
    "wrong layout": (IMAGES, {"layout": "nchw"}, "has 6 channels"),
    "fortran": (np.asfortranarray(IMAGES), {}, "cannot be read .its axes are in Fortran's order"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_arrays_that_are_no_images_are_refused(save: Save, kind: str) -> None:
    """At validation, from the file's head, and by the data set itself; nothing is unpickled."""
    array, options, told = BAD_ARRAYS[kind]
    for name, arrays in (("a.npy", {}), ("b.npz", {"arr_0": array})):
        path = save(name, array, **arrays)
        with pytest.raises(OrnsteinError, match=told):
            ImageArrays.check({"root": str(path), **options})
        with pytest.raises(OrnsteinError, match=told):
            ImageArrays(split="train", root=str(path), **options)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"root": None}, "data=npz needs a file of images: say data.root=FILE"),
    ({"root": None, "shape": [1]}, "data=memmap needs a file"),
    ({"root": "/nowhere.npz"}, "data.root=/nowhere.npz does not exist"),
    ({"root": "{folder}"}, "is a folder: name a file"),
    ({"root": "{raw}"}, r"^\S+ is neither .npz nor .npy .*data=memmap data.shape=\[N,H,W,C\]$"),
    ({"root": "{raw}", "shape": [40, 6, 6, 3]}, "has 4,324 bytes, and data.shape=.* makes 4,320: say"),
    ({"root": "{raw}", "shape": [40, 6, 6, 3], "dtype": "uint7"}, "data.dtype=uint7 does not exist"),
    ({"root": "{cut}"}, "cannot be read .*: make the file anew"),
    ({"root": "{good}", "images": "x"}, "has no array x: it has arr_0, arr_1 .data.images"),
    ({"root": "{several}"}, "holds one, two: say which are the images by data.images=NAME"),
    ({"root": "{good}", "val_root": "/nowhere.npz"}, "data.val_root=/nowhere.npz does not exist"),
    ({"root": "{good}", "label_array": "x"}, "has no array x .data.label_array"),
    ({"root": "{good}", "label_root": "{good}"}, "data.label_root=.* holds arr_0, arr_1: say data.label_array"),
    ({"root": "{good}", "label_root": "{short}"}, "labels are one whole number for each of the 40 images"),
    ({"root": "{good}", "label_root": "{negative}"}, "has a label -1: count from 0"),
]


@pytest.mark.parametrize(("options", "told"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_read_is_refused(save: Save, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    good = save("good.npz", arr_0=IMAGES, arr_1=LABELS)
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-200])
    places = {
        "folder": tmp_path,
        "raw": save("a.bin", IMAGES),
        "cut": tmp_path / "cut.npz",
        "good": good,
        "several": save("two.npz", one=IMAGES, two=IMAGES),
        "short": save("short.npy", LABELS[:-1]),
        "negative": save("negative.npy", LABELS - 1),
    }
    asked = {key: value.format(**places) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(OrnsteinError, match=told):
        ImageArrays.check(asked)
        ImageArrays(split="train", **asked)


def test_a_truncated_npy_is_told(save: Save) -> None:
    path = save("a.npy", IMAGES)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OrnsteinError, match="cannot be read"):
        ImageArrays(split="train", root=str(path))


@pytest.mark.parametrize(("shape", "layout"), [((9, 5, 5, 3), "nhwc"), ((9, 3, 5, 5), "nchw"), ((9, 1, 5, 5), "nchw")])
def test_layouts_are_told_by_shape(shape: tuple[int, ...], layout: str) -> None:
    found = Found(path=Path("a"), name="", shape=shape, dtype=np.dtype(np.uint8))
    assert check_pixels(found, layout="auto") == check_pixels(found, layout=layout) == layout
