"""Listing and scan: which files the sources have, and which pictures are in them."""

from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_prep import pool
from data_prep.catalog import STAGED, CaptionsConfig, FiltersConfig, scan_partition
from data_prep.config import PrepareConfig
from data_prep.decoder import DecodePool
from data_prep.images import ImagesConfig
from data_prep.report import Progress, console
from data_prep.shards import WORK
from data_prep.sources import Entry, SourceConfig
from data_prep.storage import find_files

ENTRIES_AT_ONCE = 1 << 16


LISTING_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("name", pa.large_string()),
        ("path", pa.large_string()),
        ("size", pa.int64()),
        ("caption_path", pa.large_string()),
        ("class_name", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


def list_sources(config: PrepareConfig) -> pa.Table:
    """Every file of every source, in a fixed order: the fields of an Entry."""
    entries = (e for name, source in config.sources.items() for e in source.entries(name))
    names, batches = LISTING_SCHEMA.names, list[pa.RecordBatch]()
    while rows := [{n: getattr(e, n) for n in names} for e in islice(entries, ENTRIES_AT_ONCE)]:
        batches.append(pa.RecordBatch.from_pylist(rows, schema=LISTING_SCHEMA))
    return pa.Table.from_batches(batches, LISTING_SCHEMA)


def class_names(listing: pa.Table) -> list[str]:
    """Of class folders, in the order of their labels."""
    return sorted(listing["class_name"].drop_null().unique().to_pylist())


def scan(config: PrepareConfig, dataset: Path, listing: pa.Table) -> None:
    """One catalog part a partition of the sources; parts that exist are not made again."""
    names, partitions = class_names(listing), _partitions(config, listing)
    done, staged = (find_files(dataset / WORK / name) for name in ("catalog", STAGED))
    todo = []
    for number, (source, begin, end) in enumerate(partitions):
        name = f"part-{number:06d}"
        # A part whose pictures were staged wants them there, so long as shards are to be made.
        there = f"{name}.staged.parquet" in done and name in staged
        if there or f"{name}.parquet" in done:
            continue
        todo.append((dataset / WORK, name, source, begin, end))
    settings = (names, config.images, config.captions, config.filters)
    work = (
        (folder, name, listing.slice(begin, end - begin), config.sources[source], *settings)
        for folder, name, source, begin, end in todo
    )
    with Progress(console, "scan", len(todo), "parts") as progress:
        for count, _ in enumerate(pool.run_tasks(_scan_task, work, _scan_lost, console.print)):
            progress.update(count + 1)


def scan_entries(
    config: PrepareConfig, dataset: Path, name: str, rows: pa.Table, names: list[str]
) -> int:
    """Write the catalog part of some of a source's entries, here; returns its pictures."""
    source = config.sources[rows["source"][0].as_py()]
    settings = (names, config.images, config.captions, config.filters)
    return _scan_task(dataset / WORK, name, rows, source, *settings)


_probes: dict[
    ImagesConfig, DecodePool
] = {}  # a worker's own, so that its child serves many partitions


def _scan_task(
    work: Path,
    name: str,
    rows: pa.Table,
    source: SourceConfig,
    names: list[str],
    images: ImagesConfig,
    captions: CaptionsConfig,
    filters: FiltersConfig,
) -> int:
    probes = _probes.setdefault(images, DecodePool(images, num_children=1))
    entries = [Entry(**row) for row in rows.to_pylist()]
    return scan_partition(work, name, entries, source, names, captions, filters, probes)


def _scan_lost(attempts: int, work: Path, name: str, rows: pa.Table, *settings: Any) -> bool:
    """Reject a table that kills whoever reads it; other partitions do not, so theirs is another trouble."""
    if not settings[0].can_kill_its_reader:
        return False
    detail = f"its reader died {attempts} times"
    columns = {"reason": "scan_crash", "detail": detail}
    for column, value in columns.items():
        place = rows.schema.get_field_index(column)
        rows = rows.set_column(place, column, pa.array([value] * len(rows), pa.string()))
    _scan_task(work, name, rows, *settings)
    return True


def _partitions(config: PrepareConfig, listing: pa.Table) -> list[tuple[str, int, int]]:
    """Neighbours of one source in the listing: many files, or one tar or table."""
    found, start = list[tuple[str, int, int]](), 0
    for name, source in config.sources.items():
        end = start + (pc.sum(pc.equal(listing["source"], name)).as_py() or 0)  # pyright: ignore[reportAttributeAccessIssue]
        size = source.per_task
        found += [(name, begin, min(begin + size, end)) for begin in range(start, end, size)]
        start = end
    return found
