"""Objectives: conversions, weightings, timestep distributions and draws against their closed forms."""

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from scipy import integrate, stats
from scipy.special import logit

from models.config import InputError, parse_config
from pipeline.data.randomness import draw_dropout, draw_noise
from pipeline.objectives.config import PRESETS, ObjectiveConfig, Weighting
from pipeline.objectives.objective import Objective
from pipeline.objectives.paths import Path
from pipeline.objectives.timesteps import Shift, Timesteps

PATHS = {
    "rectified_flow": {"kind": "rectified_flow"},
    "vp_cosine": {"kind": "vp_cosine"},
    "sd": {"kind": "vp_discrete"},
    "sd_ztsnr": {"kind": "vp_discrete", "zero_terminal_snr": True},
    "ddpm": {"kind": "vp_discrete", "betas": "linear"},
    "cosine_betas": {"kind": "vp_discrete", "betas": "cosine"},
    "edm": {"kind": "edm", "sigma_data": 0.7},
}
PREDICTIONS = ("epsilon", "v", "sample", "flow", "edm")
WEIGHT_ON_X0: dict[str, Callable] = {  # OBJECTIVES' second column, of SNR, in float64
    "min_snr": lambda snr: np.minimum(snr, 5.0),
    "soft_min_snr": lambda snr: snr * 5.0 / (snr + 5.0),
    "debiased": np.sqrt,
    "velocity": lambda snr: np.minimum(1 + np.sqrt(snr), 20.0) ** 2,
}
PRESET_NAMES = list(yaml.safe_load(PRESETS.read_text()))


def make(path: str = "rectified_flow", prediction: str = "flow", **options) -> Objective:
    """An objective of PATHS, uniform timesteps unless given."""
    options = {"timesteps": "uniform"} | options
    data = {"path": PATHS[path], "prediction": prediction, **options}
    return Objective(parse_config(ObjectiveConfig, data, "test"))


def learnable(path: str, prediction: str) -> bool:
    known = make(path, "v").config.path
    if prediction == "epsilon":
        return known.ends()[0][1] > 0
    return prediction != "edm" or known.sigma_range is not None


COMBINATIONS = [c for c in itertools.product(PATHS, PREDICTIONS) if learnable(*c)]
# Refused: infinite at a clean end.
UNBOUNDED = [(p, "sample", "debiased") for p in PATHS if make(p, "v").config.path.ends()[1][0] == 0]
WEIGHTED = [
    (*c, w) for c, w in itertools.product(COMBINATIONS, WEIGHT_ON_X0) if (*c, w) not in UNBOUNDED
]


def tensors(seed: int, count: int = 3, batch: int = 32) -> list[torch.Tensor]:
    return [draw_noise(seed, i, range(batch), (3, 4, 4)) for i in range(count)]


def times(path: str, batch: int = 32) -> torch.Tensor:
    """Spread over the path, away from its ends; multiples of 1/1000 serve every path."""
    return torch.linspace(20, 980, batch).round() / 1000


def implied(objective: Objective, pred: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor):
    """x0 and noise that a prediction implies, by its velocity."""
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in objective.alpha_sigma(t))
    velocity = objective.to_velocity(pred, x_t, t)
    x0 = (x_t - sigma * velocity) / (alpha + sigma)
    return x0, x0 + velocity


def test_every_kind_of_path_distribution_and_weighting_is_tried_here():
    def kinds(union: Any) -> set[str]:
        return {member.model_fields["kind"].default for member in get_args(get_args(union)[0])}

    assert kinds(Path) == {path["kind"] for path in PATHS.values()}
    assert kinds(Weighting) == {"none", *WEIGHT_ON_X0}
    drawn = [distribution(name)[0].config for name in DISTRIBUTIONS]
    assert kinds(Timesteps) == {config.timesteps.kind for config in drawn}
    assert kinds(Shift) == {config.shift.kind for config in drawn if config.shift}


