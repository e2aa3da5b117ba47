"""The averages of the weights against their definition in float64; profiles made after training."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.config import InputError
from pipeline.training.checkpoint import load_weights, store_snapshots
from pipeline.training.config import EMAConfig, power_exponent
from pipeline.training.ema import AdamWithEMA, ema_decays
from pipeline.training.pieces import Pieces
from pipeline.training.power_ema import (
    coefficients,
    inner_product,
    read_snapshots,
    reconstruct,
)
from tests import train_factory


@pytest.mark.distributed
@pytest.mark.parametrize("steps", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_on_two_ranks_every_average_agrees_with_float64_at_every_stage(steps):
    lines = train_factory.results("ema", "tests.ranks_ema", str(steps))
    assert len(lines) == 8
    for stage, precision, error in lines:
        assert float(error) <= 1e-6, (stage, precision)  # of weights near 1; fp32 rounds at 6e-8


def test_it_changes_nothing_of_adamw():
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(20))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizers = AdamWithEMA([ours], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2)
    for _ in range(20):
        ours.grad = torch.randn(20)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_half_of_the_average_is_forgotten_in_a_half_life():
    config = EMAConfig(halflife_images=1000, rampup_ratio=0.05, more_halflives_images=[100])
    assert ema_decays(config, 10**6, 100)["ema"] ** 10 == pytest.approx(0.5)
    assert ema_decays(config, 10**6, 100)["ema_halflife_100"] == pytest.approx(0.5)
    assert ema_decays(config, 0, 100)["ema"] == 0.0  # nothing of the random start is kept
    assert ema_decays(config, 2000, 100)["ema"] == 0.5  # while young: 5% of the pictures seen


def profile(sigma_rel: float, steps: int, batch: int = 4) -> np.ndarray:
    """The share of each step's weights in the power-function average, from the decays alone."""
    config, name = EMAConfig(sigma_rels=[sigma_rel]), f"ema_sigma_{sigma_rel:g}"
    shares = np.zeros(steps)
    for step in range(steps):
        decay = ema_decays(config, step * batch, batch)[name]
        shares *= decay
        shares[step] = 1 - decay
    return shares


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_a_power_average_has_the_width_it_is_named_by(sigma_rel):
    shares, time = profile(sigma_rel, 4000), (np.arange(4000) + 0.5) / 4000
    assert shares.sum() == pytest.approx(1)
    mean = (shares * time).sum()
    width = math.sqrt((shares * (time - mean) ** 2).sum())
    assert width == pytest.approx(sigma_rel, rel=2e-3)  # 4,000 steps for an integral
    gamma = power_exponent(sigma_rel)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.2887, 0.5])
def test_a_width_that_no_power_has_is_refused(width):
    with pytest.raises(InputError, match="between 0 and"):
        power_exponent(width)


def test_the_product_of_two_profiles_is_its_integral():
    tau = (np.arange(200_000) + 0.5) / 200_000 * 3
    for t_a, t_b in ((1.0, 3.0), (3.0, 2.0), (2.0, 2.0)):
        a, b = (
            np.where(tau < t, (g + 1) * tau**g / t ** (g + 1), 0)
            for t, g in ((t_a, 5.0), (t_b, 2.0))
        )
        got = inner_product(*(np.float64(v) for v in (t_a, 5.0, t_b, 2.0)))
        assert got == pytest.approx((a * b).mean() * 3, rel=1e-4)  # midpoints of 200,000 intervals


def random_walk(steps: int) -> torch.Tensor:
    """Weights of a parameter at each step, float64 (steps, 50)."""
    return torch.randn(steps, 50, dtype=torch.float64, generator=torch.manual_seed(0)).cumsum(0)


