"""Variants of a run at equal compute: `python -m pipeline.compare CONFIG --change muon=optimizer.kind=muon --steps 600`.

All variants of a seed see the same pictures in the same order with the same noise, and begin with the same weights
where their networks are alike. Each is an ordinary run under OUTPUT; the same line again goes on where it stopped.
"""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from models.command import load_config, plain_console, run_command
from models.config import InputError, differences
from pipeline.arguments import ConfigFile, DryRun, Overrides
from pipeline.config import CONFIG, RESULTS, TrainConfig, load_run_config


class Job(NamedTuple):
    """The arguments that train a run, what they resolve to, and the FLOPs of the whole run."""

    arguments: list[str]
    config: TrainConfig
    flops: float


def parse_changes(
    config: Path, overrides: list[str], changes: list[str]
) -> dict[str, tuple[Path, list[str]]]:
    """File and overrides of each variant by name, the config as it is first; raises InputError."""
    found = {"base": (config, overrides)}
    for item in changes:
        name, _, change = item.partition("=")
        if not re.fullmatch(r"[\w.+-]+", name) or name == "base" or not change:
            raise InputError(
                f"--change: got {item!r}, expected NAME=section.key=value or NAME=FILE.yaml"
            )
        path, given = found.get(name, found["base"])
        found[name] = (path, [*given, change]) if "=" in change else (Path(change), given)
    return found


def plan_job(path: Path, given: list[str], steps: int | None, flops: float | None) -> Job:
    """One run; raises InputError where it cannot be trained and measured, or has begun with another config."""
    from pipeline.runs.planning import flops_per_step
    from pipeline.runs.setup import fit_run

    config = load_config(TrainConfig, path, given)
    cost = flops_per_step(config)
    steps = steps or int((flops or 0) // cost)
    if not steps:
        raise InputError(f"--flops: got {flops or 0:g}, expected at least a step's, {cost:g}")
    given = [*given, f"training.images={steps * config.training.global_batch}"]
    fitted = fit_run(load_config(TrainConfig, path, given))
    heldout, run = fitted.loader.heldout_batches(1), Path(config.run)
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
    return Job([str(path), *given], fitted.config, steps * cost)


def call(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise InputError(f"{shlex.join([module, *arguments])}: ended with status {done.returncode}")


def measure(job: Job, evaluate: str) -> dict[str, float]:
    """The figures of a run, trained and evaluated as far as it is not yet."""
    from data_prep.schema import fingerprint
    from pipeline.evaluation.comparison import read_figures
    from pipeline.runs.start import finished

    run = Path(job.config.run)
    if not finished(job.config):
        call("pipeline.train", *job.arguments)
        if not finished(job.config):
            raise InputError(f"{run}: was stopped. Remedy: the same command, which goes on")
    folder = run / "compared" / fingerprint({"evaluate": evaluate})[:8]
    if not list(folder.glob("*/measurements.json")):
        call("pipeline.evaluate", str(run), "--output", str(folder), *shlex.split(evaluate))
    return read_figures(run, next(folder.glob("*/measurements.json")))


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
    evaluate: Annotated[str, typer.Option(help="more options of `evaluate`, in quotes")] = "",
    output: Annotated[Path, typer.Option(help="folder")] = Path("outputs/compare"),
    dry_run: DryRun = False,
) -> None:
    """Train variants alike and say how their held-out errors differ, paired over seeds; run again to resume."""
    from pipeline.evaluation.comparison import write

    # A child would go on alone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    variants, console = parse_changes(config, overrides or [], change or []), plain_console(100)
    if len(variants) < 2 or (steps is None) == (flops is None):
        raise InputError("expected at least one --change, and --steps or --flops")
    jobs: dict[tuple[int, str], Job] = {}
    # What is wrong with the last run is found before the first one begins.
    for seed in range(seeds):
        for name, (path, given) in variants.items():
            own = [f"run={output / f'{name}_{seed}'}", f"seed={seed}", "monitor.prompts=[]"]
            jobs[seed, name] = plan_job(path, [*given, *own], steps, flops)
    for name in variants:
        _, resolved, count = jobs[0, name]
        ratio = count / jobs[0, "base"].flops
        console.print(
            f"{name}: {resolved.training.num_steps} steps, {count:.4g} FLOPs, {ratio:.3f} of base"
        )
    if dry_run:
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for (seed, name), job in jobs.items():
        runs[name].append(measure(job, evaluate))
        console.print(f"{name}, seed {seed}: x0 error {runs[name][-1]['x0_error']:.5g}")
    budget = f"{steps} steps" if steps else f"{flops:g} FLOPs"
    console.print(write(runs, output, f"{budget} each, {seeds} seeds"))


if __name__ == "__main__":
    run_command(main)