# --- conversions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "prediction"), COMBINATIONS)
def test_every_prediction_converts_back_to_the_latents_and_noise_that_made_it(path, prediction):
    objective, t = make(path, prediction), times(path)
    latents, noise, _ = tensors(1)
    x_t, target = objective.add_noise(latents, noise, t), objective.target(latents, noise, t)
    alpha, sigma = objective.alpha_sigma(t)
    # fp32 rounding of x_t, times what the division by alpha (or sigma) makes of it.
    tolerance = 2e-6 * float(1 + (1 / alpha).max() + (1 / sigma).max())
    assert (objective.to_velocity(target, x_t, t) - (noise - latents)).abs().max() < tolerance


@pytest.mark.parametrize(("path", "prediction"), COMBINATIONS)
def test_x0_and_noise_of_any_prediction_make_up_x_t(path, prediction):
    objective, t = make(path, prediction), times(path)
    pred, x_t, _ = tensors(2)
    x0, noise = implied(objective, pred, x_t, t)
    alpha, sigma = objective.alpha_sigma(t)
    scale = float(1 + x0.abs().max() + noise.abs().max())
    assert (objective.add_noise(x0, noise, t) - x_t).abs().max() < 1e-6 * scale
    # And the prediction made from them is the one we started from.
    error = (objective.target(x0, noise, t) - pred).abs().max()
    assert error < 2e-6 * scale * float(1 + (1 / alpha).max() + (1 / sigma).max())


def test_targets_are_those_of_the_table():
    latents, noise, _ = tensors(3)
    t = times("vp_cosine")
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in make("vp_cosine", "v").alpha_sigma(t))
    v = make("vp_cosine", "v").target(latents, noise, t)
    assert torch.equal(v, -sigma * latents + alpha * noise)
    assert torch.equal(make(prediction="flow").target(latents, noise, t), noise - latents)
    assert torch.equal(make("sd", "epsilon").target(latents, noise, t), noise)
    assert torch.equal(make(prediction="sample").target(latents, noise, t), latents)


def test_edm_preconditioning_is_that_of_karras_table_1():
    objective, (latents, noise, _) = make("edm", "edm"), tensors(4)
    t, sd = times("edm"), 0.7
    sigma = (0.002 * (80.0 / 0.002) ** t.double()).view(-1, 1, 1, 1)
    c_skip = sd**2 / (sigma**2 + sd**2)
    c_out = sigma * sd / (sigma**2 + sd**2).sqrt()
    c_in = 1 / (sigma**2 + sd**2).sqrt()
    noisy = latents + sigma * noise
    x_t = objective.add_noise(latents, noise, t)
    assert torch.allclose(x_t.double(), c_in * noisy, atol=1e-5)
    target = objective.target(latents, noise, t)
    # F's target by eq. 8; its fp64 form divides by c_out, hence the wider tolerance at small sigma.
    assert torch.allclose(target.double(), (latents - c_skip * noisy) / c_out, atol=1e-4)
    pred = tensors(5)[0]
    denoised = c_skip * x_t.double() / c_in + c_out * pred
    assert torch.allclose(implied(objective, pred, x_t, t)[0].double(), denoised, atol=1e-5)
    # lambda(sigma) = 1 / c_out^2 on the denoiser's error is 1 on F's.
    terms = objective.loss(pred, latents, noise, t)
    weighted = ((denoised - latents) / c_out).square().flatten(1).mean(1)
    assert torch.allclose(terms.loss.double(), weighted, rtol=1e-4)


def test_alpha_ends_at_exactly_zero_where_the_path_ends_in_noise():
    for path, last in (("rectified_flow", 1.0), ("vp_cosine", 1.0), ("sd_ztsnr", 0.999)):
        alpha, sigma = make(path).alpha_sigma(torch.tensor([last]))
        assert alpha.item() == 0.0, path
        assert sigma.item() == 1.0, path


