"""Run under torchrun: steps that must be rejected, at every ZeRO stage and precision; prints a line each."""

import sys
from pathlib import Path

import torch

from models.conditions import Conditions
from models.config import parse_config
from pipeline import distributed
from pipeline.config import TrainConfig
from pipeline.data.batch import Batch
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from pipeline.training.config import EngineConfig, OptimizerConfig
from pipeline.training.engine import build_engine
from pipeline.training.forward import Terms
from pipeline.training.pieces import full_weights
from pipeline.training.rejection import Rejection
from tests.ranks_engine import BATCH, DECAY, batches, fresh_model

OPTIMIZER = OptimizerConfig(lr=1e-3, clip=0.5)
REJECTION = {"spike_factor": 3.0, "window": 2, "max_in_a_row": 3}


def spoil(harm: str, batch: list[torch.Tensor]) -> list[torch.Tensor]:
    """The batch with something wrong in the last rank's share."""
    batch = [tensor.clone() for tensor in batch]
    if harm == "nan":
        batch[1][-1, 0, 0, 0] = float("nan")
    if harm == "inf":
        batch[4][-1] = float("inf")
    if harm == "spike":
        batch[4][-1] *= 100
    return batch


def take(layout: str, harms: list[str], place: Batch, loader: Loader, given: TrainConfig) -> str:
    """One step per harm ("" is none); what was rejected, and the weights of before and after it."""
    stage, precision, *kind = layout.split(":")
    config = EngineConfig(zero_stage=int(stage), precision=precision, micro_batch=2)  # pyright: ignore[reportArgumentType]
    settings = OPTIMIZER.model_copy(update={"kind": kind[0]} if kind else {})
    engine, optimizer = build_engine(fresh_model(), config, settings, BATCH)
    rejection = Rejection(given, loader, optimizer)
    share = BATCH // distributed.world_size()
    begin, log = distributed.rank() * share, []
    for step, (harm, batch) in enumerate(zip(harms, batches() * 2, strict=False)):
        before = [full_weights(engine, optimizer, which) for which in ("raw", "ema")]
        optimizer.prepare(OPTIMIZER.lr, {"ema": DECAY}, None)
        terms = []
        for start in range(begin, begin + share, 2):
            t, x_t, text, pooled, target = (x[start : start + 2] for x in spoil(harm, batch))
            pred = engine(x_t, t, Conditions(text, pooled=pooled)).float()
            loss = (pred - target).square().mean(dim=(1, 2, 3))
            terms.append(Terms(t, loss.mean(), {"loss": loss.detach()}))
            if harm == "gradient" and start == BATCH - 2:
                pred.register_hook(lambda gradient: gradient * float("nan"))
            last = start == begin + share - 2
            engine.backward(rejection.judge(terms) if last else terms[-1].total)
            engine.step()
        taken = rejection.settle(step, place, terms)
        after = [full_weights(engine, optimizer, which) for which in ("raw", "ema")]
        pairs = [(x[n], y[n]) for x, y in zip(before, after, strict=True) for n in x]
        finite = all(bool(y.isfinite().all()) for _, y in pairs)
        moved = any(not torch.equal(x, y) for x, y in pairs)
        log.append(f"{harm or 'fine'}:{taken:d}{moved:d}{finite:d}")
    # Muon's states count no steps.
    counts = {int(s["step"]) for s in optimizer.state.values() if "step" in s}
    return " ".join([*log, f"adam:{sorted(counts)}", f"total:{rejection.total}"])


def main() -> None:
    run = Path(sys.argv[1])
    distributed.start(60)
    loader = Loader(
        DataConfig(path=str(run / "dataset")),
        global_batch=BATCH,
        seed=0,
        rank_of=(distributed.rank(), distributed.world_size()),
    )
    data = {"data": {"path": str(run / "dataset")}, "training": {"images": BATCH}}
    place = next(loader.batches())
    harms = ["", "", "nan", "", "gradient", "spike", "", "inf"]
    for layout in sys.argv[2:]:
        own = {"run": str(run / layout), "rejection": REJECTION}
        (run / layout).mkdir(exist_ok=True)
        given = parse_config(TrainConfig, data | own, "test")
        line = take(layout, harms, place, loader, given)
        if distributed.is_main():
            print("reject", layout, line, flush=True)
    loader.close()
    distributed.stop()


if __name__ == "__main__":
    main()
