"""What an epoch of a run will be, and the exact samples of a step: `python -m pipeline.show_data RUN_OR_CONFIG`."""

from pathlib import Path
from typing import Annotated

import typer

from models.command import load_config, plain_console, run_command
from models.config import InputError
from pipeline.arguments import MOVED, Overrides, split_places
from pipeline.config import TrainConfig, load_run_config


def main(
    run_or_config: Annotated[Path, typer.Argument(help="a run's folder, or the YAML file of one")],
    overrides: Overrides = None,
    epoch: Annotated[int, typer.Option(min=0, help="which epoch to describe")] = 0,
    ranks: Annotated[int, typer.Option(min=1, help="ranks in all")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1)] = 8,
    show: Annotated[int | None, typer.Option(min=0, help="decode the samples of this step")] = None,
    output: Annotated[Path | None, typer.Option(help="PNG for --show")] = None,
) -> None:
    """What an epoch will be: batches per bucket, repeats, what is carried over, what ranks and nodes read."""
    from pipeline.data.epochs import epoch_tables
    from pipeline.data.eras import ERAS
    from pipeline.data.loader import Loader
    from pipeline.inference.step import show_step

    if run_or_config.is_dir():
        places, others = split_places(overrides)
        if others:
            raise InputError(
                f"{run_or_config}: a run's config is what it is: got {others[0]!r}, expected {MOVED}"
            )
        config, run = load_run_config(run_or_config, places), run_or_config
    else:
        config = load_config(TrainConfig, run_or_config, overrides or [])
        run = Path(config.run)
    eras = run / ERAS
    loader = Loader(
        config.data,
        global_batch=config.training.global_batch,
        seed=config.seed,
        rank_of=(0, ranks if show is None else 1),
        eras=eras if eras.is_dir() else None,
    )
    # To look at a run decides nothing about it.
    loader.eras.settles = False
    console = plain_console()
    if show is None:
        console.print(*epoch_tables(loader, epoch, ranks_per_node))
    else:
        path = output or run / "samples" / f"data_step_{show:08d}.png"
        show_step(loader, config, show, path, console)
    loader.close()


if __name__ == "__main__":
    run_command(main, "pipeline/README.md#before-it-starts")
