"""The objective inside training: time in fp32 all the way, and steps that do not depend on how they are cut."""

import pytest
import torch

from models.config import parse_config
from models.networks import DiTConfig, build_model
from pipeline.data.randomness import draw_noise
from pipeline.objectives.config import ObjectiveConfig
from pipeline.objectives.objective import Objective
from tests import train_factory

RECORD_T = """
import sys
from pathlib import Path
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from models.command import load_config
from models.layers import TimestepEmbedder
from pipeline.config import TrainConfig
from pipeline.loop import train_all

seen = []
def record(module, args):
    if isinstance(module, TimestepEmbedder):
        seen.append((args[0].clone(), module.linear_1.weight.dtype))
register_module_forward_pre_hook(record)
train_all([load_config(TrainConfig, Path(sys.argv[1]), sys.argv[3:])])
torch.save(seen, sys.argv[2])
"""


def network() -> torch.nn.Module:
    """A tiny DiT whose output is not zero, as it is at the start."""
    torch.manual_seed(0)
    model = build_model(DiTConfig(size="debug", latent_channels=4, text_dim=0, pooled_dim=0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.distributed
def test_bf16_training_hands_t_to_the_embedding_exactly_as_drawn(tmp_path):
    config = train_factory.write_config(tmp_path)
    options = ["engine.precision=bf16", "engine.zero_stage=1", "engine.micro_batch=4"]
    options += ["training.images=32", "optimizer.warmup_images=0"]
    done = train_factory.run("-c", RECORD_T, str(config), str(tmp_path / "t.pt"), *options)
    assert done.returncode == 0, done.stderr
    seen = torch.load(tmp_path / "t.pt", weights_only=True)
    assert [t.dtype for t, _ in seen] == [torch.float32] * 8  # four steps of two micro-batches
    assert {dtype for _, dtype in seen} == {torch.bfloat16}  # the network itself is in bf16
    objective = Objective(ObjectiveConfig())
    drawn = [objective.draw_t(3, step, 8, (8, 8)) for step in range(4)]
    given = torch.cat([t for t, _ in seen]).view(4, 8)
    for step in range(4):
        assert torch.equal(given[step].sort().values, drawn[step].sort().values)
    # Rounding on the way would not have passed unseen.
    assert not torch.equal(torch.stack(drawn), torch.stack(drawn).bfloat16().float())


def test_a_discrete_level_reaches_the_embedding_as_its_number():
    config = parse_config(ObjectiveConfig, {"preset": "sd15-epsilon"}, "test")
    t = Objective(config).draw_t(0, 0, 1000, (8, 8)).sort().values
    # The embedding multiplies by 1000; an error of 1e-4 in its fastest angle is nothing.
    assert torch.allclose(1000 * t, torch.arange(1000.0), atol=1e-4)


@pytest.mark.parametrize("preset", ["sd15-epsilon", "nai3-v-ztsnr", "sd3-rf-logit-normal", "edm"])
@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 16), (1, 4), (2, 4), (4, 2)])
def test_the_gradient_of_a_step_does_not_depend_on_how_its_batch_is_cut(preset, ranks, micro_batch):
    objective = Objective(parse_config(ObjectiveConfig, {"preset": preset}, "test"))
    model, latents = network(), draw_noise(9, 0, range(16), (4, 8, 8))
    gradients = []
    for parts in (1, ranks):
        size = 16 if parts == 1 else micro_batch
        model.zero_grad()
        for rank in range(parts):
            own = torch.arange(rank, 16, parts)
            for indices in own.split(size):
                t = objective.draw_t(0, 5, 16, (8, 8))[indices]
                noise = draw_noise(0, 5, indices, (4, 8, 8))
                pred = model(objective.add_noise(latents[indices], noise, t), t)
                terms = objective.loss(pred, latents[indices], noise, t)
                (terms.loss.sum() / 16).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    # Another order of summing in fp32.
    assert torch.allclose(
        gradients[0], gradients[1], rtol=1e-3, atol=1e-5 * float(gradients[0].abs().max())
    )
