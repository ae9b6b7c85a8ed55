"""Schedules, parameterizations and samplers as schedulers of diffusers: the same samples from the same noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion import parameterizations as p
from ornstein.diffusion import schedules as s
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.grids import Discrete, Karras, LogSNR, Shifted, Uniform
from ornstein.diffusion.samplers import DDIM, DDPM, DPMpp2M, Euler
from ornstein.errors import OrnsteinError
from ornstein.experiment.export.schedulers import TABLE, alpha_bar_table, scheduler_for

SHAPE = (2, 1, 4, 4)


class Toy(nn.Module):
    """A smooth network of bounded output, which knows its noise condition."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        mean = torch.tanh(x) * torch.cos(noise_cond / 300)[:, None, None, None] - 0.2
        return mean if self.outputs == 1 else torch.cat([mean, torch.sin(3 * x)], dim=1)


class Draws:
    """The noise that diffusers draws from ``torch.Generator().manual_seed(0)``, in the place of ours."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.values = [torch.randn(SHAPE, generator=generator) for _ in range(count)]

    def expect(self, steps: int) -> Draws:
        return self

    def __call__(self, step: int, draw: int = 0) -> Tensor:
        return self.values[step - 1]


def draw_theirs(spec: Any, network: nn.Module, start: Tensor) -> Tensor:
    """Diffusers' loop, as its pipelines have it."""
    import diffusers

    scheduler = getattr(diffusers, spec.name)(**spec.config)
    if spec.name.startswith("FlowMatch"):
        scheduler.set_timesteps(sigmas=[1 - i / spec.steps for i in range(spec.steps)])
    else:
        scheduler.set_timesteps(spec.steps)
    generator = torch.Generator().manual_seed(0)
    x = start
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = network(scaled, (t.float() + spec.noise_offset).expand(len(x)))
        if output.shape[1] == 2 * x.shape[1] and "learned" not in str(scheduler.config.get("variance_type")):
            output = output.chunk(2, dim=1)[0]
        options = {} if spec.name.startswith("FlowMatch") else {"generator": generator}
        x = scheduler.step(output, t, x, return_dict=False, **options, **spec.call)[0]
    return x


@dataclass(frozen=True)
class Row:
    schedule: Any
    parameterization: Any
    sampler: Any
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)


