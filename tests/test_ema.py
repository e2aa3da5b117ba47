"""The average of the weights, against the definition in float64."""

import pytest
import torch

from pipeline.ema import AdamWithEMA, EMAConfig, ema_decay


def test_a_thousand_steps_agree_with_a_float64_average():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(50))
    optimizer = AdamWithEMA([parameter], lr=1e-2)
    config, reference = (
        EMAConfig(halflife_images=300, rampup_ratio=0.1),
        parameter.detach().double(),
    )
    for step in range(1000):
        optimizer.ema_decay = ema_decay(config, 4 * step, 4)
        parameter.grad = torch.randn(50) + parameter.detach()
        optimizer.step()
        reference = (
            optimizer.ema_decay * reference
            + (1 - optimizer.ema_decay) * parameter.detach().double()
        )
    ours = optimizer.state[parameter]["ema"]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), reference, rtol=0, atol=1e-6)


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
    config = EMAConfig(halflife_images=1000, rampup_ratio=0.05)
    assert ema_decay(config, 10**6, 100) ** 10 == pytest.approx(0.5)
    assert ema_decay(config, 0, 100) == 0.0  # nothing of the random start is kept
    assert ema_decay(config, 2000, 100) == 0.5  # while young: 5% of the pictures seen
