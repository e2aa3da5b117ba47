"""Samplers: on an exactly solvable mixture, against diffusers' own schedules, and under guidance."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from models.conditions import Conditions
from models.config import InputError, parse_config
from pipeline.data.randomness import draw_noise
from pipeline.objectives.config import SamplerConfig
from pipeline.objectives.objective import Objective
from pipeline.objectives.sampling import (
    Guidance,
    Schedule,
    ancestral_step,
    flow_scheduler,
    generate,
    guided,
)
from tests.test_objective import COMBINATIONS, PATHS, make

NOTHING = Guidance(Conditions())
# ddim takes the steps of euler.
SAMPLERS = ("euler", "heun", "dpmpp_2m", "unipc", "euler_ancestral")


def sampler(name: str = "euler", num_steps: int = 20, **options) -> SamplerConfig:
    data = {"name": name, "num_steps": num_steps, **options}
    return parse_config(SamplerConfig, data, "sampler")


# --- a mixture of three Gaussians in the plane, of mean 0 and variance 1 per coordinate -----------------

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
_means = torch.tensor([[1.2, 0.6], [-1.0, 0.8], [-0.2, -1.4]], dtype=torch.float64)
_stds = torch.tensor([0.25, 0.15, 0.35], dtype=torch.float64)
_centre = (WEIGHTS[:, None] * _means).sum(0)
_size = ((WEIGHTS * _stds**2).sum() + (WEIGHTS @ (_means - _centre) ** 2).mean()).sqrt()
MEANS, STDS = (_means - _centre) / _size, (_stds / _size)[:, None]

_angles = torch.arange(16, dtype=torch.float64) * math.pi / 16
DIRECTIONS = torch.stack([_angles.cos(), _angles.sin()])
NUM_POINTS = 1024


def fresh_sample(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kind = torch.multinomial(WEIGHTS, count, True, generator=generator)
    return MEANS[kind] + STDS[kind] * torch.randn(count, 2, generator=generator)


def quantiles(count: int) -> Tensor:
    """Quantiles of the mixture seen along each direction, from a sample 400 times as large."""
    large = (fresh_sample(400 * count, 99).double() @ DIRECTIONS).sort(0).values
    return large.view(count, 400, -1).mean(1)


def distance(points: Tensor, expected: Tensor) -> float:
    """Sliced Wasserstein-1 distance to the mixture."""
    return float(((points.double() @ DIRECTIONS).sort(0).values - expected).abs().mean())


def posterior_mean(objective: Objective):
    """The network that training would end at: E[target | x_t], exact; each pixel is a point."""

    def network(x_t: Tensor, t: Tensor, _: Conditions = Conditions()) -> Tensor:
        alpha, sigma = (c.double().view(-1, 1, 1, 1, 1) for c in objective.alpha_sigma(t))
        variance = alpha**2 * STDS**2 + sigma**2
        offset = x_t.permute(0, 2, 3, 1)[..., None, :].double() - alpha * MEANS  # (B, h, w, K, 2)
        log_weight = WEIGHTS.log() - offset.square().sum(-1) / 2 / variance[..., 0]
        share = (log_weight - variance[..., 0].log()).softmax(-1)[..., None]
        x0 = (share * (MEANS + alpha * STDS**2 / variance * offset)).sum(-2)
        noise = (share * sigma / variance * offset).sum(-2)
        x0, noise = (x.permute(0, 3, 1, 2).float() for x in (x0, noise))
        return objective.target(x0, noise, t)  # linear in both, so it commutes with the mean

    return network


def spread_noise(count: int) -> Tensor:
    """Normal noise spread evenly (Sobol), so that what is measured is the sampler's own error."""
    u = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(count, dtype=torch.float64)
    return torch.special.ndtri(u).float().T.reshape(2, 16, 8, -1).transpose(0, 1).contiguous()


def points_of(latents: Tensor) -> Tensor:
    return latents.permute(0, 2, 3, 1).reshape(-1, 2)


@pytest.fixture(scope="module")
def mixture() -> tuple[Tensor, float]:
    """The mixture's quantiles, and the mean distance of a fresh sample of as many points (0.03)."""
    expected = quantiles(NUM_POINTS)
    own = [distance(fresh_sample(NUM_POINTS, seed), expected) for seed in range(16)]
    return expected, sum(own) / len(own)


