"""Which pictures there are, which are taken, and into which shard each goes.

Scan writes one catalog Parquet part a partition of the sources; plan reads them all, filters, finds
duplicates, and cuts every bucket into shards. Both are pure functions of the sources and the config.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from data_prep.decoder import Address, Answer, DecodePool, Probe, ProbeRequest
from data_prep.images import ImagesConfig, Rejected, list_buckets, nearest_bucket
from data_prep.schema import REJECT_SCHEMA, SPLITS
from data_prep.shards import write_atomic, write_table
from data_prep.sources import Entry, Item, read_entries, sample_key
from models.config import Config

CATALOG_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("name", pa.large_string()),  # the picture's own, within its source
        ("path", pa.large_string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("content_hash", pa.binary(32)),  # sha256 of the picture's bytes
        ("height", pa.int32()),  # as seen, EXIF orientation applied
        ("width", pa.int32()),
        ("caption", pa.large_string()),
        ("metadata", pa.large_string()),  # JSON object, or empty
        ("label", pa.int64()),
        ("reason", pa.string()),  # of rejection; null where taken
        ("detail", pa.string()),
    ]
)
SHARD_LIST_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("split", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_planned", pa.int64()),
    ]
)
PROBES_IN_FLIGHT = 16


class CaptionsConfig(Config):
    """Which captions are taken."""

    empty: Literal["reject", "keep"] = (
        "reject"  # a picture of which nothing, or only blanks, is said
    )
    max_chars: int = Field(
        default=4096, ge=1
    )  # longer ones are rejected; encoders cut at their max_length


class FiltersConfig(Config):
    """Which pictures are taken. Null switches a filter off."""

    min_side: int | None = Field(default=None, ge=1)  # pixels of the shorter side, before resizing
    max_aspect: float | None = Field(default=None, ge=1)  # long over short side, before cropping
    duplicates: Literal["reject", "keep"] = "reject"  # the same file again, in any source


def scan_partition(
    part: Path,
    entries: list[Entry],
    images: ImagesConfig,
    captions: CaptionsConfig,
    pool: DecodePool,
) -> int:
    """Write the catalog part of some entries; returns its rows."""
    rows = [
        _row(item, entries[0].source, answer, captions) for item, answer in _probed(entries, pool)
    ]
    write_table(part, pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA))
    return len(rows)


def _probed(entries: list[Entry], pool: DecodePool) -> Iterator[tuple[Item, Answer | None]]:
    """Every item in order with its probe, None where the item is a rejection already."""
    waiting: deque[tuple[Item, Future[Answer] | None]] = deque()
    for item in read_entries(entries):
        address = Address(item.path, item.offset, item.length)
        waiting.append((item, None if item.reason else pool.submit(ProbeRequest(address))))
        if len(waiting) >= PROBES_IN_FLIGHT:
            first, future = waiting.popleft()
            yield first, future.result() if future else None
    for item, future in waiting:
        yield item, future.result() if future else None


def _row(item: Item, source: str, answer: Answer | None, config: CaptionsConfig) -> dict[str, Any]:
    row = {
        "key": sample_key(source, item.name),
        "source": source,
        "name": item.name,
        "path": item.path,
        "offset": item.offset,
        "length": item.length,
        "caption": "",
        "metadata": item.metadata,
        "label": item.label,
        "reason": item.reason,
        "detail": item.detail,
    }
    try:
        if isinstance(answer, Rejected):
            raise answer
        if isinstance(answer, Probe):
            row |= {"height": answer.height, "width": answer.width}
            row["content_hash"] = answer.content_hash
            row["caption"] = clean_caption(item.caption, config)
    except Rejected as rejected:
        row |= {"reason": rejected.reason, "detail": rejected.detail}
    return row


def clean_caption(data: bytes | None, config: CaptionsConfig) -> str:
    """UTF-8 text on one line, single blanks; raises Rejected."""
    try:
        text = " ".join((data or b"").decode("utf-8-sig").replace("\0", " ").split())
    except UnicodeDecodeError as error:
        raise Rejected("caption_not_utf8", f"byte {error.start}") from error
    if len(text) > config.max_chars:
        raise Rejected("caption_too_long", f"over {config.max_chars} characters")
    if not text and config.empty == "reject":
        raise Rejected("caption_empty", "no caption" if data is None else "only blanks")
    return text


def plan(
    work: Path,
    images: ImagesConfig,
    filters: FiltersConfig,
    samples_per_shard: int,
    heldout_fraction: float,
) -> None:
    """Write plan.parquet (a row a sample, a row group a shard), its rejects, and last the list of shards.

    Holds the catalog in memory, some 300 bytes a picture: 10^8 pictures want a machine with 64 GiB,
    more want a sort on disk here.
    """
    parts = sorted((work / "catalog").glob("part-*.parquet"))
    table = pa.concat_tables([pq.read_table(part, schema=CATALOG_SCHEMA) for part in parts])
    kept, rejects = apply_filters(table, filters)
    write_table(work / "plan_rejects.parquet", rejects)
    buckets = list_buckets(images)
    bucket = nearest_bucket(_numbers(kept["height"]), _numbers(kept["width"]), buckets)
    split = _heldout(kept["key"], heldout_fraction).astype(np.int64)
    group = bucket * len(SPLITS) + split
    # Keys are hashes: in their order every shard is a random sample of its bucket.
    kept = kept.append_column("group", pa.array(group))
    kept = kept.sort_by([("group", "ascending"), ("key", "ascending")])
    group, kept = kept["group"].to_numpy(), kept.drop_columns(["group"])
    shards = _cut(group, buckets, samples_per_shard)

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, kept.schema, compression="zstd") as writer:
            start = 0
            for shard in shards:
                writer.write_table(kept.slice(start, shard["num_planned"]).combine_chunks())
                start += shard["num_planned"]

    write_atomic(work / "plan.parquet", write)
    write_table(work / "shard_list.parquet", pa.Table.from_pylist(shards, SHARD_LIST_SCHEMA))


def _cut(group: np.ndarray, buckets: list[tuple[int, int]], size: int) -> list[dict[str, Any]]:
    """The list of shards of samples sorted by group, `size` samples each but for a bucket's last."""
    shards = []
    for value, count in zip(*np.unique(group, return_counts=True), strict=True):
        (height, width), split = buckets[value // len(SPLITS)], SPLITS[value % len(SPLITS)]
        for number, start in enumerate(range(0, count, size)):
            shards.append(
                {
                    "path": f"shards/{height}x{width}/{split}-{number:06d}.tar",
                    "split": split,
                    "height": height,
                    "width": width,
                    "num_planned": min(size, int(count) - start),
                }
            )
    return shards


def apply_filters(table: pa.Table, config: FiltersConfig) -> tuple[pa.Table, pa.Table]:
    """Taken rows and rejects, each rejected by the first rule that applies; duplicates come last."""
    scanned = table.filter(table["reason"].is_valid())
    tables = [_rejects(scanned, scanned["reason"], scanned["detail"])]
    table = table.filter(table["reason"].is_null())
    height, width = _numbers(table["height"]), _numbers(table["width"])
    short, long = np.minimum(height, width), np.maximum(height, width)
    rules: list[tuple[str, np.ndarray]] = []
    if config.min_side is not None:
        rules.append(("too_small", short < config.min_side))
    if config.max_aspect is not None:
        rules.append(("aspect", long > config.max_aspect * short))
    done = np.zeros(len(table), dtype=bool)
    for reason, mask in rules:
        rows = np.flatnonzero(mask & ~done)
        done |= mask
        details = [f"{w}x{h}" for h, w in zip(height[rows], width[rows], strict=True)]
        tables.append(_rejects(table.take(rows), [reason] * len(rows), details))
    table = table.filter(~done)
    if config.duplicates == "reject":
        first = _first_with_same(table["content_hash"])
        again = first != np.arange(len(table))
        originals = table["key"].take(first[again]).to_pylist()
        details = [f"same file as {key}" for key in originals]
        tables.append(_rejects(table.filter(again), ["duplicate"] * len(details), details))
        table = table.filter(~again)
    return table.drop_columns(["reason", "detail"]), pa.concat_tables(tables)


def _rejects(table: pa.Table, reason: Any, detail: Any) -> pa.Table:
    columns = [table["key"], table["source"], table["name"].cast(pa.string()), reason, detail]
    arrays = [c if isinstance(c, pa.ChunkedArray) else pa.array(c, pa.string()) for c in columns]
    return pa.Table.from_arrays(arrays, schema=REJECT_SCHEMA)


def _first_with_same(values: pa.ChunkedArray) -> np.ndarray:
    """For every row the first row that holds the same value."""
    codes = values.combine_chunks().dictionary_encode().indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    return first[codes]


def _heldout(keys: pa.ChunkedArray, fraction: float) -> np.ndarray:
    """True for a fixed pseudo-random fraction; from the key's last digits, as its first ones set the order."""
    tail = np.array([int(key[-8:], 16) for key in keys.to_pylist()], dtype=np.float64)
    return tail < fraction * 2**32


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.int64)
