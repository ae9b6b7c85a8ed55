"""Images with captions: from tables of every kind, Hugging Face's layout, or text files; and what is refused."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ornstein.data import DataModule, Pairs
from ornstein.data.base import SPLITS, NoSplit
from ornstein.data.images import load_image
from ornstein.data.pair_tables import class_names_of, find_tables
from ornstein.data.tables import read_columns
from ornstein.errors import OrnsteinError

COUNT = 12
COLOURS = ("red", "green", "blue")
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports stay in the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pictures(folder: Path, count: int = COUNT) -> list[Row]:
    """Makes images below a folder; what a table says of each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    rows = []
    for number in range(count):
        name = f"{number:02d}.png"
        Image.fromarray(rng.integers(0, 256, (10 + number, 14, 3), dtype=np.uint8)).save(folder / name)
        # A comma, quotes, a line break and letters beyond ASCII: what captions have.
        text = f'a "{COLOURS[number % 3]}" square,\n the café no. {number}'
        rows.append({"file_name": name, "text": text, "colour": COLOURS[number % 3], "number": number % 4})
    return rows


def write(path: Path, rows: Sequence[Row]) -> Path:
    """A table of the kind that its ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(root: Path | None, **options: Any) -> list[Pairs]:
    """Train and val at 8 pixels."""
    given = None if root is None else str(root)
    return [Pairs(split=split, root=given, image_size=8, **options) for split in ("train", "val")]


def told(parts: Sequence[Pairs]) -> dict[str, str]:
    """The caption of each file; its pixels are checked on the way."""
    captions = {}
    for part in parts:
        assert part.captions is not None
        for row, path in enumerate(part.paths):
            batch = part.batch([row])
            np.testing.assert_array_equal(batch["image"][0].numpy(), load_image(path, size=8))
            captions[path.name] = batch["caption"][0]
    return captions


def expected(rows: Sequence[Row]) -> dict[str, str]:
    return {row["file_name"]: " ".join(row["text"].split()) for row in rows}


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_the_layout_of_imagefolder(tmp_path: Path, kind: str) -> None:
    """A metadata file in the root; every image on one side with its own caption."""
    rows = pictures(tmp_path / "set")
    write(tmp_path / "set" / kind, rows)
    parts = read(tmp_path / "set", val_fraction=0.25)
    assert [len(part) for part in parts] == [9, 3] and told(parts) == expected(rows)
    assert parts[0].labels is None and not set(parts[0].paths) & set(parts[1].paths)


def test_metadata_of_each_split(tmp_path: Path) -> None:
    """In the layout's train and test folders; names start from their own metadata file."""
    root = tmp_path / "set"
    for split, count in (("train", 7), ("test", 4)):
        rows = pictures(root / split / "images", count)
        write(root / split / "metadata.csv", [{**row, "file_name": f"images/{row['file_name']}"} for row in rows])
    parts = read(root)
    assert [len(part) for part in parts] == [7, 4]
    with pytest.raises(NoSplit):
        Pairs(split="test", root=str(root), image_size=8)
    (root / "test" / "metadata.csv").unlink()
    with pytest.raises(OrnsteinError, match="folder of val has no metadata file"):
        read(root)


def test_one_table_over_the_folders_of_splits(tmp_path: Path) -> None:
    """Images in train, val and test folders are in those splits; some elsewhere are refused."""
    root = tmp_path / "set"
    rows = []
    for split, count in (("train", 6), ("val", 3), ("test", 4)):
        rows += [{**row, "file_name": f"{split}/{row['file_name']}"} for row in pictures(root / split, count)]
    write(root / "metadata.jsonl", rows)
    assert [len(Pairs(split=split, root=str(root), image_size=8)) for split in SPLITS] == [6, 3, 4]
    pictures(root / "more", 2)
    write(root / "metadata.jsonl", [*rows, {"file_name": "more/00.png", "text": ""}])
    with pytest.raises(OrnsteinError, match=r"1 of its images lie in none of the folders train, val, test, .*more"):
        read(root)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_any_table(tmp_path: Path, kind: str) -> None:
    """Columns by name; the root by the table or by name; a table of its own for val."""
    rows = pictures(tmp_path / "set")
    renamed = [{"path": row["file_name"], "caption": row["text"], "colour": row["colour"]} for row in rows]
    columns = {"image_column": "path", "caption_column": "caption"}
    table = write(tmp_path / "set" / f"pairs.{kind}", renamed)
    assert told(read(None, table=str(table), **columns)) == expected(rows)
    assert told(read(tmp_path / "set", table=table.name, **columns)) == expected(rows)
    train, val = (write(tmp_path / "tables" / f"{part}.{kind}", some) for part, some in
                  (("train", renamed[:8]), ("val", renamed[8:])))  # fmt: skip
    parts = read(tmp_path / "set", table=str(train), val_table=str(val), **columns)
    assert [len(part) for part in parts] == [8, 4] and told(parts) == expected(rows)
    assert [path.name for path in parts[1].paths] == [row["file_name"] for row in rows[8:]]


