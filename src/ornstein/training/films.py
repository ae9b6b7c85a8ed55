"""Films of Pillow frames: GIF by Pillow, MP4 by the optional package av; written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from PIL import Image

from ornstein.errors import OrnsteinError
from ornstein.training.pictures import write_whole

FRAME_MS, HOLD_MS = 120, 1500


def save_gif(
    frames: Sequence[Image.Image], path: str | Path, *, frame_ms: int = FRAME_MS, hold_ms: int = HOLD_MS
) -> Path:
    """Writes an endless animation, atomically, whose last frame stays for ``hold_ms``.

    Raises:
        OrnsteinError: no frames.
    """
    if not frames:
        raise OrnsteinError("an animation needs at least one frame.")
    durations = [frame_ms] * (len(frames) - 1) + [hold_ms]
    # One palette for all frames: each its own would make colours flicker and the file several times larger.
    palette = frames[-1].quantize(255)
    flat = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]

    def write(partial: str) -> None:
        flat[0].save(partial, format="GIF", save_all=True, append_images=flat[1:], duration=durations, loop=0)

    return write_whole(Path(path), write)


def save_mp4(
    frames: Sequence[Image.Image], path: str | Path, *, frame_ms: int = FRAME_MS, hold_ms: int = HOLD_MS
) -> Path:
    """Writes an H.264 film that browsers play, atomically, whose last frame stays for about ``hold_ms``.

    Args:
        frames: of one size, which where it is odd loses its last row or column (H.264 takes even sizes).

    Raises:
        OrnsteinError: no frames, or no package av.
    """
    if not frames:
        raise OrnsteinError("an animation needs at least one frame.")
    try:
        import av
    except ImportError as error:
        raise OrnsteinError("an mp4 needs the package av: pip install 'ornstein[video]', or film=gif.") from error
    width, height = (side // 2 * 2 for side in frames[0].size)

    def write(partial: str) -> None:
        with av.open(partial, "w", format="mp4") as film:
            stream = film.add_stream("libx264", rate=Fraction(1000, frame_ms), options={"crf": "18"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for frame in [*frames, *[frames[-1]] * (hold_ms // frame_ms - 1)]:
                picture = av.VideoFrame.from_image(frame.convert("RGB").crop((0, 0, width, height)))
                film.mux(stream.encode(picture))
            film.mux(stream.encode())

    return write_whole(Path(path), write)
