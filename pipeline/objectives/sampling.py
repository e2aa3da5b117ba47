"""Generation: latents from noise through diffusers schedulers, for every path and prediction.

Any path is the straight one after a scaling: x_t / (alpha + sigma) is (1 - tau) x0 + tau noise with
tau = sigma / (alpha + sigma). A scheduler is given explicit tau and the velocity noise - x0, so it need not
know the path, the prediction or a zero terminal SNR.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from models.conditions import Conditions
from models.config import InputError
from pipeline.data.randomness import draw_noise
from pipeline.objectives.config import SamplerConfig
from pipeline.objectives.objective import Objective, expand

Network = Callable[..., Tensor]
Velocity = Callable[[int, Tensor], Tensor]  # (i, x_t) -> noise - x0, at level i of the schedule


class Guidance(NamedTuple):
    """What the network is told of each picture, and what guidance leads away from: itself without the prompt, or a guide."""

    conditional: Conditions
    unconditional: Conditions | None = None
    guide: Network | None = None
    """A worse network of the same task, which is told the same as the better one."""


class Schedule(NamedTuple):
    """The noise levels of one generation: t (n,), alpha and sigma (n + 1,) ending at 1 and 0."""

    times: Tensor
    alpha: Tensor
    sigma: Tensor


@torch.no_grad()
def generate(
    network: Network,
    objective: Objective,
    noise: Float[Tensor, "B C h w"],
    guidance: Guidance,
    config: SamplerConfig,
    indices: Iterable[int] | None = None,
) -> Float[Tensor, "B C h w"]:
    """Normalised latents, fp32, from standard normal `noise`.

    `network(x_t, t, conditions)` returns the objective's prediction, or its own (`Objective.called`); t is fp32 (B,). In euler_ancestral, sample i's
    fresh noise is a function of (seed, indices[i]), whatever the batch; indices are 0, 1, ... by default.
    Raises InputError where the sampler's options have no meaning on the objective's path.
    """
    path, scale = objective.config.path, config.guidance_scale
    if config.shift is not None and not path.shiftable:
        raise InputError(
            f"sampler.shift has no meaning on path {path.kind}: its noise levels are fixed. Remedy: remove it"
        )
    if scale != 1 and guidance.unconditional is None and guidance.guide is None:
        raise ValueError(f"guidance_scale {scale}: expected unconditional conditions, or a guide")
    schedule = make_schedule(objective, config, noise)
    network = partial(objective.called, network)
    if guidance.guide is not None:
        guidance = guidance._replace(guide=partial(objective.called, guidance.guide))

    def velocity(i: int, x_t: Tensor) -> Tensor:
        t = schedule.times[i].expand(len(x_t))
        return objective.to_velocity(guided(network, x_t, t, guidance, config), x_t, t)

    x_t = noise.float() * torch.hypot(schedule.alpha[0], schedule.sigma[0])
    if config.name == "euler_ancestral":
        rows = list(range(len(noise)) if indices is None else indices)
        return sample_ancestral(velocity, x_t, schedule, config.seed, rows)
    return sample_flow(velocity, x_t, schedule, config.name)


def make_schedule(objective: Objective, config: SamplerConfig, noise: Tensor) -> Schedule:
    times = objective.sampling_times(config.num_steps, tuple(noise.shape[1:]), config.shift)
    alpha, sigma = objective.alpha_sigma(times := times.to(noise.device))
    clean, no_noise = torch.ones_like(alpha[:1]), torch.zeros_like(alpha[:1])
    return Schedule(times, torch.cat([alpha, clean]), torch.cat([sigma, no_noise]))


def sample_flow(velocity: Velocity, x_t: Tensor, schedule: Schedule, name: str) -> Tensor:
    """Run a scheduler of the straight path, which x_t / (alpha + sigma) follows."""
    scale = schedule.alpha + schedule.sigma
    scheduler = flow_scheduler(name, schedule.sigma / scale)
    x = x_t / scale[0]
    for call, timestep in enumerate(scheduler.timesteps):
        # Heun calls twice at each level but the first.
        i = (call + 1) // 2 if name == "heun" else call
        x = scheduler.step(velocity(i, x * scale[i]), timestep, x).prev_sample
    return x


def flow_scheduler(name: str, tau: Tensor) -> Any:
    """A diffusers scheduler that takes velocity and steps through `tau` (n + 1,), as given.

    Euler on the straight path is DDIM (Song 2010.02502) at eta 0 on a variance-preserving one.
    """
    import diffusers  # takes seconds, and training without pictures does not need it

    flow: Any = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    levels, num_steps = tau[:-1].cpu().numpy(), len(tau) - 1
    if name in ("euler", "ddim"):
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=levels)
    elif name == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(**flow)
        scheduler.set_timesteps(sigmas=levels)
    elif name == "heun":
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        scheduler.set_timesteps(num_steps)
        scheduler.sigmas = torch.cat([tau[:1], tau[1:-1].repeat_interleave(2), tau[-1:]])
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**flow)
        scheduler.set_timesteps(num_steps)
        scheduler.sigmas = tau.cpu()
    scheduler.set_begin_index(0)  # else it looks the timestep up, and two may be equal
    return scheduler


def sample_ancestral(
    velocity: Velocity, x_t: Tensor, schedule: Schedule, seed: int, indices: list[int]
) -> Tensor:
    """Euler ancestral; sample i's fresh noise at each step is a function of (seed, step, indices[i])."""
    for i in range(len(schedule.times)):
        fresh = draw_noise(seed, i, indices, tuple(x_t.shape[1:]), x_t.device, purpose="ancestral")
        x_t = ancestral_step(x_t, velocity(i, x_t), fresh, schedule, i)
    return x_t


