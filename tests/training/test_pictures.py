from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ornstein.errors import OrnsteinError
from ornstein.training.films import save_gif, save_mp4
from ornstein.training.pictures import MAX_WIDTH, image_grid, near_square, readable_scale, save_png, strip


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (64, 8), (65, 9)])
def test_near_square(count, columns):
    assert near_square(count) == columns


@pytest.mark.parametrize("width", [8, 16, 28, 32, 64, 256])
@pytest.mark.parametrize("columns", [1, 4, 8, 10, 16])
def test_scale_is_readable_and_fits(width, columns):
    scale = readable_scale(width, columns)
    grid = image_grid(torch.zeros(columns, 1, width, width, dtype=torch.uint8), columns)
    assert scale >= 1
    assert grid.width <= MAX_WIDTH or scale == 1
    if width <= 32 and columns <= 10:
        assert 54 <= width * scale <= 110


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_stand_in_reading_order_and_keep_their_pixels(channels):
    images = torch.randint(0, 256, (5, channels, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = np.asarray(image_grid(images, 3, scale=2))
    assert grid.shape == (2 * (6 + 2) + 2, 3 * (8 + 2) + 2, 3)
    for number in range(5):
        top, left = 2 + number // 3 * 8, 2 + number % 3 * 10
        tile = grid[top : top + 6, left : left + 8]
        assert (tile[::2, ::2] == tile[1::2, 1::2]).all()
        assert (tile[::2, ::2].transpose(2, 0, 1) == images[number].expand(3, -1, -1).numpy()).all()
    empty = grid[2 + 8 : 2 + 8 + 6, 2 + 20 : 2 + 28]
    assert len(np.unique(empty.reshape(-1, 3), axis=0)) == 1


def test_labels_where_they_fit():
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    plain = image_grid(images, 3, scale=8)
    labelled = image_grid(images, 3, scale=8, row_labels=["cat", "dog"])
    assert labelled.height == plain.height and plain.width < labelled.width < 1.3 * plain.width
    margin = labelled.width - plain.width
    assert labelled.crop((margin, 0, labelled.width, labelled.height)).tobytes() == plain.tobytes()
    ink = np.asarray(labelled.convert("L"))[:, :margin] > 150
    rows = ink.any(1)
    assert rows[: plain.height // 2].any() and rows[plain.height // 2 :].any()
    assert image_grid(images, 3, scale=8, row_labels=["a very long name of a class", "b"]).size == plain.size
    assert image_grid(images, 3, scale=1, row_labels=["a", "b"]).size == image_grid(images, 3, scale=1).size


@pytest.mark.parametrize(
    ("images", "columns"),
    [
        (torch.zeros(2, 1, 4, 4), 2),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), 2),
        (torch.zeros(4, 4, dtype=torch.uint8), 2),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 0),
    ],
)
def test_refuses(images, columns):
    with pytest.raises(OrnsteinError, match="a grid needs"):
        image_grid(images, columns)


def test_strip_is_its_rows():
    rows = [torch.full((3, 1, 4, 4), value, dtype=torch.uint8) for value in (10, 200)]
    assert strip(rows, scale=2).tobytes() == image_grid(torch.cat(rows), 3, scale=2).tobytes()
    with pytest.raises(OrnsteinError, match="a strip needs"):
        strip([rows[0], rows[1][:2]])
    with pytest.raises(OrnsteinError, match="a strip needs"):
        strip([])


def test_gif_keeps_frames_greys_and_times(tmp_path):
    levels = [0, 40, 80, 255]
    frames = [
        image_grid(torch.arange(level, level + 1, dtype=torch.uint8).reshape(1, 1, 1, 1).expand(4, 1, 8, 8), 2, scale=2)
        for level in levels
    ]
    # a last frame with all greys, as noise has: its palette serves all frames
    frames.append(image_grid(torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8), 2, scale=2))
    path = save_gif(frames, tmp_path / "deep" / "film.gif", frame_ms=50, hold_ms=700)
    film = Image.open(path)
    assert film.n_frames == 5 and film.size == frames[0].size and film.info["loop"] == 0
    durations = []
    for number, frame in enumerate(frames):
        film.seek(number)
        durations.append(film.info["duration"])
        difference = np.abs(np.asarray(film.convert("RGB")).astype(int) - np.asarray(frame).astype(int))
        assert difference.max() <= 4  # 256 greys and the ground in 255 colours
    assert durations == [50, 50, 50, 50, 700]
    with pytest.raises(OrnsteinError, match="at least one frame"):
        save_gif([], tmp_path / "none.gif")


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = save_png(Image.new("RGB", (4, 4), (1, 2, 3)), tmp_path / "a.png")
    before = path.read_bytes()

    def fail(self, target, **options):
        with open(target, "wb") as file:
            file.write(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(Image.new("RGB", (4, 4)), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_mp4_plays_its_frames(tmp_path):
    av = pytest.importorskip("av")
    frames = [Image.new("RGB", (65, 33), (level, 255 - level, 40)) for level in (0, 120, 250)]
    path = save_mp4(frames, tmp_path / "deep" / "film.mp4", frame_ms=100, hold_ms=300)
    with av.open(str(path)) as film:
        found = [np.asarray(frame.to_image()) for frame in film.decode(video=0)]
    assert len(found) == 5 and found[0].shape == (32, 64, 3), "the last of three is held, odd sides lose a row"
    for frame, level in zip(found, (0, 120, 250, 250, 250), strict=True):
        assert np.abs(frame[8:-8, 8:-8].astype(int) - (level, 255 - level, 40)).max() < 12  # H.264 is lossy
    with pytest.raises(OrnsteinError, match="at least one frame"):
        save_mp4([], tmp_path / "none.mp4")