ROWS = {
    "linear-eps": Row(
        s.Linear(), p.Epsilon(), DDIM(steps=10), "DDIMScheduler", {"beta_schedule": "linear", "beta_end": 0.02}
    ),
    "linear-eps-all": Row(s.Linear(), p.Epsilon(), DDIM(steps=250), "DDIMScheduler"),
    "linear-eps-noise": Row(s.Linear(), p.Epsilon(), DDIM(steps=10, eta=0.7), "DDIMScheduler"),
    "linear-eps-clip": Row(
        s.Linear(), p.Epsilon(), DDIM(steps=10), "DDIMScheduler", {"clip_sample_range": 0.8}, {"clip_x0": 0.8}
    ),
    "linear-x0-threshold": Row(
        s.Linear(), p.Sample(), DDIM(steps=10), "DDIMScheduler", {"thresholding": True}, {"dynamic_threshold": 0.9}
    ),
    "linear-x0-ddpm": Row(s.Linear(), p.Sample(), DDPM(steps=20), "DDPMScheduler", {"prediction_type": "sample"}),
    "linear-eps-ddpm-clip": Row(s.Linear(), p.Epsilon(), DDPM(steps=20), "DDPMScheduler", {}, {"clip_x0": 1.0}),
    "linear-v-ddpm-large": Row(
        s.Linear(), p.V(), DDPM(steps=TABLE, variance="fixed_large"), "DDPMScheduler", {"variance_type": "fixed_large"}
    ),
    "linear-learned": Row(
        s.Linear(),
        p.LearnedVariance(p.Epsilon()),
        DDPM(steps=TABLE, variance="learned"),
        "DDPMScheduler",
        {"variance_type": "learned_range"},
        {"clip_x0": 1.0},
    ),
    "linear-learned-ddim": Row(s.Linear(), p.LearnedVariance(p.V()), DDIM(steps=10), "DDIMScheduler"),
    "linear-euler": Row(s.Linear(), p.V(), Euler(steps=10), "DDIMScheduler"),
    "linear-leading": Row(
        s.Linear(),
        p.V(),
        DDIM(steps=10, grid=Discrete(spacing="leading", offset=1)),
        "DDIMScheduler",
        {"timestep_spacing": "leading", "steps_offset": 1},
    ),
    "cosine-v": Row(s.Cosine(), p.V(), DDIM(steps=10), "DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    "cosine-eps-clip": Row(s.Cosine(), p.Epsilon(), DDIM(steps=10), "DDIMScheduler", {}, {"clip_x0": 1.0}),
    "cosine-x0-ddpm": Row(s.Cosine(), p.Sample(), DDPM(steps=20), "DDPMScheduler"),
    "cosine-shifted": Row(s.Cosine(shift=2.0), p.V(), DDIM(steps=10), "DDIMScheduler"),
    "cosine-zero-snr": Row(s.Cosine(zero_terminal_snr=True), p.V(), DDIM(steps=10), "DDIMScheduler"),
    "scaled-linear": Row(
        s.ScaledLinear(),
        p.V(),
        DDIM(steps=10),
        "DDIMScheduler",
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085},
    ),
    "sigmoid": Row(s.Sigmoid(), p.V(), DDIM(steps=10), "DDIMScheduler"),
    "linear-500": Row(s.Linear(num_timesteps=500), p.V(), DDIM(steps=10), "DDIMScheduler"),
    "continuous": Row(s.SNRSigmoid(), p.V(), DDIM(steps=10), "DDIMScheduler"),
    "flow": Row(s.Flow(), p.Velocity(), Euler(steps=7), "FlowMatchEulerDiscreteScheduler", {"shift": 1.0}),
    "flow-shifted": Row(
        s.Flow(),
        p.Velocity(),
        Euler(steps=7, grid=Shifted(shift=3.0)),
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 3.0},
    ),
    "edm": Row(
        s.EDM(sigma_max=20.0, sigma_min=0.01),
        p.EDMPreconditioned(sigma_data=0.7),
        Euler(steps=9, grid=Uniform(to_zero=True)),
        "EDMEulerScheduler",
        {"sigma_max": 20.0, "sigma_data": 0.7, "rho": 7.0},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_same_samples(name: str) -> None:
    row = ROWS[name]
    spec = scheduler_for(row.schedule, row.parameterization, row.sampler, **row.limits)
    assert spec.name == row.name
    assert row.config.items() <= spec.config.items()
    assert not [note for note in spec.notes if "schedule keeps" not in note], spec.notes
    network = Toy(row.parameterization.outputs)
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    start = start * (20.0 if name == "edm" else 1.0)
    denoiser = Denoiser(network, row.schedule, row.parameterization, **row.limits)
    ours = row.sampler.sample(denoiser, Draws(row.sampler.steps), start=start).x
    theirs = draw_theirs(spec, network, start)
    # diffusers keeps its table, and rounds every step, in float32.
    assert (ours - theirs).abs().max() < 1e-4 * max(1.0, float(ours.abs().max()))


@pytest.mark.parametrize(
    "schedule",
    [
        s.Linear(),
        s.Cosine(),
        s.Cosine(shift=0.5),
        s.Cosine(zero_terminal_snr=True),
        s.ScaledLinear(),
        s.Sigmoid(),
        s.Quadratic(form="squared_time"),
        s.LaplaceTable(),
        s.Laplace(),
        s.ContinuousCosine(),
        s.Linear(num_timesteps=100),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_tables_are_ours_to_float32(schedule: Any) -> None:
    from diffusers import DDIMScheduler

    spec = scheduler_for(schedule, p.V(), DDIM(steps=10))
    theirs = DDIMScheduler(**spec.config).alphas_cumprod.double()
    # A last beta of 0.999 in float32 is 6e-5 of what it leaves, a nearer one more of still less; all others are exact.
    torch.testing.assert_close(theirs[:-1], alpha_bar_table(schedule)[:-1], rtol=5e-6, atol=0)
    torch.testing.assert_close(theirs[-1:], alpha_bar_table(schedule)[-1:], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "parameterization", "limits", "words"),
    [
        (s.VE(), p.Epsilon(), {}, "scheduler=VE format=safetensors"),
        (s.SubVP(), p.V(), {}, "scheduler=SubVP"),
        (s.Linear(), p.Velocity(), {}, "parameterization=flow"),
        (s.Linear(), p.Score(), {}, "parameterization=score"),
        (s.Linear(), p.EDMPreconditioned(), {}, "parameterization=edm"),
        (s.Flow(), p.V(), {}, "parameterization=v scheduler=Flow"),
        (s.EDM(), p.V(), {}, "scheduler=EDM"),
        (s.Flow(shift=3.0), p.Velocity(), {}, "scheduler.shift=3.0"),
        (s.EDM(shift=2.0), p.EDMPreconditioned(), {}, "scheduler.shift=2.0"),
        (s.Flow(), p.Velocity(), {"clip_x0": 1.0}, "clip_x0=null"),
        (s.EDM(), p.EDMPreconditioned(), {"dynamic_threshold": 0.9}, "dynamic_threshold=null"),
        (s.Linear(), p.V(), {"clip_x0": 1.0, "dynamic_threshold": 0.9}, "clip_x0=1.0 dynamic_threshold=0.9"),
    ],
)
def test_what_has_no_scheduler_is_refused(schedule: Any, parameterization: Any, limits: Any, words: str) -> None:
    with pytest.raises(OrnsteinError) as told:
        scheduler_for(schedule, parameterization, Euler(steps=5), **limits)
    assert [word for word in words.split() if word not in str(told.value)] == []


@pytest.mark.parametrize(
    ("schedule", "parameterization", "sampler", "word"),
    [
        (s.Linear(), p.V(), DPMpp2M(steps=10), "DPMpp2M"),
        (s.Linear(), p.V(), Euler(steps=10, s_churn=2.0), "Euler"),
        (s.Linear(), p.V(), DDIM(steps=10, grid=Karras()), "Karras"),
        (s.Linear(), p.V(), DDIM(steps=30), "30 steps"),
        (s.Linear(), p.V(), DDIM(steps=10, grid=Discrete(spacing="linspace")), "linspace"),
        (s.Linear(), p.V(), DDIM(steps=10, grid=Discrete(from_noise=True)), "from_noise"),
        (s.Linear(), p.V(), DDPM(steps=10, variance="fixed_large"), "last step"),
        (s.ContinuousCosine(), p.V(), DDIM(steps=10), "keeps noise"),
        (s.Flow(), p.Velocity(), DDPM(steps=10), "DDPM"),
        (s.Flow(), p.Velocity(), Euler(steps=10, grid=LogSNR()), "LogSNR"),
        (s.EDM(), p.EDMPreconditioned(), Euler(steps=10), "to_zero"),
    ],
)
def test_what_differs_is_told(schedule: Any, parameterization: Any, sampler: Any, word: str) -> None:
    notes = scheduler_for(schedule, parameterization, sampler).notes
    assert any(word in note for note in notes), notes
