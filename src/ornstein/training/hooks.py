"""What Lightning need not do around each training step: call hooks that nobody has, and read signatures anew."""

from __future__ import annotations

import inspect
from types import FunctionType

import lightning.pytorch as pl

STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def leave_out_empty_hooks(owner: pl.Callback | pl.LightningModule) -> None:
    """Sets those hooks of a step to None, on ``owner`` alone, that its class has from Lightning as they are.

    Lightning passes over a hook that cannot be called. Its own empty methods it calls, under a name put together for
    its profiler, six times a step for each callback and for the module.
    """
    empty = pl.LightningModule if isinstance(owner, pl.LightningModule) else pl.Callback
    for name in STEP_HOOKS:
        if getattr(type(owner), name) is getattr(empty, name):
            owner.__dict__[name] = None


def note_signature(owner: type[pl.LightningModule]) -> None:
    """Keeps the signature of the ``training_step`` that a class defines with it.

    Lightning asks before each step what arguments it takes, and Python otherwise puts that together from its code.
    """
    step = vars(owner).get("training_step")
    if isinstance(step, FunctionType):
        step.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
