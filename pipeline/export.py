"""A trained model for others: `python -m pipeline.export RUN FOLDER`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from models.command import run_command
from models.config import InputError
from pipeline import arguments


def main(
    run: arguments.RunFolder,
    folder: Annotated[Path, typer.Argument(help="to write; must not exist")],
    overrides: arguments.PlaceOverrides = None,
    weights: arguments.Weights = "ema",
    step: arguments.Step = None,
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="of the network")] = "fp32",
    encoders: Annotated[
        Literal["copy", "link"],
        typer.Option(help="VAE and text encoders copied, or links to where they are here"),
    ] = "copy",
    licence: Annotated[
        str, typer.Option("--license", help="the model's, as the hub names it, for its card")
    ] = "unknown",
    dry_run: arguments.DryRun = False,
) -> None:
    """Write a run's checkpoint as a diffusers pipeline folder, a single file and a model card."""
    from pipeline import distributed
    from pipeline.inference.exported import export, stock_class
    from pipeline.runs.trained import open_trained

    places, others = arguments.split_places(overrides)
    if others:
        raise InputError(f"override {others[0]!r}: expected {arguments.MOVED}")
    folder = folder.absolute()
    if folder.exists():
        raise InputError(f"{folder}: exists already. Remedy: another name, or remove it.")
    trained = open_trained(run, weights, step, places)
    what = stock_class(trained) or f"flowmill's {trained.config.model.kind}, its source beside it"
    distributed.say(f"{weights} at step {trained.step} as {dtype} to {folder}: {what}")
    if not dry_run:
        export(trained, folder, dtype, encoders, licence)
        distributed.say(f"wrote {folder}")


if __name__ == "__main__":
    run_command(main, "pipeline/README.md#giving-it-away")
