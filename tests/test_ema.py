"""The averages of the weights against their definition in float64; profiles made after training."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.config import InputError
from pipeline import make_ema
from pipeline.training.checkpoint import load_weights, store_snapshots
from pipeline.training.config import EMAConfig, power_exponent
from pipeline.training.ema import ema_decays
from pipeline.training.optimizers import AdamWithEMA
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
            begun = dict.fromkeys(config.names(), 0)
            clock = SimpleNamespace(
                step=step + 1, images_learned=(step + 1) * batch, ema_begun=begun
            )
            store_snapshots(run, config, clock, engine, optimizer)
    return walk


def test_a_profile_made_after_training_is_the_exact_weighted_sum_of_all_steps(tmp_path):
    walk = store(tmp_path, every=50, steps=1000)
    snapshots = read_snapshots(tmp_path, None)
    assert len(snapshots) == 40
    made = reconstruct(snapshots, 0.15)["w"].double()
    times = np.array([s.images for s in snapshots])
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

    # What was made at an earlier step is never taken for the newest.
    for sigma_rel in (0.15, 0.05):
        make_ema.main(run, sigma_rel, step=12)
    with pytest.raises(InputError, match=r"made at step 12.*of step 24.*--step 12"):
        load_weights(run, "ema_sigma_0.15")
    assert load_weights(run, "ema_sigma_0.15", 12)[1] == 12
    same = load_weights(run, "ema_sigma_0.05")[0]
    assert all(torch.equal(same[name], value) for name, value in loaded["ema_sigma_0.05"].items())
    make_ema.main(run, 0.15)
    made, step = load_weights(run, "ema_sigma_0.15")
    assert step == 24
    assert made.keys() == loaded["ema"].keys()
    with pytest.raises(InputError, match=r"expected one of \['ema', 'ema_halflife_32'"):
        load_weights(run, "ema_sigma_0.2")

    # From step 18 the run goes another way, with an average more: nothing is left of steps after it.
    shutil.rmtree(run / "checkpoints" / "step_00000024")
    make_ema.main(run, 0.2, step=18)
    options[0] = "ema.sigma_rels=[0.05,0.1,0.12]"
    before = Pieces(run / "ema_snapshots" / "step_00000024").whole(
        "ema_sigma_0.1", "proj_out.weight"
    )
    said = train_factory.train(config, *options, "optimizer.lr=1e-2", "--override")
    assert "step_00000024: the run goes on from step 18" in said
    names = sorted(path.name for path in (run / "ema").glob("*.safetensors"))
    assert names == [
        "step_00000012.ema_sigma_0.05.safetensors",
        "step_00000012.ema_sigma_0.15.safetensors",
        "step_00000018.ema_sigma_0.2.safetensors",
    ]
    assert (run / "ema" / "step_00000024.ema_sigma_0.15.safetensors.abandoned").is_file()
    stored = Pieces(run / "ema_snapshots" / "step_00000024")
    assert not torch.equal(stored.whole("ema_sigma_0.1", "proj_out.weight"), before)
    # The one that was added averages over the last six steps alone, and is not mixed with the others.
    assert {s.sigma_rel for s in read_snapshots(run, None)} == {0.05, 0.1}
    record = json.loads((run / "checkpoints/step_00000024/checkpoint.json").read_text())
    assert record["clock"]["ema_begun"]["ema_sigma_0.12"] == 18 * 8
    assert set(record["clock"]["ema_begun"].values()) == {0, 18 * 8}


@pytest.mark.parametrize("added_at", [0, 8, 800])
def test_an_average_that_is_added_later_is_what_it_were_had_the_run_begun_there(added_at):
    config = EMAConfig(sigma_rels=[0.1], more_halflives_images=[100])
    begun = dict.fromkeys(config.names(), added_at)
    for images in range(0, 4000, 8):
        late = ema_decays(config, added_at + images, 8, begun)
        assert late == ema_decays(config, images, 8)


def test_snapshots_of_averages_that_began_apart_are_not_mixed(tmp_path):
    for step, begun in ((50, [0]), (100, [0, 200]), (150, [400, 200])):
        folder = tmp_path / "ema_snapshots" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        widths = [0.05, 0.1][: len(begun)]
        about = {"step": step, "images_seen": 4 * step, "sigma_rels": widths, "begun": begun}
        (folder / "checkpoint.json").write_text(json.dumps(about))
    found = {step: read_snapshots(tmp_path, step) for step in (50, 100, 150)}
    kept = {step: [(s.step, s.sigma_rel, s.images) for s in found[step]] for step in found}
    assert kept[50] == [(50, 0.05, 200)]
    assert kept[100] == [(50, 0.05, 200), (100, 0.05, 400)]
    assert kept[150] == [(100, 0.1, 200), (150, 0.1, 400)]
