"""Run under torchrun: bytes that this rank really holds after backward, and on disk after a save; a JSON line."""

import gc
import json
import sys
from pathlib import Path

import torch

from models.conditions import Conditions
from models.networks import DiTConfig, build_model
from pipeline import distributed
from pipeline.runs.planning import num_small
from pipeline.training import checkpoint
from pipeline.training.config import EngineConfig, OptimizerConfig
from pipeline.training.engine import build_engine, parameter_groups

MODEL = DiTConfig(size="tiny", latent_channels=4, text_dim=64, pooled_dim=64)


def live_bytes() -> int:
    """Bytes of every tensor that Python can reach, each memory once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def main() -> None:
    stage, precision, kind, folder = int(sys.argv[1]), *sys.argv[2:4], Path(sys.argv[4])
    distributed.start(300)
    torch.set_num_threads(1)
    before = live_bytes()
    model = build_model(MODEL)
    numel, small = sum(p.numel() for p in model.parameters()), num_small(model)
    hidden = [
        p for g in parameter_groups(model, 0.0, kind == "muon") if g["muon"] for p in g["params"]
    ]
    by_muon = sum(p.numel() for p in hidden)
    del hidden
    config = EngineConfig(zero_stage=stage, precision=precision, micro_batch=1)  # pyright: ignore[reportArgumentType]
    settings = OptimizerConfig(kind=kind)  # pyright: ignore[reportArgumentType]
    engine, optimizer = build_engine(model, config, settings, distributed.world_size())
    held = 0
    for _ in range(2):  # the first step allocates the optimizer's states
        text, pooled = torch.randn(1, 4, 64), torch.randn(1, 64)
        pred = engine(torch.randn(1, 4, 8, 8), torch.rand(1), Conditions(text, pooled=pooled))
        engine.backward(pred.float().square().mean())
        del pred
        gc.collect()
        held = live_bytes() - before
        engine.step()
    saver = checkpoint.Saver(folder)
    saver.save(2, engine, optimizer, {})
    saver.finish()
    written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    result = {"numel": numel, "small": small, "by_muon": by_muon, "held": held, "written": written}
    if distributed.is_main():
        print("result " + json.dumps(result), flush=True)
    distributed.stop()


if __name__ == "__main__":
    main()
