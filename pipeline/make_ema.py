"""An EMA of any width after training: `python -m pipeline.make_ema RUN --sigma-rel 0.15 [--step N]`.

RUN/ema_snapshots/step_00001000/                             written while training, laid out as a checkpoint
RUN/ema/step_00004000.ema_sigma_0.15.safetensors (.sha256)   made here
"""

from typing import Annotated

import typer

from models.command import run_command
from pipeline.arguments import DryRun, RunFolder
from pipeline.config import load_run_config
from pipeline.training.config import power_exponent, power_name


def main(
    run: RunFolder,
    sigma_rel: Annotated[float, typer.Option(help="width as a share of the training time")],
    step: Annotated[int | None, typer.Option(help="of a snapshot; the newest")] = None,
    dry_run: DryRun = False,
) -> None:
    """Make the power-function EMA of any width from a run's snapshots."""
    from pipeline.training.checkpoint import save_weights
    from pipeline.training.power_ema import read_snapshots, reconstruct

    load_run_config(run)
    power_exponent(sigma_rel)
    snapshots = read_snapshots(run, step)
    last, name = snapshots[-1], power_name(sigma_rel)
    path = run / "ema" / f"step_{last.step:08d}.{name}.safetensors"
    typer.echo(
        f"{path}: width {sigma_rel:g} over the last {last.images:,} pictures at step {last.step}, from "
        f"{len(snapshots)} snapshots of widths {sorted({s.sigma_rel for s in snapshots})}; use it with "
        f"--weights {name}"
    )
    if dry_run:
        return
    about = {"step": str(last.step), "images": str(last.images), "sigma_rel": f"{sigma_rel:g}"}
    save_weights(path, reconstruct(snapshots, sigma_rel), about)


if __name__ == "__main__":
    run_command(main, "pipeline/README.md#sampling")
