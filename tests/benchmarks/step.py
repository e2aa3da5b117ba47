"""The whole training step against a bare DeepSpeed loop and a bare torch loop of the same network.

    python -m tests.benchmarks.step [--batch 8] [--rounds 40] [--json FILE]

Ours is `pipeline.loop.steps`, the trainer's own loop: loader, noise, objective, engine, EMA, monitor. The
bare loops have the same network, AdamW and clipping on one fixed batch. All sides of a stage live in one
process and take single steps in turn, so that the machine's other work meets them alike; figures are
medians. What a log costs is measured at every tenth step and counted at every 50th, the default.
"""

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from models.command import run_command
from models.config import parse_config
from models.networks import DiTConfig, build_model
from models.vae import sample_latents
from pipeline import distributed
from pipeline.config import TrainConfig
from pipeline.data.loader import Loader
from pipeline.data.randomness import draw_noise
from pipeline.loop import steps
from pipeline.objectives.objective import Objective
from pipeline.training.config import OptimizerConfig
from pipeline.training.engine import build_engine, deepspeed_config, parameter_groups
from pipeline.training.monitor import LossMeter
from tests.shard_factory import Kind, make_dataset

TEXT = (77, 256)
WARM = 4
LOGGED, SAVED, DEFAULT_LOGGED = 10, 25, 50  # every so many steps here, and by default


def run_config(folder: Path, stage: int, batch: int, size: str, threads: int) -> TrainConfig:
    """A run that is watched as by default, but logs and saves oftener."""
    data = {
        "data": {"path": str(folder / "dataset")},
        "model": {"kind": "dit", "size": size},
        "training": {"images": 10**9, "global_batch": batch},
        "engine": {"zero_stage": stage, "precision": "fp32", "cpu_threads": threads},
        "run": str(folder / f"run_{stage}"),
        "checkpoint": {"every_steps": SAVED, "keep": 1},
        "monitor": {"every_steps": LOGGED},
    }
    return parse_config(TrainConfig, data, "benchmark")


def fixed_batch(loader: Loader, objective: Objective) -> dict[str, Any]:
    """What the network takes, and its target, of step 0."""
    batch, codec = next(loader.batches(0)), loader.manifest.codec
    shape = (codec.channels, *batch.moments.shape[-2:])
    latents = sample_latents(
        batch.moments,
        draw_noise(0, 0, batch.indices, shape),
        codec.normalisation,
    )
    noise = draw_noise(0, 1, batch.indices, shape)
    t = objective.draw_t(0, 0, len(noise), shape[-2:])
    return {
        "x_t": objective.add_noise(latents, noise, t),
        "t": t,
        "conditions": batch.conditions.map(torch.clone),
        "target": objective.target(latents, noise, t),
    }


def bare_deepspeed(config: TrainConfig, model: DiTConfig, batch: dict) -> Callable[[], None]:
    """A step of DeepSpeed alone, with the trainer's settings."""
    import deepspeed

    torch.manual_seed(0)
    network = build_model(model)
    optimizer = torch.optim.AdamW(parameter_groups(network, 0.0, muon=False), lr=1e-4, fused=True)
    size = config.training.global_batch
    settings = deepspeed_config(config.engine, size, size) | {"gradient_clipping": 1.0}
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=optimizer,  # pyright: ignore[reportArgumentType]
        config=settings,
        dist_init_required=False,
    )
    given, target = {k: v for k, v in batch.items() if k != "target"}, batch["target"]

    def step() -> None:
        engine.backward((engine(**given) - target).square().mean())
        engine.step()

    return step


def muon(config: TrainConfig, model: DiTConfig, batch: dict) -> Callable[[], None]:
    """A step of the trainer's engine with Muon and one average, at the bare loops' LR."""
    size = config.training.global_batch
    settings = OptimizerConfig(kind="muon", lr=1e-4)
    engine, optimizer = build_engine(build_model(model), config.engine, settings, size)
    given, target = {k: v for k, v in batch.items() if k != "target"}, batch["target"]

    def step() -> None:
        optimizer.prepare(1e-4, {"ema": 0.999}, None)
        engine.backward((engine(**given) - target).square().mean())
        engine.step()

    return step


