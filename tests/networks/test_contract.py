"""What every network promises: shapes, labels, zero start, gradients, independence of the batch."""

import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.networks import check_labels

from .conftest import batch, perturb


@pytest.mark.parametrize(
    ("channels", "out", "height", "width"), [(1, None, 8, 8), (3, 6, 16, 8), (4, 4, 4, 12), (2, 1, 20, 4)]
)
def test_shape_follows_the_input(named_network, channels, out, height, width):
    make, _ = named_network
    network = perturb(make(channels, out_channels=out, num_classes=10))
    inputs, cond = batch(channels, height, width)
    y = network(*inputs, **cond)
    assert y.shape == (3, channels if out is None else out, height, width)
    assert y.isfinite().all()


def test_untrained_output_is_exactly_zero(named_network):
    make, size = named_network
    inputs, cond = batch(3, size)
    assert (make(3, num_classes=10)(*inputs, **cond) == 0).all()


@pytest.mark.parametrize("noise_embedding", ["sinusoidal", "fourier"])
def test_every_input_reaches_the_output(named_network, noise_embedding):
    make, size = named_network
    network = perturb(make(1, num_classes=10, noise_embedding=noise_embedding))
    (x, _), _ = batch(1, size)
    low, high = torch.full((3,), -1.0), torch.full((3,), 2.0)
    null, one, two = (torch.full((3,), i) for i in (10, 1, 2))
    base = network(x, low, label=one)
    for other in (network(x, high, label=one), network(x, low, label=two), network(x, low, label=null)):
        assert (base - other).abs().max() > 1e-3
    assert (network(x, low, label=one) == base).all()


def test_gradient_reaches_every_parameter(named_network):
    make, size = named_network
    network = perturb(make(2, num_classes=3)).train()
    inputs, _ = batch(2, size, size=8)
    label = torch.arange(8) % 4  # every row of the label table, the null row too
    network(*inputs, label=label).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_samples_do_not_see_each_other(named_network):
    make, size = named_network
    network = perturb(make(1, num_classes=10))
    (x, noise_cond), cond = batch(1, size, size=5)
    whole = network(x, noise_cond, **cond).detach()
    for i in range(5):
        alone = network(x[i : i + 1], noise_cond[i : i + 1], label=cond["label"][i : i + 1])
        # Kernels choose another order of summation for another batch size: float32 rounding, relative to the
        # largest output.
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-5 * whole.abs().max().item())


def test_unconditional_refuses_a_label_and_conditional_needs_one(named_network):
    make, size = named_network
    inputs, cond = batch(1, size)
    with pytest.raises(OrnsteinError, match="unconditional"):
        make(1)(*inputs, **cond)
    with pytest.raises(OrnsteinError, match="needs a label"):
        make(1, num_classes=10)(*inputs)
    with pytest.raises(OrnsteinError, match=r"\[0, 10\].*got 0 to 11"):
        make(1, num_classes=10)(*inputs, label=torch.tensor([0, 11, 3]))
    assert make(1)(*inputs).shape == inputs[0].shape


def test_sizes_that_do_not_divide_are_refused_in_one_sentence(named_network):
    make, _ = named_network
    with pytest.raises(OrnsteinError, match=r"^Images of 9 x 9 do not divide by \d, .* resize them to 1[02]"):
        make(1, image_size=9)
    inputs, _ = batch(1, 7, classes=None)
    with pytest.raises(OrnsteinError, match="7 x 7"):
        make(1)(*inputs)


def test_bfloat16_autocast_stays_near_float32(named_network):
    make, size = named_network
    network = perturb(make(1, num_classes=10), scale=0.05)
    inputs, cond = batch(1, size)
    exact = network(*inputs, **cond)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(*inputs, **cond)
    # bfloat16 keeps 8 bits (2^-8 = 0.4 % a rounding); some tens of layers accumulate several of these.
    assert (y.float() - exact).norm() < 0.05 * exact.norm()


def test_whole_network_in_bfloat16_runs(named_network):
    make, size = named_network
    network = perturb(make(1, num_classes=10), scale=0.05).to(torch.bfloat16)
    (x, noise_cond), cond = batch(1, size)
    assert network(x.bfloat16(), noise_cond, **cond).isfinite().all()


def test_state_dict_round_trip_gives_the_same_output(named_network):
    make, size = named_network
    first = perturb(make(1, num_classes=10, noise_embedding="fourier"))
    second = make(1, num_classes=10, noise_embedding="fourier")
    second.load_state_dict(first.state_dict())
    inputs, cond = batch(1, size)
    assert (first(*inputs, **cond) == second.eval()(*inputs, **cond)).all()
    # safetensors refuses other strides, so the layout for speed must not reach the weights.
    assert all(value.is_contiguous() for value in first.state_dict().values())


@pytest.mark.parametrize(
    ("label", "classes", "sentence"),
    [
        (torch.tensor([[1]]), 3, "one-dimensional"),
        (torch.tensor([1.0]), 3, "integer"),
        (torch.tensor([True]), 3, "integer"),
        (torch.tensor([-1]), 3, r"\[0, 3\]"),
        (torch.tensor([4]), 3, r"\[0, 3\]"),
        (None, 3, "needs a label"),
        (torch.tensor([0]), None, "unconditional"),
    ],
)
def test_check_labels_names_the_mistake(label, classes, sentence):
    with pytest.raises(OrnsteinError, match=sentence):
        check_labels(label, classes)


def test_check_labels_takes_what_is_right():
    check_labels(torch.tensor([0, 3]), 3)
    check_labels(torch.tensor([], dtype=torch.long), 3)
    check_labels(None, None)
    check_labels(torch.tensor([99]), 3, values=False)  # the range is read only where that costs nothing
