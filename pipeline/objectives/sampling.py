"""Generation: latents from noise through diffusers schedulers, for every path and prediction.

Any path is the straight one after a scaling: x_t / (alpha + sigma) is (1 - tau) x0 + tau noise with
tau = sigma / (alpha + sigma). So one adapter gives a scheduler explicit tau and the velocity
noise - x0; the path, the prediction and a zero terminal SNR are no concern of it.
"""

from collections.abc import Callable, Iterable
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


class Schedule(NamedTuple):
    """The noise levels of one generation: t (n,), alpha and sigma (n + 1,) ending at 1 and 0."""

    times: Tensor
    alpha: Tensor
    sigma: Tensor


def check_sampler(config: SamplerConfig, objective: Objective) -> None:
    """Raises InputError where the sampler's options have no meaning on the objective's path."""
    path = objective.config.path
    if config.shift is not None and not path.shiftable:
        raise InputError(
            f"sampler.shift has no meaning on path {path.kind}: its noise levels are fixed. Remedy: remove it"
        )


@torch.no_grad()
def generate(
    network: Network,
    objective: Objective,
    noise: Float[Tensor, "B C h w"],
    conditions: Conditions,
    unconditional: Conditions | None,
    config: SamplerConfig,
    indices: Iterable[int] | None = None,
) -> Float[Tensor, "B C h w"]:
    """Normalised latents, fp32, from standard normal `noise`.

    `network(x_t, t, conditions)` returns the objective's prediction; t is fp32 (B,).
    `unconditional` has the same fields and shapes; guidance needs it. Sample i's own randomness in
    euler_ancestral is a function of (seed, indices[i]), 0.. by default, whatever the batch.
    """
    check_sampler(config, objective)
    if config.guidance_scale != 1 and unconditional is None:
        raise ValueError(
            f"guidance_scale {config.guidance_scale}: expected unconditional conditions"
        )
    schedule = make_schedule(objective, config, noise)

    def velocity(i: int, x_t: Tensor) -> Tensor:
        t = schedule.times[i].expand(len(x_t))
        pred = guided(network, x_t, t, conditions, unconditional, config)
        return objective.to_velocity(pred, x_t, t)

    x_t = noise.float() * torch.hypot(schedule.alpha[0], schedule.sigma[0])
    if config.name == "euler_ancestral":
        rows = list(range(len(noise)) if indices is None else indices)
        return sample_ancestral(velocity, x_t, schedule, config.seed, rows)
    if config.name == "ddim":
        return sample_ddim(velocity, x_t, schedule)
    return sample_flow(velocity, x_t, schedule, config.name)


Velocity = Callable[[int, Tensor], Tensor]  # (i, x_t) -> noise - x0, at level i of the schedule


def make_schedule(objective: Objective, config: SamplerConfig, noise: Tensor) -> Schedule:
    height, width = noise.shape[-2:]
    times = objective.sampling_times(config.num_steps, (height, width), config.shift).to(
        noise.device
    )
    alpha, sigma = objective.alpha_sigma(times)
    clean, no_noise = torch.ones_like(alpha[:1]), torch.zeros_like(alpha[:1])
    return Schedule(times, torch.cat([alpha, clean]), torch.cat([sigma, no_noise]))


def sample_flow(velocity: Velocity, x_t: Tensor, schedule: Schedule, name: str) -> Tensor:
    """Schedulers of the straight path, which x_t / (alpha + sigma) follows."""
    scale = schedule.alpha + schedule.sigma
    scheduler = flow_scheduler(name, schedule.sigma / scale)
    x = x_t / scale[0]
    for call, timestep in enumerate(scheduler.timesteps):
        i = (
            (call + 1) // 2 if name == "heun" else call
        )  # Heun calls twice at each level but the first
        x = scheduler.step(velocity(i, x * scale[i]), timestep, x).prev_sample
    return x


