"""One step of every architecture from fixed weights on a fixed batch; prints kind, loss, norm, checksum."""

import torch
from pydantic import TypeAdapter

from models.conditions import Conditions
from models.networks import MODELS
from pipeline import distributed
from pipeline.config import ModelConfig
from pipeline.data.randomness import draw_noise
from pipeline.objectives.config import ObjectiveConfig
from pipeline.objectives.objective import Objective
from pipeline.training.config import EngineConfig, OptimizerConfig
from pipeline.training.engine import build_engine, grad_norm
from pipeline.training.first_weights import build_drawn

SIZES = {"latent_channels": 4, "text_dim": 8, "pooled_dim": 8, "latent_downscale": 8}
BATCH = 4


def drawn(purpose: str, *shape: int) -> torch.Tensor:
    """Standard normal (BATCH, *shape), the same on every machine."""
    return draw_noise(0, 0, range(BATCH), shape, purpose=purpose)


def step(kind: str) -> tuple[float, float, float]:
    """Loss, gradient norm before clipping, and a checksum of the weights after the step."""
    config = TypeAdapter(ModelConfig).validate_python({"kind": kind, "size": "debug"})
    model = build_drawn(config.with_sizes(SIZES), 0)
    with torch.no_grad():  # so that nothing is zero, as much of it is at the start
        for number, parameter in enumerate(model.parameters()):
            noise = draw_noise(0, number, [0], tuple(parameter.shape), purpose="weights")[0]
            parameter.add_(0.05 * noise)
    objective = Objective(ObjectiveConfig())
    engine, optimizer = build_engine(
        model, EngineConfig(zero_stage=0, precision="fp32"), OptimizerConfig(), BATCH
    )
    optimizer.prepare(1e-3, {"ema": 0.0}, None)
    latents, noise = drawn("latents", 4, 16, 16), drawn("noise", 4, 16, 16)
    t = objective.draw_t(0, 0, BATCH, (16, 16))
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    text = drawn("text", 6, 8) * mask[..., None]
    x_t = objective.add_noise(latents, noise, t)
    pred = engine(x_t, t, Conditions(text, mask, drawn("pooled", 8)))
    loss = objective.loss(pred, latents, noise, t).loss.mean()
    engine.backward(loss)
    engine.step()
    checksum = 0.0
    for parameter in model.parameters():  # by place, so that an exchange of two weights is seen
        squares = parameter.detach().double().flatten().square()
        checksum += float(squares @ torch.linspace(1, 2, len(squares), dtype=torch.float64))
    norm = grad_norm(engine, optimizer)
    assert norm is not None
    return float(loss.detach()), norm, checksum


def main() -> None:
    distributed.start(60)
    torch.set_num_threads(1)
    for kind in MODELS:
        print("golden", kind, *(f"{value:.9g}" for value in step(kind)), flush=True)
    distributed.stop()


if __name__ == "__main__":
    main()