def test_text_files_beside(tmp_path: Path) -> None:
    """Where there is no table at all."""
    rows = pictures(tmp_path / "set")
    for row in rows:
        (tmp_path / "set" / row["file_name"]).with_suffix(".txt").write_text(row["text"], encoding="utf-8")
    assert told(read(tmp_path / "set")) == expected(rows)
    (tmp_path / "set" / "03.txt").unlink()
    with pytest.raises(OrnsteinError, match=r"no caption file.*03\.txt.*data\.table=FILE"):
        read(tmp_path / "set")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_captions(tmp_path: Path, kind: str) -> None:
    """The first; or each in a visit of its own, in train alone; an empty list is an empty caption."""
    rows = pictures(tmp_path / "set")
    many = [
        {"file_name": row["file_name"], "text": [f"{number}.{which}" for which in range(number % 4)]}
        for number, row in enumerate(rows)
    ]
    write(tmp_path / "set" / f"metadata.{kind}", many)
    first = {row["file_name"]: (row["text"] or [""])[0] for row in many}
    assert told(read(tmp_path / "set", val_fraction=0.3)) == first
    for storage in ("memory", "mapped", "lazy"):
        train, val = read(tmp_path / "set", val_fraction=0.3, every_caption=True, storage=storage)
        assert told([val]).items() <= first.items()
        assert train.captions is not None
        visits = sorted((path.name, text) for path, text in zip(train.paths, train.captions, strict=True))
        seen = {path.name for path in train.paths}
        assert visits == sorted(
            (row["file_name"], text) for row in many if row["file_name"] in seen for text in row["text"] or [""]
        )
        images = train.batch(np.arange(len(train)))["image"].numpy()
        for row, path in enumerate(train.paths):
            np.testing.assert_array_equal(images[row], load_image(path, size=8))
        assert train.content_keys.shape == (len(train), 16)
    # An epoch meets every pair once, whatever the number of workers: the order is the sampler's alone.
    module = DataModule(
        Pairs, batch_size=len(train), root=str(tmp_path / "set"), image_size=8, every_caption=True, num_classes=None,
        val_fraction=0.3,
    )  # fmt: skip
    batch = next(iter(module.train_dataloader()))
    assert sorted(batch["caption"]) == sorted(text for _, text in visits)


@pytest.mark.parametrize(("column", "names"), [("colour", ("blue", "green", "red")), ("number", ("0", "1", "2", "3"))])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_labels(tmp_path: Path, column: str, names: tuple[str, ...], kind: str) -> None:
    """Names in the order of the alphabet, numbers in theirs; counted by the table alone."""
    rows = pictures(tmp_path / "set")
    write(tmp_path / "set" / f"metadata.{kind}", rows)
    truth = {row["file_name"]: str(row[column]) for row in rows}
    for part in read(tmp_path / "set", labels=True, label_column=column, val_fraction=0.3):
        assert part.class_names == names and part.labels is not None
        assert [names[label] for label in part.labels] == [truth[path.name] for path in part.paths]
    options = {"root": str(tmp_path / "set"), "label_column": column, "num_classes": "auto"}
    assert Pairs.count_classes(options) == len(names)
    assert Pairs.count_classes({"root": str(tmp_path / "set")}) is None
    assert read(tmp_path / "set", label_column=column)[0].labels is None


def test_the_command_line_counts_and_builds_them(tmp_path: Path, compose: Callable[..., Any]) -> None:
    """`data=pairs` with `num_classes=auto`: counted by the table before anything is built, then as the config says."""
    from ornstein.cli.build import build_data
    from ornstein.cli.validate import validate

    write(tmp_path / "set" / "metadata.jsonl", pictures(tmp_path / "set"))
    cfg = compose("data=pairs", f"data.root={tmp_path / 'set'}", "data.label_column=colour", "data.num_classes=auto")
    validate(cfg)
    assert cfg.data.num_classes == 3
    cfg.data.sigma_data = None
    data = build_data(cfg)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"image", "index", "label", "caption"} and data.train.class_names == ("blue", "green", "red")


