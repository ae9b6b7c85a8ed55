"""Mixed precision as a switch: trains, clips, and leaves weights and samples in float32."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import pytest
import torch


class GradientNorms(pl.Callback):
    def __init__(self):
        self.norms = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if grads:
            self.norms.append(float(torch.nn.utils.get_total_norm(grads)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_clipped_whatever_the_optimizer(fit, make_module, precision, fused):
    norms = GradientNorms()
    module = make_module(optimizer=partial(torch.optim.AdamW, lr=0.05, fused=fused))
    fit([norms], steps=4, module=module, precision=precision, gradient_clip_val=1e-3)
    assert len(norms.norms) >= 3
    # Clipping divides by the norm plus 1e-6, which leaves it a thousandth short of 1e-3.
    assert norms.norms == pytest.approx([1e-3] * len(norms.norms), rel=2e-3)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    (samples,) = module.generate(range(2), batch_size=2)
    assert samples.images.dtype == torch.uint8
