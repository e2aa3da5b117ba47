"""What an epoch will be, in tables: by bucket, by dataset, and what ranks and nodes read."""

import numpy as np
from rich.table import Table

from pipeline.data.loader import Era, Loader

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
        table.add_row(name, f"{float(era.mixture.repeats[number]):g}", f"{total:,}", f"{drawn:,}")
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
