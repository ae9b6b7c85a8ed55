"""Schedulers of the diffusers library as samplers: they step, our denoiser predicts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ornstein.diffusion.denoiser import Denoise, Rescheduled
from ornstein.diffusion.grids import Grid
from ornstein.diffusion.noise import SampleNoise, derive_seed
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.schedules import Level, NoiseSchedule


def _table(scheduler: Any, i: int) -> tuple[float, float]:
    """Variance preserving, at an integer time step of the table."""
    alpha_bar = float(scheduler.alphas_cumprod[int(scheduler.timesteps[i])])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def _own_pair(scheduler: Any, i: int) -> tuple[float, float]:
    """Variance preserving or flow, as the scheduler itself turns its ratio into a pair."""
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i].double())
    return float(alpha), float(sigma)


def _exploding(scheduler: Any, i: int) -> tuple[float, float]:
    return 1.0, float(scheduler.sigmas[i])


def _midpoint(scheduler: Any, i: int) -> tuple[float, float]:
    return 1.0, float((scheduler.sigmas_interpol if i % 2 else scheduler.sigmas)[i])


def _ancestral_midpoint(scheduler: Any, i: int) -> tuple[float, float]:
    return 1.0, float(scheduler.sigmas_interpol[i - 1] if i % 2 else scheduler.sigmas[i])


def _flow(scheduler: Any, i: int) -> tuple[float, float]:
    sigma = float(scheduler.sigmas[i])
    return 1 - sigma, sigma


# How each supported class scales its samples: (alpha, sigma) at its call number i.
SUPPORTED: dict[str, Callable[[Any, int], tuple[float, float]]] = {
    "DDPMScheduler": _table,
    "DDIMScheduler": _table,
    "PNDMScheduler": _table,
    "LCMScheduler": _table,
    "DPMSolverMultistepScheduler": _own_pair,
    "DPMSolverSinglestepScheduler": _own_pair,
    "DEISMultistepScheduler": _own_pair,
    "UniPCMultistepScheduler": _own_pair,
    "EulerDiscreteScheduler": _exploding,
    "EulerAncestralDiscreteScheduler": _exploding,
    "HeunDiscreteScheduler": _exploding,
    "LMSDiscreteScheduler": _exploding,
    "KDPM2DiscreteScheduler": _midpoint,
    "KDPM2AncestralDiscreteScheduler": _ancestral_midpoint,
    "EDMEulerScheduler": _exploding,
    "EDMDPMSolverMultistepScheduler": _exploding,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": _flow,
}
_TWICE = {
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
}
_PRECONDITIONED = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}
_RESERVED = {"self", "model_output", "timestep", "sample", "generator", "return_dict", "variance_noise"}


_ANCESTRAL = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler")


def check_supported(name: str) -> None:
    """Refuses a scheduler by the name of its class.

    Raises:
        ValueError: says which are supported.
    """
    if name not in SUPPORTED:
        raise ValueError(
            f"sampler.scheduler={name} is not supported by sampler=diffusers: choose one of {', '.join(SUPPORTED)}."
        )


class DiffusersSampler(Sampler):
    r"""A diffusers scheduler, on its own grid, driven by our denoiser under our schedule.

    The scheduler's sample at its call i is :math:`x = \alpha_i x_0 + \sigma_i \epsilon` on the scheduler's own table;
    the denoiser is asked at the time of equal log-SNR on ours, with x rescaled, and answers with what the scheduler's
    ``prediction_type`` calls for (eps, x0, v, flow velocity, or EDM's F). Levels beyond our schedule's range are met at
    its end. The scheduler is copied for each batch; its own options (``clip_sample``, ``use_karras_sigmas``,
    ``timestep_spacing``) are its own. Its random numbers come from one generator a sample, seeded by (seed, sample
    number), so a sample depends on these alone. Evaluations are as many as the scheduler makes: ``steps``, about twice
    that for Heun and KDPM2.

    Supported are the classes in ``SUPPORTED``; others are refused by name, among them DPMSolverSDEScheduler, whose
    noise cannot be given sample by sample. Order as the scheduler's.
    Source: von Platen et al. 2022, the diffusers library; levels matched as Karras et al. 2022 (arXiv 2206.00364),
    section 2.
    When: repeating a figure that was made with diffusers, or trying a scheduler that is not here.

    Args:
        scheduler: the scheduler, built.
        steps: as given to its ``set_timesteps``.
        step_options: further arguments of its ``step``, such as ``eta`` of DDIMScheduler or ``s_churn``.
        clip_sample: takes the place of its own default where it has such an option and was not given one: diffusers'
            is True for DDIM and DDPM, which clamps x0 to [-1, 1] at every step. None leaves the default.

    Raises:
        ValueError: a class or prediction type that is not supported, learned variance, an unknown option of ``step``;
            on ``check``, steps that the scheduler refuses.
    """

    def __init__(
        self,
        *,
        scheduler: Any,
        steps: int = 50,
        step_options: Mapping[str, Any] | None = None,
        clip_sample: bool | None = None,
    ) -> None:
        super().__init__(steps=steps)
        name = type(scheduler).__name__
        check_supported(name)
        own_defaults = scheduler.config.get("_use_default_values", ())
        if clip_sample is not None and "clip_sample" in own_defaults:
            scheduler = copy.deepcopy(scheduler)
            scheduler.register_to_config(clip_sample=clip_sample)
        self.scheduler, self.name = scheduler, name
        self.step_options = dict(step_options or {})
        self.prediction = "flow_prediction" if SUPPORTED[name] is _flow else str(scheduler.config.prediction_type)
        self._check_config()

    def _check_config(self) -> None:
        config = self.scheduler.config
        known = {"epsilon", "v_prediction"} if self.name in _PRECONDITIONED else set(_OUTPUTS)
        known = {"epsilon"} if self.name == "PNDMScheduler" else known
        if self.prediction not in known:
            raise ValueError(
                f"sampler.scheduler.prediction_type={self.prediction} of {self.name} is not supported by "
                f"sampler=diffusers: choose {' or '.join(sorted(known))}."
            )
        if "learned" in str(config.get("variance_type")):
            raise ValueError(
                f"sampler.scheduler.variance_type={config.variance_type} is not supported by sampler=diffusers: choose "
                "sampler=ddpm sampler.variance=learned."
            )
        options = set(inspect.signature(self.scheduler.step).parameters) - _RESERVED
        for option in self.step_options:
            if option not in options:
                raise ValueError(
                    f"sampler.step_options.{option} is no option of {self.name}.step: it has "
                    f"{', '.join(sorted(options)) or 'none'}."
                )

    @property
    def stochastic(self) -> bool:
        """Whether the scheduler draws noise in its steps, as it is configured."""
        return (
            self.name in _ANCESTRAL
            or "sde" in str(self.scheduler.config.get("algorithm_type"))
            or any(self.step_options.get(option, 0) for option in ("eta", "s_churn"))
        )

    def check(self, schedule: NoiseSchedule) -> None:
        self._started()

    def _started(self) -> tuple[Any, list[Level]]:
        """A fresh copy of the scheduler with its time steps set, and the level of each of its calls."""
        scheduler = copy.deepcopy(self.scheduler)
        try:
            scheduler.set_timesteps(self.steps)
        except (ValueError, TypeError, IndexError, AssertionError, ZeroDivisionError) as error:
            raise ValueError(f"sampler.steps={self.steps} is refused by {self.name}: {error}") from error
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        pairs = [SUPPORTED[self.name](scheduler, i) for i in range(len(scheduler.timesteps))]
        if self.prediction == "epsilon" and pairs[0][0] == 0:
            raise ValueError(
                f"{self.name} starts at alpha = 0, where eps does not determine x0: set "
                "sampler.scheduler.prediction_type=v_prediction, or its rescale_betas_zero_snr=false."
            )
        count = len(pairs)
        return scheduler, [Level(1 - i / count, alpha, sigma, 0.0, 0.0) for i, (alpha, sigma) in enumerate(pairs)]

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        raise ValueError("sampler=diffusers keeps its state in the scheduler: call sample, not single steps.")

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoise,
        noise: SampleNoise,
        *,
        start: Tensor | None = None,
        watch: Callable[[int, State], None] | None = None,
    ) -> State:
        """Runs the scheduler's whole loop; ``watch`` is called ``steps`` times, however many calls a step takes."""
        denoise = self.begin(denoise)
        moved = Rescheduled(denoise, denoise.schedule)
        scheduler, levels = self._started()
        calls = len(levels)
        ends = [-(-k * calls // self.steps) for k in range(self.steps + 1)]
        grid = Grid((*(levels[end] for end in ends[:-1]), Level(0.0, 1.0, 0.0, 0.0, 0.0)))
        options = dict(self.step_options)
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = _generators(noise)
        if start is None:
            start = noise(0) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        state = State(start, grid, noise)
        shown = 0
        for i, (level, t) in enumerate(zip(levels, scheduler.timesteps, strict=True)):
            scheduler.scale_model_input(state.x, t) if hasattr(scheduler, "scale_model_input") else None
            p = moved(state.x, level, again=self.name in _TWICE and i % 2 == 1)
            x = scheduler.step(self._output(p, level), t, state.x, return_dict=False, **options)[0]
            state = state.advance(x, nfe=denoise.cost, prediction=p)
            while watch is not None and shown < self.steps and ends[shown + 1] <= i + 1:
                watch(shown, state)
                shown += 1
        return state

    def _output(self, p: Prediction, level: Level) -> Tensor:
        """What the scheduler takes for the network's output."""
        if self.name in _PRECONDITIONED:
            data, sigma = float(self.scheduler.config.sigma_data), float(level.sigma)
            size = sigma**2 + data**2
            out = sigma * data / size**0.5
            return (p.x0 - (data**2 / size) * p.x_t) / (out if self.prediction == "epsilon" else -out)
        return _OUTPUTS[self.prediction](p, level)


def _v(p: Prediction, level: Level) -> Tensor:
    return (level.alpha * p.eps - level.sigma * p.x0) / (level.alpha**2 + level.sigma**2) ** 0.5


_OUTPUTS: dict[str, Callable[[Prediction, Level], Tensor]] = {
    "epsilon": lambda p, level: p.eps,
    "sample": lambda p, level: p.x0,
    "v_prediction": _v,
    "flow_prediction": lambda p, level: p.eps - p.x0,
}


def _generators(noise: SampleNoise) -> list[torch.Generator] | None:
    """One CPU generator a sample: what diffusers then draws depends on (seed, sample number) alone."""
    seed = noise.source.seed
    seeds = [derive_seed(seed, index, "diffusers") for index in noise.index.tolist()]
    return [torch.Generator().manual_seed(value) for value in seeds] or None
