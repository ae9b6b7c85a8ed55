"""A mixture of experts: who gets which sample, what it costs, who learns."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from ornstein.codecs import Identity
from ornstein.conditioning import NoConditioning
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.guidance.free import ClassifierFree
from ornstein.diffusion.objectives import Objective
from ornstein.diffusion.parameterizations import EDMPreconditioned, V
from ornstein.diffusion.samplers import DDIM
from ornstein.diffusion.schedules import Cosine, Flow
from ornstein.errors import OrnsteinError
from ornstein.networks import EDM2UNet, Experts, UNet, count_flops, count_parameters
from ornstein.training.module import DiffusionModule

from .conftest import SMALL_EDM2, SMALL_UNET, perturb

SMALL = partial(UNet, 2, **SMALL_UNET)


class Marked(nn.Module):
    """Returns its own number, and remembers how many samples it was shown at each call."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(Marked.made % 4)))
        self.seen: list[int] = []
        Marked.made += 1

    def forward(self, x: Tensor, noise_cond: Tensor, *, label: Tensor | None = None) -> Tensor:
        self.seen.append(len(x))
        return self.value + 0 * x + (0 if label is None else label.reshape(-1, 1, 1, 1))


@pytest.fixture
def marked() -> Experts:
    Marked.made = 0
    return Experts(Marked, num_experts=4)


def spread(size: int = 16) -> tuple[Tensor, Tensor]:
    """A batch of noise conditions in no order, some of them boundaries of two and of four experts."""
    t = torch.cat([torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), torch.rand(size - 5)])
    return torch.randn(size, 2, 8, 8), 1000 * t[torch.randperm(size)]


@pytest.mark.parametrize("dispatch", ["gather", "dense"])
@pytest.mark.parametrize("training", [True, False])
def test_each_sample_comes_from_the_expert_of_its_level(marked, dispatch, training):
    marked.dispatch = dispatch
    marked.train(training)
    x, noise_cond = spread()
    label = torch.arange(16) * 10
    expected = (noise_cond / 250).ceil().sub(1).clamp(min=0)  # a boundary belongs to the interval below it
    y = marked(x, noise_cond, label=label)
    assert (y == (expected + label).reshape(-1, 1, 1, 1)).all()
    sizes = [expert.seen for expert in marked.experts]
    assert sizes == ([[16]] * 4 if dispatch == "dense" else [[int((expected == i).sum())] for i in range(4)])
    for value in noise_cond.tolist():
        assert marked.expert_at(value).value == expected[noise_cond == value][0]


@pytest.mark.parametrize("make", [SMALL, partial(EDM2UNet, 2, **SMALL_EDM2)], ids=["unet", "edm2"])
def test_both_dispatches_agree_in_output_and_gradients(make):
    gather = perturb(Experts(make, num_experts=3, boundaries=[0.1, 0.6])).train()
    dense = copy.deepcopy(gather)
    dense.dispatch = "dense"
    x, noise_cond = spread()
    target = torch.randn_like(x)
    one, other = gather(x, noise_cond), dense(x, noise_cond)
    # Kernels sum in another order for another batch size: float32 rounding.
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * other.abs().max().item())
    ((one - target) ** 2).mean().backward()
    ((other - target) ** 2).mean().backward()
    for (name, p), q in zip(gather.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-3 * q.grad.abs().max().item() + 1e-9, msg=name)


def test_an_expert_without_samples_has_zero_gradients_and_is_left_out_of_evaluation(marked):
    x, noise_cond = spread()
    low = noise_cond * 0.2
    marked.train()(x, low).sum().backward()
    assert [expert.value.grad.item() for expert in marked.experts] == [x.numel(), 0, 0, 0]
    assert [expert.seen for expert in marked.experts] == [[16], [1], [1], [1]]
    marked.eval()(x, low)
    assert [len(expert.seen) for expert in marked.experts] == [2, 1, 1, 1]


def test_frozen_experts_do_not_move_and_a_batch_of_theirs_alone_can_be_trained():
    network = perturb(Experts(SMALL, train_only=[1])).train()
    assert count_parameters(network, trainable=True) == network.active_parameters() == count_parameters(SMALL())
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1)
    x, noise_cond = spread()
    for cond in (noise_cond, noise_cond * 0.4):  # the second batch has nothing for expert 1
        optimizer.zero_grad()
        network(x, cond).square().sum().backward()
        optimizer.step()
    changed = {
        name.split(".")[1] for name, value in network.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"1"}


