"""The one table of samplers, schedules and parameterizations that the ground-truth tests run over.

A new option is one row here; ``test_matrix.py`` fails where an option of conf/ has none. ``make`` takes the number of
steps and a grid; ``steps`` is what the matrix gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ornstein.diffusion.grids import Exponential as ExponentialGrid
from ornstein.diffusion.grids import GridRule, Karras
from ornstein.diffusion.parameterizations import (
    EDMPreconditioned,
    Epsilon,
    LearnedVariance,
    Sample,
    Score,
    V,
    Velocity,
)
from ornstein.diffusion.samplers import (
    DDIM,
    DDPM,
    DEIS,
    LCM,
    LMS,
    PNDM,
    RK45,
    AnnealedLangevin,
    DiffusersSampler,
    DPMpp1S,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp3M,
    DPMpp3MSDE,
    DPMppSDE,
    Euler,
    EulerAncestral,
    Heun,
    PredictorCorrector,
    Sampler,
    UniPC,
)
from ornstein.diffusion.schedules import (
    EDM,
    VE,
    Constant,
    ContinuousCosine,
    Cosine,
    Exponential,
    Flow,
    Laplace,
    LaplaceTable,
    Linear,
    Quadratic,
    ScaledLinear,
    Sigmoid,
    SNRSigmoid,
    SubVP,
    VDMLearned,
)

# By option of conf/scheduler; a variant of an option is named OPTION-VARIANT.
SCHEDULES = {
    "linear": Linear,
    "scaled_linear": ScaledLinear,
    "quadratic": Quadratic,
    "quadratic-squared_time": lambda: Quadratic(form="squared_time"),
    "cosine": Cosine,
    "cosine_continuous": ContinuousCosine,
    "sigmoid": Sigmoid,
    "snr_sigmoid": SNRSigmoid,
    "exponential": Exponential,
    "constant": Constant,
    "laplace": Laplace,
    "laplace_table": LaplaceTable,
    "sub_vp": SubVP,
    "ve": VE,
    "edm": EDM,
    "flow": Flow,
    "vdm_learned": lambda: VDMLearned(hidden=64),  # of 1024 units: what it costs to invert, nothing else
    "linear-zero_terminal_snr": lambda: Linear(zero_terminal_snr=True),
    "sub_vp-zero_terminal_snr": lambda: SubVP(zero_terminal_snr=True),
    "flow-shift": lambda: Flow(shift=3.0),
    "cosine-shift": lambda: Cosine(shift=2.0),
    "snr_sigmoid-input_scale": lambda: SNRSigmoid(input_scale=0.5),
    "edm-input_scale": lambda: EDM(input_scale=0.5),
}

# By option of conf/objective/parameterization; a variant is named OPTION-VARIANT.
PARAMETERIZATIONS = {
    "v": V,
    "eps": Epsilon,
    "x0": Sample,
    "flow": Velocity,
    "score": Score,
    "edm": lambda: EDMPreconditioned(sigma_data=0.5),
    "learned_variance": lambda: LearnedVariance(Epsilon()),
    "learned_variance-v": lambda: LearnedVariance(V()),
}

# Meaningless, and refused: neither eps nor the score determines x0 where alpha reaches 0.
NO_SIGNAL = ("flow", "flow-shift", "linear-zero_terminal_snr", "sub_vp-zero_terminal_snr")
REFUSED = {(s, p) for s in NO_SIGNAL for p in ("eps", "score", "learned_variance")}

# Refused by (schedule, sampler): a Brownian path in t of 20 levels tells no two levels apart where log-SNR crosses
# orders of magnitude within a millionth of t, on the grid of the matrix.
UNRESOLVED = {(s, "dpmpp_2m_sde-brownian") for s in ("constant", "laplace", "laplace_table")}


@dataclass(frozen=True)
class SamplerRow:
    """How the tests run one sampler.

    Attributes:
        make: (steps, grid) to the sampler.
        steps: in the matrix.
        error: of a deterministic sampler there: mean distance to the exact flow's end, in units of the data, that its
            order leaves at that many steps; None where it draws noise.
        order: of convergence, where it has one.
        grid: in the matrix.
        needs: ``variance``, of a network that learns it; ``consistency``, a consistency model.
        own_start: it begins where its own table begins, whatever the schedule.
        rounding: how far two parameterizations may part.
    """

    make: Callable[[int, GridRule | None], Sampler]
    steps: int
    error: float | None = None
    order: int | None = None
    grid: GridRule | None = Karras()  # noqa: RUF009  (frozen)
    needs: str | None = None
    own_start: bool = False
    rounding: float = 1e-9


def _row(kind: Callable[..., Sampler], steps: int, *, row: dict[str, Any] | None = None, **options: Any) -> SamplerRow:
    return SamplerRow(lambda n, grid=None: kind(steps=n, grid=grid, **options), steps, **(row or {}))


def _exact(
    kind: Callable[..., Sampler],
    steps: int,
    error: float,
    order: int,
    *,
    row: dict[str, Any] | None = None,
    **options: Any,
) -> SamplerRow:
    return _row(kind, steps, row={"error": error, "order": order, **(row or {})}, **options)


def _diffusers(steps: int, grid: GridRule | None = None) -> Sampler:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True)
    return DiffusersSampler(scheduler=scheduler, steps=steps)


_LEVELS = {"grid": ExponentialGrid()}

# By option of conf/sampler; a variant is named OPTION-VARIANT.
SAMPLERS: dict[str, SamplerRow] = {
    "ddim": _exact(DDIM, 60, 0.03, 1),
    "ddim-eta": _row(DDIM, 60, eta=0.5),
    "ddpm": _row(DDPM, 100),
    "ddpm-fixed_large": _row(DDPM, 120, variance="fixed_large"),
    "ddpm-learned": _row(DDPM, 100, variance="learned", row={"needs": "variance"}),
    "euler": _exact(Euler, 60, 0.03, 1),
    "euler-churn": _row(Euler, 60, s_churn=4.0),
    "euler_ancestral": _row(EulerAncestral, 100),
    "heun": _exact(Heun, 30, 0.01, 2),
    "heun-sigma": _exact(Heun, 40, 0.015, 2, coordinate="sigma", row={"grid": Karras(u_max=1e3)}),
    "heun-churn": _row(Heun, 30, s_churn=6.0),
    "dpmpp_1s": _exact(DPMpp1S, 60, 0.03, 1),
    "dpmpp_1s-eta": _row(DPMpp1S, 100, eta=1.0),
    "dpmpp_2m": _exact(DPMpp2M, 40, 0.01, 2),
    "dpmpp_2m-heun": _exact(DPMpp2M, 40, 0.01, 2, solver_type="heun"),
    "dpmpp_2s": _exact(DPMpp2S, 30, 0.01, 2),
    "dpmpp_2s-grid": _exact(DPMpp2S, 60, 0.01, 2, nodes="grid"),
    "dpmpp_3m": _exact(DPMpp3M, 40, 0.01, 3),
    "dpmpp_3m-published": _exact(DPMpp3M, 40, 0.01, 2, form="published"),
    "dpmpp_sde": _row(DPMppSDE, 50),
    "dpmpp_2m_sde": _row(DPMpp2MSDE, 60),
    "dpmpp_2m_sde-brownian": _row(DPMpp2MSDE, 60, noise="brownian"),
    "dpmpp_3m_sde": _row(DPMpp3MSDE, 60),
    "unipc": _exact(UniPC, 40, 0.01, 3),
    "unipc-2": _exact(UniPC, 40, 0.01, 3, solver_order=2),
    "unipc-bh1": _exact(UniPC, 40, 0.01, 3, solver_type="bh1"),
    "unipc-predictor": _exact(UniPC, 40, 0.01, 2, corrector=False),
    "deis": _exact(DEIS, 40, 0.01, 2),
    "deis-rho": _exact(DEIS, 40, 0.01, 2, coordinate="rho"),
    # The table of diffusers' laplace has kinks in t where most of log-SNR is.
    "deis-t": _exact(DEIS, 40, 0.04, 2, coordinate="t"),
    "pndm": _exact(PNDM, 60, 0.03, 2),
    "pndm-plms": _exact(PNDM, 60, 0.03, 2, warmup="heun"),
    "lms": _exact(LMS, 60, 0.01, 2),
    "lcm": _row(LCM, 3, row={"needs": "consistency"}),
    "annealed_langevin": _row(AnnealedLangevin, 150, steps_per_level=2, step_size=0.2, row=_LEVELS),
    "predictor_corrector": _row(PredictorCorrector, 60, norm="expected"),
    "rk45": _row(RK45, 1, rtol=1e-4, atol=1e-4, t_min=1e-5, row={"error": 0.01}),
    "diffusers": SamplerRow(_diffusers, 50, error=0.03, own_start=True, grid=None),
}


def option(name: str) -> str:
    """The option of conf/ that a row judges."""
    return name.partition("-")[0]
