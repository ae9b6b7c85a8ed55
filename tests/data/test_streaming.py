"""Streams of tar shards: what is read, in which order, where it goes on, and what is said of what cannot be read."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ornstein.data import StreamModule, TarShards
from ornstein.data import streaming_tar as tar
from ornstein.data.stream_place import Place
from ornstein.data.streaming import SHARD_BITS, Decode, Stream, units_of
from ornstein.errors import OrnsteinError

Shards = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(urls: Any, **options: Any) -> StreamModule:
    """A stream of small images; two shards of six are held out."""
    given = {"batch_size": 4, "image_size": 8, "num_classes": "auto", "shuffle_buffer": 5, "val_fraction": 0.34}
    return StreamModule(TarShards, **{**given, "urls": str(urls), **options})


def decode(**options: Any) -> Decode:
    """Decoding at 8 x 8 without labels."""
    return Decode(**{"size": 8, "channels": 3, "crop": "adm", "classes": None, "captions": False, **options})


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two batches hold the same to the bit."""
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) if isinstance(ours[key], torch.Tensor) else ours[key] == theirs[key]
        for key in ours
    )


def restored(module: StreamModule, batches: int, state: dict[str, Any]) -> StreamModule:
    """The module as a resumed run has it, the state having been through a file."""
    module.start_batch = batches
    module.load_state_dict(json.loads(json.dumps(state)))
    return module


def state_of(loader: Any, batches: int) -> dict[str, Any]:
    """What a checkpoint of one device holds."""
    return {"batches": batches, "shape": loader.shape, "ranks": [loader.behind(batches)]}


# ---- what is read -----------------------------------------------------------------------------------------------


def test_reads_what_webdataset_reads(tar_shards: Shards) -> None:
    """Keys, images, classes and captions are those of webdataset's own reader on the same shards, in order."""
    import webdataset

    folder = tar_shards([5, 3])
    files = tar.TarFiles(tar.expand(str(folder), key="urls"), image="png", label="cls", caption="txt")
    ours = [record for shard in range(2) for record, _ in files.read(shard)]
    theirs = list(webdataset.WebDataset(files.shards, shardshuffle=False, empty_check=False))
    assert [record.name.rpartition(" ")[2] for record in ours] == [sample["__key__"] for sample in theirs]
    assert [record.image for record in ours] == [sample["png"] for sample in theirs]
    assert [str(record.label).encode() for record in ours] == [sample["cls"] for sample in theirs]
    assert [str(record.caption).encode() for record in ours] == [sample["txt"] for sample in theirs]


@pytest.mark.parametrize("packed", [False, True])
def test_goes_on_from_every_place(tar_file: Any, tar_shards: Shards, packed: bool) -> None:
    """Reading on from behind any sample gives what follows it, of plain and of packed shards, names of any length."""
    long = {f"a/{'b' * 120}{number}.png": bytes([number]) * (500 + number * 13) for number in range(9)}
    path = tar_file("long.tar.gz" if packed else "long.tar", long, mode="w:gz" if packed else "w")
    files = tar.TarFiles([str(path)], image="png", label=None, caption=None)
    whole = list(files.read(0))
    assert [record.image for record, _ in whole] == list(long.values())
    for place, (_, behind) in enumerate(whole):
        assert [record for record, _ in files.read(0, behind)] == [record for record, _ in whole[place + 1 :]]


COLUMNS = [
    # image, label, caption, what the sample says
    ("jpg;png", "cls", "txt", ("1", "picture 4")),
    ("PNG", "json.label", "json.about.caption", (1, "json 4")),
    ("png", None, None, (None, None)),
]


@pytest.mark.parametrize(("image", "label", "caption", "says"), COLUMNS)
def test_columns(tar_shards: Shards, image: str, label: str | None, caption: str | None, says: Any) -> None:
    """Members by extension, or keys of the JSON."""
    shards = tar.expand(str(tar_shards([6])), key="urls")
    record = [record for record, _ in tar.TarFiles(shards, image=image, label=label, caption=caption).read(0)][4]
    assert (record.label, record.caption) == says and record.fault is None and record.image


