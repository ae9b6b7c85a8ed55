"""diffusers' schedulers as samplers: equal to ours where we have the method, the right draws, and refusals by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.grids import Discrete, Grid, Karras, Uniform, make_grid
from ornstein.diffusion.noise import NoiseSource, SampleNoise
from ornstein.diffusion.parameterizations import EDMPreconditioned, V, Velocity
from ornstein.diffusion.samplers import DDIM, DDPM, LCM, DiffusersSampler, DPMpp2M, Euler, Heun, Sampler, State
from ornstein.diffusion.samplers.diffusers import SUPPORTED
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Level, Linear, NoiseSchedule

# numpy's views of tensors that diffusers takes of its own tables
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

F64 = torch.float64
CLIPS = ("DDPMScheduler", "DDIMScheduler", "LCMScheduler")
NOISY = {"DDPMScheduler", "LCMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}


def build(name: str, **options: object) -> object:
    import diffusers

    if name in CLIPS:
        options.setdefault("clip_sample", False)
    return getattr(diffusers, name)(**options)


def bound(count: int, shape: tuple[int, ...] = (2,), first: int = 0, seed: int = 0) -> SampleNoise:
    return NoiseSource(seed).bind(torch.arange(first, first + count), shape)


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        self.calls += 1
        phase = (noise_cond.to(x.dtype) / 300).reshape(-1, *([1] * (x.ndim - 1)))
        return torch.tanh(0.8 * x + torch.sin(phase))


def ours_at(sampler: Sampler, denoiser: Denoiser, grid: Grid, noise: SampleNoise) -> Tensor:
    state = sampler.init(grid, noise)
    for i in range(grid.steps):
        state = sampler.step(denoiser, state, i)
    return state.x


def leading(schedule: NoiseSchedule, steps: int) -> Grid:
    return make_grid(Discrete(), schedule, steps)


def from_unit(noise: SampleNoise, grid: Grid) -> State:
    """Where diffusers starts variance-preserving schedulers: at unit noise, whatever the first level."""
    return State(noise(0), grid, noise)


@pytest.mark.parametrize(
    ("scheduler", "ours"),
    [
        (lambda: build("DDIMScheduler"), lambda n: DDIM(steps=n)),
        (lambda: build("DDIMScheduler", prediction_type="sample"), lambda n: DDIM(steps=n)),
        (lambda: build("DDIMScheduler", prediction_type="v_prediction"), lambda n: DDIM(steps=n)),
        (
            lambda: build("DPMSolverMultistepScheduler", beta_end=0.02, timestep_spacing="leading"),
            lambda n: DPMpp2M(steps=n),
        ),
    ],
    ids=["ddim-eps", "ddim-x0", "ddim-v", "dpmpp_2m"],
)
def test_variance_preserving_is_ours_on_the_same_steps(scheduler, ours) -> None:
    schedule, steps = Linear(), 20
    denoiser, noise = Denoiser(Tanh(), schedule, V()), bound(3, (2, 4, 4))
    grid = leading(schedule, steps)
    built = scheduler()
    built.set_timesteps(steps)
    levels = [schedule.level((int(t) + 1) / 1000) for t in built.timesteps]
    state = from_unit(noise, Grid((*levels, grid[-1])))
    for i in range(steps):
        state = ours(steps).step(denoiser, state, i)
    theirs = DiffusersSampler(scheduler=scheduler(), steps=steps).sample(denoiser, noise)
    # Their tables and steps are float32, and x0 from eps divides by alpha = 0.01 at first.
    torch.testing.assert_close(theirs.x, state.x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "ours"), [("EDMEulerScheduler", Euler), ("EDMDPMSolverMultistepScheduler", DPMpp2M)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_schedulers_are_ours_with_a_last_step_to_zero(name: str, ours, prediction: str) -> None:
    denoiser = Denoiser(Tanh(), EDM(), EDMPreconditioned(sigma_data=0.5))
    noise = bound(3, (2, 4, 4))
    sampler = DiffusersSampler(scheduler=build(name, prediction_type=prediction), steps=16)
    theirs = sampler.sample(denoiser, noise)
    mine = ours(steps=16, grid=Karras(to_zero=True)).sample(denoiser, noise)
    assert theirs.nfe == mine.nfe == 16
    # Theirs starts at sqrt(80**2 + 1) for ours of 80, 8e-5 apart, and is float32 of that size.
    torch.testing.assert_close(theirs.x, mine.x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "ours"),
    [("FlowMatchEulerDiscreteScheduler", Euler), ("FlowMatchHeunDiscreteScheduler", lambda **k: Heun(**k))],
)
def test_flow_schedulers_are_ours_on_their_sigmas(name: str, ours) -> None:
    denoiser, steps = Denoiser(Tanh(), Flow(), Velocity()), 12
    scheduler = build(name)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double().unique().flip(0)
    noise = bound(3, (2, 4, 4))
    grid = Grid(Flow().levels(sigmas))
    expected = ours_at(ours(steps=steps), denoiser, grid, noise)
    theirs = DiffusersSampler(scheduler=build(name), steps=steps).sample(denoiser, noise)
    torch.testing.assert_close(theirs.x, expected, rtol=1e-4, atol=1e-4)


def test_ddim_eta_is_an_option_of_step() -> None:
    denoiser, noise = Denoiser(Tanh(), Linear(), V()), bound(2, (2, 4, 4))
    still, noisy = (
        DiffusersSampler(scheduler=build("DDIMScheduler"), steps=10, step_options={"eta": eta}).sample(denoiser, noise)
        for eta in (0.0, 1.0)
    )
    assert not torch.allclose(still.x, noisy.x, atol=0.01)


# A mixture's draws: limit from sets of real draws, as in test_samplers_ground_truth.
COUNT = 1000


class Truth:
    def __init__(self, mixture: GaussianMixture) -> None:
        generator = torch.Generator().manual_seed(0)
        angle = torch.arange(8) * math.pi / 8
        self.directions = torch.stack([angle.cos(), angle.sin()])
        fresh = mixture.sample(50 * COUNT, generator=generator) @ self.directions
        self.quantiles = fresh.sort(0).values.reshape(COUNT, 50, -1).mean(1)
        real = torch.tensor([self.distance(mixture.sample(COUNT, generator=generator)) for _ in range(100)])
        self.limit = float(real.mean() + 6 * real.std())

    def distance(self, x: Tensor) -> float:
        return float(((x @ self.directions).sort(0).values - self.quantiles).abs().mean())


def three_components() -> GaussianMixture:
    means = torch.tensor([[-0.7, -0.5], [0.6, 0.7], [0.5, -0.8]])
    return GaussianMixture(means, torch.tensor([0.2, 0.15, 0.25]), torch.tensor([0.5, 0.3, 0.2]))


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(three_components())


@pytest.mark.parametrize("on", [Linear, Flow])
@pytest.mark.parametrize("name", sorted(set(SUPPORTED) - {"LCMScheduler"}))  # which needs a consistency model: below
def test_every_scheduler_draws_the_data_on_every_schedule(truth: Truth, name: str, on) -> None:
    sampler = DiffusersSampler(scheduler=build(name), steps=60)
    sampler.check(on())
    state = sampler.sample(three_components().denoiser(on(), V()), bound(COUNT))
    assert state.x.dtype == torch.float32
    assert truth.distance(state.x) < truth.limit


class FlowMap:
    """The exact flow map of N(mu, s^2 I) to data, as a denoiser on a schedule."""

    cost, renoises = 1, False

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def start(self) -> FlowMap:
        return self

    def __call__(self, x: Tensor, t: Level, *, again: bool = False):
        from ornstein.diffusion.prediction import Prediction

        scale = 0.5 / math.sqrt((t.alpha * 0.5) ** 2 + t.sigma**2)
        return Prediction(x, t, x0=0.3 + scale * (x - t.alpha * 0.3))


@pytest.mark.parametrize("on", [Linear, Flow])
def test_lcm_with_the_exact_flow_map_draws_the_data(on) -> None:
    x = DiffusersSampler(scheduler=build("LCMScheduler"), steps=4).sample(FlowMap(on()), bound(4000)).x
    # Five deviations; LCM's scalings move each prediction by 1e-4.
    assert float(x.mean()) == pytest.approx(0.3, abs=5 * 0.5 / 8000**0.5 + 0.005)
    assert float(x.std()) == pytest.approx(0.5, abs=5 * 0.5 / 16000**0.5 + 0.002)
    assert LCM().order is None


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_sample_depends_on_its_seed_and_number_alone(name: str) -> None:
    denoiser = Denoiser(Tanh(), Linear(), V())
    sampler = DiffusersSampler(scheduler=build(name), steps=6)
    whole = sampler.sample(denoiser, bound(5, (2, 4, 4))).x
    torch.testing.assert_close(
        sampler.sample(denoiser, bound(2, (2, 4, 4), first=3)).x, whole[3:], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(sampler.sample(denoiser, bound(5, (2, 4, 4))).x, whole, rtol=0, atol=0)
    assert not torch.allclose(sampler.sample(denoiser, bound(5, (2, 4, 4), seed=1)).x, whole, atol=0.05)


@pytest.mark.parametrize("name", sorted(NOISY))
def test_fresh_noise_differs_between_samples_and_seeds(name: str) -> None:
    # The same start for all: what differs afterwards is the scheduler's own noise.
    class Same(SampleNoise):
        def __call__(self, step: int, draw: int = 0) -> Tensor:
            return torch.ones(len(self.index), *self.shape)

    denoiser, sampler = Denoiser(Tanh(), Linear(), V()), DiffusersSampler(scheduler=build(name), steps=6)
    runs = [sampler.sample(denoiser, Same(NoiseSource(seed), torch.arange(2), (3,))).x for seed in (0, 1)]
    rows = torch.cat(runs)
    assert float(torch.pdist(rows).min()) > 1e-3


@pytest.mark.parametrize("name", SUPPORTED)
def test_evaluations_and_watch(name: str, steps: int = 7) -> None:
    network, seen = Tanh(), []
    sampler = DiffusersSampler(scheduler=build(name), steps=steps)
    final = sampler.sample(
        Denoiser(network, Cosine(), V()), bound(2, (2, 4, 4)), watch=lambda i, state: seen.append((i, state.nfe))
    )
    assert final.nfe == network.calls >= steps
    assert [i for i, _ in seen] == list(range(steps))
    assert seen[-1][1] == final.nfe
    assert len(final.grid.levels) == steps + 1
    assert final.prediction is not None
    assert final.grid[-1].sigma == 0


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 2, 3, 2)], ids=["1d", "2d", "4d"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_any_shape_and_an_empty_batch(name: str, shape: tuple[int, ...]) -> None:
    for count in (0, 1, 3):
        x = (
            DiffusersSampler(scheduler=build(name), steps=4)
            .sample(Denoiser(Tanh(), Linear(), V()), bound(count, shape))
            .x
        )
        assert x.shape == (count, *shape)
        assert x.isfinite().all()


def test_the_scheduler_that_was_given_is_left_as_it_was() -> None:
    scheduler = build("PNDMScheduler")
    before = {key: value for key, value in vars(scheduler).items() if not isinstance(value, Tensor)}
    DiffusersSampler(scheduler=scheduler, steps=5).sample(Denoiser(Tanh(), Linear(), V()), bound(2))
    after = {key: value for key, value in vars(scheduler).items() if not isinstance(value, Tensor)}
    assert str(before) == str(after)


class Renoising(FlowMap):
    renoises = True


REFUSED = [
    "DPMSolverSDEScheduler",
    "KarrasVeScheduler",
    "RePaintScheduler",
    "ScoreSdeVeScheduler",
    "VQDiffusionScheduler",
    "CosineDPMSolverMultistepScheduler",
    "TCDScheduler",
    "DDIMInverseScheduler",
]


@pytest.mark.parametrize("name", REFUSED)
def test_other_schedulers_are_refused_by_name(name: str) -> None:
    other = type(name, (), {})()
    with pytest.raises(
        ValueError, match=f"sampler.scheduler={name} is not supported by .*: choose one of DDPMSch.*UniPC"
    ):
        DiffusersSampler(scheduler=other)


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (
            lambda: DiffusersSampler(scheduler=build("DDIMScheduler"), steps=0),
            "sampler.steps=0: a sampler needs at least",
        ),
        (
            lambda: DiffusersSampler(scheduler=build("DDIMScheduler"), steps=2000).check(Linear()),
            "sampler.steps=2000 is refused by DDIMScheduler: ",
        ),
        (
            lambda: DiffusersSampler(scheduler=build("PNDMScheduler", prediction_type="v_prediction")),
            "prediction_type=v_prediction of PNDMScheduler is not supported by sampler=diffusers: choose epsilon",
        ),
        (
            lambda: DiffusersSampler(scheduler=build("DDPMScheduler", variance_type="learned_range")),
            "variance_type=learned_range is not supported .* sampler=ddpm sampler.variance=learned",
        ),
        (
            lambda: DiffusersSampler(scheduler=build("DDIMScheduler"), step_options={"churn": 1.0}),
            "sampler.step_options.churn is no option of DDIMScheduler.step: it has eta",
        ),
        (
            lambda: DiffusersSampler(
                scheduler=build("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
            ).check(Linear()),
            "DDIMScheduler starts at alpha = 0, where eps does not determine x0: set .*prediction_type=v_prediction",
        ),
        (
            lambda: DiffusersSampler(scheduler=build("DDIMScheduler")).sample(Renoising(Linear()), bound(1)),
            "cannot renoise as guidance=cfgpp asks",
        ),
        (
            lambda: DiffusersSampler(scheduler=build("DDIMScheduler")).step(
                FlowMap(Linear()), State(torch.ones(1, 2), make_grid(Uniform(), Linear(), 2), bound(1)), 0
            ),
            "call sample, not single steps",
        ),
    ],
)
def test_bad_input_is_one_sentence(run, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run()


def test_zero_terminal_snr_works_with_v() -> None:
    scheduler = build(
        "DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    x = DiffusersSampler(scheduler=scheduler, steps=10).sample(Denoiser(Tanh(), Flow(), Velocity()), bound(2)).x
    assert x.isfinite().all()


def test_ddpm_moments_agree_with_ours(gaussian: GaussianMixture) -> None:
    # Other noise, the same law.
    denoiser, noise = gaussian.float().denoiser(Linear(), V()), bound(4000)
    theirs = DiffusersSampler(scheduler=build("DDPMScheduler"), steps=50).sample(denoiser, noise).x
    ours = DDPM(steps=50, grid=Discrete()).sample(denoiser, noise).x
    assert float((theirs.mean(0) - ours.mean(0)).abs().max()) < 5 * 0.5 * (2 / 4000) ** 0.5
    assert float((theirs.std(0) - ours.std(0)).abs().max()) < 5 * 0.5 * (1 / 4000) ** 0.5


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_clip_sample_replaces_a_default_alone(name: str) -> None:
    import diffusers

    scheduler = getattr(diffusers, name)()
    assert DiffusersSampler(scheduler=scheduler).scheduler.config.clip_sample is True
    assert DiffusersSampler(scheduler=scheduler, clip_sample=False).scheduler.config.clip_sample is False
    assert scheduler.config.clip_sample is True
    given = getattr(diffusers, name)(clip_sample=True)
    assert DiffusersSampler(scheduler=given, clip_sample=False).scheduler.config.clip_sample is True
    assert (
        "clip_sample"
        not in DiffusersSampler(scheduler=diffusers.EulerDiscreteScheduler(), clip_sample=False).scheduler.config
    )