def test_what_a_config_knows_of_its_paths_ends_is_what_tensors_come_to():
    for path in PATHS:
        objective = make(path)
        ends = objective.config.path.snap(np.array([0.0, 1.0]))
        found = objective.alpha_sigma(torch.from_numpy(ends).float())
        np.testing.assert_allclose(objective.config.path.ends(), found, rtol=1e-5)  # fp32


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "prediction", "weighting"), WEIGHTED)
def test_a_weighted_loss_is_the_weight_on_x0_times_the_x0_error(path, prediction, weighting):
    objective, t = make(path, prediction, weighting=weighting), times(path)
    latents, noise, pred = tensors(7)
    terms = objective.loss(pred, latents, noise, t)
    alpha, sigma = (c.double() for c in objective.alpha_sigma(t))
    snr = (alpha / sigma).square().numpy()
    # The x0 error by reconstruction in fp64, not by the code's own ratio of errors.
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    x_t = a * latents + s * noise
    x0 = {
        "sample": lambda p: p,
        "epsilon": lambda p: (x_t - s * p) / a,
        "v": lambda p: (a * x_t - s * p) / (a**2 + s**2),
        "flow": lambda p: (x_t - s * p) / (a + s),
        "edm": lambda p: (
            (a * 0.49 * x_t + s * 0.7 * (a**2 * 0.49 + s**2).sqrt() * p) / (a**2 * 0.49 + s**2)
        ),
    }[prediction](pred.double())
    x0_mse = (x0 - latents).square().flatten(1).mean(1)
    assert torch.allclose(terms.x0_mse.double(), x0_mse, rtol=1e-4)
    expected = torch.from_numpy(WEIGHT_ON_X0[weighting](snr)) * x0_mse
    assert torch.allclose(
        terms.loss.double(), expected, rtol=2e-4
    )  # fp32 of alpha, sigma near 0 and 1


@pytest.mark.parametrize(("path", "prediction"), COMBINATIONS)
def test_no_weight_loss_or_x0_error_is_nan_or_infinite_at_either_end(path, prediction):
    ends = torch.tensor([0.0, 1e-30, 1e-7, 1.0 - 6e-8, 1.0])
    if make(path, "v").config.path.discrete:
        ends = torch.tensor([0.0, 0.001, 0.5, 0.998, 0.999])
    latents, noise, pred = (x[:5] for x in tensors(8))
    for weighting in ("none", *WEIGHT_ON_X0):
        if (path, prediction, weighting) in UNBOUNDED:
            continue
        terms = make(path, prediction, weighting=weighting).loss(pred, latents, noise, ends)
        assert terms.loss.isfinite().all(), weighting
        assert terms.x0_mse.isfinite().all(), weighting
        assert (terms.loss >= 0).all(), weighting


def test_velocity_is_the_loss_of_flow_of_a_network_that_predicts_x0():
    flow, sample = make(), make(prediction="sample", weighting={"kind": "velocity", "t_min": 0.1})
    latents, noise, x0 = tensors(10)
    t = torch.linspace(0.1, 1, 32)
    x_t = flow.add_noise(latents, noise, t)
    pred = (x_t - x0) / t.view(-1, 1, 1, 1)
    loss = sample.loss(x0, latents, noise, t).loss
    torch.testing.assert_close(loss, flow.loss(pred, latents, noise, t).loss, rtol=1e-5, atol=0)
    assert sample.weight(torch.tensor([0.0, 0.05])).tolist() == pytest.approx([100, 100])


def test_epsilon_on_levels_that_end_all_but_in_noise_is_noted_and_trained():
    data = {"path": PATHS["cosine_betas"], "prediction": "epsilon"}
    (note,) = parse_config(ObjectiveConfig, data, "test").notes()
    assert "ends at SNR 2e-09, as iDDPM's" in note
    assert make("sd", "epsilon").config.notes() == make("cosine_betas", "v").config.notes() == []


@pytest.mark.parametrize("weighting", [w for w in WEIGHT_ON_X0 if w != "velocity"])
def test_the_terminal_step_of_a_zero_terminal_snr_path_is_trained(weighting):
    t = torch.tensor([0.998, 0.999])
    before, terminal = make("sd_ztsnr", "v", weighting=weighting).weight(t).tolist()
    assert terminal == 1.0
    assert before < 0.1  # the form itself goes to 0 there
    options = {"kind": weighting, "terminal_weight": 0.25}
    assert make("sd_ztsnr", "v", weighting=options).weight(t)[1].item() == 0.25