def test_names_of_shards(tar_shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Braces, globs, folders, lists and `::` name the same shards; addresses stay as they are."""
    folder = tar_shards([1, 1, 1])
    names = [str(folder / f"t-{number:03d}.tar") for number in range(3)]
    for urls in (
        f"{folder}/t-{{000..002}}.tar",
        f"{folder}/*.tar",
        f"file://{folder}/t-{{000..002}}.tar",
        str(folder),
        names,
        "::".join(names),
    ):
        assert tar.expand(urls, key="urls") == names
    assert tar.expand("https://x.org/{a,b}.tar", key="urls") == ["https://x.org/a.tar", "https://x.org/b.tar"]


REFUSED_NAMES = [
    ("{here}/t-{000..004}.tar", "data.urls 2 of 5 shards t-003.tar t-004.tar"),
    ("{here}/no*.tar", "fits no file"),
    ("{here}/..", "holds no .tar files"),
    ("{here}/t-{000..1.tar", "data.urls braces"),
    ("{here}/t-000.tar::{here}/t-000.tar", "more than once"),
    ("s3://bucket/t-{000..002}.tar", "s3:// data.urls='pipe:COMMAND data.trust_pipes=true"),
    ("", "data.urls names no shards"),
]


@pytest.mark.parametrize(("urls", "words"), REFUSED_NAMES)
def test_refused_names(tar_shards: Shards, urls: str, words: str) -> None:
    """Shards that are not there, in one sentence."""
    folder = tar_shards([1, 1, 1])
    with pytest.raises(OrnsteinError) as caught:
        tar.expand(urls.replace("{here}", str(folder)), key="urls")
    assert all(word in str(caught.value) for word in words.split())


def test_commands_are_not_run_unasked(tar_shards: Shards) -> None:
    """`pipe:` needs trust; with it its output is read, and a failing command is named."""
    path = tar_shards([3]) / "t-000.tar"
    shards = tar.expand(f"pipe:cat {path}", key="urls")
    with pytest.raises(OrnsteinError, match=r"data\.trust_pipes=true"):
        tar.TarFiles(shards, image="png", label=None, caption=None)
    piped = tar.TarFiles(shards, image="png", label=None, caption=None, trust_pipes=True)
    assert len(list(piped.read(0))) == 3
    failing = tar.TarFiles(["pipe:exit 3"], image="png", label=None, caption=None, trust_pipes=True)
    with pytest.raises(tar.Unreachable, match="exit 3"):
        list(failing.read(0))


def test_commands_of_a_stored_config() -> None:
    """What somebody else's run names runs no command unasked, wherever its shards are listed."""
    from omegaconf import OmegaConf

    from ornstein.cli.trust import check_targets

    for data in (
        {"urls": "pipe:cat a"},
        {"urls": ["a.tar", "b.tar::pipe:cat a"]},
        {"urls": "a", "test_urls": "pipe:x"},
    ):
        stored = OmegaConf.create({"data": {"_target_": "ornstein.data.StreamModule", "trust_pipes": True, **data}})
        with pytest.raises(OrnsteinError, match=r"trust_targets=\[pipe\]"):
            check_targets(stored)
        check_targets(stored, ["pipe"])
    check_targets(OmegaConf.create({"data": {"_target_": "ornstein.data.hub_data", "path": "x"}}))


# ---- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "lanes"), [(7, 1), (7, 2), (7, 3), (8, 4), (2, 5), (1, 3), (3, 6)])
def test_lanes_share_an_epoch(shards: int, lanes: int) -> None:
    """Every sample belongs to exactly one lane, epoch by epoch; no lane is without a share; epochs differ."""
    for epoch in range(3):
        units = [units_of(shards, lanes, seed=1, epoch=epoch, lane=lane) for lane in range(lanes)]
        held = [(shard, number) for lane in units for shard, part, parts in lane for number in range(part, 20, parts)]
        assert sorted(held) == [(shard, number) for shard in range(shards) for number in range(20)]
        assert all(units) and max(map(len, units)) - min(map(len, units)) <= 1
    orders = [units_of(9, 1, seed=1, epoch=epoch, lane=0) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (3, 2)])
