"""Resume a run with one item of its state left out, for each item: `forgetful FOLDER`; prints a line each.

All in one process, as the trainer runs step by step.
"""

import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from models.command import load_config
from pipeline import loop
from pipeline.config import TrainConfig
from pipeline.data.loader import Loader
from pipeline.training import checkpoint, clock
from tests.train_factory import unlike, write_config

STEP = 12  # of the checkpoint that is resumed from
restore, batches = checkpoint.restore, Loader.batches
lr_schedule, ema_decays = clock.lr_schedule, clock.ema_decays


def forgetting(key: str) -> Any:
    """`restore`, after which a state of the optimizer is as at the start."""

    def run(folder: Path, engine: Any, optimizer: Any, **parts: Any) -> Any:
        record = restore(folder, engine, optimizer, **parts)
        for parameter, state in optimizer.state.items():
            state[key].copy_(parameter if key == "ema" else torch.zeros_like(state[key]))
        return record

    return patch.object(checkpoint, "restore", run)


ITEMS = {key: forgetting(key) for key in ("ema", "exp_avg", "exp_avg_sq", "step")} | {
    "schedule": patch.object(
        clock, "lr_schedule", lambda *given: lambda step: lr_schedule(*given)(step - STEP)
    ),
    "images_seen": patch.object(
        clock,
        "ema_decays",
        lambda ema, seen, size, begun: ema_decays(ema, seen - STEP * size, size, begun),
    ),
    "loader": patch.object(
        Loader, "batches", lambda loader, start, step: batches(loader, start - STEP, step)
    ),
    "noise": patch.object(
        Loader, "batches", lambda loader, start, step: batches(loader, start, step - STEP)
    ),
    "nothing": patch.object(Loader, "batches", batches),
}


def run(folder: Path, name: str) -> None:
    config = load_config(TrainConfig, write_config(folder, name), ["checkpoint.keep=9"])
    for _ in loop.steps(config):
        pass


def main() -> None:
    folder = Path(sys.argv[1])
    run(folder, "whole")
    for item, forgetful in ITEMS.items():
        shutil.copytree(folder / "whole", folder / item)
        config = folder / item / "config.yaml"
        config.write_text(config.read_text().replace(str(folder / "whole"), str(folder / item)))
        for step in (18, 24):
            shutil.rmtree(folder / item / "checkpoints" / f"step_{step:08d}")
        with forgetful:
            run(folder, item)
        print("forgot", item, *unlike(folder / item, folder / "whole")[:1], flush=True)


if __name__ == "__main__":
    main()
