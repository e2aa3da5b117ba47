"""Variants of a run at equal compute: `python -m pipeline.compare CONFIG --change muon=optimizer.kind=muon --steps 600`.

All variants of a seed see the same pictures in the same order with the same noise, and begin with the same weights
where their networks are alike. Each is an ordinary run under OUTPUT; the same line again goes on where it stopped.
With the record of what was measured of it, a run itself is not needed again.
"""

import asyncio
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer

from models.command import load_config, plain_console, run_command
from models.config import InputError, differences
from pipeline.arguments import ConfigFile, DryRun, Overrides
from pipeline.config import CONFIG, RESULTS, TrainConfig, load_run_config


class Slot(NamedTuple):
    """Where one run is trained and measured at a time: what starts Python there, and variables of its own."""

    launcher: list[str]
    variables: dict[str, str]


class Job(NamedTuple):
    """The arguments that train a run, what they resolve to, the FLOPs of the whole run, and all that it results from."""

    arguments: list[str]
    config: TrainConfig
    flops: float
    results_from: dict[str, Any]


def parse_changes(
    config: Path, overrides: list[str], changes: list[str]
) -> dict[str, tuple[Path, list[str]]]:
    """File and overrides of each variant by name, the config as it is first; raises InputError."""
    found = {"base": (config.absolute(), overrides)}
    for item in changes:
        name, _, change = item.partition("=")
        if not re.fullmatch(r"[\w.+-]+", name) or name == "base" or not change:
            raise InputError(
                f"--change: got {item!r}, expected NAME=section.key=value or NAME=FILE.yaml"
            )
        path, given = found.get(name, found["base"])
        found[name] = (
            (path, [*given, change]) if "=" in change else (Path(change).absolute(), given)
        )
    return found


def plan_job(
    path: Path, given: list[str], steps: int | None, flops: float | None, costs: dict[str, float]
) -> Job:
    """One run; raises InputError where it cannot be trained and measured, or has begun with another config.

    `costs` has the FLOPs of steps that were counted before.
    """
    from data_prep.schema import fingerprint
    from pipeline.runs.planning import flops_per_step
    from pipeline.runs.setup import fit_run

    config = load_config(TrainConfig, path, given)
    batch = config.training.global_batch
    kind = f"{config.model} {config.data} {config.optimizer.kind} {batch}"
    cost = costs[kind] = costs.get(kind) or flops_per_step(config)
    steps = steps or int((flops or 0) // cost)
    if not steps:
        raise InputError(f"--flops: got {flops or 0:g}, expected at least a step's, {cost:g}")
    given = [*given, f"training.images={steps * batch}"]
    fitted = fit_run(load_config(TrainConfig, path, given))
    heldout, run = fitted.loader.heldout_batches(1), Path(config.run)
    shards = fitted.loader.first.mixture.table["sha256"].to_pylist()
    fitted.loader.close()
    if not heldout:
        raise InputError(
            f"{path}: its dataset holds nothing out. Remedy: prepare with heldout_fraction=0.05"
        )
    if (run / CONFIG).is_file():
        changed = differences(load_run_config(run), fitted.config)
        if others := [key for key in changed if key.split(".")[0] in RESULTS]:
            raise InputError(
                f"{run}: was trained with another {', '.join(others)}. Remedy: another --output"
            )
    # People are shown what is no default; the hash is of all but where the data lie. An option that is null counts for
    # none: one that is new leaves the records of before as they are.
    own: dict[str, Any] = {"mode": "json", "include": set(RESULTS), "exclude": {"data": {"path"}}}
    settings = fitted.config.model_dump(exclude_defaults=True, **own)
    settings["sha256"] = fingerprint(
        {"all": fitted.config.model_dump(exclude_none=True, **own), "shards": shards}
    )
    return Job([str(path), *given], fitted.config, steps * cost, settings)


def share_machine(jobs: int, launcher: str = "") -> list[Slot]:
    """Places that give each of so many runs side by side a GPU and a share of the cores; raises InputError.

    A launcher gives each what it asks for, here or on other machines.
    """
    import torch

    words = shlex.split(launcher) or [sys.executable]
    if jobs == 1 or launcher:
        return jobs * [Slot(words, {})]
    count = torch.cuda.device_count()
    every = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    if count and jobs > count:
        raise InputError(f"--jobs: got {jobs}, expected at most the GPUs here, {count}")
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    gpus = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in every.split(",")] if count else jobs * [{}]
    return [Slot(words, threads | gpu) for gpu in gpus[:jobs]]


async def call(slot: Slot, module: str, *arguments: str) -> None:
    """Run a module of ours to its end. Where we are stopped it is too, which saves, and waited for."""
    words, to = [*slot.launcher, "-m", module, *arguments], asyncio.subprocess.DEVNULL
    variables = os.environ | slot.variables
    done = await asyncio.create_subprocess_exec(*words, stdout=to, env=variables)
    try:
        await done.wait()
    finally:
        if done.returncode is None:
            done.terminate()
            await done.wait()
    if done.returncode:
        raise InputError(f"{shlex.join(words)}: ended with status {done.returncode}")


async def train(job: Job, slot: Slot) -> None:
    """Train a run as far as it is not yet; raises InputError where it was stopped."""
    from pipeline.runs.start import finished

    if not finished(job.config):
        await call(slot, "pipeline.train", *job.arguments)
    if not finished(job.config):
        raise InputError(f"{job.config.run}: was stopped. Remedy: the same command, which goes on")


