"""How fast each deterministic sampler converges to the exact flow, as a table and a picture.

    python benchmarks/convergence.py --out docs/images/convergence.png

Each sampler runs over log-SNR from -3 to 5 on one Gaussian, whose flow has a closed form, on a variance-preserving, a
variance-exploding and a flow schedule, in float64. The error is the largest over ten positions, in units of the data,
against the evaluations of the denoiser that it took; a dashed guide has the slope of the order that the class states.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.grids import make_grid
from ornstein.diffusion.noise import NoiseSource
from ornstein.diffusion.parameterizations import V
from ornstein.diffusion.samplers import DDIM, DEIS, LMS, PNDM, DPMpp2M, DPMpp2S, DPMpp3M, Heun, Sampler, State, UniPC
from ornstein.diffusion.schedules import EDM, Flow, Linear, NoiseSchedule

STEPS = (8, 16, 32, 64, 128)
SCHEDULES = {"linear (variance preserving)": Linear, "edm (variance exploding)": EDM, "flow": Flow}
# euler and dpmpp_1s at eta 0 are ddim's step, and lie on its line.
SAMPLERS = {
    "ddim": DDIM,
    "heun": Heun,
    "dpmpp_2s": DPMpp2S,
    "dpmpp_2m": DPMpp2M,
    "pndm": PNDM,
    "lms": LMS,
    "deis": DEIS,
    "unipc": UniPC,
    "dpmpp_3m": DPMpp3M,
}
COLOURS = ("#777777", "#1f77b4", "#17becf", "#2ca02c", "#bcbd22", "#ff7f0e", "#8c564b", "#d62728", "#9467bd")
MARKERS = "osD^v<>PX"


@dataclass(frozen=True)
class EvenLogSNR:
    """Even in log-SNR from -3 to 5, where every order shows within 128 steps."""

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        return schedule.time(torch.linspace(-3, 5, steps + 1, dtype=torch.float64))


@dataclass(frozen=True)
class Line:
    """One sampler on one schedule: evaluations and errors, one for each of STEPS, and the order it states."""

    evaluations: list[int]
    errors: list[float]
    order: int

    def slope(self) -> float:
        """The last slope against the number of steps."""
        return math.log2(self.errors[-2] / self.errors[-1])


def measure(kind: type[Sampler], schedule: NoiseSchedule) -> Line:
    """Errors of a sampler against the closed form."""
    gaussian = GaussianMixture(torch.tensor([[0.4, -0.3]]).double(), torch.tensor([0.5]).double())
    denoiser, noise = gaussian.denoiser(schedule, V()), NoiseSource(0).bind(torch.arange(5), (2,))
    evaluations, errors = [], []
    for steps in STEPS:
        grid = make_grid(EvenLogSNR(), schedule, steps)
        first = grid[0]
        spread = math.hypot(first.alpha * 0.5, first.sigma)
        offsets = torch.linspace(-2, 2, 10, dtype=torch.float64).reshape(5, 2)
        x = first.alpha * gaussian.means[0] + spread * offsets
        sampler, state = kind(steps=steps), State(x, grid, noise)
        for i in range(steps):
            state = sampler.step(denoiser, state, i)
        evaluations.append(state.nfe)
        errors.append(float((state.x - gaussian.flow(x, first, grid[-1])).abs().max()))
    order = kind(steps=8).order
    assert order is not None
    return Line(evaluations, errors, order)


def draw(lines: dict[str, dict[str, Line]], out: Path) -> None:
    """One panel a schedule, one line a sampler."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(lines), figsize=(13, 5), sharey=True, layout="constrained")
    for axis, (title, panel) in zip(axes, lines.items(), strict=True):
        for (name, line), colour, marker in zip(panel.items(), COLOURS, MARKERS, strict=True):
            label = f"{name} (order {line.order})"
            axis.loglog(line.evaluations, line.errors, color=colour, marker=marker, markersize=5, label=label)
        for order, start in ((1, 0.3), (2, 0.1), (3, 4e-3)):
            ends = (STEPS[0], STEPS[-1])
            guide = [start * (n / ends[0]) ** -order for n in ends]
            axis.loglog(ends, guide, color="black", linestyle="--", linewidth=0.8, alpha=0.6)
            axis.annotate(f"slope {order}", (ends[1], guide[1]), xytext=(5, -3), textcoords="offset points", fontsize=8)
        axis.set(title=title, xlabel="network evaluations", xlim=(7, 400), ylim=(1e-8, 1))
        axis.set_xticks([8, 16, 32, 64, 128, 256], ["8", "16", "32", "64", "128", "256"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("largest error against the exact flow")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measures, prints the table, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to draw the picture, such as docs/images/convergence.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = {title: {n: measure(kind, on()) for n, kind in SAMPLERS.items()} for title, on in SCHEDULES.items()}
    print("| schedule | sampler | order stated | last slope |", *[f"{n} steps |" for n in STEPS])
    print("| --- | --- |", " ".join(["--- |"] * (len(STEPS) + 2)))
    for title, panel in lines.items():
        for name, line in panel.items():
            errors = " | ".join(f"{e:.1e}" for e in line.errors)
            print(f"| {title} | {name} | {line.order} | {line.slope():.2f} | {errors} |")
    if arguments.out is not None:
        draw(lines, arguments.out)


if __name__ == "__main__":
    main()
