"""Levers on the cost of pretraining: each does what its paper says, and nothing when it is off."""

from typing import Any

import pytest
import torch
from torch import nn

from models import layers
from models.conditions import Conditions
from models.config import InputError
from models.networks import MaskingConfig, RoutingConfig, Span, build_model
from models.roles import parameter_roles
from pipeline.config import TrainConfig
from pipeline.data.randomness import draw_noise
from pipeline.objectives.config import ObjectiveConfig
from pipeline.objectives.objective import Objective
from pipeline.runs.setup import fit_run
from pipeline.training.forward import Draws, Forward
from tests.shard_factory import Kind, make_dataset
from tests.test_networks import debug, inputs, predict, randomise

ROUTED = {"routing": RoutingConfig(ratio=0.5, start=1, end=-1), "depth": 4}
MASKED = {"masking": MaskingConfig(ratio=0.75, mixer_depth=2), "depth": 2}
KINDS = ["dit", "mmdit"]


def scores(patches: int = 16) -> torch.Tensor:
    return torch.rand(3, patches, generator=torch.Generator().manual_seed(2))


def watched(model: nn.Module, **given: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and each block's tokens as they enter it."""
    tokens: list[torch.Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
        for block in model.blocks
    ]
    out = predict(model, **given)
    for hook in hooks:
        hook.remove()
    return out, tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"rope": True, "register_tokens": 2}])
def test_tread_sends_half_of_the_patches_around_the_middle_blocks(kind, options):
    model = randomise(debug(kind, **ROUTED, **options))
    registers = options.get("register_tokens", 0)
    kept = scores().argsort(dim=1)[:, :8].sort(dim=1).values
    out, tokens = watched(model, **inputs(), token_scores=scores())
    assert [x.shape[1] - registers for x in tokens] == [16, 8, 8, 16]
    for row in range(3):
        around = sorted(set(range(16)) - set(kept[row].tolist()))
        # Those that went around come to the last block as they left the first; the others do not.
        _, before = watched(model, **inputs())
        assert torch.equal(tokens[3][row, around], before[1][row, around])
        assert torch.equal(tokens[1][row, :8], before[1][row, kept[row]])
        assert (tokens[3][row, kept[row]] - tokens[1][row, :8]).abs().min(-1).values.max() > 1e-4
    assert out.shape == (3, 4, 8, 8)
    # Without scores, as when pictures are drawn, all blocks see all patches.
    out, tokens = watched(model, **inputs())
    assert all(x.shape[1] == 16 + registers for x in tokens)
    plain = randomise(debug(kind, depth=4, **options))
    assert torch.equal(out, predict(plain, **inputs()))


