"""Held-out error, picture metrics against torchmetrics on the same files, and the whole command."""

import pytest
import torch

from pipeline.data import DataConfig, Loader
from pipeline.heldout import LOG_SNR, time_at, x0_errors
from pipeline.objective import Objective, ObjectiveConfig
from tests.shard_factory import Kind, make_dataset

PRESETS = ("sd15-epsilon", "nai3-v-ztsnr", "min-snr-v", "sd3-rf-logit-normal", "flux-shift", "edm")


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    data = make_dataset(
        tmp_path_factory.mktemp("heldout"), [((32, 32), 8)], Kind(), heldout=[((32, 32), 60)]
    )
    loader = Loader(DataConfig(path=str(data)), global_batch=8, seed=0)
    yield loader
    loader.close()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_network_that_implies_x0_of_zero_errs_by_the_latents_power_at_every_level(loader, preset):
    objective = Objective(ObjectiveConfig.model_validate({"preset": preset}))
    batch, codec = loader.heldout_batch(60), loader.manifest.codec

    def network(x_t, t, **given):
        _, sigma = objective.alpha_sigma(t)
        noise = x_t / sigma.view(-1, 1, 1, 1)
        return objective.target(torch.zeros_like(x_t), noise, t)

    errors = x0_errors(network, objective, codec, batch)
    assert errors.shape == (len(LOG_SNR), 60)
    # Mean and std of the moments are uniform in [0, 1], the scale 0.5: 0.25 (1/3 + 1/3) = 1/6.
    # 1920 elements, a tenth is four standard deviations.
    assert errors.mean() == pytest.approx(1 / 6, rel=0.1)
    # fp32 and, at log SNR 6, noise recovered by a division by 0.05.
    assert (errors - errors[:1]).abs().max() < 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_the_levels_are_where_they_say(preset):
    objective = Objective(ObjectiveConfig.model_validate({"preset": preset}))
    for log_snr in LOG_SNR:
        alpha, sigma = objective.alpha_sigma(torch.tensor([time_at(objective, log_snr)]))
        # Discrete paths have 1000 levels; their gaps are widest where they are clean.
        assert float(2 * (alpha / sigma).log()) == pytest.approx(log_snr, abs=0.2)


def test_any_cut_of_the_heldout_batch_gives_the_same_errors(loader):
    objective = Objective(ObjectiveConfig())
    batch, codec = loader.heldout_batch(6), loader.manifest.codec
    network = lambda x_t, t, **given: torch.tanh(x_t) * given["micro"][:, :1, None, None]  # noqa: E731
    whole = x0_errors(network, objective, codec, batch.rows(2, 5), rounds=2)
    parts = [
        x0_errors(network, objective, codec, batch.rows(i, i + 1), rounds=2) for i in range(2, 5)
    ]
    assert torch.allclose(whole, torch.cat(parts, 1), rtol=1e-6)