def test_pseudo_huber_is_squared_error_when_small_and_linear_when_large():
    latents, noise, _ = tensors(9)
    t, c = times("rectified_flow"), 0.3
    huber = make(loss={"kind": "pseudo_huber", "c": c})
    target = huber.target(latents, noise, t)
    for size, expected in ((1e-4, 1e-8), (1e3, 2 * c * (math.hypot(1e3, c) - c))):
        terms = huber.loss(target + size, latents, noise, t)
        # 1e-8 is measured through fp32 sums of order 1, so relative to a rounding of 1e-7 / 1e-4.
        assert torch.allclose(terms.loss, torch.tensor(expected), rtol=1e-2)
    assert terms.x0_mse.mean() > 1e4  # squared still: the measure is the same for every loss


# --- timestep distributions ----------------------------------------------------------------------


def shifted(cdf: Callable, a: float) -> Callable:
    """t is a u / (1 + (a - 1) u) of a u with this CDF."""
    return lambda t: cdf(t / (a - (a - 1) * t))


def mode_cdf(scale: float) -> Callable:
    """The map falls from t(0) = 1 to t(1) = 0, so P(T <= t) = 1 - u(t); inverted on a fine grid."""
    u = np.linspace(1, 0, 200_001)
    t = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    return lambda x: 1 - np.interp(x, t, u)


def cosmap_cdf(t):
    """Integral of 2 / (pi - 2 pi t + 2 pi t^2)."""
    density = lambda x: 2 / (np.pi - 2 * np.pi * x + 2 * np.pi * x * x)  # noqa: E731
    grid = np.linspace(0, 1, 2001)
    return np.interp(t, grid, integrate.cumulative_simpson(density(grid), x=grid, initial=0))


def log_normal_cdf(t):
    low, high = np.log(0.002), np.log(80.0)
    ends = [(e + 0.5) / 1.2 for e in (low, high)]
    return stats.truncnorm(*ends, loc=-0.5, scale=1.2).cdf(low + (high - low) * t)


LOGIT_NORMAL = {"kind": "logit_normal", "mean": 0.5, "std": 0.8}


def logit_normal_cdf(t):
    with np.errstate(divide="ignore"):
        return stats.norm.cdf((logit(t) - 0.5) / 0.8)


DISTRIBUTIONS = {
    "uniform": ({}, lambda t: t),
    "logit_normal": ({"timesteps": LOGIT_NORMAL}, logit_normal_cdf),
    "mode": ({"timesteps": {"kind": "mode", "scale": 1.29}}, mode_cdf(1.29)),
    "mode_negative": ({"timesteps": {"kind": "mode", "scale": -0.9}}, mode_cdf(-0.9)),
    "cosmap": ({"timesteps": "cosmap"}, cosmap_cdf),
    "shift": ({"shift": {"kind": "constant", "value": 3.0}}, shifted(lambda t: t, 3.0)),
    "shifted_logit_normal": (
        {"timesteps": LOGIT_NORMAL, "shift": {"kind": "constant", "value": 3.0}},
        shifted(logit_normal_cdf, 3.0),
    ),
    "resolution": (
        {"shift": {"kind": "resolution", "base_pixels": 256}},
        shifted(lambda t: t, 4.0),
    ),
    "dimension": ({"shift": "dimension"}, shifted(lambda t: t, 8.0)),  # 64 channels
    # 64 x 64 latent pixels are 1024 tokens, a fifth of the way from 256 to 4096.
    "flux": ({"shift": "flux"}, shifted(lambda t: t, math.exp(0.5 + 0.65 * 768 / 3840))),
    "log_normal": (
        {
            "path": {"kind": "edm"},
            "prediction": "edm",
            "timesteps": {"kind": "log_normal", "mean": -0.5, "std": 1.2},
        },
        log_normal_cdf,
    ),
}


def distribution(name: str) -> tuple[Objective, Callable]:
    options, cdf = DISTRIBUTIONS[name]
    data = {"timesteps": "uniform", **options}
    return Objective(parse_config(ObjectiveConfig, data, "test")), cdf


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_global_batch_of_t_follows_its_closed_form_to_one_part_in_its_size(name):
    objective, cdf = distribution(name)
    size = 4096
    t = objective.draw_t(0, 3, size, (64, 64, 64)).double().numpy()
    statistic = stats.kstest(t, cdf).statistic
    # One sample in each 1/B of probability, so the empirical CDF is never further than 1/B.
    assert statistic < 1.01 / size + 2e-5  # fp32 t, interpolated CDFs


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_one_place_in_the_batch_follows_the_same_density_over_steps(name):
    objective, cdf = distribution(name)
    t = [objective.draw_t(1, step, 3, (64, 64, 64))[1].item() for step in range(1000)]
    assert stats.kstest(t, cdf).pvalue > 1e-3  # fixed seeds: fails always or never


