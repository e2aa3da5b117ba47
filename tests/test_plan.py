"""Plans against what really happens: memory, checkpoints, datasets; and every recipe planned."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

from models.command import load_config
from models.config import InputError
from models.networks import DiTConfig, UNetConfig, build_model
from pipeline import plan
from pipeline.config import TrainConfig
from pipeline.runs.planning import (
    Sample,
    activation_bytes,
    assumed_data,
    checkpoint_bytes,
    prepared_data,
    state_bytes,
)
from tests.train_factory import ROOT, environment, run, write_config

RECIPES = sorted((ROOT / "configs").glob("train_*.yaml"))
ALL = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "precision"),
    [c if c == (2, "bf16") else pytest.param(*c, marks=pytest.mark.slow) for c in ALL],
)
def test_predicted_states_and_checkpoints_are_those_of_two_ranks_within_2_percent(
    tmp_path, stage, precision
):
    done = run("tests.ranks_plan", str(stage), precision, str(tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr
    line = next(li for li in done.stdout.splitlines() if li.startswith("result "))
    found = json.loads(line.removeprefix("result "))
    predicted = state_bytes(found["numel"], stage, precision, ranks=2, small=found["small"])
    assert found["held"] == pytest.approx(predicted.total, rel=0.02)
    assert found["written"] == pytest.approx(checkpoint_bytes(found["numel"]), rel=0.02)


ACTIVATIONS = """
import json, sys, torch
from models.conditions import Conditions
from models.networks import DiTConfig, build_model
torch.set_num_threads(1)
network = build_model(DiTConfig(**json.loads(sys.argv[3]), gradient_checkpointing=sys.argv[1] == "True"))
for p in network.parameters():
    p.grad = torch.zeros_like(p)
def step(batch):
    text, mask = torch.randn(batch, 16, 64), torch.ones(batch, 16, dtype=torch.bool)
    given = Conditions(text, mask, torch.randn(batch, 64))
    network(torch.randn(batch, 4, 32, 32), torch.rand(batch), given).square().mean().backward()
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
step(2)
before = peak()
step(int(sys.argv[2]))
print("result", peak() - before)
"""
NETWORK = {"size": "tiny", "latent_channels": 4, "text_dim": 64, "pooled_dim": 64}


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "batch"), [(False, 32), (True, 96)])
def test_predicted_activations_are_the_memory_that_a_step_takes_within_15_percent(checkpointing, batch):  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ACTIVATIONS, str(checkpointing), str(batch), json.dumps(NETWORK)],
        capture_output=True, text=True, cwd=ROOT,
        # What is freed goes back to the system at once, so that the peak is not that of fragments.
        env=environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split("result")[1])
    predicted = activation_bytes(
        DiTConfig(**NETWORK), Sample(32, 32, 16, 0.0), "fp32", checkpointing
    )
    assert measured == pytest.approx((batch - 2) * predicted, rel=0.15)


@pytest.mark.slow
def test_checkpointing_and_bf16_take_less():
    sample, config = Sample(16, 16, 8, 0.0), DiTConfig(**(NETWORK | {"size": "debug"}))
    plain = activation_bytes(config, sample, "fp32", False)
    assert activation_bytes(config, sample, "fp32", True) < 0.7 * plain
    assert activation_bytes(config, sample, "bf16", False) < 0.7 * plain


def test_stages_divide_what_they_say():
    n, ranks = 10**9, 64
    by_stage = [state_bytes(n, stage, "bf16", ranks) for stage in (0, 1, 2, 3)]
    assert by_stage[0].optimizer == 16 * n
    assert by_stage[1].optimizer == 16 * n / ranks
    assert by_stage[2].gradients == 4 * n / ranks
    assert by_stage[3].weights == 2 * n / ranks
    assert state_bytes(n, 2, "bf16", ranks, averages=3).optimizer == 24 * n / ranks


def test_a_prepared_dataset_is_planned_from_its_own_numbers(tmp_path, capsys):
    codec = {"normalisation": {"mean": [0.0] * 4, "std": [10.0] * 4}}
    path = write_config(tmp_path, codec=codec)
    plan.main(path, gpus=2, gpu_memory=1.0, fit=True)
    out = capsys.readouterr().out
    config = load_config(TrainConfig, path, [])
    data = prepared_data(config)
    assert data.num_pictures == 90
    # A network that needs all that the data fix, as `train` takes it.
    unet = UNetConfig(size="debug", size_conditioning=True)
    assumed = assumed_data(9, 64, 8, 5, DiTConfig(**NETWORK))
    for dataset in (data, assumed):
        with torch.device("meta"):
            build_model(unet.with_sizes(dataset.sizes))
    tars = list((tmp_path / "dataset").glob("shards/*/*.tar"))
    assert data.total_bytes == sum(p.stat().st_size for p in tars)
    assert "90 pictures" in out
    assert "normalised latents have a std of 0.1, expected 0.5 to 2" in out
    # What --fit prints is a valid change of the same config.
    best = out.splitlines()[-1].split()
    changed = load_config(TrainConfig, path, best)
    assert config.training.global_batch // 2 % (changed.engine.micro_batch or 0) == 0


@pytest.mark.slow
def test_a_model_too_large_is_said_not_to_fit(tmp_path, capsys):
    overrides = ["model.size=XL"]
    plan.main(write_config(tmp_path), overrides, gpus=1, gpu_memory=1.0, fit=True)
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "Nothing fits" in out
    assert "engine.zero_stage=" not in out


def plan_line(path) -> list[str]:
    """The `flowmill plan` line that a recipe's first lines hold, without the command."""
    found = re.search(r"flowmill plan (configs/[^\n]*)", path.read_text())
    assert found, f"{path}: no `flowmill plan` line"
    return shlex.split(found[1])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_is_built_and_has_the_size_that_it_states(path):
    overrides = [a for a in plan_line(path) if a.startswith("model.")]
    config = load_config(TrainConfig, path, overrides)
    with torch.device("meta"):
        numel = sum(p.numel() for p in build_model(config.model).parameters())
    assert f" {numel / 1e6:,.1f} M parameters" in path.read_text(), numel


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_is_planned_as_it_says_and_fits(path):
    done = run("pipeline.plan", *plan_line(path), COLUMNS="150")
    assert done.returncode == 0, done.stderr
    assert "over all GPUs" in done.stdout
    assert "Nothing fits" not in done.stdout


def test_what_cannot_be_planned_is_refused(tmp_path):
    path = write_config(tmp_path)
    with pytest.raises(InputError, match=r"expected a divisor of training\.global_batch, 8"):
        plan.main(path, gpus=3)
    with pytest.raises(InputError, match="expected one of B200"):
        plan.main(path, gpus=2, gpu="H1000")
    with pytest.raises(InputError, match="no dataset to take them from"):
        plan.main(path, gpus=2, pictures=1000)
    with pytest.raises(InputError, match=r"manifest.json"):
        plan.main(path, ["data.path=/nowhere"], gpus=2)
