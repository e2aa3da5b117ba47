"""Run under torchrun: write checkpoints in several layouts, or read them in others; prints one line per pair.

ranks_layout FOLDER write LAYOUT ...     LAYOUT: stage, precision and more, as 2:fp32 or 0:bf16:muon
ranks_layout FOLDER read LAYOUT ...      each of what was written, in each layout
ranks_layout FOLDER resume LAYOUT ...    each as it was written

From the first ZeRO 3 of a process on DeepSpeed's linear layer stands in for torch's, which rounds bf16 otherwise:
a process that resumes gets the layouts in the order in which they were written.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from models.conditions import Conditions
from pipeline import distributed
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Saver
from pipeline.training.config import EngineConfig
from pipeline.training.engine import build_engine
from pipeline.training.pieces import full_weights
from tests.ranks_engine import BATCH, DECAY, OPTIMIZER, batches, fresh_model, shares

STEPS = 3


def micro_batch() -> int:
    return min(4, BATCH // distributed.world_size())


def engine_of(layout: str) -> tuple[Any, Any]:
    stage, precision, *more = layout.split(":")
    settings: dict[str, Any] = {"zero_stage": int(stage), "precision": precision}
    settings["micro_batch"] = micro_batch()
    if "offload" in more:
        settings["offload_optimizer"] = "cpu"
        settings["offload_parameters"] = "cpu" if stage == "3" else "none"
    kind = "muon" if "muon" in more else "adamw"
    config = OPTIMIZER.model_copy(update={"kind": kind})
    engine, optimizer = build_engine(fresh_model(), EngineConfig(**settings), config, BATCH)
    optimizer.prepare(OPTIMIZER.lr, {"ema": DECAY, "ema_halflife_64": 0.5}, None)
    return engine, optimizer


def step(engine: Any, batch: list[torch.Tensor], update: bool) -> float:
    """The loss of the whole batch; with `update` it is learned from."""
    total = 0.0
    for t, x_t, text, pooled, target in shares(batch, micro_batch()):
        with torch.set_grad_enabled(update):
            pred = engine(x_t, t, Conditions(text, pooled=pooled)).float()
            loss = (pred - target).square().mean()
        total += float(loss) * micro_batch() / BATCH
        if update:
            engine.backward(loss)
            engine.step()
    return sum(distributed.gather_objects(total))


def states(engine: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Every state of every parameter, whole."""
    names = {"raw", *(key for state in optimizer.state.values() for key in state)} - {"step"}
    return {
        f"{state}.{name}": value
        for state in sorted(names)
        for name, value in full_weights(engine, optimizer, state).items()
    }


def train_on(engine: Any, optimizer: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses before, in and after one more step, and the states after it."""
    fixed = batches()[STEPS]
    losses = [step(engine, fixed, update) for update in (False, True, False)]
    return losses, states(engine, optimizer)


def write(folder: Path, layout: str) -> None:
    engine, optimizer = engine_of(layout)
    for batch in batches()[:STEPS]:
        step(engine, batch, update=True)
    saver = Saver(folder / layout / checkpoint.CHECKPOINTS)
    saver.save(STEPS, engine, optimizer, {})
    before = states(engine, optimizer)
    saver.finish()
    assert not saver.failed
    losses, after = train_on(engine, optimizer)
    if distributed.is_main():
        torch.save((before, losses, after), folder / f"{layout}.pt")


def unlike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> int:
    """How many states differ in a bit; those of rank 0, where they are."""
    assert not distributed.is_main() or ours.keys() == theirs.keys()
    return sum(not torch.equal(value, theirs[name]) for name, value in ours.items())


def read(folder: Path, source: str, target: str) -> None:
    """States that differ in a bit at first and after one more step, and how far the losses are apart."""
    engine, optimizer = engine_of(target)
    record = checkpoint.restore(folder / source, engine, optimizer)
    assert record is not None
    assert record["step"] == STEPS
    before, losses, after = torch.load(folder / f"{source}.pt")
    wrong = [unlike(states(engine, optimizer), before)]
    got, found = train_on(engine, optimizer)
    wrong.append(unlike(found, after))
    apart = [abs(mine / theirs - 1) for mine, theirs in zip(got, losses, strict=True)]
    if distributed.is_main():
        print("layout", source, target, distributed.world_size(), *wrong, *apart, flush=True)


def main() -> None:
    folder, what, *layouts = sys.argv[1:]
    distributed.start(60)
    for layout in layouts:
        if what == "write":
            write(Path(folder), layout)
        elif what == "resume":
            read(Path(folder), layout, layout)
        else:
            for written in sorted(p.stem for p in Path(folder).glob("*.pt")):
                read(Path(folder), written, layout)
    distributed.stop()


if __name__ == "__main__":
    main()
