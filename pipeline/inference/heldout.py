"""The x0 error on held-out samples at fixed noise levels: one measure, whatever the objective.

It does not depend on path, prediction, weighting or distribution of t, so runs that differ in them compare.
The loss, which does, is measured beside it.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from data_prep.schema import CodecRecord
from models.vae import sample_latents
from pipeline import distributed
from pipeline.data.batch import Batch
from pipeline.data.randomness import draw_noise
from pipeline.objectives.objective import Objective
from pipeline.objectives.paths import NUM_TIMESTEPS
from pipeline.objectives.sampling import Network
from pipeline.training.monitor import NUM_LEVELS

LOG_SNR = (-5, -4, -2, 0, 2, 4, 6)


def time_at(objective: Objective, log_snr: float) -> float:
    """The t of a path whose SNR is nearest."""
    t = torch.arange(NUM_TIMESTEPS) / NUM_TIMESTEPS
    if not objective.config.path.discrete:
        t = torch.linspace(1e-4, 1 - 1e-4, 20_001)
    alpha, sigma = objective.alpha_sigma(t)
    return float(t[(2 * (alpha / sigma).log() - log_snr).abs().argmin()])


@torch.no_grad()
def terms_at(
    network: Network,
    objective: Objective,
    codec: CodecRecord,
    batch: Batch,
    times: Iterable[float],
    rounds: int = 1,
) -> tuple[Float[Tensor, "levels b"], Float[Tensor, "levels b"]]:
    """Each sample's weighted loss and mean squared error of the x0 that the network implies, at each t.

    The noise is a function of batch.indices, so any cut of a larger batch gives the same figures; with
    `rounds` draws of it. The batch lies on the network's device.
    """
    device, places = batch.moments.device, batch.indices
    shape = (codec.channels, *batch.moments.shape[-2:])
    posterior = draw_noise(0, 0, places, shape, device, "posterior")
    latents = sample_latents(batch.moments, posterior, codec.normalisation)
    times = list(times)
    loss, x0_mse = torch.zeros(2, len(times), len(places), device=device)
    for level, time in enumerate(times):
        t = torch.full((len(places),), time, device=device)
        for number in range(rounds):
            noise = draw_noise(1, level * rounds + number, places, shape, device)
            x_t = objective.add_noise(latents, noise, t)
            pred = objective.called(network, x_t, t, batch.conditions)
            terms = objective.loss(pred, latents, noise, t)
            loss[level] += terms.loss / rounds
            x0_mse[level] += terms.x0_mse / rounds
    return loss, x0_mse


def x0_errors(
    network: Network, objective: Objective, codec: CodecRecord, batch: Batch, rounds: int = 1
) -> Float[Tensor, "levels b"]:
    """The x0 error of each sample at each of LOG_SNR."""
    times = [time_at(objective, log_snr) for log_snr in LOG_SNR]
    return terms_at(network, objective, codec, batch, times, rounds)[1]


TIMES = [(level + 0.5) / NUM_LEVELS for level in range(NUM_LEVELS)]


def terms_by_part(
    network: Network,
    objective: Objective,
    codec: CodecRecord,
    batches: list[Batch],
    micro_batch: int,
) -> list[Float[Tensor, "2 levels b"]]:
    """Loss and x0 error at TIMES of this rank's parts of the batches: every world_size-th micro-batch."""
    parts = [rows for batch in batches for rows in batch.parts(micro_batch)]
    mine = parts[distributed.rank() :: distributed.world_size()]
    return [torch.stack(terms_at(network, objective, codec, rows, TIMES)).cpu() for rows in mine]


def means_by_noise_level(terms: list[Float[Tensor, "2 levels b"]]) -> dict[str, float]:
    """Means over the samples at TIMES, and over those: what training logs of its held-out samples."""
    means = torch.cat(terms, dim=2).mean(2).tolist()  # (2, levels)
    values = {}
    for kind, levels in zip(("loss", "x0_mse"), means, strict=True):
        values[kind] = sum(levels) / NUM_LEVELS
        values |= {f"{kind}_t_{t:.4f}": v for t, v in zip(TIMES, levels, strict=True)}
    return values