def flow_scheduler(name: str, tau: Tensor) -> Any:
    """A diffusers scheduler that takes velocity and steps through `tau` (n + 1,), as given."""
    import diffusers  # takes seconds, and training without pictures does not need it

    levels, num_steps = tau[:-1].cpu().numpy(), len(tau) - 1
    if name == "euler":
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=levels)
    elif name == "heun":
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        scheduler.set_timesteps(num_steps)
        scheduler.sigmas = torch.cat([tau[:1], tau[1:-1].repeat_interleave(2), tau[-1:]])
    elif name == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction"
        )
        scheduler.set_timesteps(sigmas=levels)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction"
        )
        scheduler.set_timesteps(num_steps)
        scheduler.sigmas = tau.cpu()
    scheduler.set_begin_index(0)  # else it looks the timestep up, and two may be equal
    return scheduler


def sample_ddim(velocity: Velocity, x_t: Tensor, schedule: Schedule) -> Tensor:
    """DDIM (Song 2010.02502) at eta 0 on x_t / sqrt(alpha^2 + sigma^2), a variance-preserving path.

    The scheduler gets a table of exactly the levels to visit: its own walks k by 1000 // num_steps,
    which misses the levels that it announces wherever num_steps does not divide 1000.
    """
    import diffusers

    power = torch.hypot(schedule.alpha, schedule.sigma)
    num_steps = len(schedule.times)
    scheduler: Any = diffusers.DDIMScheduler(
        num_train_timesteps=num_steps, prediction_type="sample", clip_sample=False
    )
    scheduler.alphas_cumprod = (schedule.alpha / power).square()[:-1].flip(0)
    scheduler.set_timesteps(num_steps)
    x = x_t / power[0]
    for i, timestep in enumerate(scheduler.timesteps):
        x_t = x * power[i]
        x0 = (x_t - schedule.sigma[i] * velocity(i, x_t)) / (schedule.alpha[i] + schedule.sigma[i])
        x = scheduler.step(x0, timestep, x).prev_sample
    return x


def sample_ancestral(
    velocity: Velocity, x_t: Tensor, schedule: Schedule, seed: int, indices: list[int]
) -> Tensor:
    """Euler ancestral; sample i's fresh noise at each step is a function of (seed, step, indices[i])."""
    for i in range(len(schedule.times)):
        fresh = draw_noise(seed, i, indices, tuple(x_t.shape[1:]), x_t.device, purpose="ancestral")
        levels = (*schedule.alpha[i : i + 2], *schedule.sigma[i : i + 2])
        x_t = ancestral_step(x_t, velocity(i, x_t), fresh, *levels)
    return x_t


def ancestral_step(
    x_t: Tensor,
    velocity: Tensor,
    fresh: Tensor,
    alpha: Tensor,
    alpha_next: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
) -> Tensor:
    """A draw from q(x_next | x_t, x0) (Ho 2006.11239, eq. 6) for any alpha and sigma.

    Of sigma_next the part r goes on along the predicted noise and sqrt(1 - r^2) is fresh, so the
    variance is sigma_next^2 on every path; r, the ratio of both sigma/alpha, is 0 after SNR 0, where
    diffusers' EulerAncestralDiscreteScheduler, the same step on VP paths, has no form.
    """
    x0 = (x_t - sigma * velocity) / (alpha + sigma)
    r = alpha * sigma_next / (alpha_next * sigma)
    noise = r * (x0 + velocity) + (1 - r**2).clamp_min(0).sqrt() * fresh
    return alpha_next * x0 + sigma_next * noise


def guided(
    network: Network,
    x_t: Tensor,
    t: Tensor,
    conditions: Conditions,
    unconditional: Conditions | None,
    config: SamplerConfig,
) -> Tensor:
    """Prediction under classifier-free guidance (Ho 2207.12598), both halves in one batch, fp32."""
    low, high = config.guidance_interval
    if config.guidance_scale == 1 or unconditional is None or not low <= float(t[0]) <= high:
        return network(x_t, t, conditions).float()
    pairs = zip(unconditional, conditions, strict=True)
    both = Conditions(*(None if u is None or c is None else torch.cat([u, c]) for u, c in pairs))
    uncond, cond = network(torch.cat([x_t, x_t]), torch.cat([t, t]), both).float().chunk(2)
    pred = uncond + config.guidance_scale * (cond - uncond)
    if config.guidance_rescale > 0:
        # The floor is for a network that still predicts zero everywhere.
        ratio = cond.flatten(1).std(1) / pred.flatten(1).std(1).clamp_min(1e-12)
        pred = pred * expand(config.guidance_rescale * ratio + 1 - config.guidance_rescale, pred)
    return pred
