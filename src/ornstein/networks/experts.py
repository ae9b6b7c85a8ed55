"""Several copies of a network, each of them expert in one interval of noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError
from ornstein.networks.cost import count_parameters


class Experts(nn.Module):
    """A mixture of denoising experts: a sample goes to the one network whose interval its noise level lies in.

    Expert 0 has the least noise. Boundaries are times, and a network knows noise conditions only: whoever joins it to a
    schedule and a parameterization calls `place_boundaries`; until then a condition is taken for 1000 times the time.
    One evaluation costs what one network does. All samples of a sampler's step share a level, and the denoiser, which
    knows it as a number, asks `expert_at` for the one network that runs.

    A training batch holds all levels. `dispatch: gather` sorts it by expert and runs each on its own samples, the work
    of one network in all; their numbers differ from step to step, and an accelerator's host waits for them once a step.
    `dispatch: dense` runs every expert on the whole batch and selects: static shapes and no waiting, at `num_experts`
    times the work, for graphs that are compiled whole. Exported graphs are always dense.

    Source: Balaji et al. 2022 (eDiff-I, arXiv 2211.01324); Feng et al. 2023 (ERNIE-ViLG 2.0, arXiv 2210.15257).
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        *,
        num_experts: int = 2,
        boundaries: Sequence[float] | None = None,
        train_only: Sequence[int] | None = None,
        dispatch: str = "gather",
    ) -> None:
        """Make the experts.

        Args:
            network: makes one network, called once an expert.
            num_experts: how many, at least 2.
            boundaries: `num_experts - 1` ascending times in (0, 1) between them; None: equal intervals of time.
            train_only: numbers of the experts that learn, the others are frozen; None: all learn. Draw training's times
                from their intervals then (objective.time): other samples teach nobody.
            dispatch: of a batch of several levels, `gather` or `dense`.

        Raises:
            OrnsteinError: a network instead of what makes one, or numbers that do not fit.
        """
        super().__init__()
        if isinstance(network, nn.Module) or not callable(network):
            raise OrnsteinError("Experts makes its own copies: give network as a partial (_partial_: true).")
        if num_experts < 2:
            raise OrnsteinError(f"num_experts is at least 2, got {num_experts}: one expert is the network by itself.")
        if dispatch not in ("gather", "dense"):
            raise OrnsteinError(f"dispatch is 'gather' or 'dense', got '{dispatch}'.")
        self.boundaries = _boundaries(boundaries, num_experts)
        self.dispatch = dispatch
        self.experts = nn.ModuleList(network() for _ in range(num_experts))
        self.thresholds: tuple[float, ...] = ()
        self.place_boundaries(lambda t: 1000.0 * t)
        if train_only is not None:
            learning = _learning(train_only, num_experts)
            for number, expert in enumerate(self.experts):
                expert.requires_grad_(number in learning)

    def place_boundaries(self, noise_cond: Callable[[float], float]) -> None:
        """Take the noise conditions at the boundaries from `noise_cond`, ascending in time.

        Under a learned schedule the boundaries stay at the noise levels where they were when this was called.
        """
        self.thresholds = tuple(float(noise_cond(t)) for t in self.boundaries)
        if not all(low < high for low, high in pairwise(self.thresholds)):
            raise OrnsteinError(
                f"boundaries={list(self.boundaries)} are {list(self.thresholds)} as noise conditions, which do not "
                "ascend: choose others."
            )

    def expert_at(self, noise_cond: float) -> nn.Module:
        """Return the network that a whole batch of this noise condition needs."""
        return self.experts[sum(noise_cond > threshold for threshold in self.thresholds)]

    def active_parameters(self) -> int:
        """Count the parameters that one evaluation uses: those of one expert."""
        return count_parameters(self.experts[0])

    def shared_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict of experts that all start from one network's; one of experts stays as it is."""
        if any(name.startswith("experts.") for name in state_dict):
            return dict(state_dict)
        return {f"experts.{i}.{name}": value for i in range(len(self.experts)) for name, value in state_dict.items()}

    def load_shared(self, state_dict: Mapping[str, Tensor]) -> None:
        """Start every expert from the weights of one network (`init.from=` of a run does it by `shared_state`).

        Raises:
            OrnsteinError: the state dict is of another network than the experts.
        """
        try:
            self.load_state_dict(self.shared_state(state_dict))
        except RuntimeError as error:
            raise OrnsteinError(
                "these weights are of another network than model.network.network describes, from which all experts "
                "were to start: change one of the two."
            ) from error

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each expert in place, or the whole where it is dense: routing needs numbers, which no graph has."""
        if self.dispatch == "dense":
            super().compile(*args, **kwargs)
            return
        for expert in self.experts:
            expert.compile(*args, **kwargs)

    def forward(self, x: Tensor, noise_cond: Tensor, **conditioning: Tensor | None) -> Tensor:
        """Return `(B, out_channels, H, W)`, each sample from the expert of its `noise_cond (B,)`.

        Other arguments are those of the experts, tensors `(B, ...)`; so are shapes and errors.
        """
        if x.is_meta:  # there are no levels to see; one expert has the shape and the cost of any
            return self.experts[0](x, noise_cond, **conditioning)
        if self.dispatch == "dense" or torch.compiler.is_exporting():
            return self._dense(x, noise_cond, conditioning)
        return self._gathered(x, noise_cond, conditioning)

    def _dense(self, x: Tensor, noise_cond: Tensor, conditioning: Mapping[str, Tensor | None]) -> Tensor:
        first, *others = [expert(x, noise_cond, **conditioning) for expert in self.experts]
        for threshold, output in zip(self.thresholds, others, strict=True):
            first = torch.where((noise_cond > threshold).reshape(-1, 1, 1, 1), output, first)
        return first

    def _gathered(self, x: Tensor, noise_cond: Tensor, conditioning: Mapping[str, Tensor | None]) -> Tensor:
        above = torch.stack([noise_cond > threshold for threshold in self.thresholds])
        order = above.sum(0).argsort(stable=True)
        # How many lie below each boundary: the host must know them before it can cut the batch.
        cuts = [0, *(~above).sum(1).tolist(), x.shape[0]]
        parts = []
        for expert, (start, stop) in zip(self.experts, pairwise(cuts), strict=True):
            if start == stop and not (self.training and _learns(expert)):
                continue
            # One without samples takes part with none of another's, so that its gradients are zero and not missing:
            # several devices agree on whose gradients there are, and a batch of frozen experts' samples can be trained.
            rows = order[start:stop] if start < stop else order[:1]
            given = {name: None if value is None else value[rows] for name, value in conditioning.items()}
            parts.append(expert(x[rows], noise_cond[rows], **given)[: stop - start])
        return torch.cat(parts)[order.argsort()]


def _learns(expert: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in expert.parameters())


def _boundaries(boundaries: Sequence[float] | None, num_experts: int) -> tuple[float, ...]:
    if boundaries is None:
        return tuple(i / num_experts for i in range(1, num_experts))
    times = tuple(float(t) for t in boundaries)
    if len(times) != num_experts - 1:
        raise OrnsteinError(
            f"boundaries={list(times)} must be {num_experts - 1} for num_experts={num_experts}: one time between two "
            "neighbours."
        )
    if not all(low < high for low, high in pairwise((0.0, *times, 1.0))):
        raise OrnsteinError(f"boundaries={list(times)} are times that ascend between 0 and 1, both left out.")
    return times


def _learning(train_only: Sequence[int], num_experts: int) -> set[int]:
    numbers = set(train_only)
    if not numbers or not numbers <= set(range(num_experts)):
        raise OrnsteinError(
            f"train_only={list(train_only)} names experts from 0 to {num_experts - 1}, at least one of them; null "
            "trains all."
        )
    return numbers
