"""Run under torchrun: a network's first weights at each stage and precision; prints what is unlike those drawn whole."""

import sys

import torch

from models.networks import DiTConfig
from pipeline import distributed
from pipeline.training.config import EngineConfig, OptimizerConfig
from pipeline.training.engine import build_engine
from pipeline.training.first_weights import build_drawn, placement
from pipeline.training.pieces import full_weights

MODEL = DiTConfig(size="debug", modulation="shared", latent_channels=4, text_dim=8, pooled_dim=8)
BATCH = 4


def main() -> None:
    distributed.start(60)
    whole = build_drawn(MODEL, 5).state_dict()
    for case in sys.argv[1:]:
        stage, precision, *hpz = case.split(":")
        more = {"hpz_partition_size": int(hpz[0])} if hpz else {}
        config = EngineConfig(zero_stage=int(stage), precision=precision, **more)  # pyright: ignore[reportArgumentType]
        network = build_drawn(MODEL, 5, placement(config, BATCH))
        kept = sum(p.numel() for p in network.parameters())
        engine, optimizer = build_engine(network, config, OptimizerConfig(), BATCH)
        ours, dtype = full_weights(engine, optimizer, "raw"), torch.bfloat16
        wrong = [
            name
            for name, value in whole.items()
            if not torch.equal(
                ours[name], value.to(dtype).float() if precision == "bf16" else value
            )
        ]
        if distributed.is_main():
            print("first", case, kept, len(wrong), *wrong[:3], flush=True)
    distributed.stop()


if __name__ == "__main__":
    main()
