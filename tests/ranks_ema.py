"""Run under torchrun: three averages over so many steps at every ZeRO stage against float64; prints a line each."""

import sys

import torch
from torch import nn

from pipeline import distributed
from pipeline.training.config import EMAConfig, EngineConfig, OptimizerConfig
from pipeline.training.ema import ema_decays
from pipeline.training.engine import build_engine
from pipeline.training.pieces import full_weights

CONFIG = EMAConfig(halflife_images=300, more_halflives_images=[2000], sigma_rels=[0.1])
BATCH = 4


def worst(stage: int, precision: str, steps: int) -> float:
    """The largest difference of any average from its float64 reference."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 5))
    model.config = None  # pyright: ignore[reportArgumentType] - a network of ours has one
    engine, optimizer = build_engine(
        model,
        EngineConfig(zero_stage=stage, precision=precision),  # pyright: ignore[reportArgumentType]
        OptimizerConfig(lr=1e-2),
        BATCH,
    )
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    g = torch.Generator().manual_seed(distributed.rank())
    reference: dict[str, dict[str, torch.Tensor]] = {}
    for step in range(steps):
        optimizer.decays = ema_decays(CONFIG, step * BATCH, BATCH)
        x, y = (torch.randn(BATCH // 2, n, generator=g).to(dtype) for n in (6, 5))
        engine.backward((engine(x) - y).float().square().mean())
        engine.step()
        raw = full_weights(engine, optimizer, "raw")
        for name, decay in optimizer.decays.items():
            old = reference.get(name, raw)
            reference[name] = {
                k: decay * old[k].double() + (1 - decay) * raw[k].double() for k in raw
            }
    errors = [0.0]
    for name, weights in reference.items():
        ours = full_weights(engine, optimizer, name)
        errors += [float((ours[k].double() - weights[k]).abs().max()) for k in ours]
    return max(errors)


def main() -> None:
    distributed.start(60)
    torch.set_num_threads(1)
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            error = worst(stage, precision, int(sys.argv[1]))
            if distributed.is_main():
                print("ema", stage, precision, error, flush=True)
    distributed.stop()


if __name__ == "__main__":
    main()
