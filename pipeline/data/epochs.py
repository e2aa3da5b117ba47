"""What an epoch will be, in tables: by bucket, by dataset, and what ranks and nodes read."""

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from pipeline.data.loader import Era, Loader

GIB = 1 << 30


def epoch_tables(loader: Loader, epoch: int, ranks_per_node: int) -> list[Table]:
    """An epoch by bucket and by dataset, and what ranks and nodes read."""
    era = loader.era_of_epoch(epoch)
    local, order = epoch - era.plan.first_epoch, era.order
    rows, totals = list[tuple[str, ...]](), np.zeros(6, np.int64)
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
        rows.append((f"{bucket.key[0]}x{bucket.key[1]}", *(f"{value:,}" for value in row)))
    rows.append(("all", *(f"{value:,}" for value in totals)))
    steps = f"steps {order.first_step(epoch):,} to {order.first_step(epoch + 1) - 1:,}"
    head = ["bucket", "shards", "samples", "in the epoch", "batches", "carried in", "carried over"]
    return [
        _table(f"epoch {epoch}: {steps}", head, rows),
        dataset_table(era, local),
        reading_table(era, local, loader.world_size, ranks_per_node),
    ]


def _table(title: str, head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """Words, and columns of numbers."""
    table = Table(title=title)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "all" else None)
    return table


def dataset_table(era: Era, local: int) -> Table:
    rows, parts = list[tuple[str, ...]](), [p for b in era.order.buckets for p in b.parts]
    for number, dataset in enumerate(era.mixture.datasets):
        mine = [part for part in parts if era.mixture.dataset[part.shards[0]] == number]
        drawn = sum(part.drawn(local + 1) - part.drawn(local) for part in mine)
        total, repeat = sum(part.total for part in mine), float(era.mixture.repeats[number])
        name = f"{dataset.name}: {dataset.source.path}"
        rows.append((name, f"{repeat:g}", f"{total:,}", f"{drawn:,}"))
    return _table("datasets", ("dataset", "repeat", "samples", "in the epoch"), rows)


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
    trained = ~mixture.heldout
    rows = [
        ("dataset, train split", f"{mixture.bytes[trained].sum() / GIB:.3f}", f"{trained.sum():,}"),
        ("a rank, at most", f"{ranks_bytes.max() / GIB:.3f}", ""),
        ("a node, at most", "", f"{read.sum(axis=1).max():,}"),
        ("a window (data.window_shards), a partition", "", f"{plan.window_shards}"),
        ("canonical partitions", "", f"{plan.partitions}"),
    ]
    title = f"reading, {world_size} ranks on {nodes} nodes"
    return _table(title, ("", "GiB", "shards"), rows)