# One prediction is enough: the next test shows that all take the same way.
@pytest.mark.parametrize("path", PATHS)
def test_with_the_exact_posterior_mean_every_sampler_reaches_the_mixture(path, mixture):
    objective, (expected, own) = make(path, "flow"), mixture
    noise = spread_noise(NUM_POINTS)
    assert distance(points_of(noise), expected) > 6 * own  # it has a way to go
    for name in SAMPLERS:
        # Ancestral is of first order and adds scatter of its own: more steps, and twice the distance.
        num_steps, limit = (200, 2 * own) if name == "euler_ancestral" else (50, own)
        config = sampler(name, num_steps)
        latents = generate(posterior_mean(objective), objective, noise, NOTHING, config)
        assert distance(points_of(latents), expected) < limit, name


@pytest.mark.parametrize(("path", "prediction"), [c for c in COMBINATIONS if c[1] != "flow"])
def test_every_prediction_takes_every_sampler_along_the_same_trajectory(path, prediction):
    noise = spread_noise(256)
    for name in SAMPLERS:
        latents = [
            generate(posterior_mean(o), o, noise, NOTHING, sampler(name, num_steps=8))
            for o in (make(path, prediction), make(path, "flow"))
        ]
        # fp32, and epsilon at the noisiest level divides by alpha = 0.006 (ddpm), 0.0125 (edm), 5e-5 (cosine).
        limit = 0.02 if (path, prediction) == ("cosine_betas", "epsilon") else 5e-4
        assert (latents[0] - latents[1]).abs().max() < limit, name


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_the_error_of_every_sampler_vanishes_with_its_steps(path):
    objective, count = make(path), 4096
    expected, noise = quantiles(count), spread_noise(count)
    own = sum(distance(fresh_sample(count, seed), expected) for seed in range(16)) / 16
    for name in SAMPLERS:
        errors = []
        for num_steps in (10, 40, 160):
            config = sampler(name, num_steps)
            latents = generate(posterior_mean(objective), objective, noise, NOTHING, config)
            errors.append(distance(points_of(latents), expected))
        print(f"{path:15} {name:16}", *(f"{e:.4f}" for e in errors), f"fresh {own:.4f}")
        assert errors[0] > errors[1] > errors[2], name
        # Spread points resolve 0.004; a fresh sample is at 0.02, and ancestral is of fresh noise.
        assert errors[2] < (2 * own if name == "euler_ancestral" else own), name


# --- what the network is asked --------------------------------------------------------------------


def calls(
    path: str, config: SamplerConfig, prediction: str = "flow"
) -> tuple[list[Tensor], list[float]]:
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x_t: Tensor, t: Tensor, _: Conditions) -> Tensor:
        assert t.dtype == torch.float32
        assert (t == t[0]).all()
        seen.append((x_t, t))
        return torch.zeros_like(x_t, dtype=torch.bfloat16)

    generate(network, make(path, prediction), spread_noise(128), NOTHING, config)
    return [x for x, _ in seen], [t[0].item() for _, t in seen]


def test_a_discrete_path_is_sampled_at_trailing_levels_from_the_very_last():
    x_t, t = calls("sd_ztsnr", sampler("euler", 30))
    assert [round(1000 * x) for x in t[:3]] == [999, 966, 932]
    assert len(t) == 30
    assert all(abs(1000 * x - round(1000 * x)) < 1e-4 for x in t)
    assert torch.equal(x_t[0], spread_noise(128))  # at SNR 0 the input is the noise itself


@pytest.mark.parametrize("path", PATHS)
def test_every_number_of_steps_gives_as_many_levels_each_less_noisy_than_the_last(path):
    """diffusers' trailing spacing gives 62 levels for 61 steps, the last of them -1."""
    objective = make(path)
    for num_steps in range(1, 1001):
        times = objective.sampling_times(num_steps, (8, 8))
        assert times.shape == (num_steps,)
        # A table has 1000 levels, so near as many steps share some.
        steps = times.diff()
        assert (steps <= 0).all() if objective.config.path.discrete else (steps < 0).all()
        assert 0 <= times.min() <= times.max() <= 1
        alpha, sigma = objective.alpha_sigma(times)
        assert (sigma > 0).all()
        assert (alpha >= 0).all()


