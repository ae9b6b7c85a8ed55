"""What multistep and singlestep solvers are made of: moments, weights, the reverse SDE's kernel and its noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.grids import LogSNR, Uniform, make_grid
from ornstein.diffusion.noise import NoiseSource, SampleNoise
from ornstein.diffusion.parameterizations import Sample, V
from ornstein.diffusion.samplers import DPMpp1S, DPMpp2MSDE, DPMpp3MSDE, DPMppSDE, State
from ornstein.diffusion.samplers.deis import moments_in_time
from ornstein.diffusion.samplers.multistep import data_kernel, exponential_moments, lagrange_weights
from ornstein.diffusion.schedules import EDM, Flow, Linear

F64 = torch.float64
STOCHASTIC = {"dpmpp_1s": DPMpp1S, "dpmpp_sde": DPMppSDE, "dpmpp_2m_sde": DPMpp2MSDE, "dpmpp_3m_sde": DPMpp3MSDE}


def bound(count: int, shape: tuple[int, ...] = (2, 4, 4)) -> SampleNoise:
    return NoiseSource(3).bind(torch.arange(count), shape)


class Tanh(nn.Module):
    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        return torch.tanh(0.7 * x)


@pytest.mark.parametrize("h", [-3.0, -0.2, 1e-9, 1e-3, 0.2499, 0.2501, 1.0, 12.0])
def test_exponential_moments(h: float) -> None:
    v = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
    for k, moment in enumerate(exponential_moments(h, 4)):
        # The midpoint rule is off by its step squared times h**3.
        assert moment == pytest.approx(float((h * torch.exp(h * (v - 1)) * v**k).mean()), rel=1e-8)


def test_exponential_moments_of_an_infinite_step() -> None:
    assert exponential_moments(math.inf, 1) == [1.0]


def test_lagrange_weights_integrate_polynomials_exactly() -> None:
    nodes, moments = [0.0, -0.7, -1.9, 1.0], [1 / (k + 1) for k in range(4)]
    weights = lagrange_weights(nodes, moments)
    for k in range(4):
        assert sum(w * v**k for w, v in zip(weights, nodes, strict=True)) == pytest.approx(moments[k], abs=1e-14)


def test_deis_in_time_integrates_rho() -> None:
    # On flow rho = t/(1 - t): the mean of v over rho's share of a step has a closed form.
    grid = make_grid(Uniform(t_max=0.9, t_min=0.1), Flow(), 4)
    moments = moments_in_time(Flow(), grid.levels, 2)
    for i in range(4):
        t, s = grid[i].t, grid[i + 1].t

        def integral(u: float) -> float:  # of tau drho/dtau = tau / (1 - tau)**2
            return math.log(1 - u) + 1 / (1 - u)

        mean = (integral(s) - integral(t)) / (s / (1 - s) - t / (1 - t))
        assert float(moments[i, 1]) == pytest.approx((mean - t) / (s - t), rel=1e-12)
        assert float(moments[i, 0]) == 1.0


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize(
    ("eta", "noise"), [(0.3, "independent"), (1.0, "independent"), (2.0, "independent"), (1.0, "brownian")]
)
def test_sde_samples_a_gaussian(kind: str, eta: float, noise: str) -> None:
    gaussian = GaussianMixture(torch.tensor([[0.4, -0.3]]), torch.tensor([0.5]))
    sampler = STOCHASTIC[kind](steps=80, eta=eta, noise=noise, grid=LogSNR())
    count = 4000 if noise == "independent" else 500
    x = sampler.sample(gaussian.denoiser(Linear(), Sample()), bound(count, (2,))).x
    # Deviations: 0.5/sqrt(count) of a mean, half of that at most of the std over both; four of them, and the solver's
    # own error: of first order for 1S (0.04 at eta = 2), else small.
    four, own = 4 * 0.5 / count**0.5, 0.03 if kind == "dpmpp_1s" else 0.005
    torch.testing.assert_close(x.mean(0), torch.tensor([0.4, -0.3]), rtol=0, atol=four)
    assert float((x - torch.tensor([0.4, -0.3])).square().mean().sqrt()) == pytest.approx(0.5, abs=four / 2 + own)


@pytest.mark.parametrize("kind", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_a_brownian_path_is_followed_the_closer_the_more_steps(kind: str) -> None:
    gaussian = GaussianMixture(torch.tensor([[0.4, -0.3]]), torch.tensor([0.5]))
    denoiser = gaussian.denoiser(Linear(), Sample())

    def gap(noise: str, steps: int) -> float:
        ends = [
            STOCHASTIC[kind](steps=n, grid=Uniform(t_max=0.9, t_min=0.1), noise=noise)
            .sample(denoiser, bound(32, (2,)))
            .x
            for n in (steps, 2 * steps)
        ]
        return float((ends[0] - ends[1]).square().mean().sqrt())

    assert gap("brownian", 32) < 0.6 * gap("brownian", 8)
    assert gap("brownian", 32) < 0.2 * gap("independent", 32)


def test_sde_is_k_diffusions_recursion_in_sigma() -> None:
    # dpmpp_sde as it is written in sigma, at eta = 1 and alpha = 1: an ancestral step to the middle, then one to the
    # end from the same start, whose normals are those that z_1 and z_2 of the two halves make together.
    denoiser, grid = Denoiser(Tanh(), EDM(), V()), make_grid(Uniform(t_max=0.9, t_min=0.1), EDM(), 3)

    def noise(step: int, draw: int = 0) -> Tensor:
        return bound(2)(step, draw).double()

    def ancestral(a: float, b: float) -> tuple[float, float]:
        up = (b**2 * (a**2 - b**2) / a**2) ** 0.5
        return (b**2 - up**2) ** 0.5, up

    x = y = noise(0)
    for i in range(3):
        with torch.no_grad():
            x = DPMppSDE(steps=3).step(denoiser, State(x, grid, noise), i).x
        a, b = grid[i].sigma, grid[i + 1].sigma
        middle = (a * b) ** 0.5
        level = EDM().level(float(EDM().time(torch.tensor(-2 * math.log(middle), dtype=F64))))
        first = denoiser(y, grid[i]).x0
        down, up = ancestral(a, middle)
        z1, z2 = noise(i + 1), noise(i + 1, 1)
        inner = down / a * y + (1 - down / a) * first + up * z1
        second = denoiser(inner, level).x0
        down, up_whole = ancestral(a, b)
        z = (ancestral(middle, b)[0] / middle * up * z1 + ancestral(middle, b)[1] * z2) / up_whole
        y = down / a * y + (1 - down / a) * second + up_whole * z
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_kernel_is_the_reverse_process() -> None:
    # At eta = 1 with the true x0, the step is the posterior q(x_s | x_t, x0).
    schedule = Linear()
    t, s = schedule.level(0.7), schedule.level(0.4)
    kernel, exact = data_kernel(t, s, 1.0), schedule.transition(0.7, 0.4)
    assert kernel.carry == pytest.approx(float(exact.on_x_t), rel=1e-12)
    assert kernel.gain == pytest.approx(float(exact.on_x0), rel=1e-12)
    assert kernel.noise**2 == pytest.approx(float(exact.variance), rel=1e-12)
    # And whatever eta, x_t = alpha x0 + sigma eps keeps its variance.
    for eta in (0.0, 0.5, 3.0):
        kernel = data_kernel(t, s, eta)
        assert (kernel.carry * t.sigma) ** 2 + kernel.noise**2 == pytest.approx(s.sigma**2, rel=1e-12)
        assert kernel.carry * t.alpha + kernel.gain == pytest.approx(s.alpha, rel=1e-12)