def test_classes_from_ten_on_stay_in_order(tmp_path: Path) -> None:
    rows = [{"file_name": f"{number}.png", "text": "", "class": str(number)} for number in (10, 2, 1)]
    table = write(tmp_path / "t.csv", rows)
    options = {"table": str(table), "label_column": "class"}
    assert Pairs.count_classes(options) == 3
    from ornstein.data.pair_tables import Columns

    pairs = find_tables(None, str(table), None).read(Columns(image="file_name", caption="text", label="class"))
    assert class_names_of(pairs["train"]) == ("1", "2", "10")


def test_missing_and_damaged_images_are_bad_ones(tmp_path: Path) -> None:
    """Named and left out up to max_bad, with the captions and labels of the others in place."""
    rows = pictures(tmp_path / "set")
    write(tmp_path / "set" / "metadata.csv", rows)
    (tmp_path / "set" / "02.png").unlink()
    (tmp_path / "set" / "05.png").write_bytes(b"")
    (tmp_path / "set" / "07.png").write_bytes((tmp_path / "set" / "07.png").read_bytes()[:100])
    with pytest.raises(OrnsteinError, match=r"^3 images .*02\.png: there is no such file.*05.*empty.*07.*max_bad=3"):
        read(tmp_path / "set", max_bad=2)
    with pytest.warns(UserWarning, match=r"^3 images .*All are listed in "):
        parts = read(tmp_path / "set", max_bad=3, labels=True, label_column="colour", val_fraction=0.3)
    left = {name: text for name, text in expected(rows).items() if name not in ("02.png", "05.png", "07.png")}
    assert told(parts) == left
    for part in parts:
        assert part.labels is not None
        assert [f'"{part.class_names[label]}"' in str(text) for label, text in zip(part.labels, part.captions or [],
                strict=True)] == [True] * len(part)  # fmt: skip


def test_buckets(tmp_path: Path) -> None:
    """Several shapes, and several captions on top of them."""
    rows = pictures(tmp_path / "set")
    write(tmp_path / "set" / "metadata.jsonl", [{**row, "text": [row["text"], "again"]} for row in rows])
    shapes = [[8, 16], [8, 8], [16, 8]]
    train, val = read(tmp_path / "set", buckets=shapes, every_caption=True)
    plain = read(tmp_path / "set", every_caption=True)[0]
    assert len(train) == len(plain) == 2 * (COUNT - len(val)) and train.captions == plain.captions
    for row in (0, 1, len(train) - 1):
        shape = train.batch([row])["image"].shape[2:]
        np.testing.assert_array_equal(
            train.batch([row])["image"][0].numpy(), load_image(train.paths[row], size=tuple(shape))
        )


