"""What samplers cost and whether they draw noise on the way, found by running them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ornstein.cli.options.files import read_option

if TYPE_CHECKING:
    from ornstein.diffusion.samplers import Sampler, State
    from ornstein.diffusion.schedules import NoiseSchedule

_STEPS = (12, 18, 24)


def measure(name: str) -> tuple[str, str, str]:
    """A sampler's order at its default keys, its evaluations for N steps, and whether it draws noise on the way.

    Evaluations are counted on a Gaussian mixture, under the first schedule that the sampler runs on.
    """
    from ornstein.diffusion.schedules import EDM, Flow, Linear

    sampler = build_sampler(name)
    for schedule in (Linear(), EDM(), Flow()):
        try:
            sampler.check(schedule)
        except ValueError:
            continue
        order = "" if sampler.order is None else str(sampler.order)
        last = _run(sampler, schedule, 0)
        random = "no" if last.x.equal(_run(sampler, schedule, 1).x) else "yes"
        if last.nfe_each is not None:
            return order, "as the tolerance asks", random
        counts = [_run(build_sampler(name, steps=steps), schedule, 0).nfe for steps in _STEPS]
        return order, _formula(counts), random
    raise ValueError(f"sampler={name} runs on none of the schedules linear, edm and flow.")


def _formula(counts: list[int]) -> str:
    """``a N + b`` from the evaluations of 12, 18 and 24 steps; the counts where they lie on no line."""
    slope, rest = divmod(counts[1] - counts[0], _STEPS[1] - _STEPS[0])
    offset = counts[0] - slope * _STEPS[0]
    if rest or counts[2] != slope * _STEPS[2] + offset:
        return ", ".join(f"{count} for {steps}" for count, steps in zip(counts, _STEPS, strict=True))
    return ("N" if slope == 1 else f"{slope} N") + (f" {'+-'[offset < 0]} {abs(offset)}" if offset else "")


def build_sampler(name: str, **keys: Any) -> Sampler:
    """A sampler with its default keys and grid, some keys changed."""
    option = read_option("sampler", name)
    inner = {choice.key: dict(read_option(choice.group, choice.name).node) for choice in option.choices}
    # Through text, because OmegaConf reads 1e-3 as a number and YAML's own reader does not.
    return instantiate(OmegaConf.create(yaml.safe_dump({**option.node, **inner, **keys})))


def _run(sampler: Sampler, schedule: NoiseSchedule, seed: int) -> State:
    """The trajectory of one point from a fixed start; ``seed`` decides all noise after that."""
    import torch

    from ornstein.diffusion.analytic import GaussianMixture
    from ornstein.diffusion.noise import NoiseSource, SampleNoise
    from ornstein.diffusion.parameterizations import Sample

    class Noise(SampleNoise):
        def __call__(self, step: int, draw: int = 0) -> torch.Tensor:
            return torch.full((1, 2), 0.5) if step == 0 else super().__call__(step, draw)

    mixture = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.3, 0.5]))
    noise = Noise(NoiseSource(seed), torch.zeros(1, dtype=torch.int64), (2,))
    return sampler.sample(mixture.denoiser(schedule, Sample()), noise)
