"""Pictures to shards: `flowmill prepare CONFIG.yaml [section.key=value ...]`. Run it again to resume or to grow."""

from pathlib import Path
from typing import Annotated

import typer

from data_prep.config import PrepareConfig
from models.command import load_config, run_command


def main(
    config: Annotated[Path, typer.Argument(help="A YAML file; see configs/prepare_*.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, say what would be done, do nothing.")
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Delete what an earlier preparation left in the output."),
    ] = False,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="Add what is new though files are gone or changed, whose samples stay.",
        ),
    ] = False,
) -> None:
    """Prepare pictures for training: latents and text embeddings in shards."""
    from data_prep.preparation import prepare

    prepare(load_config(PrepareConfig, config, overrides or []), dry_run, restart, allow_missing)


if __name__ == "__main__":
    run_command(main)
