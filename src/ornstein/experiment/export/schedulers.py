"""A schedule, parameterization and sampler of ours as a scheduler of diffusers: class, config, and what differs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ornstein.diffusion.grids import Discrete, GridRule, Shifted, Uniform
from ornstein.diffusion.parameterizations import (
    EDMPreconditioned,
    Epsilon,
    LearnedVariance,
    Parameterization,
    Sample,
    V,
    Velocity,
)
from ornstein.diffusion.samplers import DDIM, DDPM, Euler, Sampler
from ornstein.diffusion.schedules import EDM, Flow, NoiseSchedule
from ornstein.errors import OrnsteinError

TABLE = 1000  # steps of diffusers' tables: its time step i is our t = (i + 1)/1000
WAY_OUT = "format=safetensors, onnx or torch_export take the network as it is"
_PREDICTIONS: dict[type[Parameterization], str] = {Epsilon: "epsilon", Sample: "sample", V: "v_prediction"}


@dataclass(frozen=True)
class SchedulerSpec:
    """A scheduler of diffusers that steps as ours.

    Attributes:
        name: its class.
        config: its constructor's arguments.
        steps: number of steps of the run's own sampler, at most what the scheduler takes.
        noise_offset: our noise condition minus the time step that diffusers hands to the network.
        call: what a pipeline's call must say beside, such as ``eta``.
        notes: sentences on what the scheduler does otherwise than the run's own sampler.
    """

    name: str
    config: dict[str, Any]
    steps: int
    noise_offset: float = 0.0
    call: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def scheduler_for(
    schedule: NoiseSchedule,
    parameterization: Parameterization,
    sampler: Sampler,
    *,
    clip_x0: float | None = None,
    dynamic_threshold: float | None = None,
) -> SchedulerSpec:
    """The scheduler whose samples are ours, for the same noise on the same steps.

    Variance-preserving schedules become a table (``DDIMScheduler``, ``DDPMScheduler``), flow a
    ``FlowMatchEulerDiscreteScheduler``, edm an ``EDMEulerScheduler``.

    Raises:
        OrnsteinError: a schedule, parameterization or limit on x0 that no scheduler of diffusers expresses.
    """
    limited = clip_x0 is not None or dynamic_threshold is not None
    if isinstance(schedule, Flow) and isinstance(parameterization, Velocity):
        return _flow(schedule, sampler, limited)
    if isinstance(schedule, EDM) and isinstance(parameterization, EDMPreconditioned):
        return _edm(schedule, parameterization, sampler, limited)
    mean = parameterization.mean if isinstance(parameterization, LearnedVariance) else parameterization
    prediction = _PREDICTIONS.get(type(mean))
    if not schedule.variance_preserving or prediction is None:
        raise OrnsteinError(
            f"objective.parameterization={mean.name} on scheduler={type(schedule).__name__} has no scheduler in "
            "diffusers, which knows eps, x0 and v on variance-preserving schedules, flow on flow, and edm on edm: "
            f"{WAY_OUT}."
        )
    if clip_x0 is not None and dynamic_threshold is not None:
        raise OrnsteinError(
            f"clip_x0={clip_x0} and dynamic_threshold={dynamic_threshold} together have no form in diffusers, which "
            "does one or the other: add clip_x0=null or dynamic_threshold=null."
        )
    learned = isinstance(parameterization, LearnedVariance)
    return _table(schedule, prediction, sampler, learned=learned, clip=clip_x0, threshold=dynamic_threshold)


def _table(
    schedule: NoiseSchedule,
    prediction: str,
    sampler: Sampler,
    *,
    learned: bool,
    clip: float | None,
    threshold: float | None,
) -> SchedulerSpec:
    spacing, notes = _spacing(sampler.rule, sampler.steps)
    config: dict[str, Any] = {
        "num_train_timesteps": TABLE,
        **betas_config(alpha_bar_table(schedule)),
        "prediction_type": prediction,
        "clip_sample": clip is not None,
        "clip_sample_range": 1.0 if clip is None else float(clip),
        "thresholding": threshold is not None,
        **spacing,
    }
    if threshold is not None:
        # diffusers clamps the threshold itself, at 1 unless told otherwise, which would make it a clip.
        config |= {"dynamic_thresholding_ratio": float(threshold), "sample_max_value": 1e6}
    start = float(schedule.sigma(0.0))
    if start > 1e-6 and not getattr(sampler.rule, "to_zero", False):
        notes.append(f"the schedule keeps noise of deviation {start:.2g} at t = 0, which diffusers' last step removes")
    if isinstance(sampler, DDPM):
        return _ancestral(config, sampler, notes, learned=learned)
    call: dict[str, Any] = {} if clip is None and threshold is None else {"use_clipped_model_output": True}
    if isinstance(sampler, DDIM):
        call = {"eta": float(sampler.eta), **call}
    elif not (isinstance(sampler, Euler) and type(sampler) is Euler and sampler.s_churn == 0):
        notes.append(f"the run's sampler {type(sampler).__name__} stays behind: the pipeline draws with DDIM")
    config["set_alpha_to_one"] = True
    return SchedulerSpec("DDIMScheduler", config, min(sampler.steps, TABLE), 1.0, call, tuple(notes))


def _ancestral(config: dict[str, Any], sampler: DDPM, notes: list[str], *, learned: bool) -> SchedulerSpec:
    if sampler.variance != "fixed_small" and sampler.steps < TABLE:
        notes.append(
            f"with sampler.variance={sampler.variance} and fewer than {TABLE} steps diffusers adds noise in its last "
            "step too, ours does not"
        )
    variance = {"learned": "learned_range"}.get(sampler.variance, sampler.variance)
    if learned and variance != "learned_range":
        notes.append("the pipeline leaves the learned variance out, as sampler.variance says")
    config = {**config, "variance_type": variance}
    return SchedulerSpec("DDPMScheduler", config, min(sampler.steps, TABLE), 1.0, {}, tuple(notes))


def _spacing(rule: GridRule, steps: int) -> tuple[dict[str, Any], list[str]]:
    """``timestep_spacing`` of a grid rule; "trailing" is our uniform grid wherever steps divide 1000."""
    notes: list[str] = []
    if isinstance(rule, Discrete) and rule.num_timesteps == TABLE:
        if rule.spacing == "linspace":
            notes.append("diffusers' step on a linspace grid goes back by a fixed 1000/steps, ours to the next time")
        if rule.from_noise:
            notes.append("sampler.grid.from_noise has no form in diffusers, whose leading grid starts short of noise")
        leading = {"steps_offset": int(rule.offset)} if rule.spacing == "leading" else {}
        return {"timestep_spacing": rule.spacing, **leading}, notes
    if not (isinstance(rule, Uniform) and (rule.t_max, rule.t_min) == (1.0, 0.0)):
        notes.append(
            f"the run's grid {type(rule).__name__} has no form in diffusers: the pipeline steps uniformly in t, as "
            "sampler/grid=uniform does"
        )
    if TABLE % steps:
        notes.append(f"{steps} steps do not divide {TABLE}, so diffusers rounds its time steps and ours do not")
    return {"timestep_spacing": "trailing"}, notes


def _flow(schedule: Flow, sampler: Sampler, limited: bool) -> SchedulerSpec:
    _refuse_limits(limited, "scheduler=flow")
    if schedule.shift != schedule.input_scale:
        raise OrnsteinError(
            f"scheduler.shift={schedule.shift} of a flow tells the network the time before its shift, and diffusers "
            f"the time after it: {WAY_OUT}."
        )
    notes: list[str] = []
    shift = 1.0
    if isinstance(sampler.rule, Shifted):
        shift = float(sampler.rule.shift)
    elif not _is_uniform(sampler.rule):
        notes.append(f"the run's grid {type(sampler.rule).__name__} stays behind: the pipeline steps uniformly in t")
    _note_sampler(sampler, notes)
    config = {"num_train_timesteps": TABLE, "shift": shift}
    return SchedulerSpec("FlowMatchEulerDiscreteScheduler", config, sampler.steps, notes=tuple(notes))


def _edm(schedule: EDM, parameterization: EDMPreconditioned, sampler: Sampler, limited: bool) -> SchedulerSpec:
    _refuse_limits(limited, "scheduler=edm")
    if schedule.shift != schedule.input_scale:
        raise OrnsteinError(f"scheduler.shift={schedule.shift} of edm has no form in diffusers: {WAY_OUT}.")
    notes: list[str] = []
    if not (_is_uniform(sampler.rule) and getattr(sampler.rule, "to_zero", False)):
        notes.append("the pipeline's levels are those of sampler/grid=uniform with sampler.grid.to_zero=true")
    _note_sampler(sampler, notes)
    config = {
        "sigma_min": float(schedule.sigma_min),
        "sigma_max": float(schedule.sigma_max),
        "sigma_data": float(parameterization.sigma_data),
        "rho": float(schedule.rho),
        "sigma_schedule": "karras",
        "prediction_type": "epsilon",
        "final_sigmas_type": "zero",
    }
    return SchedulerSpec("EDMEulerScheduler", config, sampler.steps, notes=tuple(notes))


def _is_uniform(rule: GridRule) -> bool:
    return isinstance(rule, Uniform) and (rule.t_max, rule.t_min) == (1.0, 0.0)


def _note_sampler(sampler: Sampler, notes: list[str]) -> None:
    """Euler without churn and deterministic DDIM take the same step."""
    plain = type(sampler) is Euler and sampler.s_churn == 0
    if not (plain or (isinstance(sampler, DDIM) and sampler.eta == 0)):
        notes.append(f"the run's sampler {type(sampler).__name__} stays behind: the pipeline takes Euler steps")


def _refuse_limits(limited: bool, what: str) -> None:
    if limited:
        raise OrnsteinError(
            f"clip_x0 and dynamic_threshold have no form in diffusers' scheduler of {what}: add clip_x0=null "
            "dynamic_threshold=null."
        )


def alpha_bar_table(schedule: NoiseSchedule) -> Tensor:
    """alpha**2 of a variance-preserving schedule at t = (i + 1)/1000, (1000,) float64."""
    times = torch.arange(1, TABLE + 1, dtype=torch.float64) / TABLE
    with torch.no_grad():
        return schedule.alpha(times).double().cpu() ** 2


def betas_config(alpha_bar: Tensor) -> dict[str, Any]:
    """The library's words for a table (1000,) of alpha_bar: a named schedule, or the betas themselves."""
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])
    start, end = (float(f"{float(beta):.9g}") for beta in (betas[0], betas[-1]))
    linear = torch.linspace(start, end, TABLE, dtype=torch.float64)
    scaled = torch.linspace(start**0.5, end**0.5, TABLE, dtype=torch.float64) ** 2
    for name, table in (("linear", linear), ("scaled_linear", scaled)):
        if torch.allclose(table, betas, rtol=1e-7, atol=0):
            return {"beta_schedule": name, "beta_start": start, "beta_end": end}
    times = torch.arange(TABLE + 1, dtype=torch.float64) / TABLE
    cosine = torch.cos((times + 0.008) / 1.008 * torch.pi / 2) ** 2
    if torch.allclose((1 - cosine[1:] / cosine[:-1]).clamp(max=0.999), betas, rtol=1e-7, atol=0):
        return {"beta_schedule": "squaredcos_cap_v2"}
    return {"trained_betas": _rounded_betas(alpha_bar)}


def _rounded_betas(alpha_bar: Tensor) -> list[float]:
    """float32 betas whose products in float32 stay at alpha_bar: each makes up for the rounding of those before it."""
    betas: list[float] = []
    product = 1.0
    for wanted in alpha_bar.tolist():
        beta = torch.tensor(1 - wanted / product if product > 0 else 1.0, dtype=torch.float32)
        betas.append(float(beta))
        product *= float(1 - beta)
    return betas