def bare_torch(model: DiTConfig, batch: dict) -> Callable[[], None]:
    torch.manual_seed(0)
    network = build_model(model)
    optimizer = torch.optim.AdamW(parameter_groups(network, 0.0, muon=False), lr=1e-4, fused=True)
    given, target = {k: v for k, v in batch.items() if k != "target"}, batch["target"]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (network(**given) - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds, of all threads of this process."""
    begin, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - begin, time.process_time() - cpu


def compare(
    ours: Iterator[int], others: dict[str, Callable[[], None]], rounds: int
) -> list[dict[str, float]]:
    """Median seconds of a step of each side, in turn, wall and CPU; ours also with a log and with a save."""
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for number in range(LOGGED):  # beyond the first log, which counts the model's FLOPs once
        next(ours)
        for step in others.values() if number < WARM else ():
            step()
    for number in range(LOGGED + 1, LOGGED + 1 + rounds):
        kind = "save" if number % SAVED == 0 else "log" if number % LOGGED == 0 else "plain"
        order: list[tuple[str, Callable[[], Any]]] = [(kind, lambda: next(ours)), *others.items()]
        for name, step in order if number % 2 else reversed(order):
            times[name].append(seconds(step))
    clocks = []
    for clock in range(2):
        medians = {n: statistics.median(t[clock] for t in taken) for n, taken in times.items()}
        logs = (medians["log"] - medians["plain"]) / DEFAULT_LOGGED
        clocks.append(medians | {"ours": medians["plain"] + logs})
    return clocks


def parts(config: TrainConfig, loader: Loader, model: DiTConfig, rounds: int) -> dict[str, float]:
    """Median seconds of what a step has beside the engine, each alone."""
    objective, codec = Objective(config.objective), loader.manifest.codec
    batches, meter = loader.batches(0), LossMeter(torch.device("cpu"))
    weights = [p.detach() for p in build_model(model).parameters()]
    averages = [w.clone() for w in weights]
    batch = next(batches)
    shape = (codec.channels, *batch.moments.shape[-2:])
    draws = [draw_noise(0, 0, batch.indices, shape) for _ in range(2)]
    t = objective.draw_t(0, 0, len(batch.indices), shape[-2:])

    def objective_alone() -> None:
        x0 = sample_latents(batch.moments, draws[0], codec.normalisation)
        objective.loss(objective.add_noise(x0, draws[1], t), x0, draws[1], t)

    timed: dict[str, Callable[[], Any]] = {
        "loader (read ahead, its wait)": lambda: next(batches),
        "noise and posterior noise": lambda: [
            draw_noise(0, n, batch.indices, shape) for n in range(2)
        ],
        "latents, x_t, loss": objective_alone,
        "EMA": lambda: torch._foreach_lerp_(averages, weights, 0.001),
        "loss meter": lambda: meter.add(t, {"loss": t, "x0_mse": t}),
    }
    return {
        name: statistics.median(seconds(part)[0] for _ in range(rounds))
        for name, part in timed.items()
    }


def measure_stage(
    config: TrainConfig, model: DiTConfig, fixed: dict[str, Any], rounds: int
) -> tuple[dict[str, float], list[str]]:
    """The figures of one ZeRO stage, and its row of the table."""
    stage = config.engine.zero_stage
    others = {
        "deepspeed": bare_deepspeed(config, model, fixed),
        "muon": muon(config, model, fixed),
    }
    if stage == 0:
        others["torch"] = bare_torch(model, fixed)
    wall, cpu = compare(steps(config), others, rounds)
    figures = {}
    for clock, prefix in ((wall, ""), (cpu, "cpu_")):
        for other in others.keys() - {"muon"}:
            figures[f"{prefix}over_{other}_z{stage}"] = clock["ours"] / clock[other]
        figures[f"{prefix}muon_over_ours_z{stage}"] = clock["muon"] / clock["ours"]
    stall = wall["save"] - wall["plain"]
    if stage == 0:
        figures["save_stall_s"] = stall
    cells = [wall.get("torch"), wall["deepspeed"], wall["ours"]]
    return figures, [
        str(stage),
        *("" if cell is None else f"{1000 * cell:.1f}" for cell in cells),
        f"{wall['ours'] / wall['deepspeed']:.3f}",
        f"{cpu['ours'] / cpu['deepspeed']:.3f}",
        f"{wall['muon'] / wall['ours']:.3f}",
        f"{cpu['muon'] / cpu['ours']:.3f}",
        f"{1000 * (wall['log'] - wall['plain']):.1f}",
        f"{1000 * stall:.0f}",
    ]


def main(
    batch: Annotated[int, typer.Option(min=1)] = 8,
    size: Annotated[str, typer.Option(help="of the DiT")] = "tiny",
    rounds: Annotated[int, typer.Option(min=25, help="steps of each side at each stage")] = 50,
    stages: Annotated[str, typer.Option(help="of ZeRO")] = "0,1,2,3",
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    output: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Table the cost of a step over bare DeepSpeed and bare torch, and of its parts."""
    distributed.start(600)
    torch.set_num_threads(threads)
    figures: dict[str, float] = {}
    table = Table(title=f"DiT-{size}, batch {batch}, fp32, {threads} threads: ms per step")
    for column in (
        "ZeRO",
        "torch",
        "DeepSpeed",
        "ours",
        "over DeepSpeed",
        "in CPU time",
        "Muon over AdamW",
        "in CPU time",
        "a log",
        "a save",
    ):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kind = Kind(encoders={"mini": TEXT}, channels=4, ragged=False)
        make_dataset(folder / "dataset", [((256, 256), 256)], kind)
        config = run_config(folder, 0, batch, size, threads)
        loader = Loader(config.data, global_batch=batch, seed=0)
        model = DiTConfig(size=size, latent_channels=4, text_dim=TEXT[1], pooled_dim=TEXT[1])  # pyright: ignore[reportArgumentType]
        fixed = fixed_batch(loader, Objective(config.objective))
        for stage in map(int, stages.split(",")):
            config = run_config(folder, stage, batch, size, threads)
            more, row = measure_stage(config, model, fixed, rounds)
            figures |= more
            table.add_row(*row)
            print("stage", *row, flush=True)
        alone = Table(title="what a step has beside the engine, each alone: ms")
        for part, cost in parts(config, loader, model, rounds).items():
            alone.add_row(part, f"{1000 * cost:.2f}")
        loader.close()
    for shown in (table, alone):
        Console(width=120).print(shown)
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")
    distributed.stop()


if __name__ == "__main__":
    run_command(main)