def ancestral_step(
    x_t: Tensor, velocity: Tensor, fresh: Tensor, schedule: Schedule, i: int
) -> Tensor:
    """A draw from q(x_next | x_t, x0) (Ho 2006.11239, eq. 6), x_next at level i + 1, for any alpha and sigma.

    The part r of sigma_next goes on along the predicted noise and sqrt(1 - r^2) of it is fresh, so the variance
    is sigma_next^2 on every path. r, the ratio of both sigma/alpha, is 0 after SNR 0, where diffusers'
    EulerAncestralDiscreteScheduler, the same step on VP paths, is undefined.
    """
    (alpha, alpha_next), (sigma, sigma_next) = (x[i : i + 2] for x in schedule[1:])
    x0 = (x_t - sigma * velocity) / (alpha + sigma)
    r = alpha * sigma_next / (alpha_next * sigma)
    noise = r * (x0 + velocity) + (1 - r**2).clamp_min(0).sqrt() * fresh
    return alpha_next * x0 + sigma_next * noise


def guided(
    network: Network, x_t: Tensor, t: Tensor, guidance: Guidance, config: SamplerConfig
) -> Tensor:
    """Prediction, fp32, under classifier-free guidance (Ho 2207.12598), both halves in one batch, or by a guide:
    guide + scale (network - guide), autoguidance (Karras 2406.02507, eq. 2). Both call twice.
    """
    (low, high), (conditions, unconditional, guide) = config.guidance_interval, guidance
    if config.guidance_scale == 1 or not low <= float(t[0]) <= high:
        return network(x_t, t, conditions).float()
    if guide is not None:
        away, cond = (called(x_t, t, conditions).float() for called in (guide, network))
    else:
        assert unconditional is not None
        pairs = zip(unconditional, conditions, strict=True)
        both = [None if u is None or c is None else torch.cat([u, c]) for u, c in pairs]
        predicted = network(torch.cat([x_t, x_t]), torch.cat([t, t]), Conditions(*both))
        away, cond = predicted.float().chunk(2)
    pred = away + config.guidance_scale * (cond - away)
    if config.guidance_rescale > 0:
        # The floor serves a network that still predicts zero everywhere.
        ratio = cond.flatten(1).std(1) / pred.flatten(1).std(1).clamp_min(1e-12)
        pred = pred * expand(config.guidance_rescale * ratio + 1 - config.guidance_rescale, pred)
    return pred
