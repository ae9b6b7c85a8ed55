r"""Averages of any length after training, from the snapshots of two that were kept (EDM2's post-hoc EMA).

A power-function average of the weights :math:`\theta(\tau)`, :math:`\tau` counted in updates, is

.. math:: \hat\theta_\gamma(t) = \frac{\gamma + 1}{t^{\gamma + 1}} \int_0^t \tau^\gamma\, \theta(\tau)\, d\tau .

Its length is told by ``std``, the standard deviation of that weighting as a share of the training's length: 0.1
averages over about the last fifth of it. Averages of two lengths, written down now and then, span nearly all others.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696),
section 3 and appendix C.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.training.limits import MAX_STD

FOLDER = "ema"
_NAME = re.compile(r"step_(\d+)_std_(\d\.\d+)\.safetensors")
# Relative residual of its profile above which a mixture is not what was asked for.
_FAR = 0.1


def gamma_of(std: float) -> float:
    """The exponent of the power function whose relative standard deviation is ``std``.

    Solves ``std**2 = (gamma + 1) / ((gamma + 2)**2 (gamma + 3))`` for its largest root.

    Raises:
        OrnsteinError: std outside (0, 0.28].
    """
    if not 0 < std <= MAX_STD:
        raise OrnsteinError(f"an average's std={std} must lie in (0, {MAX_STD}]: 0.05 to 0.2 are usual.")
    inverse = std**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real[np.abs(roots.imag) < 1e-6 * np.abs(roots)].max())


def power_decay(updates: int, gamma: float) -> float:
    r""":math:`\beta_\gamma(t) = (1 - 1/t)^{\gamma + 1}`, the rate of update number t >= 1; the first forgets all."""
    return (1 - 1 / updates) ** (gamma + 1)


def inner_product(t_a: np.ndarray, gamma_a: np.ndarray, *, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    r""":math:`\int p_a p_b\, d\tau` of power-function profiles that end at ``t_a`` and ``t_b``, broadcast.

    In logarithms: the powers of a long training overflow.
    """
    first = np.minimum(t_a, t_b)
    logs = (gamma_a + gamma_b + 1) * np.log(first) - (gamma_a + 1) * np.log(t_a) - (gamma_b + 1) * np.log(t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * np.exp(logs)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How snapshots are mixed.

    Attributes:
        weights: float64 (N,), one a snapshot.
        residual: distance of the mixed profile to the one asked for, as a share of the latter's norm: 0 is exact.
    """

    weights: np.ndarray
    residual: float


def mixture(updates: Sequence[int], stds: Sequence[float], *, target_updates: int, target_std: float) -> Mixture:
    """The least-squares mixture of snapshots taken after ``updates`` with lengths ``stds`` (N each)."""
    t, gamma = np.array(updates, dtype=np.float64), np.array([gamma_of(std) for std in stds])
    t_goal, gamma_goal = np.array(float(target_updates)), np.array(gamma_of(target_std))
    gram = inner_product(t[:, None], gamma[:, None], t_b=t[None], gamma_b=gamma[None])
    overlap = inner_product(t, gamma, t_b=t_goal, gamma_b=gamma_goal)
    norm = float(inner_product(t_goal, gamma_goal, t_b=t_goal, gamma_b=gamma_goal))
    # Profiles are scaled to norm 1: early snapshots are far narrower than late ones.
    scale = 1 / np.sqrt(np.diag(gram))
    solved, *_ = np.linalg.lstsq(gram * scale[:, None] * scale[None], overlap * scale, rcond=1e-12)
    weights = solved * scale
    square = norm - 2 * weights @ overlap + weights @ gram @ weights
    return Mixture(weights=weights, residual=float(np.sqrt(max(square, 0.0) / norm)))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One file of averaged weights: ``ema/step_000500_std_0.050.safetensors``."""

    path: Path
    step: int
    std: float
    updates: int


def snapshot_name(step: int, std: float) -> str:
    """The file of an average after optimizer step ``step``."""
    return f"step_{step:06d}_std_{std:.3f}.safetensors"


def snapshots_of(run: str | Path) -> list[Snapshot]:
    """The snapshots in a run's folder, by step and length.

    Raises:
        OrnsteinError: there are none, or a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(run) / FOLDER
    found = []
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        if not _NAME.fullmatch(path.name):
            continue
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
            step, updates = int(facts["step"]), int(facts["updates"])
            found.append(Snapshot(path=path, step=step, std=float(facts["std"]), updates=updates))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise OrnsteinError(f"{path} is cut short or damaged ({error}): remove it and try again.") from error
    if not found:
        raise OrnsteinError(
            f"{folder} holds no snapshots to make averages of: train with ema=power, which writes them now and then."
        )
    return sorted(found, key=lambda each: (each.step, each.std))


def averaged_weights(run: str | Path, std: float, *, step: int | None = None) -> dict[str, dict[str, Tensor]]:
    """:func:`reconstruct` of a run's snapshots, by part: ``network`` and, where it is learned, ``schedule``."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in reconstruct(snapshots_of(run), std, step=step).items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts


def reconstruct(snapshots: Sequence[Snapshot], std: float, *, step: int | None = None) -> dict[str, Tensor]:
    """The weights averaged over ``std`` of the training that ended at ``step`` (the last snapshot's unless given).

    Memory holds one snapshot and the result. Returns tensors by name, in the dtypes of the snapshots (mixed in
    float64).

    Raises:
        OrnsteinError: no snapshot at that step, or none that come near the length asked for.
    """
    from safetensors.torch import load_file

    used, mixed = mixture_of(snapshots, std, step=step)
    total: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for snapshot, weight in zip(used, mixed.weights.tolist(), strict=True):
        for name, value in load_file(snapshot.path).items():
            if name not in total:
                total[name], kinds[name] = torch.zeros_like(value, dtype=torch.float64), value.dtype
            total[name].add_(value, alpha=weight)
    return {name: value.to(kinds[name]) for name, value in total.items()}


def mixture_of(snapshots: Sequence[Snapshot], std: float, *, step: int | None = None) -> tuple[list[Snapshot], Mixture]:
    """Which snapshots make the average of ``std`` at ``step``, and how; no weights are read.

    Raises:
        OrnsteinError: no snapshot at that step, or none that come near the length asked for.
    """
    steps = sorted({each.step for each in snapshots})
    goal = steps[-1] if step is None else step
    if goal not in steps:
        raise OrnsteinError(f"step={goal} has no snapshot: choose one of {', '.join(map(str, steps))}.")
    used = [each for each in snapshots if each.step <= goal]
    mixed = mixture(
        [each.updates for each in used],
        [each.std for each in used],
        target_updates=max(each.updates for each in used),
        target_std=std,
    )
    if mixed.residual > _FAR:
        raise OrnsteinError(
            f"std={std} cannot be made of {len(used)} snapshots of std={', '.join(sorted({str(u.std) for u in used}))} "
            f"(off by {mixed.residual:.0%}): choose a std nearer to these, or train with a smaller ema.snapshot_every."
        )
    return used, mixed