@pytest.mark.parametrize(
    "name", [name for name in SAMPLERS if name != "euler_ancestral"] + ["ddim"]
)
def test_a_scheduler_takes_exactly_the_steps_that_it_is_given(name):
    for num_steps in {*range(1, 1001, 7), 61, 103, 121, 122, 201, 999, 1000}:
        tau = torch.linspace(1, 0, num_steps + 1)
        calls = 2 * num_steps - 1 if name == "heun" else num_steps
        assert len(flow_scheduler(name, tau).timesteps) == calls


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_or_many_every_sampler_returns_finite_fp32(path, name):
    for num_steps in (1, 2, 3, 14, 15):
        objective = make(path)
        network, config = posterior_mean(objective), sampler(name, num_steps)
        latents = generate(network, objective, spread_noise(128), NOTHING, config)
        assert latents.dtype == torch.float32
        assert latents.isfinite().all(), num_steps


def test_heun_calls_the_network_twice_a_step_but_once_at_the_first_level():
    _, t = calls("rectified_flow", sampler("heun", 4))
    assert t == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    for name in SAMPLERS:
        if name != "heun":
            assert calls("rectified_flow", sampler(name, 4))[1] == [1.0, 0.75, 0.5, 0.25], name


def test_times_are_shifted_once_and_as_in_training():
    shift = {"kind": "constant", "value": 3.0}
    _, given = calls("rectified_flow", sampler("euler", 10, shift=shift))
    u = torch.linspace(1, 0, 11)[:-1]
    assert torch.allclose(torch.tensor(given), 3 * u / (1 + 2 * u), atol=1e-6)
    objective = make(shift={"kind": "resolution", "base_pixels": 16})
    # 64 latent pixels against 16: sqrt is 2. The sampler's own shift takes the objective's place.
    u = u.double()
    times = objective.sampling_times(10, (8, 8)).double()
    assert torch.allclose(times, 2 * u / (1 + u), atol=1e-6)
    config = sampler(shift=shift)
    assert torch.allclose(
        objective.sampling_times(10, (8, 8), config.shift).double(), 3 * u / (1 + 2 * u), atol=1e-6
    )


def test_edm_is_sampled_at_karras_sigmas():
    _, t = calls("edm", sampler("euler", 18))
    sigma = 0.002 * (80 / 0.002) ** torch.tensor(t).double()
    ramp = torch.arange(18).double() / 17
    expected = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(sigma, expected, rtol=1e-5)


# --- diffusers' own variance-preserving schedules ----------------------------------------------------


def native(scheduler, noise: Tensor, num_steps: int, objective: Objective) -> Tensor:
    """Sample as a diffusers pipeline does, the scheduler choosing its timesteps and the conversion."""
    network = posterior_mean(objective)
    scheduler.set_timesteps(num_steps)
    x = noise
    if isinstance(scheduler, EulerDiscreteScheduler):
        # Its state is x_t / alpha. Its own start, sigma_max noise, has variance 0.995 at k = 999.
        x = noise * (scheduler.sigmas[0] ** 2 + 1).sqrt()
    for timestep in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, timestep)
        t = torch.full((len(x),), float(timestep)) / 1000
        x = scheduler.step(network(x_t, t), timestep, x).prev_sample
    return x


STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
}


@pytest.mark.parametrize(("prediction", "theirs"), [("epsilon", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("ddim", lambda **o: DDIMScheduler(clip_sample=False, **o)),
        ("euler", EulerDiscreteScheduler),
        ("dpmpp_2m", DPMSolverMultistepScheduler),
        ("unipc", UniPCMultistepScheduler),
    ],
)
def test_samplers_follow_diffusers_stable_diffusion_trajectories(
    name, scheduler, prediction, theirs
):
    objective, noise = make("sd", prediction), spread_noise(256)
    scheduler = scheduler(prediction_type=theirs, **STABLE_DIFFUSION)
    expected = native(scheduler, noise, 20, objective)
    ours = generate(posterior_mean(objective), objective, noise, NOTHING, sampler(name, 20))
    # Rounding of 20 steps; UniPC's own table is of 1000 fp32 products.
    assert (ours - expected).abs().max() < 1e-3


def test_flow_euler_follows_diffusers_with_explicit_sigmas():
    objective, noise = make(shift={"kind": "constant", "value": 3.0}), spread_noise(256)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 21)[:-1].tolist())
    x, network = noise, posterior_mean(objective)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, (timestep / 1000).expand(len(x))), timestep, x).prev_sample
    ours = generate(network, objective, noise, NOTHING, sampler("euler", 20))
    assert (ours - x).abs().max() < 1e-4  # fp32


