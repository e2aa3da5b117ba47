"""Audit of a prepared dataset: `flowmill verify DATASET`. Every hash, index, count, shape, and NaN."""

import os
import sys
from typing import Annotated

import typer

from models.command import run_command


def main(
    dataset: Annotated[str, typer.Argument(help="A folder or URL that flowmill prepare wrote.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes that read shards.")] = (
        os.cpu_count() or 1
    ),
    decode: Annotated[
        int,
        typer.Option(min=0, help="Pictures of each shard's proof to decode again, and compare."),
    ] = 0,
    encode: Annotated[
        int,
        typer.Option(min=0, help="Captions of each shard's proof to encode again, and compare."),
    ] = 0,
    vae: Annotated[str | None, typer.Option(help="The codec's folder, where it has moved.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of a text encoder that has moved.")
    ] = None,
) -> None:
    """Audit a prepared dataset; exit status 1 and what is wrong, if anything is."""
    # The command's help needs none of it.
    from data_prep.audit import drifted, verify
    from data_prep.report import console
    from data_prep.storage import open_root

    root = open_root(dataset, "dataset")
    problems = verify(root, workers)
    if not problems and (decode or encode):
        folders = {name: folder for name, _, folder in (pair.partition("=") for pair in text or [])}
        problems = drifted(root, decode, encode, vae, folders)
    for problem in problems:
        console.print("wrong", problem, style="red")
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, "data_prep/README.md#is-it-right")