def test_no_duplicates_and_no_loss(tar_shards: Shards, world_size: int, workers: int) -> None:
    """Over all devices and workers every sample of an epoch is met once, whatever the shards' sizes: 3 shards of 6
    devices' workers have parts.
    """
    counts = [5, 0, 11]
    files = tar.TarFiles(tar.expand(str(tar_shards(counts)), key="urls"), image="png", label=None, caption=None)
    expected = sorted((shard << SHARD_BITS) + number for shard, count in enumerate(counts) for number in range(count))
    met: list[int] = []
    lanes = world_size * max(workers, 1)
    for lane in range(lanes):
        stream = Stream(files, decode(), batch_size=1, seed=5, buffer=4, rank=lane, world_size=lanes)
        share = iter(stream)
        while True:
            batch = next(share)
            if share.start[0] > 0:  # the batch is of the next epoch
                break
            met += batch["index"].tolist()
    assert sorted(met) == expected


def test_order_is_a_function_of_its_seed(tar_shards: Shards) -> None:
    """The same again, another under another seed or number of workers; a buffer shuffles, one of 1 does not."""
    folder = tar_shards([9, 9, 9, 9, 9, 9])

    def order(**options: Any) -> list[int]:
        module = made(folder, **{"seed": 1, **options})
        return torch.cat([batch["index"] for batch in islice(module.train_dataloader(), 10)]).tolist()

    first = order()
    assert order() == first
    assert order(seed=2) != first and order(num_workers=2) != first
    plain = order(shuffle_buffer=1)
    assert plain != first
    in_shards = [value for _, value in zip(range(9), plain, strict=False)]
    assert in_shards == sorted(in_shards)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 6, 23])
def test_goes_on_to_the_bit(tar_shards: Shards, workers: int, stop: int) -> None:
    """A stream that is put back after any number of batches gives the batches of the undisturbed one."""
    folder = tar_shards([7, 5, 9, 6, 8, 7])
    whole = made(folder, num_workers=workers, caption_column="txt").train_dataloader()
    batches = list(islice(whole, 34))
    assert all(len(batch["caption"]) == 4 and batch["label"].shape == (4,) for batch in batches)
    loader = made(folder, num_workers=workers, caption_column="txt").train_dataloader()
    list(islice(loader, stop + 2))  # Lightning reads ahead
    again = restored(made(folder, num_workers=workers, caption_column="txt"), stop, state_of(loader, stop))
    rest = list(islice(again.train_dataloader(), 34 - stop))
    assert all(same(ours, theirs) for ours, theirs in zip(rest, batches[stop:], strict=True))


