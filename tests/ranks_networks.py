"""Run alone or under torchrun: 200 steps of a network with each prediction on a dataset; prints a line each.

python -m tests.ranks_networks DATASET FOLDER ZERO_STAGE KIND[:OPTIONS] PREDICTION...
"""

import sys

import torch
import yaml

from models.config import parse_config
from models.networks import build_model
from pipeline import distributed
from pipeline.config import TrainConfig
from pipeline.objectives.objective import Objective
from pipeline.runs.setup import fit_run
from pipeline.training.engine import build_engine
from pipeline.training.forward import Forward

STEPS, BATCH = 200, 8
VP = {"path": {"kind": "vp_discrete"}, "timesteps": {"kind": "uniform"}}
OBJECTIVES = {
    "epsilon": {"preset": "sd15-epsilon"},
    "v": {"preset": "sd2-v"},
    "sample": {**VP, "prediction": "sample"},
    "flow": {"preset": "sd3-rf-logit-normal"},
    "edm": {"preset": "edm"},
}


def run(dataset: str, folder: str, stage: int, model: dict, objective_section: dict) -> list[float]:
    """Each step's loss, of all ranks."""
    data = {
        "data": {"path": dataset},
        "model": {"size": "debug", **model},
        "objective": objective_section,
        "training": {"images": STEPS * BATCH, "global_batch": BATCH},
        "engine": {"zero_stage": stage, "precision": "fp32"},
        "run": folder,
    }
    run = fit_run(parse_config(TrainConfig, data, "test"))
    config, objective = run.config, Objective(run.config.objective)
    torch.manual_seed(0)
    engine, optimizer = build_engine(
        build_model(config.model), config.engine, config.optimizer, BATCH
    )
    forward = Forward(engine, objective, run.loader, config.model, 0.1, torch.device("cpu"))
    values, batches = [], run.loader.batches(0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        batch = next(batches)
        terms = forward(batch, forward.draw(step, batch.moments.shape[-2:]), images=0)
        engine.backward(terms.total)
        engine.step()
        values.append(sum(distributed.gather_objects(float(terms.named["loss"].mean()))))
    run.loader.close()
    return [value / distributed.world_size() for value in values]


def main() -> None:
    dataset, folder, stage, model, *predictions = sys.argv[1:]
    distributed.start(1800)
    kind, _, options = model.partition(":")
    section = {"kind": kind, **(yaml.safe_load(options) or {})}
    for prediction in predictions:
        seen = run(dataset, f"{folder}/{prediction}", int(stage), section, OBJECTIVES[prediction])
        first, last = sum(seen[:20]) / 20, sum(seen[-20:]) / 20
        distributed.say(f"trained {prediction} {first:.4f} {last:.4f}")
    distributed.stop()


if __name__ == "__main__":
    main()
