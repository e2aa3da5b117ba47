"""Pictures to shards: `flowmill prepare CONFIG.yaml [section.key=value ...]`. Run it again to resume."""

from pathlib import Path
from typing import Annotated

import typer

from data_prep.config import LayerConfig, config_of
from models.command import read_yaml, run_command


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
) -> None:
    """Prepare pictures for training: latents and text embeddings in shards; with `base`, a layer over a dataset."""
    found = config_of(read_yaml(config, overrides or []), str(config))
    if isinstance(found, LayerConfig):
        from data_prep.layer import prepare_layer

        prepare_layer(found, dry_run, restart)
        return
    from data_prep.preparation import prepare

    prepare(found, dry_run, restart)


if __name__ == "__main__":
    run_command(main)
