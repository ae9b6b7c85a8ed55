"""Which noise each clean sample of a batch is paired with in training."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Coupling(Protocol):
    """Re-pairs a batch's noise with its data: returns eps (B, *shape), permuted over the batch.

    The data stays where it is, so that its conditioning stays with it.

    Attributes:
        independent: noise and data stay independent, as stochastic samplers, likelihoods and bounds assume.
    """

    @property
    def independent(self) -> bool: ...

    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor: ...


class Independent:
    r"""Noise as it was drawn, independent of the data.

    .. math:: q(x_0, \epsilon) = q(x_0)\, N(\epsilon; 0, I)

    Source: Ho et al. 2020 (arXiv 2006.11239), algorithm 1. When: always, unless few-step flows are the aim.
    """

    independent = True

    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        return eps


class MinibatchOT:
    r"""Exact optimal transport between the batch's data and its noise: straighter paths, fewer sampling steps.

    .. math:: \pi^* = \arg\min_\pi \sum_i \|x_0^{(i)} - \epsilon^{(\pi(i))}\|^2
              = \arg\max_\pi \sum_i \langle x_0^{(i)}, \epsilon^{(\pi(i))} \rangle

    The second form shows that alpha and sigma change nothing, so one pairing serves all times of every schedule.
    Where alpha(1) > 0 the paths end near the noise rather than in it, as with independent noise. What the network then
    predicts drives deterministic samplers (the velocity of the coupled flow), but eps_hat is no score any more:
    stochastic samplers, likelihoods and classifier guidance assume independent noise, and bounds (vlb, hybrid, vdm)
    refuse this coupling. The pairing does not look at labels: in conditional training the noise of a class is then
    skewed toward that class, slightly so at large batches. Each rank pairs its own batch; the assignment
    is solved on the CPU in O(B^3) and costs a synchronisation of the device.

    Source: Tong et al. 2024 (arXiv 2302.00482), section 3.2; Pooladian et al. 2023 (arXiv 2304.14772), section 3.
    When: unconditional flow matching meant for few deterministic steps.
    """

    independent = False

    @torch.no_grad()
    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        from scipy.optimize import linear_sum_assignment

        affinity = x0.flatten(1).double() @ eps.flatten(1).double().T
        _, columns = linear_sum_assignment(affinity.cpu().numpy(), maximize=True)
        return eps[torch.as_tensor(columns, device=eps.device)]
