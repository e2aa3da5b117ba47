"""Pictures to shards: `flowmill prepare CONFIG.yaml [section.key=value ...]`. Run it again to resume or to grow."""

from pathlib import Path
from typing import Annotated

import typer

from models.command import read_yaml, run_command
from models.config import InputError


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
    """Prepare pictures for training: latents and text embeddings in shards; with `base`, a layer over a dataset."""
    # For the help of the command it is not needed.
    from data_prep.config import LayerConfig, config_of

    found = config_of(read_yaml(config, overrides or []), str(config))
    if isinstance(found, LayerConfig):
        from data_prep.layer import prepare_layer

        if allow_missing:
            raise InputError("--allow-missing: a layer has no sources of which files could be gone")
        prepare_layer(found, dry_run, restart)
        return
    from data_prep.preparation import prepare

    prepare(found, dry_run, restart, allow_missing)


if __name__ == "__main__":
    run_command(main, "data_prep/README.md")
