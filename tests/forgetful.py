"""pipeline.train with one item of a run's state left out on resuming: `forgetful ITEM CONFIG.yaml ...`."""

import sys
from pathlib import Path
from typing import Any

import torch

from models.config import load_config
from pipeline import checkpoint, train
from pipeline.config import TrainConfig
from pipeline.data import Loader

restore, lr_schedule, batches = checkpoint.restore, train.lr_schedule, Loader.batches
ema_decays = train.ema_decays


def forgetting(key: str) -> Any:
    """`restore`, after which a state of the optimizer is as at the start."""

    def run(folder: Path, engine: Any, optimizer: Any) -> Any:
        record = restore(folder, engine, optimizer)
        for parameter, state in optimizer.state.items():
            if key == "step":
                state[key].zero_()
            else:
                state[key].copy_(parameter if key == "ema" else torch.zeros_like(parameter))
        return record

    return run


def main() -> None:
    item, config, *overrides = sys.argv[1:]
    if item in ("ema", "exp_avg", "exp_avg_sq", "step"):
        checkpoint.restore = forgetting(item)
    if item == "schedule":
        start = 12  # the step of the checkpoint
        train.lr_schedule = lambda *args: lambda step: lr_schedule(*args)(step - start)
    if item == "images_seen":
        train.ema_decays = lambda ema, images, batch: ema_decays(ema, images - 12 * batch, batch)
    if item == "loader":
        Loader.batches = lambda self, start=0: batches(self, 0)
    if item == "noise":
        draw = train.draw_noise
        train.draw_noise = lambda seed, step, *rest: draw(seed, step - 12, *rest)
    train.train(load_config(TrainConfig, Path(config), overrides))


if __name__ == "__main__":
    main()
