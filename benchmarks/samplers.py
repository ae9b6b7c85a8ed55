"""Microseconds a sampler spends on a step beside its network: ours, diffusers, k-diffusion and azula in turn.

::

    python benchmarks/samplers.py --markdown table.md
    pip install --target FOLDER --no-deps k-diffusion==0.1.1.post1 torchdiffeq==0.2.5 torchsde==0.2.6 azula==0.11.1
    ORNSTEIN_PEERS=FOLDER python benchmarks/samplers.py         # the last two as well

The network gives back what it is given, so that all the time is the library's own. What is timed is one whole sampling
call, from the grid to the last step, divided by the number of steps; the initial noise is drawn outside the clock. All
run on one thread, one call after the other in rounds; the figure is the median over rounds. A library that is not there
is left out with a line that says so.
``benchmarks/README.md`` says what is held equal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ornstein  # noqa: F401  (first: lets torchvision be imported beside any build of torch)

# isort: split
import torch
from common import environment, finite, markdown_table, median, show_table, write
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from torch import Tensor, nn

from ornstein.cli.launch import conf_dir, register_resolvers
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.noise import NoiseSource
from ornstein.diffusion.parameterizations import Epsilon
from ornstein.diffusion.schedules import Linear

Call = Callable[[], Any]
SHAPE = (3, 8, 8)
PEERS = "k-diffusion==0.1.1.post1 torchdiffeq==0.2.5 torchsde==0.2.6 azula==0.11.1"


@dataclass(frozen=True)
class Row:
    """A sampler under its name in each library; None where a library has none."""

    ours: str
    diffusers: str | None = None
    diffusers_options: tuple[tuple[str, Any], ...] = ()
    k_diffusion: str | None = None
    azula: str | None = None


ROWS = (
    Row("ddim", "DDIMScheduler", azula="DDIMSampler"),
    Row("euler", "EulerDiscreteScheduler", k_diffusion="sample_euler", azula="EulerSampler"),
    Row("heun", "HeunDiscreteScheduler", k_diffusion="sample_heun", azula="HeunSampler"),
    Row("ddpm", "DDPMScheduler", azula="DDPMSampler"),
    Row("euler_ancestral", "EulerAncestralDiscreteScheduler", k_diffusion="sample_euler_ancestral"),
    Row("dpmpp_2m", "DPMSolverMultistepScheduler", k_diffusion="sample_dpmpp_2m"),
    Row("dpmpp_3m", "DPMSolverMultistepScheduler", (("solver_order", 3),)),
    Row("dpmpp_2s", "DPMSolverSinglestepScheduler"),
    Row("dpmpp_2m_sde", "DPMSolverMultistepScheduler", (("algorithm_type", "sde-dpmsolver++"),), "sample_dpmpp_2m_sde"),
    Row("dpmpp_3m_sde", k_diffusion="sample_dpmpp_3m_sde"),
    Row("unipc", "UniPCMultistepScheduler"),
    Row("deis", "DEISMultistepScheduler"),
    Row("pndm", "PNDMScheduler", (("skip_prk_steps", True),)),
    Row("lms", "LMSDiscreteScheduler", k_diffusion="sample_lms"),
    Row("lcm", "LCMScheduler", (("original_inference_steps", 50),)),
)


class SameAsInput(nn.Module):
    """The network that costs nothing."""

    def forward(self, x_in: Tensor, noise_cond: Tensor) -> Tensor:
        """Gives back its input."""
        return x_in


def ours(name: str, steps: int, batch: int) -> Call:
    """Our sampler by its name in the config group, as sample.py would build it, on the linear schedule."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        sampler = instantiate(compose("train", overrides=[f"sampler={name}", f"sampler.steps={steps}"]).sampler)
    denoiser = Denoiser(SameAsInput(), Linear(), Epsilon())
    index = torch.arange(batch)
    bound = [NoiseSource(0).bind(index, SHAPE) for _ in range(1000)]
    for noise in bound:
        noise(0)
    return lambda: sampler.sample(denoiser, bound.pop())


def diffusers_loop(name: str, options: dict[str, Any], steps: int, batch: int) -> Call:
    """The loop of diffusers' own documentation around one of its schedulers."""
    import diffusers

    scheduler, network = getattr(diffusers, name)(**options), SameAsInput()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, *SHAPE)
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    extra = {"generator": generator} if takes_generator else {}

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(steps)
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(output, t, x, **extra).prev_sample
        return x

    return run


def k_diffusion_loop(name: str, steps: int, batch: int) -> Call:
    """k-diffusion's function with the bare identity as its denoiser, without its wrappers: the least it can cost."""
    sampling = _peer("k_diffusion.sampling", bare_package=True)
    noise = torch.randn(batch, *SHAPE)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return x

    def run() -> Tensor:
        sigmas = sampling.get_sigmas_karras(steps, 0.03, 14.6)
        extra = {}
        if name.endswith("_sde"):  # else it draws a Brownian tree, which is dearer
            extra["noise_sampler"] = lambda sigma, sigma_next: torch.randn_like(noise)
        return getattr(sampling, name)(denoise, noise * sigmas[0], sigmas, disable=True, **extra)

    return run


