"""Images of several shapes: which shapes there are, which one each image gets, and what it costs. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ornstein.errors import OrnsteinError

Shape = tuple[int, int]
"""Height and width in pixels."""

MAX_RATIO = 4.0
KEYS = ("area", "step", "max_ratio")
# Log ratios closer than this are equal: rounding must not decide between two shapes.
TIE = 1e-9
ROWS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class AutoBuckets:
    """What `data.buckets={area, step, max_ratio}` asks for; `auto` is all of it by default.

    Attributes:
        area: pixels that every shape should have; None: `image_size ** 2`.
        step: sides are multiples of it; None: `auto_step`.
        max_ratio: of the longer side to the shorter.

    Raises:
        OrnsteinError: a number out of its range.
    """

    area: int | None = None
    step: int | None = None
    max_ratio: float = MAX_RATIO

    def __post_init__(self) -> None:
        for key, value in (("area", self.area), ("step", self.step)):
            if value is not None and not _is_side(value):
                raise OrnsteinError(f"data.buckets.{key}={value}: give a positive whole number of pixels")
        if isinstance(self.max_ratio, bool) or not isinstance(self.max_ratio, int | float) or not self.max_ratio >= 1:
            raise OrnsteinError(f"data.buckets.max_ratio={self.max_ratio}: give a number of 1 or more, 4 say")


def parse_buckets(option: Any) -> AutoBuckets | tuple[Shape, ...] | None:
    """`data.buckets` as typed: None, `auto`, a mapping with `area`, `step`, `max_ratio`, or a list of [height, width].

    Shapes come back ordered from wide to high.

    Raises:
        OrnsteinError: anything else, or a shape that stands there twice.
    """
    if option is None or isinstance(option, AutoBuckets):
        return option
    if option == "auto":
        return AutoBuckets()
    if isinstance(option, Mapping):
        unknown = sorted(str(key) for key in option if key not in KEYS)
        if unknown:
            raise OrnsteinError(f"data.buckets.{unknown[0]} does not exist: there are {', '.join(KEYS)}")
        return AutoBuckets(**{str(key): value for key, value in option.items()})
    shapes = [tuple(shape) if isinstance(shape, Sequence) else shape for shape in _listed(option)]
    for shape in shapes:
        if not isinstance(shape, tuple) or len(shape) != 2 or not all(_is_side(side) for side in shape):
            raise _no_buckets(option)
    if len(set(shapes)) != len(shapes):
        raise OrnsteinError(f"data.buckets={option} names a shape twice: leave one out")
    return tuple(sorted(shapes, key=_wide_first))


def _listed(option: Any) -> Sequence[Any]:
    if not isinstance(option, Sequence) or isinstance(option, str) or not option:
        raise _no_buckets(option)
    return option


def _no_buckets(option: Any) -> OrnsteinError:
    return OrnsteinError(
        f"data.buckets={option} is neither null, nor auto, nor a list of [height, width] in pixels, such as "
        "data.buckets=[[32,48],[40,40],[48,32]]"
    )


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _wide_first(shape: Shape) -> tuple[float, int]:
    return (shape[0] / shape[1], shape[0] * shape[1])


def bucket_shapes(option: Any, *, image_size: int, factor: int = 1) -> tuple[Shape, ...] | None:
    """The shapes that `data.buckets` means, ordered from wide to high; None where it is None.

    Args:
        option: as typed, see `parse_buckets`.
        image_size: side of the square whose area all shapes of `auto` share.
        factor: what the network (and its codec) needs every side to be a multiple of.

    Raises:
        OrnsteinError: an option that is none, or sides that `factor` does not divide.
    """
    parsed = parse_buckets(option)
    if parsed is None:
        return None
    if isinstance(parsed, AutoBuckets):
        step = auto_step(image_size, factor) if parsed.step is None else parsed.step
        if step % factor:
            raise OrnsteinError(
                f"data.buckets.step={step}: the network takes sides that are multiples of {factor}, so choose a "
                f"multiple of {factor}, or null"
            )
        return auto_shapes(area=parsed.area or image_size**2, step=step, max_ratio=float(parsed.max_ratio))
    for height, width in parsed:
        if height % factor or width % factor:
            fit = [max(1, round(side / factor)) * factor for side in (height, width)]
            raise OrnsteinError(
                f"data.buckets: [{height},{width}] does not divide by {factor}, which the network needs: choose "
                f"[{fit[0]},{fit[1]}], say, or a network with a smaller patch_size or fewer levels"
            )
    return parsed


def checked_buckets(
    option: Any, *, image_size: int | None, balanced: bool, latents: str | None
) -> tuple[Shape, ...] | None:
    """`bucket_shapes`, and that nothing stands beside the option that cannot be had with it.

    Raises:
        OrnsteinError: as `bucket_shapes`; `auto` without `data.image_size`; class-balanced batches; or cached latents.
    """
    parsed = parse_buckets(option)
    if parsed is None:
        return None
    if balanced:
        raise OrnsteinError(
            "data.buckets orders batches by shape and data.balanced=true by class: set one of them to null or false"
        )
    if latents is not None:
        raise OrnsteinError(
            f"data.latents={latents} holds latents of squares and data.buckets asks for other shapes: leave one out "
            "(without data.latents the codec encodes each batch as it comes)"
        )
    if image_size is None:
        if isinstance(parsed, AutoBuckets):
            raise OrnsteinError("data.buckets=auto makes shapes as large as image_size squares: say data.image_size")
        return parsed
    return bucket_shapes(parsed, image_size=image_size)


def auto_step(image_size: int, factor: int) -> int:
    """The smallest multiple of `factor` that divides `image_size` and is at least a sixteenth of it.

    A sixteenth is SDXL's 64 of 1024 pixels. Where `factor` itself does not divide, it is the step.
    """
    fitting = [
        step for step in range(factor, image_size + 1, factor) if image_size % step == 0 and 16 * step >= image_size
    ]
    return fitting[0] if fitting else factor


def auto_shapes(*, area: int, step: int, max_ratio: float = MAX_RATIO) -> tuple[Shape, ...]:
    """Shapes of about `area` pixels with sides in multiples of `step`, ordered from wide to high.

    For every side that is a multiple of `step`, the other side that brings the area nearest, on a logarithmic scale;
    with each shape stands its transpose. Shapes whose sides differ by more than `max_ratio` are left out; the square
    nearest to the area is always there.

    Source: the buckets of NovelAI (2022, "Aspect Ratio Bucketing": steps of 64 pixels below a maximal area) and of
    SDXL (Podell et al. 2023, arXiv 2307.01952, section 2.3: as near to 1024**2 pixels as multiples of 64 come).
    """
    square = _nearest(math.sqrt(area), step)
    found = {(square, square)}
    longest = math.sqrt(area * max_ratio)
    for side in range(step, int(longest) + step, step):
        other = _nearest(area / side, step)
        if max(side / other, other / side) <= max_ratio * (1 + TIE):
            found |= {(side, other), (other, side)}
    return tuple(sorted(found, key=_wide_first))


def _nearest(side: float, step: int) -> int:
    """The multiple of `step` nearest to `side` in ratio; the larger of two that are equally near."""
    below = max(1, math.floor(side / step)) * step
    above = below + step
    return below if side / below < above / side else above


def assign(sizes: Any, shapes: Sequence[Shape]) -> np.ndarray:
    """The shape for each image: the one whose aspect ratio is nearest on a logarithmic scale.

    Between shapes that are equally near (shapes of one ratio, or an image just between two), the one nearest to the
    image in area, then the one that stands first. An image beyond the most extreme shape gets that shape, and loses
    more of its longer side than others do: none is left out.

    Args:
        sizes: (N, 2), height and width of each image as it is.
        shapes: (height, width) each.

    Returns:
        int64 (N,), places in `shapes`.
    """
    # A data set has few sizes, and rows of a bounded number at once keep memory from growing with it.
    images = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    _, first, which = np.unique(images[:, 0] * (1 << 32) + images[:, 1], return_index=True, return_inverse=True)
    pairs = images[first]
    found = [_nearest_shapes(part, shapes) for part in np.array_split(pairs, len(pairs) // ROWS + 1)]
    return np.concatenate(found)[which.ravel()]


def _nearest_shapes(sizes: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    images, goals = sizes.astype(np.float64), np.asarray(shapes, dtype=np.float64)
    ratio = np.abs(np.log(images[:, 0] / images[:, 1])[:, None] - np.log(goals[:, 0] / goals[:, 1])[None])
    area = np.abs(np.log(images.prod(axis=1))[:, None] - np.log(goals.prod(axis=1))[None])
    tied = ratio <= ratio.min(axis=1, keepdims=True) + TIE
    return np.where(tied, area, np.inf).argmin(axis=1).astype(np.int64)


def cropped_share(sizes: Any, shapes: Any) -> np.ndarray:
    """What share of each image is cut away when it is resized to cover its shape: float64 (N,) in [0, 1).

    Args:
        sizes, shapes: (N, 2), height and width of each image as it is and as it will be.
    """
    images, goals = np.asarray(sizes, dtype=np.float64), np.asarray(shapes, dtype=np.float64)
    ratio = (images[:, 0] * goals[:, 1]) / (images[:, 1] * goals[:, 0])
    return 1 - np.minimum(ratio, 1 / ratio)


def bucket_table(
    shapes: Sequence[Shape], counts: Sequence[int], *, batch: int, cropped: Sequence[float] | None = None
) -> list[str]:
    """One line a shape: how many images, what share of all, how many batches an epoch, how much is cropped away.

    Args:
        shapes: (height, width) each.
        counts: images of each.
        batch: images of a whole micro-batch, over all devices.
        cropped: mean share of an image that is cut away, for each shape.
    """
    total = max(1, sum(counts))
    rows = [("height x width", "images", "share", "batches an epoch", "cropped")]
    for place, (shape, count) in enumerate(zip(shapes, counts, strict=True)):
        away = "" if cropped is None or not count else f"{100 * cropped[place]:.1f} %"
        rows.append(
            (f"{shape[0]} x {shape[1]}", f"{count:,}", f"{100 * count / total:.1f} %", f"{count / batch:.2f}", away)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    few = [shape for shape, count in zip(shapes, counts, strict=True) if 0 < count < batch]
    if few:
        named = ", ".join(f"{height} x {width}" for height, width in few)
        lines.append(
            f"fewer images than a batch of {batch}: {named}; their batches hold an image more than once and come up as "
            "rarely, so that every image is seen equally often"
        )
    return lines