def test_a_uniform_share_is_mixed_in_sample_by_sample():
    options = {
        "timesteps": {"kind": "logit_normal", "mean": 0.0, "std": 0.2},
        "uniform_fraction": 0.3,
    }
    objective = make(**options)
    t = torch.stack([objective.draw_t(2, step, 64, (8, 8)) for step in range(200)]).double().numpy()
    cdf = lambda x: 0.3 * x + 0.7 * stats.norm.cdf(logit(np.clip(x, 1e-9, 1 - 1e-9)) / 0.2)  # noqa: E731
    assert stats.kstest(t.ravel(), cdf).statistic < 1.63 / math.sqrt(t.size)  # the 1% level of iid
    # The narrow part lies in 0.3..0.7, so what lies outside is 60% of the uniform part of each batch.
    outside = ((t < 0.3) | (t > 0.7)).sum(1)
    assert outside.min() > 0
    assert outside.max() < 30  # a batch drawn whole would put all or none there
    assert outside.mean() == pytest.approx(64 * 0.3 * 0.6, rel=0.1)


def test_a_positive_mean_leans_to_noise_on_every_path():
    # A descending table indexed with the sampled density turns the sign: 0.398.
    for path in ("rectified_flow", "vp_cosine", "sd"):
        objective = make(path, "v", timesteps={"kind": "logit_normal", "mean": 0.5, "std": 1.0})
        mean = objective.draw_t(0, 0, 4096, (8, 8)).mean().item()
        assert mean == pytest.approx(0.602, abs=1e-3), path


def test_every_level_of_a_discrete_path_is_drawn_equally_often_by_uniform():
    t = make("sd", "v").draw_t(0, 0, 5000, (8, 8))
    k = (t.double() * 1000).round().long()
    assert torch.allclose(t.double() * 1000, k.double(), atol=1e-4)
    assert torch.bincount(k, minlength=1000).tolist() == [5] * 1000


@pytest.mark.parametrize("path", ["rectified_flow", "vp_cosine"])
def test_a_shift_multiplies_sigma_over_alpha(path):
    plain = make(path, "v")
    moved = make(path, "v", shift={"kind": "constant", "value": 2.5})
    pairs = [o.alpha_sigma(o.draw_t(0, 0, 64, (8, 8)).double()) for o in (plain, moved)]
    ratio = [s.double() / a.double() for a, s in pairs]
    assert torch.allclose(ratio[1], 2.5 * ratio[0], rtol=1e-4)  # fp32 t near 1


def test_the_mode_scale_beyond_which_the_map_folds_back_is_refused():
    u = np.linspace(0, 1, 10_001)
    for scale, folds in ((1.75, False), (1.76, True), (-1.0, False), (-1.01, True)):
        slope = np.diff(1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u))
        assert bool((slope > 1e-12).any()) is folds
        if folds:
            with pytest.raises(InputError, match=r"timesteps\.scale"):
                make(timesteps={"kind": "mode", "scale": scale})
        else:
            make(timesteps={"kind": "mode", "scale": scale})


# --- draws ---------------------------------------------------------------------------------------


def test_noise_of_a_sample_depends_on_its_place_in_the_global_batch_alone():
    shape = (4, 8, 8)
    whole = draw_noise(5, 17, range(16), shape)
    for ranks, micro in ((1, 4), (2, 4), (4, 2)):
        for rank in range(ranks):
            own = list(range(rank, 16, ranks))
            for begin in range(0, len(own), micro):
                part = own[begin : begin + micro]
                assert torch.equal(draw_noise(5, 17, torch.tensor(part), shape), whole[part])


