"""Generation: latents from noise through diffusers schedulers, for every path and prediction.

Any path is the straight one after a scaling: x_t / (alpha + sigma) is (1 - tau) x0 + tau noise with
tau = sigma / (alpha + sigma). So one adapter hands every scheduler explicit tau and the velocity
noise - x0, and neither the path, the prediction nor a zero terminal SNR concerns it.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from models.config import Config
from pipeline.objective import Objective, expand

Network = Callable[..., Tensor]


class SamplerConfig(Config):
    """How pictures are drawn from a trained network; guidance_scale 1 is no guidance."""

    name: Literal["euler"] = "euler"
    num_steps: int = Field(30, ge=1, le=1000)
    guidance_scale: float = Field(1.0, ge=0)
    guidance_rescale: float = Field(0.0, ge=0, le=1)  # phi of Lin 2305.08891, sec. 3.4
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # of t, Kynkaanniemi 2404.07724
    seed: int = 0


@torch.no_grad()
def generate(
    network: Network,
    objective: Objective,
    noise: Float[Tensor, "B C h w"],
    conditioning: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor] | None,
    config: SamplerConfig,
) -> Float[Tensor, "B C h w"]:
    """Normalised latents, fp32, from standard normal `noise`.

    `network(x_t, t, **conditioning)` returns the objective's prediction, t fp32 (B,).
    `unconditional` holds the same keys and shapes, and is needed where guidance_scale is not 1.
    """
    path = objective.config.path
    times = torch.from_numpy(path.sampling_times(config.num_steps)).float().to(noise.device)
    alpha, sigma = objective.alpha_sigma(times)
    scale = alpha + sigma
    tau = sigma / scale
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=tau.tolist(), device=noise.device)
    x = noise.float() * (alpha[0] ** 2 + sigma[0] ** 2).sqrt() / scale[0]
    for i, timestep in enumerate(scheduler.timesteps):
        t = times[i].expand(len(x))
        x_t = x * scale[i]
        pred = guided(network, x_t, t, conditioning, unconditional, config)
        x = scheduler.step(objective.to_velocity(pred, x_t, t), timestep, x).prev_sample
    return x


def guided(
    network: Network,
    x_t: Tensor,
    t: Tensor,
    conditioning: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor] | None,
    config: SamplerConfig,
) -> Tensor:
    """Prediction under classifier-free guidance (Ho 2207.12598), both halves in one batch, fp32."""
    low, high = config.guidance_interval
    if config.guidance_scale == 1 or not low <= float(t[0]) <= high:
        return network(x_t, t, **conditioning).float()
    assert unconditional is not None
    both = {key: torch.cat([unconditional[key], value]) for key, value in conditioning.items()}
    uncond, cond = network(torch.cat([x_t, x_t]), torch.cat([t, t]), **both).float().chunk(2)
    pred = uncond + config.guidance_scale * (cond - uncond)
    if config.guidance_rescale > 0:
        ratio = cond.flatten(1).std(1) / pred.flatten(1).std(1)
        pred = pred * expand(config.guidance_rescale * ratio + 1 - config.guidance_rescale, pred)
    return pred