def test_goes_on_where_a_worker_was_killed(tar_shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading process killed for real: told in one line, and the batches and the place are the undisturbed ones."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader.stateful_dataloader")
    # It looks for dead workers every five seconds.
    monkeypatch.setattr(stateful._StatefulMultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    folder = tar_shards([7, 5, 9, 6, 8, 7])
    undisturbed = made(folder, num_workers=2).train_dataloader()
    batches = list(islice(undisturbed, 16))
    loader = made(folder, num_workers=2).train_dataloader()
    reading = iter(loader)
    found = [next(reading) for _ in range(5)]
    before = {child.pid for child in multiprocessing.active_children()}
    with pytest.warns(UserWarning, match="a data worker died"):
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        found += [next(reading) for _ in range(11)]
    assert all(same(ours, theirs) for ours, theirs in zip(found, batches, strict=True))
    assert state_of(loader, 16) == state_of(undisturbed, 16)


def test_every_device_goes_on_in_its_own_place(tar_shards: Shards) -> None:
    """Two devices with a share of five shards each: a checkpoint holds both places, each takes its own back."""
    folder = tar_shards([7, 5, 9, 6, 8, 7, 4])

    def device(rank: int) -> StreamModule:
        module = made(folder, val_fraction=0.3)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        return module

    loaders = [device(rank).train_dataloader() for rank in range(2)]
    whole = [list(islice(loader, 12)) for loader in loaders]
    assert not same(whole[0][0], whole[1][0])
    state = {"batches": 7, "shape": loaders[0].shape, "ranks": [loader.behind(7) for loader in loaders]}
    for rank in range(2):
        rest = islice(restored(device(rank), 7, state).train_dataloader(), 5)
        assert all(same(ours, theirs) for ours, theirs in zip(rest, whole[rank][7:], strict=True))
    with pytest.raises(OrnsteinError, match=r"trainer\.devices times trainer\.num_nodes was 2 and is 1"):
        restored(made(folder, val_fraction=0.3), 7, state).train_dataloader()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_cannot_be_had_stops_in_one_sentence(tar_shards: Shards, workers: int) -> None:
    """From a worker too, without its traceback."""
    folder = tar_shards([3, 3, 3])
    module = made(folder, num_workers=workers, num_classes=None)
    module.setup()
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(OrnsteinError, match=r"^the shard .*\.tar cannot be read .*resume the run$"):
        next(iter(module.train_dataloader()))


def test_iterating_leaves_the_global_stream_alone(tar_shards: Shards) -> None:
    """A loader that drew from torch's stream would make resumed runs differ."""
    loader = made(tar_shards([4, 4, 4]), num_workers=1).train_dataloader()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_place_of_another_shape(tar_shards: Shards) -> None:
    """Other devices or workers are refused by name; data.exact_resume=false begins a new pass."""
    folder = tar_shards([4, 4, 4, 4])
    loader = made(folder).train_dataloader()
    list(islice(loader, 5))
    state = state_of(loader, 5)
    with pytest.raises(OrnsteinError, match=r"data\.num_workers was 0 and is 1.*data\.exact_resume=false"):
        restored(made(folder, num_workers=1), 5, state).train_dataloader()
    with pytest.raises(OrnsteinError, match="after 5 batches, not 7"):
        restored(made(folder), 7, state).train_dataloader()
    fresh = restored(made(folder, num_workers=1, exact_resume=False), 5, state).train_dataloader()
    assert next(iter(fresh))["image"].shape == (4, 3, 8, 8)
    assert Place(**state).next_epoch == 2  # 11 images an epoch, 20 met
    unknown = made(folder)
    unknown.start_batch = 3
    with pytest.raises(OrnsteinError, match="unknown"):
        unknown.train_dataloader()


# ---- bad samples, shards and addresses --------------------------------------------------------------------------


def bad_members() -> dict[str, bytes]:
    """Six samples, three of them bad."""
    good = {f"g{number}.{kind}": content for number in range(3) for kind, content in _good(number).items()}
    return good | {"x1.png": b"no image", "x1.cls": b"0", "x2.cls": b"1", "x3.png": _good(9)["png"], "x3.cls": b"?!"}


def _good(number: int) -> dict[str, bytes]:
    file = io.BytesIO()
    Image.fromarray(np.full((9, 9, 3), 20 * number, dtype=np.uint8)).save(file, "PNG")
    return {"png": file.getvalue(), "cls": b"1"}


def test_bad_samples_are_counted_and_named(tar_file: Any, tar_shards: Shards) -> None:
    """Left out up to max_bad, each told of once however often it is met, and refused above it; the count resumes."""
    path = tar_file("bad.tar", bad_members())
    val = tar_shards([3], "val", first=100)
    stream = partial(
        made, path, val_urls=str(val), num_classes=2, class_names=["a", "1"], batch_size=3, overlap="allow"
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loader = stream(max_bad=3).train_dataloader()
        batches = list(islice(loader, 5))
    assert all(batch["label"].tolist() == [1, 1, 1] for batch in batches)
    lines = [str(each.message) for each in told if "data.max_bad=3" in str(each.message)]
    assert len(lines) == 3 and all(name in "".join(lines) for name in ("bad.tar: x1", "bad.tar: x2", "bad.tar: x3"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # those three are known
        list(islice(restored(stream(max_bad=3), 5, state_of(loader, 5)).train_dataloader(), 5))
    with pytest.raises(OrnsteinError, match=r"3 images of the (training )?stream"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(islice(stream(max_bad=2).train_dataloader(), 5))
    with pytest.raises(OrnsteinError, match=r"bad\.tar: x\d: .*data\.max_bad=1"):
        list(islice(stream().train_dataloader(), 1))
    with pytest.warns(UserWarning, match="3 images of the train stream left out"):
        assert stream(max_bad=3).train.content_keys.shape == (3, 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_stops_workers_in_one_sentence(tar_file: Any, tar_shards: Shards, workers: int) -> None:
    """The sentence names shard and key, and holds no traceback of a worker."""
    path, val = tar_file("bad.tar", bad_members()), tar_shards([3], "val", first=100)
    loader = made(path, val_urls=str(val), num_classes=2, num_workers=workers, overlap="allow").train_dataloader()
    with pytest.raises(OrnsteinError, match=r"^1 image of the stream cannot be used: .*bad\.tar: x") as caught:
        list(islice(loader, 3))
    assert "Traceback" not in str(caught.value)


def cut(path: Path, share: float) -> Path:
    """The file, cut off there."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


DAMAGE: list[tuple[str, Callable[[Path], object], int, str]] = [
    # what, how, samples before it, words of the reason
    ("cut within a member", lambda path: cut(path, 0.6), 4, "damaged or cut off after its first"),
    ("cut to nothing", lambda path: cut(path, 0), 0, "from its start empty file"),
    ("no tar", lambda path: path.write_bytes(b"<html>not found</html>" * 99), 0, "from its start"),
    ("cut behind a member", lambda path: path.write_bytes(path.read_bytes()[: 512 * 3 * 2]), 1, "unexpected end"),
    (
        "a damaged head",
        lambda path: path.write_bytes(path.read_bytes()[: 512 * 6] + b"?" * 512 + path.read_bytes()[512 * 7 :]),
        1,
        "damaged head",
    ),
]


@pytest.mark.parametrize(("how", "good", "words"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_damaged_shards(tar_file: Any, how: Callable[[Path], object], good: int, words: str) -> None:
    """What is whole is read, and one bad thing says what is wrong; whole samples are not lost with max_bad."""
    members = {f"{number}.png": bytes([number]) * 1000 for number in range(8)}
    path = tar_file("t.tar", members)  # 512 + 1024 bytes a member
    how(path)
    files = tar.TarFiles([str(path)], image="png", label=None, caption=None)
    records = [record for record, _ in files.read(0)]
    faults = [record for record in records if record.fault is not None]
    assert len(faults) == 1 and len(records) - 1 >= good and faults[0] is records[-1]
    assert faults[0].name == str(path) and all(word in str(faults[0].fault) for word in words.split())


def test_empty_shards(tar_file: Any, tar_shards: Shards) -> None:
    """A shard without samples is nothing to speak of; nothing but such is."""
    folder = tar_shards([4, 0, 5, 0])
    batches = list(islice(made(folder, val_urls=str(tar_shards([2], "val", first=50))).train_dataloader(), 5))
    assert len({int(index) for batch in batches for index in batch["index"]}) == 9
    empty = tar_shards([0, 0], "none")
    with pytest.raises(OrnsteinError, match="hold no image"):
        made(empty, val_urls=str(folder), num_classes=None).setup()


class Server(ThreadingHTTPServer):
    """Serves files; `broken` answers are cut in half, `busy` ones are 503."""

    files: dict[str, bytes]
    broken: int
    busy: int
    asked: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Range") or "all")
        content = self.server.files.get(self.path)
        if self.server.busy > 0 or content is None:
            self.server.busy -= 1
            self.send_error(503 if content is not None else 404)
            return
        start = 0
        if given := self.headers.get("Range"):
            start = int(given.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = (len(content) + start) // 2 if self.server.broken > 0 else len(content)
        self.server.broken -= 1
        self.wfile.write(content[start:end])

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on this machine, and no waiting between tries."""
    monkeypatch.setattr(tar, "WAITS", (0.0, 0.0, 0.0))
    made_server = Server(("127.0.0.1", 0), Handler)
    made_server.files, made_server.broken, made_server.busy, made_server.asked = {}, 0, 0, []
    thread = threading.Thread(target=made_server.serve_forever, daemon=True)
    thread.start()
    yield made_server
    made_server.shutdown()
    made_server.server_close()
    thread.join()


def test_addresses(server: Server, tar_shards: Shards) -> None:
    """Shards of an address are those of the disk, through broken connections and busy servers, from where they broke
    off; what is not there is told at once, what stays busy after the last try.
    """
    path = tar_shards([30]) / "t-000.tar"
    server.files["/t.tar"] = path.read_bytes()
    address = f"http://127.0.0.1:{server.server_port}"
    here = tar.TarFiles([str(path)], image="png", label="cls", caption=None)
    there = tar.TarFiles([f"{address}/t.tar"], image="png", label="cls", caption=None)
    expected = [(record.image, record.label) for record, _ in here.read(0)]
    server.broken, server.busy = 2, 2
    read = list(there.read(0))
    assert [(record.image, record.label) for record, _ in read] == expected
    assert any(asked.startswith("bytes=") for asked in server.asked)
    server.asked.clear()
    rest = [(record.image, record.label) for record, _ in there.read(0, read[11][1])]
    assert rest == expected[12:] and server.asked == [f"bytes={read[11][1][0]}-"]
    server.busy = 99
    with pytest.raises(tar.Unreachable, match=r"t\.tar cannot be read at 4 tries .*503"):
        list(there.read(0))
    server.asked.clear()
    with pytest.raises(tar.Unreachable, match="404"):
        list(tar.TarFiles([f"{address}/no.tar"], image="png", label=None, caption=None).read(0))
    assert len(server.asked) == 1


# ---- what everybody else sees -----------------------------------------------------------------------------------


def test_face_of_a_data_module(tar_shards: Shards) -> None:
    """Bounded data sets that can be indexed, counts, names, classes, and fingerprints that stay."""
    folder = tar_shards([6, 6, 6, 6, 6, 6])
    module = made(
        folder, reference_images=10, val_limit=7, caption_column="txt", test_urls=str(tar_shards([3], "u", first=60))
    )
    module.setup()
    assert (len(module.train), len(module.val), module.num_images) == (10, 7, 24)
    assert module.train.name == "webdataset, its first 10" and module.reference is module.train
    assert module.train.class_names == ("0", "1", "2") and module.train.num_classes == 3
    assert module.test is not None and len(module.test) == 3
    assert [len(batch["index"]) for batch in module.val_dataloader()] == [4, 3]
    assert module.train.batch([0, 1])["image"].shape == (2, 3, 8, 8)
    again = made(folder, reference_images=10, val_limit=7, caption_column="txt")
    assert again.train.fingerprint == module.train.fingerprint != again.val.fingerprint
    assert made(folder, reference_images=11, caption_column="txt").train.fingerprint != again.train.fingerprint
    read = list(module.read("train", batch_size=9))
    assert [len(batch["keys"]) for batch in read] == [9, 9, 6] and read[0]["caption"][0] == module.train.captions[0]
    assert np.array_equal(read[0]["image"], module.train.images[np.arange(9)])
    assert np.array_equal(read[0]["keys"], module.train.content_keys[:9])
    whole = made(folder)
    assert len(whole.train) == 24 and whole.train.name == "webdataset"


def test_the_config(tar_shards: Shards) -> None:
    """conf/data/webdataset.yaml builds a stream of what data.urls names."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    group = OmegaConf.load(Path(__file__).parents[2] / "conf" / "data" / "webdataset.yaml")
    own = {"urls": str(tar_shards([4, 4])), "image_size": 8, "num_classes": 3, "batch_size": 2, "sigma_data": None}
    config = OmegaConf.create({"seed": 7, "data": OmegaConf.merge(group, own, {"caption_template": "a {}"})})
    module = instantiate(config.data)
    assert isinstance(module, StreamModule) and module.seed == 7
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (2, 3, 8, 8) and batch["caption"] == [f"a {label}" for label in batch["label"]]


def test_cached_images_are_those_decoded(tar_shards: Shards, cache: Path) -> None:
    """The second start decodes nothing; a map cut off in its writing is made anew."""
    folder = tar_shards([5, 5, 5])
    first = made(folder).train
    pixels = first.images[np.arange(len(first))]
    maps = {path: path.stat().st_mtime_ns for path in (cache / "ornstein").rglob("*.npy")}
    second = made(folder).train
    assert {path: path.stat().st_mtime_ns for path in (cache / "ornstein").rglob("*.npy")} == maps
    assert np.array_equal(second.images[np.arange(len(second))], pixels)
    for path in maps:
        cut(path, 0.5)
    assert np.array_equal(made(folder).train.images[np.arange(len(first))], pixels)


def test_splits_share_no_image(tar_shards: Shards, tar_file: Any) -> None:
    """Training leaves out what val holds, by content; refuse names it; allow lets it pass."""
    train, val = tar_shards([8]), tar_shards([3], "val", first=6)  # 6 and 7 are in both
    stream = partial(made, train, val_urls=str(val))
    met = {int(index) for batch in islice(stream().train_dataloader(), 8) for index in batch["index"]}
    assert met == set(range(6)) and len(stream().train) == 6
    allowed = stream(overlap="allow").train_dataloader()
    assert {int(index) for batch in islice(allowed, 8) for index in batch["index"]} == set(range(8))
    with pytest.raises(OrnsteinError, match=r"00006.*held-out split too"):
        list(islice(stream(overlap="refuse").train_dataloader(), 8))


def test_limit_takes_the_first_of_the_shards(tar_shards: Shards) -> None:
    """Training and its reference are the first images, counted over the shards."""
    module = made(tar_shards([5, 5, 5]), val_urls=str(tar_shards([2], "val", first=50)), limit=7)
    met = {int(index) for batch in islice(module.train_dataloader(), 12) for index in batch["index"]}
    assert met == {0, 1, 2, 3, 4, 1 << SHARD_BITS, (1 << SHARD_BITS) + 1}
    assert len(module.train) == 7 == module.num_images


REFUSED = [
    ({"batch_size": 0}, "data.batch_size=0"),
    ({"shuffle_buffer": 0}, "data.shuffle_buffer=0"),
    ({"max_bad": -1}, "data.max_bad=-1"),
    ({"num_workers": -1}, "data.num_workers=-1"),
    ({"crop": "middle"}, "data.crop=middle"),
    ({"overlap": "maybe"}, "data.overlap=maybe"),
    ({"latents": "auto"}, "data.latents=auto ornstein.cli.prepare"),
    ({"image_column": ""}, "data.image_column="),
    ({"nonsense": 1}, "nonsense"),
    ({"urls": None}, "data.urls="),
    ({"num_classes": 2}, "data.num_classes 2 3"),
    ({"label_column": "no"}, "data.label_column"),
    ({"urls": "{one}", "val_urls": "{one}"}, "two of data.urls, data.val_urls"),
    ({"urls": "{one}"}, "one shard data.val_urls"),
    ({"urls": "https://x.org/{a,b}.tar"}, "data.num_classes=N"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[row[1] for row in REFUSED])
def test_refused(tar_shards: Shards, options: dict[str, Any], words: str) -> None:
    """What cannot work, in one sentence that names the option."""
    folder = tar_shards([4, 4, 4])
    one = str(folder / "t-000.tar")
    given = {key: value.replace("{one}", one) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(OrnsteinError) as caught:
        StreamModule(
            TarShards, **{"urls": str(folder), "batch_size": 4, "image_size": 8, "num_classes": "auto"} | given
        ).setup()
    assert all(word in str(caught.value) for word in words.split())


def test_missing_packages_are_named(tar_shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with the command."""
    folder = tar_shards([4, 4])
    module = made(folder)
    module.setup()
    monkeypatch.setitem(__import__("sys").modules, "torchdata.stateful_dataloader", None)
    with pytest.raises(OrnsteinError, match=r"pip install 'ornstein\[data\]'"):
        module.train_dataloader()
    monkeypatch.setitem(__import__("sys").modules, "braceexpand", None)
    with pytest.raises(OrnsteinError, match=r"pip install 'ornstein\[data\]'"):
        made(folder).setup()
