"""The x0 error on held-out samples at fixed noise levels: one measure, whatever the objective.

It does not depend on path, prediction, weighting or distribution of t, so runs that differ in them compare.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from data_prep.schema import CodecRecord
from models.vae import sample_latents
from pipeline.batch import Batch
from pipeline.objective import Objective, draw_noise
from pipeline.sampling import Network

LOG_SNR = (-5, -4, -2, 0, 2, 4, 6)


def time_at(objective: Objective, log_snr: float) -> float:
    """The t of a path whose SNR is nearest."""
    t = torch.arange(1000) / 1000
    if objective.config.path.kind != "vp_discrete":
        t = torch.linspace(1e-4, 1 - 1e-4, 20_001)
    alpha, sigma = objective.alpha_sigma(t)
    return float(t[(2 * (alpha / sigma).log() - log_snr).abs().argmin()])


@torch.no_grad()
def x0_errors(
    network: Network, objective: Objective, codec: CodecRecord, batch: Batch, rounds: int = 1
) -> Float[Tensor, "levels b"]:
    """Mean squared error of the x0 that the network implies, a sample, at each of LOG_SNR.

    The noise is a function of batch.indices, so any cut of a larger batch gives the same figures; with
    `rounds` draws of it. The batch lies on the network's device.
    """
    device, places = batch.moments.device, batch.indices
    shape = (codec.latent_channels, *batch.moments.shape[-2:])
    posterior = draw_noise(0, 0, places, shape, device, "posterior")
    latents = sample_latents(batch.moments, posterior, codec.scaling_factor, codec.shift_factor)
    given = {n: getattr(batch, n) for n in ("text_emb", "text_mask", "pooled", "micro", "label")}
    errors = torch.zeros(len(LOG_SNR), len(places), device=device)
    for level, log_snr in enumerate(LOG_SNR):
        t = torch.full((len(places),), time_at(objective, log_snr), device=device)
        for number in range(rounds):
            noise = draw_noise(1, level * rounds + number, places, shape, device)
            pred = network(objective.add_noise(latents, noise, t), t, **given)
            errors[level] += objective.loss(pred, latents, noise, t).x0_mse / rounds
    return errors
