"""What a step does faster than torch and Lightning would: the same, to the bit."""

import inspect
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from ornstein.training.base import clip_by_norm
from ornstein.training.hooks import STEP_HOOKS, leave_out_empty_hooks
from ornstein.training.module import DiffusionModule


def with_gradients(scale: float, *, bad: float | None = None) -> list[torch.nn.Parameter]:
    """Parameters whose gradients' norm is ``scale``, one without a gradient, one gradient ``bad`` if that is given."""
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((7, 5), (3,), (), (2, 3, 4))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    for parameter in parameters:
        parameter.grad.mul_(scale / norm)
    if bad is not None:
        parameters[1].grad[2] = bad
    return [*parameters, torch.nn.Parameter(torch.zeros(2))]


# Around 1 - 1e-6, where torch's coefficient, the limit over norm + 1e-6, turns 1.
CLOSE = [1 + k * 2**-23 for k in range(-20, 21)]


@pytest.mark.parametrize("limit", [1.0, 0.3])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_clips_as_torch_does_to_the_bit(limit, bad):
    for scale in (1e-3, 0.9, *CLOSE, 1.5, 1e4):
        ours, theirs = (with_gradients(limit * scale, bad=bad) for _ in range(2))
        norm, known = clip_by_norm(ours, limit), torch.nn.utils.clip_grad_norm_(theirs, limit)
        torch.testing.assert_close(norm, known, rtol=0, atol=0, equal_nan=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)


def test_nothing_to_clip_has_no_norm():
    assert clip_by_norm([torch.nn.Parameter(torch.zeros(2))], 1.0) == 0


class OwnWay(torch.optim.SGD):
    """An optimizer that forgets gradients in its own way."""

    forgot = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.forgot += 1
        super().zero_grad(set_to_none)


@pytest.mark.parametrize("kind", [torch.optim.SGD, OwnWay])
def test_gradients_are_forgotten_as_the_optimizer_has_it(make_module, kind):
    module = make_module()
    first, *others = module.network.parameters()
    optimizer = kind([{"params": [first]}, {"params": others}], lr=0.1)
    for parameter in module.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.optimizer_zero_grad(0, 0, optimizer)
    assert all(parameter.grad is None for parameter in module.network.parameters())
    assert getattr(optimizer, "forgot", 1) == 1


class Witness(pl.Callback):
    """Has one hook of a step."""

    def __init__(self) -> None:
        self.ends = 0

    def on_train_batch_end(self, *_):
        self.ends += 1


class WitnessOfMore(Witness):
    """Has two, one of which calls the empty one of its class."""

    def on_train_batch_start(self, *arguments):
        super().on_train_batch_start(*arguments)
        self.ends += 100


@pytest.mark.parametrize(("kind", "calls"), [(Witness, 3), (WitnessOfMore, 303)])
def test_hooks_of_a_callback_are_called_and_empty_ones_passed_over(fit, kind, calls):
    witness, another = kind(), kind()
    leave_out_empty_hooks(witness)
    own = {name for name in STEP_HOOKS if name in vars(kind) or name in vars(Witness)}
    assert {name for name in STEP_HOOKS if getattr(witness, name) is not None} == own
    assert all(callable(getattr(another, name)) for name in STEP_HOOKS), "of that callback alone"
    fit([witness], steps=3)
    assert witness.ends == calls


class Told(DiffusionModule):
    """Has one hook of a step, which calls the empty one of its class."""

    told = 0

    def on_train_batch_end(self, *arguments):
        super().on_train_batch_end(*arguments)
        self.told += 1


def test_hooks_of_a_module_are_called_and_empty_ones_passed_over(fit, make_module):
    module = make_module(kind=Told)
    assert {name for name in STEP_HOOKS if getattr(module, name) is not None} == {"on_train_batch_end"}
    fit([], steps=3, module=module)
    assert module.told == 3


class Brief(DiffusionModule):
    """Takes no number of the batch."""

    def training_step(self, batch):
        return super().training_step(batch, 0)


@pytest.mark.parametrize(("kind", "takes"), [(DiffusionModule, True), (Told, True), (Brief, False)])
def test_lightning_knows_what_a_step_takes(fit, make_module, kind, takes):
    module = make_module(kind=kind)
    assert "__signature__" in vars(type(module).training_step), "kept, not put together anew"
    assert is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2) is takes
    assert inspect.signature(module.training_step).parameters.keys() == {"batch", *(("batch_idx",) if takes else ())}
    fit([], steps=2, module=module)
    assert module.micro_batches_seen == 2
