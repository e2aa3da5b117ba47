"""What an epoch of a run will be, and the exact samples of a step: `python -m pipeline.show_data RUN_OR_CONFIG`."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from models.command import load_config, run_command
from models.config import InputError
from models.vae import LatentCodec, sample_latents
from pipeline.arguments import Overrides
from pipeline.config import TrainConfig, load_run_config
from pipeline.data.batch import Batch
from pipeline.data.encoders import encoder_folder
from pipeline.data.eras import ERAS
from pipeline.data.loader import Era, Loader
from pipeline.inference.grid import grid

GIB = 1 << 30


def epoch_tables(loader: Loader, epoch: int, ranks_per_node: int) -> list[Table]:
    """An epoch by bucket and by dataset, and what ranks and nodes read."""
    era = loader.era_of_epoch(epoch)
    local, order = epoch - era.plan.first_epoch, era.order
    table = Table(
        title=f"epoch {epoch}: steps {order.first_step(epoch):,} to {order.first_step(epoch + 1) - 1:,}"
    )
    for name in (
        "bucket",
        "shards",
        "samples",
        "in the epoch",
        "batches",
        "carried in",
        "carried over",
    ):
        table.add_column(name, justify="right")
    totals = np.zeros(6, np.int64)
    for bucket in order.buckets:
        before, after = bucket.drawn(local), bucket.drawn(local + 1)
        row = [
            sum(len(part.shards) for part in bucket.parts),
            sum(part.total for part in bucket.parts),
            after - before,
            bucket.batches(local + 1) - bucket.batches(local),
            before % era.plan.global_batch,
            after % era.plan.global_batch,
        ]
        totals += row
        table.add_row(f"{bucket.key[0]}x{bucket.key[1]}", *(f"{value:,}" for value in row))
    table.add_row("all", *(f"{value:,}" for value in totals), style="bold")
    return [
        table,
        dataset_table(era, local),
        reading_table(era, local, loader.world_size, ranks_per_node),
    ]


def dataset_table(era: Era, local: int) -> Table:
    table = Table(title="datasets")
    for name in ("dataset", "repeat", "samples", "in the epoch"):
        table.add_column(name, justify="left" if name == "dataset" else "right")
    for number, dataset in enumerate(era.mixture.datasets):
        parts = [
            p
            for b in era.order.buckets
            for p in b.parts
            if era.mixture.dataset[p.shards[0]] == number
        ]
        drawn = sum(part.drawn(local + 1) - part.drawn(local) for part in parts)
        total = sum(part.total for part in parts)
        name = f"{dataset.name}: {dataset.source.path}"
        table.add_row(name, f"{dataset.source.repeat:g}", f"{total:,}", f"{drawn:,}")
    return table


def reading_table(era: Era, local: int, world_size: int, ranks_per_node: int) -> Table:
    """What every rank and node reads in an epoch, its bytes counted by samples."""
    mixture, plan = era.mixture, era.plan
    ranks_bytes = np.zeros(world_size)
    nodes = -(-world_size // ranks_per_node)
    read = np.zeros((nodes, len(mixture.sizes)), bool)
    for bucket in era.order.buckets:
        layout = bucket.layout(local)
        for partition in range(plan.partitions):
            rank, pieces = partition % world_size, layout.partition(partition)
            share = (pieces.stop - pieces.start) / pieces.size
            ranks_bytes[rank] += (mixture.bytes[pieces.shard] * share).sum()
            read[rank // ranks_per_node, pieces.shard] = True
    used = int((~mixture.heldout).sum())
    table = Table(title=f"reading, {world_size} ranks on {nodes} nodes")
    for name in ("", "GiB", "shards"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(
        "dataset, train split", f"{mixture.bytes[~mixture.heldout].sum() / GIB:.3f}", f"{used:,}"
    )
    table.add_row("a rank, at most", f"{ranks_bytes.max() / GIB:.3f}", "")
    table.add_row("a node, at most", "", f"{read.sum(axis=1).max():,}")
    table.add_row("a window (data.window_shards), a partition", "", f"{plan.window_shards}")
    table.add_row("canonical partitions", "", f"{plan.partitions}")
    return table


def show_step(loader: Loader, config: TrainConfig, step: int, path: Path, console: Console) -> None:
    """Print the samples of a step's global batch and save them, decoded, as one picture."""
    batch: Batch = next(loader.batches(step))
    mixture, codec = loader.era_at(step).mixture, loader.manifest.codec
    ids = batch.sample_ids.numpy()
    samples = [mixture.locate(number) for number in ids.tolist()]
    captions = [sample.get("caption", "") for sample in samples]
    table = Table(
        title=f"step {step}, epoch {batch.epoch}, bucket {batch.bucket[0]}x{batch.bucket[1]}"
    )
    for name in ("place", "sample", "shard", "row", "caption"):
        table.add_column(
            name, justify="left" if name in ("shard", "caption") else "right", overflow="fold"
        )
    for place, (number, sample) in enumerate(zip(ids, samples, strict=True)):
        where, row = sample["shard"], str(sample["row"])
        table.add_row(str(place), str(number), where, row, captions[place])
    console.print(table)
    folder = encoder_folder(codec, config.encoders.vae, "vae")
    network = LatentCodec.load(folder, codec.dtype)  # pyright: ignore[reportArgumentType]
    noise = torch.zeros(len(ids), codec.channels, *batch.moments.shape[-2:])
    latents = sample_latents(batch.moments, noise, codec.normalisation)
    pictures = torch.cat([network.decode(part) for part in latents.split(16)])
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(pictures, captions, columns=8).save(path)
    console.print(f"wrote {path}")


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
    if run_or_config.is_dir():
        if overrides:
            raise InputError(
                f"{run_or_config}: overrides go with a YAML file; a run's config is what it is"
            )
        config, run = load_run_config(run_or_config), run_or_config
    else:
        config = load_config(TrainConfig, run_or_config, overrides or [])
        run = Path(config.run)
    eras = run / ERAS
    loader = Loader(
        config.data.model_copy(update={"grow": False}),  # to look at a run decides nothing about it
        global_batch=config.training.global_batch,
        seed=config.seed,
        rank_of=(0, ranks if show is None else 1),
        eras=eras if eras.is_dir() else None,
    )
    console = Console(soft_wrap=True)
    if show is None:
        console.print(*epoch_tables(loader, epoch, ranks_per_node))
    else:
        path = output or run / "samples" / f"data_step_{show:08d}.png"
        show_step(loader, config, show, path, console)
    loader.close()


if __name__ == "__main__":
    run_command(main)