def test_noise_is_standard_normal_and_differs_in_every_respect():
    whole = draw_noise(5, 17, range(64), (4, 16, 16))
    assert stats.kstest(whole.numpy().ravel(), "norm").pvalue > 1e-3  # fixed seed
    others = [
        draw_noise(6, 17, range(64), (4, 16, 16)),
        draw_noise(5, 18, range(64), (4, 16, 16)),
        draw_noise(5, 17, range(64, 128), (4, 16, 16)),
        draw_noise(5, 17, range(64), (4, 16, 16), purpose="posterior"),
        draw_noise(5 + 2**32, 17, range(64), (4, 16, 16)),
    ]
    for other in others:
        correlation = float((whole * other).mean())
        assert abs(correlation) < 4 / math.sqrt(whole.numel())  # 4 standard errors
    # Counters do not run together: step 1, place 17 is not step 11, place 7.
    assert not torch.equal(draw_noise(5, 1, [17], (8,)), draw_noise(5, 11, [7], (8,)))


def test_caption_dropout_has_its_rate_and_is_pure():
    dropped = torch.stack([draw_dropout(0, step, 256, 0.1) for step in range(200)])
    assert dropped.dtype == torch.bool
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.006)  # 4.5 standard errors
    assert torch.equal(draw_dropout(0, 7, 256, 0.1), dropped[7])
    assert not draw_dropout(0, 0, 64, 0.0).any()
    assert draw_dropout(0, 0, 64, 1.0).all()


def test_t_of_a_step_is_pure_and_new_at_each_step():
    objective = Objective(ObjectiveConfig())
    first = objective.draw_t(3, 11, 64, (8, 8))
    assert torch.equal(first, objective.draw_t(3, 11, 64, (8, 8)))
    for seed, step in ((3, 12), (4, 11)):
        assert not torch.equal(first, objective.draw_t(seed, step, 64, (8, 8)))


# --- the config ----------------------------------------------------------------------------------

REFUSED = [
    (
        {"path": "rectified_flow", "prediction": "epsilon"},
        "ends at SNR 0: there x_t is the noise itself",
    ),
    ({"path": "vp_cosine", "prediction": "epsilon"}, "ends at SNR 0"),
    ({"path": PATHS["sd_ztsnr"], "prediction": "epsilon", "timesteps": "uniform"}, "ends at SNR 0"),
    ({"network": {"prediction": "flow"}}, "network has no effect"),
    ({"network": {"path": "vp_cosine", "prediction": "epsilon"}}, "ends at SNR 0"),
    ({"prediction": "edm"}, "prediction edm needs sigma_data"),
    ({"timesteps": "log_normal"}, "path rectified_flow is not made of sigma"),
    (
        {"path": "vp_discrete", "prediction": "v", "shift": "flux"},
        "shift has no meaning on path vp_discrete",
    ),
    ({"path": "edm", "prediction": "edm", "shift": "flux"}, "shift has no meaning on path edm"),
    ({"timesteps": "uniform", "uniform_fraction": 0.1}, "every t is uniform already"),
    ({"weighting": {"kind": "min_snr", "terminal_weight": 2.0}}, "terminal_weight has no effect"),
    (
        {
            "path": "vp_discrete",
            "prediction": "v",
            "weighting": {"kind": "debiased", "terminal_weight": 0},
        },
        "terminal_weight has no effect",
    ),
    ({"prediction": "sample", "weighting": "debiased"}, "infinite at t = 0 of path rectified_flow"),
    (
        {"path": {"kind": "edm", "sigma_min": 2, "sigma_max": 1}},
        "sigma_min 2.0 must be below sigma_max",
    ),
    ({"path": "rectified"}, "rectified"),
    ({"weighting": {"kind": "min_snr", "gama": 4}}, "did you mean 'gamma'?"),
    ({"weightning": "min_snr"}, "did you mean 'weighting'?"),
    ({"preset": "sd3"}, "valid: sd15-epsilon, sd2-v"),
    ({"preset": "sd15-epsilon", "path": {"zero_terminal_snr": True}}, "ends at SNR 0"),
]


@pytest.mark.parametrize(("data", "reason"), REFUSED, ids=[r[:40] for _, r in REFUSED])
def test_what_cannot_be_meant_or_learnt_is_refused_with_its_reason(data, reason):
    with pytest.raises(InputError) as error:
        parse_config(ObjectiveConfig, data, "run.yaml")
    assert reason in str(error.value)
    assert str(error.value).startswith("run.yaml: ")


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_a_preset_loads_and_its_dump_loads_to_the_same(name):
    config = parse_config(ObjectiveConfig, {"preset": name}, "test")
    assert parse_config(ObjectiveConfig, config.model_dump(mode="json"), "test") == config


