"""Fit a small autoencoder to pictures that no public one knows: `flowmill fit-vae CONFIG.yaml [key=value ...]`."""

from pathlib import Path
from typing import Annotated

import typer

from data_prep.config import FitVaeConfig
from models.command import load_config, run_command


def main(config: Path, overrides: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Fit a small autoencoder to the pictures that CONFIG names."""
    from data_prep.fitting import run

    run(load_config(FitVaeConfig, config, overrides or []))


if __name__ == "__main__":
    run_command(main, "data_prep/README.md#what-you-need")
