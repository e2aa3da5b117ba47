"""Presets trained alike: the same data, network, seed and steps, then one measure for all.

    python -m tests.benchmarks.objectives configs/demo_train.yaml data.path=DATASET [--json FILE]

The measure is the x0 error on held-out samples at given noise levels (log SNR), from EMA weights, with the
same noise for every objective. It does not depend on path, prediction, weighting or distribution of t.
A pair of lines that differ in one option says what that option does; a second seed says what is chance.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from models.command import load_config, run_command
from models.config import InputError
from pipeline.config import TrainConfig, load_run_config
from pipeline.inference.heldout import LOG_SNR, x0_errors
from pipeline.objectives.objective import Objective
from pipeline.runs.setup import fit_run, network_for_sampling
from pipeline.training.checkpoint import load_weights

# Name -> the objective section. After the presets, what differs from one of them in one option.
VARIANTS = {
    "sd15-epsilon": "{preset: sd15-epsilon}",
    "sd2-v": "{preset: sd2-v}",
    "nai3-v-ztsnr": "{preset: nai3-v-ztsnr}",
    "min-snr-v": "{preset: min-snr-v}",
    "sd3-rf-logit-normal": "{preset: sd3-rf-logit-normal}",
    "flux-shift": "{preset: flux-shift}",
    "edm": "{preset: edm}",
    "sd15-epsilon + min_snr": "{preset: sd15-epsilon, weighting: min_snr}",
    "sd2-v + min_snr": "{preset: sd2-v, weighting: min_snr}",
    "min-snr-v - min_snr": "{preset: min-snr-v, weighting: none}",
    "sd3 - logit_normal": "{preset: sd3-rf-logit-normal, timesteps: uniform}",
}
HELD_OUT = 256
ROUNDS = 4  # draws of noise for each held-out sample and level


def measure(run: Path, weights: str = "ema") -> list[float]:
    """Held-out x0 error of a run's newest checkpoint at each of LOG_SNR."""
    fitted = fit_run(load_run_config(run))
    batches = fitted.loader.heldout_batches(HELD_OUT)
    if not batches:
        raise InputError(
            f"{run}: its dataset holds nothing out. Remedy: prepare with heldout_fraction=0.05"
        )
    state, _ = load_weights(run, weights)  # pyright: ignore[reportArgumentType]
    network = network_for_sampling(fitted.config, state, torch.device("cpu"))
    objective, codec = Objective(fitted.config.objective), fitted.loader.manifest.codec
    errors = [x0_errors(network, objective, codec, batch, ROUNDS) for batch in batches]
    fitted.loader.close()
    return torch.cat(errors, 1).mean(1).tolist()


def train(config: Path, run: Path, overrides: Iterable[str]) -> None:
    """One run as a command, its pictures and frequent checkpoints left out; a finished one is kept."""
    arguments = [
        str(config),
        f"run={run}",
        "monitor.prompts=[]",
        "checkpoint.every_steps=100000",
        *overrides,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.train", *arguments], stdout=subprocess.DEVNULL
    )
    if done.returncode:
        raise InputError(f"{run}: training ended with status {done.returncode}")


def main(
    config: Annotated[
        Path, typer.Argument(help="a training config whose dataset holds samples out")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, not objective")
    ] = None,
    folder: Annotated[Path, typer.Option(help="of the runs")] = Path("outputs/objectives"),
    seeds: Annotated[int, typer.Option(min=1, help="runs of each objective")] = 1,
    output: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Train every preset alike and table the held-out x0 error by noise level."""
    load_config(TrainConfig, config, overrides or [])  # wrong ones end here, before hours
    results: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        for name, section in VARIANTS.items():
            run = folder / f"{name.replace(' ', '')}_{seed}"
            train(config, run, [*(overrides or []), f"objective={section}", f"seed={seed}"])
            results.setdefault(name, []).append(measure(run))
            print(name, seed, " ".join(f"{e:.4f}" for e in results[name][-1]), flush=True)
    table = Table(
        title="held-out x0 error by log SNR, EMA weights; mean of seeds (spread of seeds)"
    )
    table.add_column("objective", no_wrap=True)
    for log_snr in LOG_SNR:
        table.add_column(f"{log_snr:+d}", justify="right")
    for name, runs in results.items():
        mean, spread = np.mean(runs, axis=0), np.ptp(runs, axis=0)
        cells = (f"{m:.4f} ({s:.4f})" for m, s in zip(mean, spread, strict=True))
        table.add_row(name, *cells)
    Console(width=130).print(table)
    if output is not None:
        flat = {
            f"{name} @ {log_snr:+d}": float(value)
            for name, runs in results.items()
            for log_snr, value in zip(LOG_SNR, np.mean(runs, axis=0), strict=True)
        }
        output.write_text(json.dumps(flat, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
