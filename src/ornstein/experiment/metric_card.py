"""The metric card of an evaluation: every figure with what it takes to believe it, on one page."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ornstein.experiment.atomic import replace_file

if TYPE_CHECKING:
    from PIL import Image

# What a figure is, by the beginning of its name; the first that fits.
MEANINGS = (
    ("sfid", "Fréchet distance of spatial features, smaller is better"),
    (r"fid_infinity|fd_.*_infinity", "extrapolated to infinitely many samples, smaller is better"),
    ("fid_floor|fd_.*_floor", "what as many real images would score"),
    ("fid|fd_", "Fréchet distance to the reference, smaller is better"),
    ("kid_std", "deviation of KID over its subsets"),
    ("kid_se", "standard error of KID"),
    ("kid", "kernel distance, smaller is better"),
    ("cmmd", "kernel distance in CLIP's manner, smaller is better"),
    ("real_inception_score", "of the reference images"),
    ("inception_score_std", "deviation over its splits"),
    ("inception_score", "clear and varied classes, larger is better"),
    ("precision", "share of samples within the real images' manifold"),
    ("recall", "share of real images within the samples' manifold"),
    ("density", "how densely samples lie where real images do"),
    ("coverage", "share of real images with a sample near"),
    ("label_accuracy", "share that shows the class asked for"),
    ("clip_score", "agreement with the captions, 0 to 100"),
    (r"text_r\d+_chance", "that share by chance"),
    (r"text_r\d+_real", "that share of real held-out images"),
    (r"text_r\d+", "share whose caption is among so many nearest of the gallery"),
    ("psnr", "dB, samples beside the images that they should restore"),
    ("ssim", "their structural similarity, up to 1"),
    ("lpips", "their perceptual distance, smaller is better"),
    ("memorised_share", "share suspiciously near a training image, 0.05 by chance"),
    (".*bits_per_dim", "of held-out images, smaller is better"),
)
PROTOCOLS = {
    "balanced": "balanced: sample i is asked for class i mod the number of classes",
    "held_out": "held-out data's own conditions, in order",
    "given": "given by the user",
    "none": "none: the model is unconditional",
}


_BETWEEN = 0.35  # inches between pictures


@dataclass(frozen=True)
class Figure:
    """One row of the card: a figure, its 95 % interval where there is one, and what it says."""

    name: str
    value: float
    interval: tuple[float, float] | None
    meaning: str

    @property
    def told(self) -> str:
        """The value, with its interval."""
        spread = "" if self.interval is None else f" ({self.interval[0]:.4g} to {self.interval[1]:.4g})"
        return f"{self.value:.4g}{spread}"


def figures_of(report: Mapping[str, Any]) -> list[Figure]:
    """The figures of an ``evaluation.json``, intervals beside what they are of."""
    values = {name: float("nan") if value is None else float(value) for name, value in report["values"].items()}
    ends = {f"{name}_{end}" for name in values for end in ("low", "high")}
    return [
        Figure(
            name,
            value,
            (values[f"{name}_low"], values[f"{name}_high"]) if f"{name}_low" in values else None,
            next((told for pattern, told in MEANINGS if re.match(pattern, name)), ""),
        )
        for name, value in values.items()
        if name not in ends
    ]


def facts_of(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What decides the figures of an ``evaluation.json``, as rows of (what, told)."""
    sampling, reference, settings = (report.get(key) or {} for key in ("sampling", "reference", "settings"))
    source = [f"{reference.get('count') or 'an untold number of'} images"]
    source += [str(reference[key]) for key in ("split", "file") if reference.get(key)]
    source += [f"data {str(reference['data'])[:12]}"] if reference.get("data") else []
    size = reference.get("image_size")
    source += [f"{'x'.join(map(str, size)) if isinstance(size, list) else size} pixels"] if size else []
    rows = [
        ("samples", f"{report['num_samples']:,}, rounded to uint8 as they would be stored"),
        ("conditions", PROTOCOLS.get(str(report.get("label_protocol")), str(report.get("label_protocol")))),
        ("reference", ", ".join(source)),
        ("features", f"{report['extractor']}, fingerprint {str(report['fingerprint'])[:12]}"),
    ]
    if settings.get("kid_subsets") and settings.get("kid_subset_size"):
        rows.append(("KID", f"{settings['kid_subsets']} subsets of at most {settings['kid_subset_size']}"))
    if settings.get("bootstrap"):
        rows.append(("intervals", f"95 %, {settings['bootstrap']} resamples"))
    if bits := settings.get("likelihood"):
        rows.append(("bits/dim", f"of {bits['num_images']} held-out images, NFE {bits['nfe']} each, without guidance"))
    rows += _sampling_rows(sampling)
    floor = report.get("floor")
    if floor:
        rows.append(("floor", f"{floor['fid']:.4g} between two sets of {floor['count']:,} real images"))
    near = report.get("memorisation")
    if near:
        medians = f"{near['sample_median']:.3g} of samples, {near['held_out_median']:.3g} of held-out images"
        rows.append(("nearest image", f"median distance {medians}"))
    versions = report.get("versions") or {}
    rows.append(("versions", ", ".join(f"{name} {number}" for name, number in versions.items() if number != "absent")))
    return [(name, told) for name, told in rows if told]


