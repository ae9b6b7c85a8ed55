import pytest
import torch
from torch import nn

from ornstein.networks import count_flops, count_parameters


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    ("module", "shape", "flops"),
    [
        (nn.Linear(7, 11), (7,), 2 * 7 * 11),
        (nn.Conv2d(3, 5, 3, padding=1), (3, 4, 6), 2 * 3 * 5 * 9 * 24),
        (nn.Conv2d(6, 6, 3, groups=6), (6, 5, 5), 2 * 6 * 9 * 9),
    ],
)
def test_two_operations_a_multiply_accumulate_per_sample(module, shape, flops, batch):
    assert count_flops(module, torch.zeros(batch, *shape)) == flops


def test_counting_leaves_the_module_as_it_was():
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout())
    module[0].weight.requires_grad_(False)
    count_flops(module, torch.zeros(2, 3))
    assert module.training and module[0].weight.grad is None
    assert count_parameters(module) == 16 and count_parameters(module, trainable=True) == 4
