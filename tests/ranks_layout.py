"""Run under torchrun: write checkpoints in several layouts, or read them in others; prints a line each.

ranks_layout FOLDER write LAYOUT ...     LAYOUT: stage and precision, as 2:fp32
ranks_layout FOLDER read LAYOUT ...      each of what was written, in each layout
"""

import sys
from pathlib import Path
from typing import Any

import torch

from models.conditions import Conditions
from pipeline import checkpoint, distributed
from pipeline.checkpoint import Saver
from pipeline.engine import EngineConfig, build_engine
from pipeline.pieces import full_weights
from tests.ranks_engine import BATCH, DECAY, OPTIMIZER, batches, fresh_model

STEPS = 3


def engine_of(layout: str) -> tuple[Any, Any]:
    stage, precision = layout.split(":")
    config = EngineConfig(zero_stage=int(stage), precision=precision, micro_batch=4)  # pyright: ignore[reportArgumentType]
    engine, optimizer = build_engine(fresh_model(), config, OPTIMIZER, BATCH)
    optimizer.decays = {"ema": DECAY, "ema_halflife_64": 0.5}
    for group in optimizer.param_groups:
        group["lr"] = OPTIMIZER.lr
    return engine, optimizer


def step(engine: Any, batch: list[torch.Tensor], update: bool) -> float:
    """The loss of the whole batch; with `update` it is learned from."""
    share = BATCH // distributed.world_size()
    begin, total = distributed.rank() * share, 0.0
    for start in range(begin, begin + share, 4):
        t, x_t, text, pooled, target = (tensor[start : start + 4] for tensor in batch)
        with torch.set_grad_enabled(update):
            loss = (
                (engine(x_t, t, Conditions(text, pooled=pooled)).float() - target).square().mean()
            )
        total += float(loss) * 4 / BATCH
        if update:
            engine.backward(loss)
            engine.step()
    return sum(distributed.gather_objects(total))


def states(engine: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Every state of every parameter, whole."""
    names = ("raw", "exp_avg", "exp_avg_sq", *optimizer.decays)
    return {
        f"{state}.{name}": value
        for state in names
        for name, value in full_weights(engine, optimizer, state).items()
    }


def write(folder: Path, layout: str) -> None:
    engine, optimizer = engine_of(layout)
    for batch in batches()[:STEPS]:
        step(engine, batch, update=True)
    saver = Saver(folder / layout / checkpoint.CHECKPOINTS)
    saver.save(STEPS, engine, optimizer, {})
    expected: dict[str, Any] = {"states": states(engine, optimizer)}
    saver.finish()
    assert not saver.failed
    fixed = batches()[STEPS]
    expected["losses"] = [
        step(engine, fixed, False),
        step(engine, fixed, True),
        step(engine, fixed, False),
    ]
    if distributed.is_main():
        torch.save(expected, folder / f"{layout}.pt")


def read(folder: Path, source: str, target: str) -> None:
    """States that differ in a bit, and how far the losses before and after one more step are apart."""
    engine, optimizer = engine_of(target)
    record = checkpoint.restore(folder / source, engine, optimizer)
    assert record is not None
    assert record["step"] == STEPS
    expected, found = torch.load(folder / f"{source}.pt"), states(engine, optimizer)
    assert not distributed.is_main() or found.keys() == expected["states"].keys()
    wrong = [
        name for name, value in found.items() if not torch.equal(value, expected["states"][name])
    ]
    fixed = batches()[STEPS]
    losses = [step(engine, fixed, False), step(engine, fixed, True), step(engine, fixed, False)]
    apart = [abs(got / want - 1) for got, want in zip(losses, expected["losses"], strict=True)]
    if distributed.is_main():
        print("layout", source, target, distributed.world_size(), len(wrong), *apart, flush=True)


def main() -> None:
    folder, what, *layouts = sys.argv[1:]
    distributed.start(60)
    for layout in layouts:
        if what == "write":
            write(Path(folder), layout)
        else:
            for written in sorted(p.stem for p in Path(folder).glob("*.pt")):
                read(Path(folder), written, layout)
    distributed.stop()


if __name__ == "__main__":
    main()
