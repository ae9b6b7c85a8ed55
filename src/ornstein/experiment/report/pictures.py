"""Pictures inside a page: as they are while there is room, the large ones made smaller where there is not."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ornstein.experiment.report.collect import FILMS, Picture

if TYPE_CHECKING:
    from PIL import Image

MIME = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}
LEAST = 6_000  # bytes: below, a picture shows nothing
# Kinds in the order in which room is given; what stands nowhere here comes between the stills and the films.
FIRST = ("step", "first_samples", "best_and_worst", "trajectory", "nearest_training_images", "codec", "schedule")
_FRAMES = 12  # of a film that is made smaller


def chosen(pictures: Sequence[Picture], most: int) -> list[Picture]:
    """Of each kind at most ``most``, evenly spaced over the steps, the last among them."""
    found = []
    for kind in dict.fromkeys(picture.kind for picture in pictures):
        own = sorted((each for each in pictures if each.kind == kind), key=lambda each: each.step or 0)
        count = min(most, len(own))
        found += [own[len(own) - 1 - i * len(own) // count] for i in reversed(range(count))]
    return found


def embedded(runs: Sequence[Sequence[Picture]], *, max_bytes: int) -> dict[Path, str]:
    """Data addresses of the runs' pictures, of about ``max_bytes`` in all; a picture that has no room is left out.

    The newest sample grid of every run comes first, then what else :data:`FIRST` says. Those that are larger than
    what falls to each become WebP, smaller step by step.
    """
    room = max_bytes * 3 // 4  # of bytes, before they are written as letters
    wanted = [each for _, each in sorted(_ranked(runs), key=lambda pair: pair[0])]
    kept = wanted[: max(1, room // LEAST)]
    sizes = {each.path: each.path.stat().st_size for each in kept}
    share = _share(list(sizes.values()), room)
    found = {}
    for path, size in sizes.items():
        address = _as_it_is(path) if size <= share else _smaller(path, share)
        if address is not None:
            found[path] = address
    return found


def _ranked(runs: Sequence[Sequence[Picture]]) -> Iterator[tuple[tuple[int, int], Picture]]:
    for pictures in runs:
        for kind in dict.fromkeys(picture.kind for picture in pictures):
            own = sorted((each for each in pictures if each.kind == kind), key=lambda each: -(each.step or 0))
            place = FIRST.index(kind) if kind in FIRST else len(FIRST) + any(each.path.suffix in FILMS for each in own)
            # Older ones of a kind after the newest of all kinds.
            yield from (((place if age == 0 else len(FIRST) + 2, age), each) for age, each in enumerate(own))


def _share(sizes: Sequence[int], room: int) -> int:
    """The size that no picture may be above for all of them to fit; the largest one's where they do."""
    ordered = sorted(sizes)
    for place, size in enumerate(ordered):
        if size * (len(ordered) - place) > room:
            return room // (len(ordered) - place)
        room -= size
    return ordered[-1] if ordered else room


def _as_it_is(path: Path) -> str:
    return _address(path.read_bytes(), MIME[path.suffix])


def _address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _smaller(path: Path, most: int) -> str | None:
    """A picture as WebP of at most ``most`` bytes; None where it cannot be read or made so small."""
    from PIL import Image

    if path.suffix == ".mp4":
        return None
    try:
        with Image.open(path) as picture:
            frames, times = _frames(picture)
    except (OSError, ValueError):
        return None
    steps = ((1.0, 0), (1.0, 75), (0.75, 70), (0.5, 65), (0.5, 40), (0.35, 35), (0.25, 30))
    # Films are half noise, which takes long and gains nothing without loss.
    for scale, quality in steps[2:] if len(frames) > 1 else steps:
        content = _webp([_scaled(frame, scale) for frame in frames], times, quality=quality)
        if len(content) <= most:
            return _address(content, "image/webp")
    return None


def _frames(picture: Image.Image) -> tuple[list[Image.Image], list[int]]:
    """A still, or a film's frames thinned out, with the time in ms that each stays."""
    count = getattr(picture, "n_frames", 1)
    shown = sorted({round(place * (count - 1) / (_FRAMES - 1)) for place in range(_FRAMES)})
    frames, times, waited = [], [], 0
    for number in range(count):
        picture.seek(number)
        waited += int(picture.info.get("duration", 0))
        if number in shown:
            frames.append(picture.convert("RGB"))
            times.append(waited)
            waited = 0
    return frames, times


def _scaled(frame: Image.Image, scale: float) -> Image.Image:
    if scale == 1.0:
        return frame
    return frame.resize((max(1, round(frame.width * scale)), max(1, round(frame.height * scale))))


def _webp(frames: Sequence[Image.Image], times: Sequence[int], *, quality: int) -> bytes:
    """Lossless where ``quality`` is 0."""
    how: dict[str, Any] = {"lossless": True} if quality == 0 else {"quality": quality}
    content = io.BytesIO()
    if len(frames) > 1:
        how |= {"save_all": True, "append_images": list(frames[1:]), "duration": list(times), "loop": 0}
    frames[0].save(content, "WEBP", method=2, **how)
    return content.getvalue()