@pytest.mark.parametrize("parameterization", [V(), EDMPreconditioned(sigma_data=0.5)])
@pytest.mark.parametrize("schedule", [Cosine(), Flow()])
def test_boundaries_are_times_under_every_parameterization(marked, schedule, parameterization):
    marked.boundaries = (0.2, 0.5, 0.9)
    module = DiffusionModule(
        marked,
        schedule=schedule,
        objective=Objective(parameterization),
        codec=Identity(2, 8, sigma_data=0.5),
        conditioner=NoConditioning(),
        sampler=DDIM(steps=2),
    )
    times = torch.tensor([0.05, 0.19, 0.21, 0.49, 0.51, 0.89, 0.91, 1.0])
    expected = torch.tensor([0.0, 0, 1, 1, 2, 2, 3, 3])
    denoiser = module.denoiser()
    x = torch.randn(8, 2, 8, 8)
    assert (denoiser.output(x, schedule.level(times, 4)).mean((1, 2, 3)) == expected).all()
    for t, number in zip(times.tolist(), expected.tolist(), strict=True):
        assert (denoiser.output(x, schedule.level(t)) == number).all()


def test_in_a_sampler_one_expert_runs_at_a_time_and_guided_branches_share_it(marked):
    x = torch.randn(3, 2, 8, 8)
    schedule = Cosine()
    denoiser = Denoiser(marked.eval(), schedule, V()).bind({"label": torch.tensor([1, 2, 0])})
    guided = ClassifierFree(scale=2.0)(denoiser, {"label": torch.full((3,), 3)}).start()
    for t in (0.9, 0.6, 0.3, 0.1):
        guided(x, t)
    assert [expert.seen for expert in marked.experts] == [[6]] * 4


def test_all_start_from_one_network_and_other_weights_are_refused():
    single = perturb(SMALL())
    network = Experts(SMALL, num_experts=3).eval()
    network.load_shared(single.state_dict())
    x, noise_cond = spread()
    expected = single(x, noise_cond)
    torch.testing.assert_close(network(x, noise_cond), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    pointers = {p.data_ptr() for p in network.parameters()}
    assert len(pointers) == len(list(network.parameters()))  # copies: each learns by itself
    with pytest.raises(OrnsteinError, match="of another network than"):
        network.load_shared(UNet(2, base_channels=8, channel_mults=(1, 2), groups=4).state_dict())


def test_it_costs_what_one_network_does():
    network, single = Experts(SMALL, num_experts=3), SMALL()
    assert count_parameters(network) == 3 * network.active_parameters() == 3 * count_parameters(single)
    x, noise_cond = torch.zeros(4, 2, 8, 8), torch.zeros(4)
    assert count_flops(network, x, noise_cond) == count_flops(single, x, noise_cond)
    meta = network.to("meta")
    assert count_flops(meta, x.to("meta"), noise_cond.to("meta")) == count_flops(single, x, noise_cond)


def test_exported_it_needs_no_number_from_the_batch():
    network = perturb(Experts(SMALL))
    x, noise_cond = spread()
    program = torch.export.export(network, (x, noise_cond))
    expected = network(x, noise_cond)
    torch.testing.assert_close(
        program.module()(x, noise_cond), expected, rtol=0, atol=1e-4 * expected.abs().max().item()
    )


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"num_experts": 1}, "at least 2, got 1"),
        ({"boundaries": [0.2, 0.4]}, r"boundaries=\[0.2, 0.4\] must be 1 for num_experts=2"),
        ({"num_experts": 3, "boundaries": [0.6, 0.4]}, "ascend between 0 and 1"),
        ({"boundaries": [1.0]}, "ascend between 0 and 1"),
        ({"train_only": []}, "at least one of them"),
        ({"train_only": [2]}, "experts from 0 to 1"),
        ({"dispatch": "sorted"}, "'gather' or 'dense', got 'sorted'"),
    ],
)
def test_wrong_numbers_are_named(kwargs, sentence):
    with pytest.raises(OrnsteinError, match=sentence):
        Experts(Marked, **kwargs)


def test_a_network_in_the_place_of_what_makes_one_is_refused():
    with pytest.raises(OrnsteinError, match="_partial_: true"):
        Experts(Marked())


class Convolutions(nn.Module):
    """A network whose kernels take a second to compile: what is judged is who gets which sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.scale = nn.Linear(1, 4)

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        scale = self.scale(noise_cond[:, None] / 1000)[:, :, None, None]
        return self.out((self.stem(x) * scale).sigmoid())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "dispatch", "backend"),
    [
        (Convolutions, "gather", "inductor"),
        (Convolutions, "dense", "inductor"),
        # Traced with numbers of samples that differ, without kernels, which take minutes: test_unet.py makes them.
        (SMALL, "gather", "aot_eager"),
    ],
    ids=["gather", "dense", "unet"],
)
def test_compiled_it_gives_the_same(make, dispatch, backend):
    eager = perturb(Experts(make, dispatch=dispatch))
    network = copy.deepcopy(eager)
    network.compile(fullgraph=True, backend=backend)
    for size in (6, 9, 5):
        x, noise_cond = torch.randn(size, 2, 8, 8), 1000 * torch.rand(size)
        expected = eager(x, noise_cond)
        # Fused kernels sum in another order: float32 rounding.
        torch.testing.assert_close(network(x, noise_cond), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