def store(run: Path, every: int, steps: int, batch: int = 4) -> torch.Tensor:
    """Train nothing: average a random walk with the optimizer and snapshot it as the trainer does."""
    walk = random_walk(steps)
    parameter = torch.nn.Parameter(walk[0].float())
    optimizer = AdamWithEMA([parameter], lr=0.0, weight_decay=0.0)
    module = torch.nn.ParameterDict({"w": parameter})
    # What DeepSpeed's engine says at stage 0 in fp32.
    engine = SimpleNamespace(zero_optimization_stage=lambda: 0, optimizer=optimizer, module=module)
    config = EMAConfig(sigma_rels=[0.05, 0.1])
    for step in range(steps):
        optimizer.decays = ema_decays(config, step * batch, batch)
        parameter.data.copy_(walk[step])
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if (step + 1) % every == 0:
            clock = SimpleNamespace(step=step + 1, images_learned=(step + 1) * batch)
            store_snapshots(run, config, clock, engine, optimizer)
    return walk


def test_a_profile_made_after_training_is_the_exact_weighted_sum_of_all_steps(tmp_path):
    walk = store(tmp_path, every=50, steps=1000)
    snapshots = read_snapshots(tmp_path, None)
    assert len(snapshots) == 40
    made = reconstruct(snapshots, 0.15)["w"].double()
    times = np.array([s.images_seen for s in snapshots])
    shares = coefficients(times, np.array([s.sigma_rel for s in snapshots]), times[-1], 0.15)
    exact = np.zeros(1000)
    for snapshot, share in zip(snapshots, shares, strict=True):
        exact[: snapshot.step] += share * profile(snapshot.sigma_rel, snapshot.step)
    assert exact.sum() == pytest.approx(1, abs=1e-9)
    # Snapshots are fp32, and their shares have both signs.
    scale = float(walk.abs().max()) * np.abs(shares).sum()
    assert float((made - torch.from_numpy(exact) @ walk).abs().max()) <= 1e-6 * scale
    # And that sum is the wanted average, but for what 20 snapshots per width cannot express.
    wanted = torch.from_numpy(profile(0.15, 1000)) @ walk
    spread = float((walk[-1] - wanted).abs().max())
    assert float((made - wanted).abs().max()) <= 0.01 * spread


def test_a_kept_width_comes_back_as_it_was_stored(tmp_path):
    store(tmp_path, every=50, steps=200)
    made = reconstruct(read_snapshots(tmp_path, 150), 0.1)["w"]
    stored = Pieces(tmp_path / "ema_snapshots" / "step_00000150").whole("ema_sigma_0.1", "w")
    torch.testing.assert_close(made, stored, rtol=0, atol=1e-5)  # values up to 20 in fp32


def test_a_changed_snapshot_is_found_and_named(tmp_path):
    store(tmp_path, every=50, steps=100)
    path = tmp_path / "ema_snapshots" / "step_00000050" / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"step_00000050.*bytes changed"):
        reconstruct(read_snapshots(tmp_path, None), 0.15)


@pytest.mark.distributed
def test_a_run_keeps_its_averages_and_any_width_can_be_made_and_sampled_from_it(tmp_path):
    config = train_factory.write_config(tmp_path)
    options = [
        "ema.sigma_rels=[0.05,0.1]",
        "ema.more_halflives_images=[32]",
        "ema.snapshot_images=48",
        "ema.rampup_ratio=1",
        "engine.zero_stage=2",
    ]
    train_factory.train(config, *options)
    run = tmp_path / "run"
    snapshots = read_snapshots(run, None)
    assert [s.step for s in snapshots] == [6, 6, 12, 12, 18, 18, 24, 24]
    assert Pieces(snapshots[0].folder).states == ["ema_sigma_0.05", "ema_sigma_0.1"]
    loaded = {
        n: load_weights(run, n)[0] for n in ("raw", "ema", "ema_halflife_32", "ema_sigma_0.05")
    }
    assert len({tuple(w["proj_out.weight"].flatten()[:4].tolist()) for w in loaded.values()}) == 4

    done = train_factory.run("pipeline.make_ema", str(run), "--sigma-rel", "0.15")
    assert done.returncode == 0, done.stderr
    made, step = load_weights(run, "ema_sigma_0.15")
    assert step == 24
    assert made.keys() == loaded["ema"].keys()
    with pytest.raises(InputError, match=r"expected one of \['ema', 'ema_halflife_32'"):
        load_weights(run, "ema_sigma_0.2")
