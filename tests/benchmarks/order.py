"""A loader's start on ever larger datasets, up to a billion samples in a million shards, and how well it mixes.

Every shard is the same file, so that a table of a million takes no more disk than one: only those that
the first windows of the resumed rank want are there, as links to it.
"""

import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from data_prep.schema import (
    MANIFEST,
    SHARD_SCHEMA,
    SHARD_TABLE,
    BucketRecord,
    index_path,
    read_manifest,
)
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from pipeline.data.order import Order, Part, Plan
from tests.shard_factory import Kind, make_dataset

SAMPLES = 1000  # a shard
GLOBAL_BATCH, RANKS, NODES = 2048, 8, 4
BUCKETS = [(256, 256), (192, 320), (320, 192), (128, 512)]
SAMPLE_BYTES = 124 << 10  # what a sample would take with its text


def make_large(folder: Path, shards: int) -> None:
    """A manifest and shard table of so many shards, a template for each, and no shard yet."""
    make_dataset(
        folder, [(bucket, SAMPLES) for bucket in BUCKETS], Kind({}, bare=True, downscale=64)
    )
    small = pq.read_table(folder / SHARD_TABLE).to_pylist()
    numbers = np.arange(shards)
    parts = []
    for kind, row in enumerate(small):
        template = folder / row["path"]
        template.rename(folder / f"template-{kind}.tar")
        (folder / index_path(row["path"])).rename(folder / f"template-{kind}.idx.npy")
        mine = numbers[kind :: len(small)]
        base = row["path"].rsplit("/", 1)[0]
        columns = {
            name: pa.array([row[name]]).take(pa.array(np.zeros(len(mine), np.int64)))
            for name in row
        }
        columns["path"] = pa.array([f"{base}/train-{number:09d}.tar" for number in mine])
        parts.append(pa.table(columns).cast(SHARD_SCHEMA))
    pq.write_table(pa.concat_tables(parts), folder / SHARD_TABLE)
    manifest = read_manifest(folder)
    counts = [
        BucketRecord(height=h, width=w, num_samples=len(p) * SAMPLES)
        for (h, w), p in zip(BUCKETS, parts, strict=True)
    ]
    manifest = manifest.model_copy(update={"buckets": counts}).with_fingerprint()
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def link_shards(loader: Loader, folder: Path, step: int) -> None:
    """Put the shards there that the first windows after a step want."""
    era = loader.era_at(step)
    epoch, plan = era.order.epoch_of(step), era.plan
    sequence = era.order.sequence(epoch)[step - era.order.first_step(epoch) :]
    templates = {bucket: kind for kind, bucket in enumerate(sorted(BUCKETS))}
    for bucket in set(sequence[:2].tolist()):
        order = era.order.buckets[bucket]
        place = int(np.flatnonzero(sequence == bucket)[0])
        number = era.order.locate(step + place)[2]
        for partition in loader.partitions:
            windows = order.windows(partition, number * plan.global_batch // plan.partitions, epoch)
            for window in (next(windows) for _ in range(4)):
                for shard in window.segments.shard.tolist():
                    path = folder / era.mixture.text("path", shard)
                    if not path.exists():
                        kind = templates[era.mixture.bucket(shard)]
                        path.hardlink_to(folder / f"template-{kind}.tar")
                        Path(index_path(str(path))).hardlink_to(folder / f"template-{kind}.idx.npy")


def resume(folder: Path, results: "multiprocessing.Queue[dict[str, float]]") -> None:
    """One rank of eight starts at a random step of the third epoch."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    config = DataConfig(path=str(folder), verify="size", prefetch=0)
    loader = Loader(config, global_batch=GLOBAL_BATCH, seed=0, rank_of=(3, RANKS))
    opened = time.perf_counter()
    order = loader.first.order
    step = order.first_step(2) + int(np.random.default_rng().integers(loader.steps_per_epoch(2)))
    link_shards(loader, folder, step)
    order.sequence.cache_clear()  # what finding the shards has worked out already
    for bucket in order.buckets:
        bucket.layout.cache_clear()
    start = time.perf_counter()
    batches = loader.batches(step)
    next(batches)
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = np.zeros((NODES, len(loader.first.mixture.sizes)), bool)
    for bucket in order.buckets:
        layout = bucket.layout(2)
        for partition in range(order.plan.partitions):
            node = partition % RANKS // (RANKS // NODES)
            read[node, layout.partition(partition).shard] = True
    results.put(
        {
            "open_s": opened - begin,
            "first_batch_s": end - start,
            "memory_mib": (peak - before) / 1024,
            "shards_opened": len(loader.first.store.opened),
            "node_shards": int(read.sum(axis=1).max()),
        }
    )


def mixing(shards: int, size: int, batch: int, partitions: int, window: int) -> list[float]:
    """Measure over 200 batches the correlation of neighbours' source positions in a batch and between batches, and how
    much the batch's mean position varies, 1.0 being a perfect shuffle."""
    part = Part(np.arange(shards), np.full(shards, size))
    bucket = Order({(1, 1): [part]}, Plan(0, batch, partitions, window)).buckets[0]
    share, steps = batch // partitions, 200
    source = np.empty((steps, partitions, share))
    for partition in range(partitions):
        positions, count = [], 0
        for piece in bucket.windows(partition, 0, 0):
            rows = [s * size + r for s, r in zip(piece.segments.shard, piece.rows(), strict=True)]
            positions.append(np.concatenate(rows)[piece.shuffle()])
            count += len(positions[-1])
            if count >= steps * share:
                break
        source[:, partition] = np.concatenate(positions)[: steps * share].reshape(steps, share)
    source = source.reshape(steps, batch) / (shards * size)
    within = np.corrcoef(source[:, :-1].ravel(), source[:, 1:].ravel())[0, 1]
    between = np.corrcoef(source[:-1].ravel(), source[1:].ravel())[0, 1]
    return [within, between, float(source.mean(axis=1).var() * 12 * batch)]


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
    folder: Annotated[Path | None, typer.Option(help="where to build the tables (1 GB)")] = None,
) -> None:
    """Start a loader on ever larger datasets, and measure how well it mixes."""
    console, flat = Console(), {}
    title = f"one of {RANKS} ranks starts at a random step; global batch {GLOBAL_BATCH}, shards of {SAMPLES}"
    table = Table(title=title)
    for name in (
        "samples",
        "shards",
        "table read, s",
        "first batch, s",
        "memory a rank, MiB",
        "shards opened first",
        "shards per node and epoch",
        "GiB of them at 124 KiB",
    ):
        table.add_column(name, justify="right")
    for shards in (1_000, 10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            make_large(Path(temporary), shards)
            processes = multiprocessing.get_context("spawn")
            results = processes.Queue()
            child = processes.Process(target=resume, args=(Path(temporary), results))
            child.start()
            found = results.get(timeout=600)
            child.join()
        flat |= {f"{name}_{shards}": value for name, value in found.items()}
        node_gib = found["node_shards"] * SAMPLES * SAMPLE_BYTES / 2**30
        table.add_row(
            f"{shards * SAMPLES:,}",
            f"{shards:,}",
            f"{found['open_s']:.2f}",
            f"{found['first_batch_s']:.3f}",
            f"{found['memory_mib']:.0f}",
            f"{found['shards_opened']}",
            f"{found['node_shards']:,}",
            f"{node_gib:,.0f}",
        )
    console.print(table)
    table = Table(title="mixing of 4,096 shards of 1,000 that lie in the order of their source")
    for name in (
        "batch",
        "partitions",
        "window",
        "neighbours",
        "next batch",
        "batch mean's variance",
    ):
        table.add_column(name, justify="right")
    default = DataConfig(path="").window_shards
    for batch, partitions in ((256, 64), (2048, 64), (256, 16)):
        for window in (1, 2, 4, 8, 16):
            found = mixing(4096, 1000, batch, partitions, window)
            mark = "*" if window == default else ""
            table.add_row(
                str(batch), str(partitions), f"{window}{mark}", *(f"{value:.3f}" for value in found)
            )
            if (batch, window) == (256, default) and partitions == 64:
                flat |= dict(
                    zip(
                        ("mixing_neighbours", "mixing_next_batch", "mixing_mean_variance"),
                        found,
                        strict=True,
                    )
                )
    table.add_row("", "", "perfect", "0.000", "0.000", "1.000")
    console.print(table)
    if json_file:
        json_file.write_text(json.dumps(flat, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
