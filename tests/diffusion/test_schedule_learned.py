"""The schedule that is trained with the model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from ornstein.diffusion.schedules import VDMLearned
from ornstein.diffusion.schedules import learned as module

F64 = torch.float64
GRID = torch.linspace(0, 1, 2001, dtype=F64)


def shaken(seed: int = 0, size: float = 1.0, **options) -> VDMLearned:
    """A schedule whose parameters have moved as far as training could."""
    schedule = VDMLearned(hidden=64, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in schedule.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return schedule


def test_starts_as_nearly_a_straight_line_between_its_ends() -> None:
    schedule = VDMLearned(min_log_snr=-5.0, max_log_snr=13.3)
    assert schedule.log_snr_range() == pytest.approx((-5.0, 13.3), abs=1e-12)
    with torch.no_grad():
        line = 13.3 - 18.3 * GRID
        # The middle layer bends it by a few percent of its span.
        torch.testing.assert_close(schedule.log_snr(GRID), line, rtol=0, atol=1.0)
    # No random numbers are drawn: the rest of a run starts from the same weights as under another schedule.
    state = torch.get_rng_state()
    again = VDMLearned()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(schedule.parameters(), again.parameters(), strict=True))


def test_is_the_papers_network() -> None:
    schedule = shaken()
    weights = {name: value.double() for name, value in schedule.named_parameters()}
    positive = {name: torch.log1p(weights[name].exp()) for name in ("first_weight", "middle_weight", "last_weight")}

    def gamma(t: torch.Tensor) -> torch.Tensor:
        inner = positive["first_weight"] * t + weights["first_bias"]
        layer = torch.sigmoid(inner[:, None] * positive["middle_weight"] + weights["middle_bias"])
        return inner + layer @ positive["last_weight"]

    ends = gamma(torch.tensor([0.0, 1.0], dtype=F64))
    fraction = (gamma(GRID) - ends[0]) / (ends[1] - ends[0])
    low, high = schedule.log_snr_range()
    # Kingma et al. 2021, appendix H; the log-SNR is read back from alpha and sigma.
    torch.testing.assert_close(schedule.log_snr(GRID), high - (high - low) * fraction, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_monotone_invertible_and_exact_at_the_ends_wherever_training_goes(seed: int) -> None:
    schedule = shaken(seed, size=3.0)
    assert bool((schedule.log_snr(GRID).diff() < 0).all())
    assert bool((schedule.d_log_snr(GRID) < 0).all())
    least, most = schedule.log_snr_range()
    assert least < most
    top, span = float(schedule.top) + 13.3, math.log1p(math.exp(float(schedule.span))) / math.log(2) * 18.3
    assert (least, most) == pytest.approx((top - span, top), rel=1e-9)
    # Where a steep network is nearly flat, a log-SNR known to 1e-14 knows its time less well than that.
    flat = (1e-13 / schedule.d_log_snr(GRID).abs()).max().item()
    torch.testing.assert_close(schedule.time(schedule.log_snr(GRID)), GRID, rtol=0, atol=max(1e-9, 100 * flat))
    single = schedule.time(schedule.log_snr(GRID.float()))
    assert single.dtype == torch.float32
    outside = torch.tensor([math.inf, most + 1, least - 1, -math.inf], dtype=F64)
    assert schedule.time(outside).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("options", [{}, {"zero_terminal_snr": True}, {"shift": 2.0}])
def test_gradients_reach_every_parameter(options) -> None:
    schedule = shaken(**options)
    level = schedule.level(torch.tensor([0.2, 0.6]), 4)
    assert level.alpha.shape == (2, 1, 1, 1)
    for index in range(1, 5):  # alpha, sigma and both derivatives
        schedule.zero_grad()
        level[index].sum().backward(retain_graph=True)
        for name, parameter in schedule.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
            assert float(parameter.grad.abs().max()) > 0, name


def test_gradients_are_those_of_central_differences() -> None:
    schedule = shaken(size=0.3).double()
    t = torch.tensor([0.1, 0.45, 0.9], dtype=F64)

    def value() -> torch.Tensor:
        return torch.stack(schedule.coefficients(t)).mul(torch.arange(1, 13).reshape(4, 3)).sum()

    value().backward()
    h = 1e-5
    for parameter in schedule.parameters():
        flat = parameter.data.reshape(-1)
        flat[0] += h
        up = value().item()
        flat[0] -= 2 * h
        down = value().item()
        flat[0] += h
        # Truncation h^2 and rounding 1e-15 * |value| / h, of a value about 100.
        assert parameter.grad.reshape(-1)[0].item() == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-7)


def test_grids_and_single_times_carry_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = VDMLearned(hidden=16)
    seen = []
    original = VDMLearned.coefficients

    def watched(self: VDMLearned, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(torch.is_grad_enabled())
        return original(self, t)

    monkeypatch.setattr(VDMLearned, "coefficients", watched)
    for call in (lambda: schedule.level(0.5), lambda: schedule.levels(torch.ones(1)), schedule.log_snr_range):
        call()
    assert seen == [False, False, False]
    assert not schedule.time(torch.tensor([0.0, 3.0])).requires_grad


def test_ends_stay_where_they_are_not_learned() -> None:
    schedule = VDMLearned(hidden=16, learn_ends=False)
    schedule.level(torch.tensor([0.0, 1.0]))
    optimizer = torch.optim.SGD([p for p in schedule.parameters() if p.requires_grad], lr=10.0)
    (schedule.log_snr(torch.tensor([0.3, 0.7])) ** 2).sum().backward()
    optimizer.step()
    assert schedule.log_snr_range() == pytest.approx((-5.0, 13.3), abs=1e-12)
    assert VDMLearned(hidden=16).state_dict().keys() == schedule.state_dict().keys()


def test_learns_a_given_curve() -> None:
    schedule = VDMLearned(hidden=32, min_log_snr=-3.0, max_log_snr=3.0)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.05)
    t = torch.linspace(0, 1, 65)
    wanted = 6 - 12 * torch.sigmoid(12 * (t - 0.5))
    errors = []
    for _ in range(300):
        loss = (schedule.log_snr(t) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    # From an error of several units of log-SNR to a tenth: shape and both ends are within its reach.
    assert errors[0] > 4 and errors[-1] < 0.02


def test_state_dict_round_trip_and_copies() -> None:
    first, second = shaken(1), VDMLearned(hidden=64)
    second.load_state_dict(first.state_dict())
    expected = torch.stack(first.coefficients(GRID))
    assert torch.equal(torch.stack(second.coefficients(GRID)), expected)
    copied = copy.deepcopy(first)
    nn.init.zeros_(copied.last_weight)
    assert torch.equal(torch.stack(first.coefficients(GRID)), expected)
    assert not torch.equal(torch.stack(copied.coefficients(GRID)), expected)


def test_computes_in_the_precision_of_its_times() -> None:
    schedule = shaken()
    double, single = schedule.coefficients(GRID[1:]), schedule.coefficients(GRID[1:].float())
    for a, b in zip(double, single, strict=True):
        assert (a.dtype, b.dtype) == (F64, torch.float32)
        # The network's difference from its value at 0 is off by 1e-7, times a span of 20 or so in log-SNR.
        torch.testing.assert_close(b.double(), a, rtol=3e-4, atol=1e-5)


@torch.no_grad()
def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = shaken()
    whole = torch.stack(schedule.coefficients(GRID.reshape(3, 23, 29)))
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 64 * 100)
    # Matrix products of another height may sum in another order.
    torch.testing.assert_close(
        torch.stack(schedule.coefficients(GRID.reshape(3, 23, 29))), whole, rtol=1e-9, atol=1e-14
    )
    assert schedule.log_snr(torch.empty(0)).shape == (0,)