def azula_loop(name: str, steps: int, batch: int) -> Call:
    """The sampler of azula with its simplest denoiser around the identity."""
    sample, denoise, schedules = (_peer(f"azula.{module}") for module in ("sample", "denoise", "noise"))
    denoiser = denoise.SimpleDenoiser(SameAsInput(), schedules.VPSchedule())
    sampler = getattr(sample, name)(denoiser, steps=steps, silent=True)
    noise = torch.randn(batch, *SHAPE)
    return lambda: sampler(noise)


def _peer(module: str, *, bare_package: bool = False) -> Any:
    folder = os.environ.get("ORNSTEIN_PEERS")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    package = module.split(".")[0]
    if bare_package and package not in sys.modules:
        # Importing the package itself asks for its training code's many dependencies.
        found = importlib.util.find_spec(package)
        if found is None or found.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        bare = types.ModuleType(package)
        bare.__path__ = list(found.submodule_search_locations)
        sys.modules[package] = bare
    return importlib.import_module(module)


def time_in_turn(calls: dict[str, Call], *, steps: int, rounds: int) -> dict[str, float]:
    """Median microseconds a step of each call, one after the other in every round."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn >= 2:  # first calls fill caches
                spent[name].append((time.perf_counter() - began) / steps * 1e6)
    return {name: median(times) for name, times in spent.items()}


def measure(row: Row, *, steps: int, rounds: int, batch: int, missing: set[str]) -> dict[str, float]:
    """Each library's figure for one row; libraries that are not installed go into ``missing``."""
    calls = {"ours": ours(row.ours, steps, batch)}
    makers: dict[str, Callable[[], Call]] = {}
    if row.diffusers is not None:
        scheduler = row.diffusers
        makers["diffusers"] = lambda: diffusers_loop(scheduler, dict(row.diffusers_options), steps, batch)
    if row.k_diffusion is not None:
        function = row.k_diffusion
        makers["k-diffusion"] = lambda: k_diffusion_loop(function, steps, batch)
    if row.azula is not None:
        sampler = row.azula
        makers["azula"] = lambda: azula_loop(sampler, steps, batch)
    for library, make in makers.items():
        try:
            calls[library] = make()
        except ModuleNotFoundError:
            missing.add(library)
    return time_in_turn(calls, steps=steps, rounds=rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, shows and writes the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="some of the samplers, by commas (default: all)")
    parser.add_argument("--steps", type=int, default=50, help="of each sampling call (default: 50)")
    parser.add_argument("--batch", type=int, default=4, help="samples of 3x8x8 (default: 4)")
    parser.add_argument("--rounds", type=int, default=41, help="timed calls of each side (default: 41)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", metavar="FILE", help="write the table for RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="two short rounds: only to see that it runs")
    args = parser.parse_args(arguments)
    if args.quick:
        args.steps, args.rounds = 5, 1
    names = [row.ours for row in ROWS]
    only = args.only.split(",") if args.only else names
    if unknown := [name for name in only if name not in names]:
        parser.error(f"--only: {', '.join(unknown)} is not among {', '.join(names)}")

    torch.set_num_threads(args.threads)
    register_resolvers()
    console, missing, figures = Console(), set[str](), dict[str, dict[str, float]]()
    for row in ROWS:
        if row.ours in only:
            console.print(f"{row.ours} ...")
            figures[row.ours] = measure(row, steps=args.steps, rounds=args.rounds, batch=args.batch, missing=missing)
    libraries = ("diffusers", "k-diffusion", "azula")
    header = ["µs a step", "ours", *libraries, "ours / diffusers", "promised", "ours / k-diffusion", "promised"]
    rows = [_cells(name, found, libraries) for name, found in figures.items()]
    setting = environment(args.threads)
    note = (
        f"{args.batch}x{'x'.join(map(str, SHAPE))}, {args.steps} steps, medians of {args.rounds} calls in turn, "
        f"{args.threads} thread, torch {setting['torch']}, diffusers {setting['diffusers']}."
    )
    for library in sorted(missing):
        console.print(f"{library} is not installed and left out: pip install --target FOLDER --no-deps {PEERS}")
    show_table("what a sampler spends on a step", header, rows)
    if args.json:
        write(args.json, json.dumps(finite({"environment": setting, "figures": figures}), indent=2))
    if args.markdown:
        write(args.markdown, f"{note}\n\n{markdown_table(header, rows)}")
    return 0


def _cells(name: str, found: dict[str, float], libraries: Sequence[str]) -> list[str]:
    def verdict(library: str, most: float) -> list[str]:
        if library not in found:
            return ["-", "-"]
        ratio = found["ours"] / found[library]
        return [f"{ratio:.2f}", f"{most:.2f} {'met' if ratio <= most else 'NOT MET'}"]

    times = [f"{found[library]:.0f}" if library in found else "-" for library in ("ours", *libraries)]
    return [name, *times, *verdict("diffusers", 0.5), *verdict("k-diffusion", 1.0)]


if __name__ == "__main__":
    raise SystemExit(main())