async def measure(job: Job, evaluate: str, record: Path, slot: Slot) -> dict[str, float]:
    """The figures of a run, as recorded, or trained and evaluated as far as it is not yet."""
    from data_prep.schema import fingerprint
    from models.files import write_text
    from pipeline.evaluation.comparison import read_figures

    of, run = job.results_from | {"evaluate": evaluate}, Path(job.config.run)
    if record.is_file() and (saved := json.loads(record.read_text()))["of"] == of:
        return saved["figures"]
    await train(job, slot)
    folder = run / "compared" / fingerprint({"evaluate": evaluate})[:8]
    options = ["--output", str(folder), *shlex.split(evaluate)]
    await call(slot, "pipeline.evaluate", str(run), *options)
    figures = read_figures(run, next(folder.glob("*/measurements.json"))) | {"flops": job.flops}
    record.parent.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps({"of": of, "figures": figures}, indent=1) + "\n")
    return figures


async def measure_all(
    jobs: list[Job], evaluate: str, records: Path, places: list[Slot]
) -> list[dict[str, float]]:
    """The figures of every run, as many at a time as there are places; says each as it ends."""
    free, console = asyncio.Queue[Slot](), plain_console()
    for place in places:
        free.put_nowait(place)

    async def run(job: Job) -> dict[str, float]:
        name, place = Path(job.config.run).name, await free.get()
        figures = await measure(job, evaluate, records / f"{name}.json", place)
        console.print(f"{name}: x0 error {figures['x0_error']:.5g}")
        # Where it failed its place is not free: nothing else begins.
        free.put_nowait(place)
        return figures

    return await asyncio.gather(*map(run, jobs))


def steps_within(seconds: float, path: Path, given: list[str]) -> int:
    """How many steps take so long, by the speed of a short run beside which nothing may run."""
    from pipeline.inference.model_card import read_scalars

    # So short a run has no room for a schedule.
    plain = "{schedule: constant_with_warmup, warmup_images: 0, decay_images: 0}"
    job = plan_job(path, [*given, f"optimizer={plain}", "monitor.every_steps=10"], 50, None, {})
    asyncio.run(train(job, Slot([sys.executable], {})))
    _, step_ms = read_scalars(Path(job.config.run), "speed/step_ms")["speed/step_ms"]
    return max(1, int(1000 * seconds / median(step_ms)))


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    change: Annotated[
        list[str] | None,
        typer.Option(help="NAME=section.key=value or NAME=FILE.yaml; repeated, also for a NAME"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="runs of each variant")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="of each run")] = None,
    flops: Annotated[float | None, typer.Option(help="of each run instead, such as 1e15")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="of each run's steps instead, where nothing else runs")
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="runs side by side, each with a GPU and a share of the cores")
    ] = 1,
    launcher: Annotated[
        str, typer.Option(help="what starts each run, such as 'torchrun --nproc-per-node 8'")
    ] = "",
    evaluate: Annotated[str, typer.Option(help="more options of `evaluate`, in quotes")] = "",
    output: Annotated[Path, typer.Option(help="folder")] = Path("outputs/compare"),
    records: Annotated[
        Path | None, typer.Option(help="folder of every run's figures; OUTPUT/records")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train variants alike and say how their held-out errors differ, paired over seeds; run again to resume."""
    from pipeline.evaluation.comparison import write

    # A child would go on alone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    variants, console = parse_changes(config, overrides or [], change or []), plain_console(160)
    output = output.absolute()
    budgets = {"steps": steps, "FLOPs": flops, "seconds of steps": seconds}
    budget = [f"{amount:g} {unit} each" for unit, amount in budgets.items() if amount]
    if len(variants) < 2 or len(budget) != 1:
        raise InputError("expected at least one --change, and one of --steps, --flops, --seconds")
    if seconds and (jobs > 1 or launcher or dry_run):
        raise InputError("--seconds: runs are timed here, one by one. Remedy: --steps or --flops")
    places = share_machine(jobs, launcher)
    planned, costs = dict[str, list[Job]](), dict[str, float]()
    shared = [slot.variables["OMP_NUM_THREADS"] for slot in places if slot.variables][:1]
    threads = [f"engine.cpu_threads={count}" for count in shared]
    # What is wrong with the last run is found before the first one begins.
    for name, (path, own) in variants.items():
        own = [*threads, *own, "monitor.prompts=[]"]
        if seconds:
            steps = steps_within(seconds, path, [*own, f"run={output / 'timed' / name}"])
        each = [[f"run={output / f'{name}_{seed}'}", f"seed={seed}"] for seed in range(seeds)]
        planned[name] = [plan_job(path, [*own, *one], steps, flops, costs) for one in each]
        job, ratio = planned[name][0], planned[name][0].flops / planned["base"][0].flops
        about = f"{job.config.training.num_steps} steps, {job.flops:.4g} FLOPs"
        console.print(f"{name}: {about}, {ratio:.3f} of base")
    if dry_run:
        return
    every = [job for own in planned.values() for job in own]
    found = iter(asyncio.run(measure_all(every, evaluate, records or output / "records", places)))
    runs = {name: [next(found) for _ in own] for name, own in planned.items()}
    console.print(write(runs, output, f"{budget[0]}, {seeds} seeds"))


if __name__ == "__main__":
    run_command(main, "pipeline/README.md#which-of-two-is-better")