def test_the_default_is_a_preset_by_name():
    preset = parse_config(ObjectiveConfig, {"preset": "sd3-rf-logit-normal"}, "test")
    assert preset == ObjectiveConfig()


def test_a_key_beside_a_preset_changes_that_key_alone():
    data = {"preset": "nai3-v-ztsnr", "weighting": {"gamma": 2.0}, "timesteps": "cosmap"}
    config = parse_config(ObjectiveConfig, data, "test")
    base = parse_config(ObjectiveConfig, {"preset": "nai3-v-ztsnr"}, "test")
    assert config.weighting.model_dump() == {**base.weighting.model_dump(), "gamma": 2.0}
    assert config.timesteps.kind == "cosmap"
    assert config.path == base.path
    other = parse_config(
        ObjectiveConfig, {"preset": "nai3-v-ztsnr", "weighting": "debiased"}, "test"
    )
    assert other.weighting.kind == "debiased"


# --- agreement with diffusers ---------------------------------------------------------------------


def ddpm(betas: str, **options) -> DDPMScheduler:
    if betas == "scaled_linear":
        options |= {"beta_start": 0.00085, "beta_end": 0.012}
    return DDPMScheduler(beta_schedule=betas, **options)


SCHEDULES = [("sd", "scaled_linear"), ("ddpm", "linear"), ("cosine_betas", "squaredcos_cap_v2")]


@pytest.mark.parametrize(("path", "betas"), SCHEDULES)
def test_discrete_paths_agree_with_diffusers(path, betas):
    scheduler, k = ddpm(betas), torch.arange(1000)
    objective = make(path, "v")
    alpha, sigma = objective.alpha_sigma(k / 1000)
    # diffusers multiplies 1000 fp32 factors, we fp64 ones.
    assert torch.allclose(alpha**2, scheduler.alphas_cumprod, rtol=1e-3, atol=1e-7)
    k = k[::31]
    latents, noise, _ = tensors(12, batch=len(k))
    x_t = objective.add_noise(latents, noise, k / 1000)
    assert torch.allclose(x_t, scheduler.add_noise(latents, noise, k), atol=1e-4)
    velocity = scheduler.get_velocity(latents, noise, k)
    assert torch.allclose(objective.target(latents, noise, k / 1000), velocity, atol=1e-4)
    snr = (alpha / sigma)[k] ** 2
    assert torch.allclose(snr, compute_snr(scheduler, k), rtol=2e-3)


def test_zero_terminal_snr_agrees_with_diffusers():
    betas = rescale_zero_terminal_snr(ddpm("scaled_linear").betas)
    alpha, sigma = make("sd_ztsnr").alpha_sigma(torch.arange(1000) / 1000)
    assert torch.allclose(alpha**2, torch.cumprod(1 - betas, 0), rtol=1e-3, atol=1e-6)
    assert torch.allclose(alpha**2 + sigma**2, torch.tensor(1.0), atol=1e-6)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("logit_normal", 0.5, 0.8, None), LOGIT_NORMAL),
        (("mode", None, None, 1.29), {"kind": "mode", "scale": 1.29}),
    ],
)
def test_timestep_densities_agree_with_diffusers(theirs, ours):
    scheme, mean, std, scale = theirs
    generator = torch.Generator().manual_seed(0)
    drawn = compute_density_for_timestep_sampling(
        scheme, 20_000, mean, std, scale, "cpu", generator
    )
    t = make(timesteps=ours).draw_t(0, 0, 20_000, (8, 8))
    assert stats.ks_2samp(drawn.numpy(), t.numpy()).pvalue > 1e-3  # fixed seed


def test_cosmap_density_is_diffusers_cosmap_weighting():
    t = torch.linspace(0.05, 0.95, 19)
    density = compute_loss_weighting_for_sd3("cosmap", t)
    numeric = np.gradient(cosmap_cdf(np.linspace(0, 1, 2001)), 1 / 2000)[100:1901:100]
    np.testing.assert_allclose(density.numpy(), numeric, rtol=1e-3)