def _sampling_rows(sampling: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows on what made the samples; those that are not told are left out."""
    rows = []
    if "images_seen" in sampling:
        ema = sampling.get("ema")
        average = f" ({', '.join(f'{key} {value}' for key, value in ema.items())})" if ema else ""
        rows.append(("weights", f"{sampling.get('weights')}{average}, {sampling['images_seen']:,} images seen"))
    if "sampler" in sampling:
        grid = f" on the grid {sampling['grid']}" if sampling.get("grid") else ""
        rows.append(
            ("sampler", f"{sampling['sampler']}, {sampling.get('steps')} steps{grid}, NFE {sampling.get('nfe')}")
        )
    if "guidance" in sampling:
        scale = sampling.get("guidance_scale")
        rows.append(("guidance", f"{sampling['guidance']}{'' if scale is None else f', scale {scale:g}'}"))
    if "seed" in sampling:
        first = sampling.get("first_index") or 0
        last = "" if not first else f", samples from number {first} on"
        rows.append(("seed", f"{sampling['seed']}{last}"))
    return rows


def headline(report: Mapping[str, Any]) -> str:
    """The main figure in a sentence, with what to read it against."""
    from ornstein.metrics.figures.naming import main_figure

    figures = {figure.name: figure for figure in figures_of(report)}
    name = main_figure(figures)
    if name is None:
        return "no Fréchet distance was taken"
    floor = next((figure for figure in figures.values() if figure.name.endswith("_floor")), None)
    against = "" if floor is None else f"; as many real images would score {floor.told}"
    return f"{name} {figures[name].told} of {report['num_samples']:,} samples{against}"


def card_text(report: Mapping[str, Any], *, title: str, pictures: Sequence[tuple[str, str]] = ()) -> str:
    """The card as Markdown.

    Args:
        report: ``evaluation.json``.
        title: of the run.
        pictures: (what it shows, file name beside the card).
    """
    figures = [(figure.name, figure.told, figure.meaning) for figure in figures_of(report)]
    lines = [f"# Metric card: {title}", "", f"**{headline(report)}.**", "", *_table(("figure", "value", ""), figures)]
    lines += ["", "## What decides them", "", *_table(("", ""), facts_of(report)), ""]
    for shown, file in pictures:
        lines += [f"## {shown}", "", f"![{shown}]({file})", ""]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    cells = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def draw_card(
    report: Mapping[str, Any],
    path: str | Path,
    *,
    title: str,
    samples: Image.Image | None = None,
    neighbours: Image.Image | None = None,
) -> Path:
    """The card as one page, a PNG, written atomically: figures and facts as text, samples and neighbours as pictures.

    Args:
        report: ``evaluation.json``.
        path: of the PNG.
        title: of the run.
        samples: a strip or grid of samples.
        neighbours: samples beside their nearest training images.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Page

    width, line = 9.6, 0.215  # inches
    figures, facts = figures_of(report), _wrapped(facts_of(report), 88)
    shown = [(name, picture) for name, picture in (("samples", samples), ("neighbours", neighbours)) if picture]
    sizes = _side_by_side([picture for _, picture in shown], width - 1.0, 4.5)
    height = 1.35 + line * (len(figures) + len(facts)) + 0.3 + (max(high for _, high in sizes) + 0.75 if shown else 0.2)
    page = Page(figsize=(width, height), dpi=110, facecolor="white")
    canvas = FigureCanvasAgg(page)
    top = height - 0.42

    def write(x: float, text: str, **style: Any) -> None:
        page.text(x / width, top / height, text, va="center", **style)

    write(0.5, f"Metric card: {title}", fontsize=15, weight="bold")
    top -= 0.36
    write(0.5, headline(report), fontsize=11)
    top -= 0.42
    widest = max(len(figure.told) for figure in figures)
    for figure in figures:
        write(0.5, figure.name, fontsize=10)
        write(2.55 + 0.085 * widest, figure.told, fontsize=10, ha="right", family="DejaVu Sans Mono")
        write(2.75 + 0.085 * widest, figure.meaning, fontsize=9, color="0.4")
        top -= line
    top -= 0.13
    rule = (top + 0.05) / height
    page.add_artist(_rule(0.5 / width, 1 - 0.5 / width, rule))
    top -= 0.17
    for name, told in facts:
        write(0.5, name, fontsize=9.5, color="0.4")
        write(1.75, told, fontsize=9.5)
        top -= line
    top -= 0.2
    left = 0.5
    for (name, picture), size in zip(shown, sizes, strict=True):
        write(left, name, fontsize=9.5, color="0.4")
        axis = page.add_axes((left / width, (top - 0.17 - size[1]) / height, size[0] / width, size[1] / height))
        smaller = picture.width > size[0] * 110
        axis.imshow(picture, interpolation="lanczos" if smaller else "nearest", aspect="auto")
        axis.set_axis_off()
        left += size[0] + _BETWEEN
    canvas.draw()
    path = Path(path)
    replace_file(path, lambda file: canvas.print_png(file))
    return path


def _rule(left: float, right: float, y: float) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([left, right], [y, y], color="0.8", linewidth=0.8)


def _side_by_side(pictures: Sequence[Image.Image], width: float, height: float) -> list[tuple[float, float]]:
    """Inches for pictures of one height beside one another: together at most so wide, each at most so high."""
    shapes = [picture.width / picture.height for picture in pictures]
    if not shapes:
        return []
    common = min(height, (width - _BETWEEN * (len(shapes) - 1)) / sum(shapes))
    return [(common * shape, common) for shape in shapes]


def _wrapped(rows: Sequence[tuple[str, str]], width: int) -> list[tuple[str, str]]:
    """Long facts over several lines, named on the first."""
    return [
        (name if number == 0 else "", part)
        for name, told in rows
        for number, part in enumerate(textwrap.wrap(told, width) or [""])
    ]


def show(report: Mapping[str, Any], seconds: float) -> None:
    """Prints the figures as a table, and what decides them under it."""
    from rich.console import Console
    from rich.table import Table

    print(f"{report['num_samples']} samples in the {report['extractor']} feature space, {seconds:.1f} s")
    if bits := (report.get("settings") or {}).get("likelihood"):
        print(
            f"bits/dim of {bits['num_images']} held-out images without guidance, {bits['nfe']} network evaluations "
            f"each, {bits['seconds']:.1f} s"
        )
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("", style="dim")
    for figure in figures_of(report):
        value = figure.told if math.isfinite(figure.value) else "-"
        table.add_row(figure.name, value, figure.meaning)
    console = Console()
    console.print(table)
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, told in facts_of(report):
        facts.add_row(name, told)
    console.print(facts)