def levels(path: str, k: int, k_next: int) -> Schedule:
    times = torch.tensor([k, k_next]) / 1000
    return Schedule(times[:1], *make(path).alpha_sigma(times))


def test_an_ancestral_step_is_diffusers_euler_ancestral_on_its_path():
    scheduler = EulerAncestralDiscreteScheduler(prediction_type="v_prediction", **STABLE_DIFFUSION)
    scheduler.set_timesteps(20)
    objective = make("sd", "v")
    x_t, pred = (draw_noise(0, i, range(4), (2, 8, 8)) for i in range(2))
    scale = (scheduler.sigmas[0] ** 2 + 1).sqrt()
    scheduler.scale_model_input(x_t * scale, scheduler.timesteps[0])
    generator = torch.Generator().manual_seed(0)
    expected = scheduler.step(pred, scheduler.timesteps[0], x_t * scale, generator=generator)
    fresh = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0))
    velocity = objective.to_velocity(pred, x_t, torch.full((4,), 0.999))
    ours = ancestral_step(x_t, velocity, fresh, levels("sd", 999, 949), 0)
    next_scale = (scheduler.sigmas[1] ** 2 + 1).sqrt()
    assert torch.allclose(ours, expected.prev_sample / next_scale, atol=2e-5)  # fp32 at sigma 14.6


@pytest.mark.parametrize("path", PATHS)
def test_an_ancestral_step_has_the_marginal_of_its_level_and_the_paths_own_memory(path):
    schedule = levels(path, 999, 700)
    (alpha, alpha_next), (sigma, sigma_next) = schedule.alpha, schedule.sigma
    count = 400_000
    noise, fresh = (draw_noise(1, i, [0], (count,))[0] for i in range(2))
    x0 = torch.full((count,), 0.8)
    x_t = alpha * x0 + sigma * noise
    x_next = ancestral_step(x_t, noise - x0, fresh, schedule, 0)
    # q(x_next | x0): mean alpha x0, standard deviation sigma; 5 standard errors of 400,000 draws.
    assert x_next.mean().item() == pytest.approx(float(alpha_next) * 0.8, abs=8e-3)
    assert x_next.std().item() == pytest.approx(float(sigma_next), rel=6e-3)
    # x_t is x_next times alpha / alpha_next plus noise of its own, which fixes their covariance.
    covariance = ((x_next - x_next.mean()) * (x_t - x_t.mean())).mean().item()
    expected = float(sigma_next**2 * alpha / alpha_next)
    assert covariance == pytest.approx(expected, abs=8e-3)


def test_ancestral_noise_of_a_sample_does_not_depend_on_its_batch():
    objective, noise = make(), spread_noise(256)
    network, config = posterior_mean(objective), sampler("euler_ancestral", 6, seed=3)
    whole = generate(network, objective, noise, NOTHING, config)
    part = generate(network, objective, noise[4:7], NOTHING, config, indices=range(4, 7))
    assert torch.allclose(part, whole[4:7], atol=1e-6)
    other = generate(network, objective, noise, NOTHING, sampler("euler_ancestral", 6, seed=4))
    assert (other - whole).abs().max() > 0.1


# --- guidance --------------------------------------------------------------------------------------


def factors(values: list[float]) -> Conditions:
    """What `scaled_network` is told."""
    return Conditions(label=torch.tensor(values))


