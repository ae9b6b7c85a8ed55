"""Hooks of a training step that nobody has: not called."""

from __future__ import annotations

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