@pytest.mark.parametrize("kind", KINDS)
def test_kept_patches_keep_their_places_under_rope(kind):
    """Whatever is dropped, what is left attends by its own distances: keeping all but in name changes nothing."""
    routing = RoutingConfig(ratio=0.01, start=1, end=3)  # of 16 patches, none
    model = randomise(debug(kind, rope=True, depth=4, routing=routing))
    expected = predict(model, **inputs())
    torch.testing.assert_close(predict(model, **inputs(), token_scores=scores()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_deferred_masking_lets_dropped_patches_reach_kept_ones_through_the_mixer(kind):
    model = randomise(debug(kind, **MASKED))
    given = inputs()
    given["x_t"].requires_grad_()
    out, tokens = watched(model, **given, token_scores=scores())
    assert [x.shape[1] for x in tokens] == [16, 16, 4, 4]
    kept = layers.kept_pixels(scores(), model.config.span, 2, 8, 8)
    assert kept.float().mean() == 0.25
    # The kept patches' predictions feel the dropped ones; dropped before the mixer, they would not.
    (out * kept).square().sum().backward()
    gradient = given["x_t"].grad
    assert gradient is not None
    assert (gradient * ~kept).abs().max() > 1e-4


def test_the_loss_is_over_the_kept_patches_alone(tmp_path):
    """The trainer's own loss, against the mean over kept pixels written out."""
    kind = Kind(encoders={}, channels=4, deterministic=True)
    section = {
        "seed": 5,
        "data": {"path": str(make_dataset(tmp_path / "data", [((64, 64), 6)], kind))},
        "model": {"size": "debug", **MASKED},
        "training": {"images": 3, "global_batch": 3},
        "run": str(tmp_path / "run"),
    }
    run, objective = fit_run(TrainConfig.model_validate(section)), Objective(ObjectiveConfig())
    model = randomise(build_model(run.config.model))
    forward = Forward(model, objective, run.loader, run.config.model, 0.1, torch.device("cpu"))
    batch, t = next(run.loader.batches(7)), torch.tensor([0.2, 0.5, 0.8])
    terms = forward(batch, Draws(t, torch.zeros(3, dtype=torch.bool)), images=0)
    run.loader.close()
    drawn = draw_noise(5, 7, range(3), (16,), purpose="tokens")
    kept = layers.kept_pixels(drawn, Span(2, 4, 0.75), 2, 8, 8)
    noise = draw_noise(5, 7, range(3), (4, 8, 8))
    latents = 0.5 * batch.moments.float()  # the dataset's scaling factor
    pred = model(objective.add_noise(latents, noise, t), t, Conditions(token_scores=drawn))
    squared = (pred - objective.target(latents, noise, t)).square()
    for row in range(3):
        expected = squared[row][:, kept[row, 0]].mean()
        torch.testing.assert_close(terms.named["loss"][row], expected)
    assert torch.equal(terms.t, t)
    # Another step keeps other patches.
    assert not torch.equal(drawn, draw_noise(5, 8, range(3), (16,), purpose="tokens"))


def test_levers_that_contradict_each_other_or_the_depth_are_refused():
    with pytest.raises(ValueError, match="got both"):
        debug("dit", **ROUTED | MASKED)
    with pytest.raises(InputError, match="blocks 2 to -2, expected some of 2"):
        predict(debug("dit", routing=RoutingConfig()), **inputs(), token_scores=scores())
    with pytest.raises(InputError, match="mup_base_width: got 48, expected a multiple of 32"):
        parameter_roles(debug("dit", mup_base_width=48))


def step_sizes(width: int, mup: bool) -> float:
    """How far three steps of Adam move the output of a DiT `width` wide, relative to fixed targets."""
    torch.manual_seed(0)
    options = {"mup_base_width": 64} if mup else {}
    model = debug("dit", hidden_size=width, num_heads=width // 32, depth=2, **options)
    roles = parameter_roles(model)
    groups = [
        {"params": [p], "lr": 1e-2 * roles[name].lr_scale} for name, p in model.named_parameters()
    ]
    optimizer = torch.optim.Adam(groups)
    given = inputs()
    target = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    for _ in range(3):
        optimizer.zero_grad()
        (predict(model, **given) - target).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return float(predict(model, **given).square().mean().sqrt())


def test_under_mup_the_same_lr_moves_the_output_as_far_at_any_width():
    """Coordinate check (2203.03466, appendix D.1): without muP steps grow with the width, with it they do not."""
    plain = [step_sizes(width, mup=False) for width in (64, 512)]
    scaled = [step_sizes(width, mup=True) for width in (64, 512)]
    assert plain[1] > 2 * plain[0]
    assert 0.5 < scaled[1] / scaled[0] < 2


def test_mup_scales_the_lr_of_matrices_by_their_fan_in_and_nothing_else():
    model = debug("dit", hidden_size=256, num_heads=8, mup_base_width=64, num_classes=3)
    roles = parameter_roles(model)
    assert roles["transformer_blocks.0.attn1.to_q.weight"].lr_scale == 0.25
    assert roles["transformer_blocks.0.norm1.linear.weight"].lr_scale == 0.25
    assert roles["proj_out.weight"].lr_scale == 0.25  # an output: fan_in is the width
    for name in ("proj_in.weight", "caption_projection.linear_1.weight", "proj_out.bias"):
        assert roles[name].lr_scale == 1
    assert roles["time_text_embed.class_embedder.weight"].lr_scale == 1
    weight = model.transformer_blocks[0].ff.net[2].weight
    assert float(weight.detach().std()) == pytest.approx(1024**-0.5, rel=0.02)  # 1 / sqrt(fan_in)