Table = Callable[[Path], Any]
WRONG: list[tuple[str, dict[str, Any], bytes | None, str]] = [
    ("no column", {}, b"name,text\na.png,x\n", r"no column file_name, only name, text: set data\.image_column"),
    ("no caption", {"caption_column": "alt"}, b"file_name,text\na.png,x\n", "no column alt, only file_name, text"),
    ("no label", {"label_column": "class"}, b"file_name,text\na.png,x\n", "no column class"),
    ("empty", {}, b"", "t.csv is empty"),
    ("head alone", {}, b"file_name,text\n", "t.csv has no rows"),
    ("utf-16", {}, "file_name,text\na.png,x\n".encode("utf-16"), "not text in UTF-8"),
    ("latin", {}, "file_name,text\na.png,café\n".encode("latin-1"), r"not text in UTF-8 .*byte 24"),
    ("commas", {}, b"file_name,text\na.png,one, two\n", "line 2 has 3 values for 2 columns: quote"),
    ("short", {}, b"file_name,text\na.png,x\na\n", "line 3 has 1 values for 2 columns"),
    ("quotes", {}, b'file_name,text\na.png,"x" y\n', "line 2 cannot be read"),
    ("open quotes", {}, b'file_name,text\na.png,"x\n', "cannot be read .unexpected end"),
    ("two heads", {}, b"file_name,text,text\na.png,x,y\n", "two columns named text"),
    ("no name", {}, b"file_name,text\n,x\n", "line 2 names no file"),
    ("twice", {}, b"file_name,text\na.png,x\nb.png,y\n./a.png,z\n", r"line 4 names \./a\.png for the second time"),
]
WRONG_LINES: list[tuple[str, dict[str, Any], bytes, str]] = [
    ("no json", {}, b'{"file_name": "a.png", "text": "x"}\n{"file_name": ', "line 2 is no JSON"),
    ("no object", {}, b'{"file_name": "a.png", "text": "x"}\n[1]', "line 2 is no object"),
    ("no key", {}, b'{"file_name": "a.png", "text": "x"}\n\n{"file_name": "b.png"}', "line 3 has no text: add it"),
    ("number", {}, b'{"file_name": "a.png", "text": 5}', "line 1: its caption is 5 where text"),
    ("numbers", {}, b'{"file_name": "a.png", "text": ["x", 5]}', "its caption is .'x', 5. where text"),
    ("inside", {}, b'{"file_name": {"bytes": "eA=="}, "text": "x"}', "holds an image itself .*data=hf"),
    ("class", {"label_column": "c"}, b'{"file_name": "a.png", "text": "x", "c": null}', "its c is None where a class"),
]


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [(row[1], (f"t.{end}", row[2]), row[3]) for end, rows in (("csv", WRONG), ("jsonl", WRONG_LINES)) for row in rows],
    ids=[row[0] for row in (*WRONG, *WRONG_LINES)],
)
def test_wrong_tables(tmp_path: Path, options: dict, content: tuple[str, bytes], message: str) -> None:
    """One sentence with the table, and the line where there is one."""
    (tmp_path / content[0]).write_bytes(content[1])
    with pytest.raises(OrnsteinError, match=message) as caught:
        read(tmp_path, table=content[0], **options)
    assert content[0] in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_parquet(tmp_path: Path) -> None:
    """Cut off at either end."""
    rows = pictures(tmp_path / "set")
    table = write(tmp_path / "set" / "t.parquet", rows)
    assert "colour" in read_columns(table)
    whole = table.read_bytes()
    for content in (whole[:-40], b"PAR1" + whole[200:], b""):
        table.write_bytes(content)
        with pytest.raises(OrnsteinError, match=r"t\.parquet"):
            read(tmp_path / "set", table="t.parquet")


MISPLACED = [
    ({}, r"data=pairs needs .*data\.root=FOLDER.*data\.table=FILE"),
    ({"root": "nowhere"}, r"data\.root=nowhere: there is no such folder"),
    ({"root": ".", "table": "nowhere.csv"}, r"data\.table=nowhere\.csv: there is no such file"),
    ({"table": "nowhere.csv"}, r"data\.table=nowhere\.csv: there is no such file"),
    ({"root": ".", "table": "pairs.csv", "val_table": "nowhere.csv"}, r"data\.val_table=nowhere\.csv"),
    ({"root": ".", "val_table": "pairs.csv"}, r"data\.val_table=pairs\.csv needs a data\.table"),
    ({"root": ".", "table": "pairs.xlsx"}, r"read from \.csv, \.tsv, \.jsonl, \.parquet"),
    ({"root": ".", "table": "pairs.csv", "caption_column": "alt"}, "no column alt"),
    ({"root": ".", "table": "pairs.csv", "num_classes": 3}, r"data\.num_classes=3 .*data\.label_column"),
    ({"root": "two"}, r"has metadata\.jsonl and metadata\.csv: name one"),
]


@pytest.mark.parametrize(("options", "message"), MISPLACED, ids=[str(row[0]) for row in MISPLACED])
def test_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Row, message: str) -> None:
    """`check`, which the command line calls, reads no row and no image."""
    monkeypatch.chdir(tmp_path)
    write(Path("pairs.csv"), [{"file_name": "a.png", "text": "x"}])
    Path("pairs.xlsx").write_bytes(b"")
    for kind in ("jsonl", "csv"):
        write(Path("two") / f"metadata.{kind}", [{"file_name": "a.png", "text": "x"}])
    with pytest.raises(OrnsteinError, match=message):
        Pairs.check(options)
    Pairs.check({"root": ".", "table": "pairs.csv"})


def test_classes_that_train_lacks(tmp_path: Path) -> None:
    rows = pictures(tmp_path / "set")
    train = write(tmp_path / "set" / "train.csv", [row for row in rows if row["colour"] != "red"])
    val = write(tmp_path / "set" / "val.csv", [row for row in rows if row["colour"] == "red"])
    with pytest.raises(OrnsteinError, match=r"classes that train has not \(red\)"):
        read(None, table=str(train), val_table=str(val), labels=True, label_column="colour")