def scaled_network(x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    assert conditions.label is not None
    return x_t * conditions.label.view(-1, 1, 1, 1)


def guidance_case(**options) -> tuple[Tensor, Tensor, Tensor]:
    """Guided prediction, and the conditional and unconditional ones."""
    x_t, t = draw_noise(0, 0, range(3), (2, 4, 4)), torch.full((3,), 0.5)
    cond, uncond = factors([1.0, 2.0, 3.0]), factors([0.5] * 3)
    pred = guided(scaled_network, x_t, t, Guidance(cond, uncond), sampler(**options))
    return pred, scaled_network(x_t, t, cond), scaled_network(x_t, t, uncond)


def test_guidance_extrapolates_from_the_unconditional_prediction():
    pred, cond, uncond = guidance_case(guidance_scale=4.0)
    assert torch.allclose(pred, uncond + 4 * (cond - uncond))
    pred, _, uncond = guidance_case(guidance_scale=0.0)
    assert torch.equal(pred, uncond)
    pred, cond, _ = guidance_case(guidance_scale=1.0)
    assert torch.equal(pred, cond)


def test_a_guide_is_led_away_from_and_told_the_same():
    x_t, t = draw_noise(0, 0, range(3), (2, 4, 4)), torch.full((3,), 0.5)
    cond, config = factors([1.0, 2.0, 3.0]), sampler(guidance_scale=4.0)

    def guide(x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return torch.tanh(scaled_network(x_t, t, conditions))

    worse, better = guide(x_t, t, cond), scaled_network(x_t, t, cond)
    for uncond in (None, factors([0.5] * 3)):
        pred = guided(scaled_network, x_t, t, Guidance(cond, uncond, guide), config)
        torch.testing.assert_close(pred, worse + 4 * (better - worse))
    # A whole generation: of a guide that says what the network says, nothing is left.
    objective, noise = make(), spread_noise(128)
    factor = factors([-1.0] * len(noise))
    alone = generate(scaled_network, objective, noise, Guidance(factor), sampler())
    same = Guidance(factor, None, scaled_network)
    torch.testing.assert_close(generate(scaled_network, objective, noise, same, config), alone)
    led = generate(scaled_network, objective, noise, Guidance(factor, None, guide), config)
    assert (led - alone).abs().max() > 0.1


def test_guidance_rescale_is_diffusers():
    pred, cond, uncond = guidance_case(guidance_scale=4.0, guidance_rescale=0.7)
    expected = rescale_noise_cfg(uncond + 4 * (cond - uncond), cond, guidance_rescale=0.7)
    assert torch.allclose(pred, expected, atol=1e-6)
    full, cond, _ = guidance_case(guidance_scale=4.0, guidance_rescale=1.0)
    assert torch.allclose(full.flatten(1).std(1), cond.flatten(1).std(1))


def test_a_network_that_predicts_zero_survives_guidance_rescale():
    objective, noise = make(), spread_noise(128)
    config = sampler("euler", 4, guidance_scale=5.0, guidance_rescale=0.7)
    factor = factors([0.0] * len(noise))
    latents = generate(scaled_network, objective, noise, Guidance(factor, factor), config)
    assert torch.equal(latents, noise)


def test_outside_the_guidance_interval_the_network_is_asked_once_and_conditionally():
    objective, noise, sizes = make(), spread_noise(128), []

    def network(x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        sizes.append((len(x_t), t[0].item()))
        return scaled_network(x_t, t, conditions)

    cond, uncond = (factors([f] * len(noise)) for f in (-1.0, -0.5))
    config = sampler("euler", 10, guidance_scale=3.0, guidance_interval=[0.25, 0.75])
    generate(network, objective, noise, Guidance(cond, uncond), config)
    n = len(noise)
    assert [size for size, _ in sizes] == [n, n, n, 2 * n, 2 * n, 2 * n, 2 * n, 2 * n, n, n]


def test_guidance_needs_unconditional_conditions():
    with pytest.raises(ValueError, match="expected unconditional conditions"):
        generate(scaled_network, make(), spread_noise(128), NOTHING, sampler(guidance_scale=2.0))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"guidance_rescale": 0.7}, "no effect at guidance_scale 1"),
        ({"guidance_interval": [0.2, 0.8]}, "no effect at guidance_scale 1"),
        ({"guidance_scale": 2, "guidance_interval": [0.8, 0.2]}, "expected low below high"),
        ({"guidance_scale": 2, "guidance_interval": [0.2, 1.2]}, "less than or equal to 1"),
        ({"name": "dpm"}, "'dpmpp_2m'"),
        ({"num_steps": 0}, "greater than or equal to 1"),
        ({"guidance": 2}, "did you mean 'guidance_scale'?"),
    ],
)
def test_sampler_options_without_meaning_are_refused(options, reason):
    with pytest.raises(InputError) as error:
        sampler(**options)
    assert reason in str(error.value)


@pytest.mark.parametrize("path", ["sd", "edm"])
def test_a_sampler_shift_is_refused_on_a_path_of_fixed_levels(path):
    config = sampler(shift={"kind": "constant", "value": 3.0})
    with pytest.raises(InputError, match="no meaning on path"):
        generate(scaled_network, make(path), spread_noise(128), NOTHING, config)
