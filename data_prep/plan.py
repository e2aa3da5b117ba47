"""Into which shard each picture goes: filters, duplicates, buckets, cuts. A pure function of the catalog.

Streams: the catalog is read twice, column by column and batch by batch, and sorted on disk by ranges of the
keys. In memory are one range, 29 bytes per duplicate and, where near duplicates are looked for, 16 per picture;
of a growth 40 per new picture too, and of what earlier generations kept a block.
"""

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.catalog import CATALOG_SCHEMA, FiltersConfig
from data_prep.config import PrepareConfig
from data_prep.duplicates import DROP, known_files, known_looks, near_duplicates, same_files
from data_prep.images import Bucket, list_buckets, nearest_bucket
from data_prep.schema import REJECT_SCHEMA, SPLITS
from data_prep.schema.metadata import check_fields
from data_prep.shards import new_table, read_table, sealed_commits, write_table
from data_prep.storage import find_files, is_remote
from models.config import InputError

ROWS_AT_ONCE = 1 << 16
# Full rows that are sorted in memory at once.
ROWS_PER_RANGE = 400_000
HASHES_PER_RANGE = 8_000_000
# Each range is an open file.
MAX_RANGES = 256
# Shards in one file of the plan; reading one shard reads the footer for all of them.
SHARDS_PER_FILE = 256


@dataclass(frozen=True)
class ShardSpec:
    """A shard to be made, of `num_planned` pictures: a row of the plan's list."""

    path: str
    split: str
    height: int
    width: int
    num_planned: int
    generation: int = 0


def make_plan(config: PrepareConfig, work: Path, earlier: Sequence[Path] = ()) -> list[ShardSpec]:
    """The shards of a generation, `earlier` the folders of those before it.

    Raises InputError if no picture is left to fill one of the first generation.
    """
    if not (work / "shard_list.parquet").is_file():
        buckets, size = list_buckets(config.images), config.samples_per_shard
        plan(work, buckets, config.filters, size, config.heldout_fraction, earlier)
    shards = shard_list(work)
    if not shards and not earlier:
        rejects = read_table(work / "plan_rejects.parquet")
        counts = Counter(rejects["reason"].to_pylist()).most_common()
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
        raise InputError(
            f"sources: of {len(rejects)} pictures none is left: {reasons} (see {work}/plan_rejects.parquet). "
            "Remedy: other pictures, captions or filters, and --restart."
        )
    return shards


def shard_list(work: Path) -> list[ShardSpec]:
    return [ShardSpec(**row) for row in read_table(work / "shard_list.parquet").to_pylist()]


def plan(
    work: Path,
    buckets: list[Bucket],
    filters: FiltersConfig,
    samples_per_shard: int,
    heldout_fraction: float,
    earlier: Sequence[Path] = (),
) -> None:
    """Write plan/NNNNNN.parquet (a row per picture, a row group a shard), the rejects, and last the shard list.

    `earlier` are the folders of the generations before, of whose pictures no duplicate is taken. Raises InputError
    where the filters speak of metadata that no picture has.
    """
    made = r"part-([0-9]{6}|[1-9][0-9]{6,})(\.staged)?\.parquet"
    names = sorted(name for name in find_files(work / "catalog") if re.fullmatch(made, name))
    parts = [work / "catalog" / name for name in names]
    texts = (t for _, rows in _batches(parts, ["metadata"]) for t in rows["metadata"].to_pylist())
    # What is new may lack a field that was there before.
    check_fields(texts, {} if earlier else filters.metadata)
    with _aside(work) as folder:
        drops = find_duplicates(parts, filters, folder, earlier)
        count = _num_ranges(parts, ROWS_PER_RANGE)
        paths = [folder / f"range-{number}.arrow" for number in range(count)]
        with new_table(work / "plan_rejects.parquet", REJECT_SCHEMA) as write:
            sifted = sift(parts, filters, drops)
            spill(_grouped(sifted, write, buckets, heldout_fraction), paths)
        cut = _cut(read_ranges(paths), samples_per_shard)
        shards = _write_shards(work / "plan", cut, buckets, len(earlier))
    rows = [asdict(spec) for spec in shards]
    write_table(work / "shard_list.parquet", pa.Table.from_pylist(rows))


@contextmanager
def _aside(work: Path) -> Iterator[Path]:
    """A folder for what is sorted on disk; one that a killed run left behind is deleted."""
    local = not is_remote(work)
    for leftover in work.iterdir() if local else ():
        if re.fullmatch(r"plan-[a-z0-9_]{8}\.tmp", leftover.name) and leftover.is_dir():
            shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(".tmp", "plan-", work if local else None) as folder:
        yield Path(folder)


def kept_pictures(work: Path, column: str) -> Iterator[tuple[np.ndarray, pa.ChunkedArray]]:
    """Hashes in a column, and keys, of what a finished generation planned and did not reject."""
    parts = [work / "plan" / name for name in sorted(find_files(work / "plan"))]
    rejects = [r["key"] for commit in sealed_commits(work) or () for r in commit["rejects"]]
    gone = pa.array(rejects, pa.string())
    for _, table in _batches(parts, ["key", column]):
        if column not in table.column_names:
            raise InputError(
                f"{work}: was planned by an older version, without the hashes that filters.near_duplicates "
                "compares. Remedy: prepare it anew, with --restart or in another output."
            )
        table = table.filter(~pc.field("key").isin(gone))
        yield _hashes(table[column]), table["key"]


def _grouped(
    sifted: Iterator[tuple[pa.Table, pa.Table]],
    write_rejects: Callable[[pa.Table], None],
    buckets: list[Bucket],
    heldout_fraction: float,
) -> Iterator[pa.Table]:
    """Taken rows with the number of their bucket and split; rejects are written."""
    for kept, rejected in sifted:
        write_rejects(rejected)
        bucket = nearest_bucket(_numbers(kept["height"]), _numbers(kept["width"]), buckets)
        words = key_words(kept["key"])
        heldout = (words[:, 3] << 16 | words[:, 4]) < heldout_fraction * 2**32
        yield kept.append_column("group", pa.array(bucket * len(SPLITS) + heldout, pa.int64()))


def read_planned(work: Path, number: int) -> pa.Table:
    """The pictures of the shard at this place in the list."""
    name = f"{number // SHARDS_PER_FILE:06d}.parquet"
    with (work / "plan" / name).open("rb") as file:
        return pq.ParquetFile(file).read_row_group(number % SHARDS_PER_FILE)


def sift(
    parts: list[Path], filters: FiltersConfig, drops: np.ndarray
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Taken rows and rejects, batch by batch; each is rejected by the first rule that applies, DROP after all others."""
    originals = np.unique(drops["original"])
    keys = np.zeros(len(originals), dtype="S20")
    for first, table in _batches(parts, CATALOG_SCHEMA.names):
        begin, end = np.searchsorted(drops["row"], [first, first + len(table)])
        mine, fate = drops[begin:end], _fate(table, filters)
        same_file = mine["distance"] < 0
        fate[mine["row"] - first] = np.where(same_file, "duplicate", "near_duplicate")
        # An original comes before its duplicates, so its key is known by then.
        low, high = np.searchsorted(originals, [first, first + len(table)])
        keys[low:high] = table["key"].take(originals[low:high] - first).to_pylist()
        same = keys[np.searchsorted(originals, mine["original"])].astype(str).tolist()
        said = dict[int, str]()
        for (row, _, distance, generation, key), own in zip(mine.tolist(), same, strict=True):
            alike = f"{bytes(key).hex()} (generation {generation})" if generation >= 0 else own
            how = "same file as" if distance < 0 else f"{distance} of 64 bits from"
            said[row - first] = f"{how} {alike}"
        columns = [*REJECT_SCHEMA.names, "height", "width"]
        rejects = table.select(columns).filter(fate != "").to_pylist()
        for i, row in zip(np.flatnonzero(fate != "").tolist(), rejects, strict=True):
            if not row["reason"]:
                said.setdefault(i, f"{row['width']}x{row['height']}")
            row |= {"reason": row["reason"] or fate[i], "detail": said.get(i, row["detail"])}
        taken = table.filter(fate == "").drop_columns(["reason", "detail"])
        yield taken, pa.Table.from_pylist(rejects, schema=REJECT_SCHEMA)


def _fate(table: pa.Table, filters: FiltersConfig) -> np.ndarray:
    """Why the rules that look at one row alone reject each; "" where they do not."""
    scanned = {"scanned": table["reason"].is_valid().to_numpy()}
    rules = scanned | filters.rules(_numbers(table["height"]), _numbers(table["width"]))
    return np.select([*rules.values()], [*rules], "").astype("U32")


def find_duplicates(
    parts: list[Path], filters: FiltersConfig, folder: Path, earlier: Sequence[Path] = ()
) -> np.ndarray:
    """DROP of every row that an earlier one, or a picture of an earlier generation, makes superfluous, by row."""
    found = np.zeros(0, DROP)
    if filters.duplicates == "reject":
        if earlier:
            known = [kept_pictures(work, "content_hash") for work in earlier]
            found = known_files(*_all_passing(parts, filters, "content_hash"), known)
        count = _num_ranges(parts, HASHES_PER_RANGE)
        exact = same_files(_passing(parts, filters, "content_hash"), count, folder)
        # All rows with the hash of a known picture are its duplicates, the first of them too.
        found = np.concatenate([found, exact[~np.isin(exact["row"], found["row"])]])
    if filters.near_duplicates is not None:
        rows, looks = _all_passing(parts, filters, "perceptual_hash")
        known = [kept_pictures(work, "perceptual_hash") for work in earlier]
        searches = [partial(known_looks, known=known)] if earlier else []
        for search in [*searches, near_duplicates]:
            stays = ~np.isin(rows, found["row"])
            rows, looks = rows[stays], looks[stays]
            found = np.concatenate([found, search(rows, looks, filters.near_duplicates)])
    return np.sort(found, order="row")


def _all_passing(parts: list[Path], filters: FiltersConfig, column: str) -> tuple[Any, Any]:
    """All of `_passing` at once."""
    return tuple(map(np.concatenate, zip(*_passing(parts, filters, column), strict=True)))


def _passing(
    parts: list[Path], filters: FiltersConfig, column: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers of the rows that pass by themselves, int64 (n,), and their hashes in a column; first those of no rows."""
    batches = _batches(parts, [column, "height", "width", "reason"])
    for first, table in chain([(0, CATALOG_SCHEMA.empty_table())], batches):
        rows = np.flatnonzero(_fate(table, filters) == "")
        yield rows + first, _hashes(table[column].take(rows))


def _hashes(column: pa.ChunkedArray) -> np.ndarray:
    """Perceptual hashes, uint64 (n,), or the first half of each sha256, uint64 (n, 2)."""
    array = column.combine_chunks()
    if array.type == pa.uint64():
        return array.to_numpy()
    words = np.frombuffer(array.buffers()[1] or b"", "u8").reshape(-1, 4)
    return words[array.offset : array.offset + len(array), :2]


def spill(tables: Iterator[pa.Table], paths: list[Path]) -> None:
    """Write every row into the file of its key's range, so that each can be sorted in memory."""
    writers = dict[int, pa.ipc.RecordBatchFileWriter]()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with ExitStack() as opened:
        for table in tables:
            place = key_words(table["key"])[:, 0] * len(paths) >> 16
            for number in np.unique(place).tolist():
                if number not in writers:
                    writer = pa.ipc.new_file(str(paths[number]), table.schema, options=options)
                    writers[number] = opened.enter_context(writer)
                writers[number].write_table(table.filter(place == number))


def read_ranges(paths: list[Path]) -> Iterator[pa.Table]:
    """What was spilled, in the order of the keys' ranges, each sorted by group and key."""
    for path in filter(Path.exists, paths):
        with pa.ipc.open_file(str(path)) as reader:
            table = reader.read_all()
        yield table.sort_by([("group", "ascending"), ("key", "ascending")])
        path.unlink()


def _write_shards(
    folder: Path, cut: Iterator[tuple[int, pa.Table]], buckets: list[Bucket], generation: int
) -> list[ShardSpec]:
    """Write the pictures of every shard, SHARDS_PER_FILE to a file."""
    shards, counts = list[ShardSpec](), Counter[int]()
    prefix = f"g{generation:04d}-" if generation else ""
    while first := next(cut, None):
        path = folder / f"{len(shards) // SHARDS_PER_FILE:06d}.parquet"
        with new_table(path, first[1].schema) as write:
            for group, table in chain([first], islice(cut, SHARDS_PER_FILE - 1)):
                write(table)
                (height, width), split = buckets[group // len(SPLITS)], SPLITS[group % len(SPLITS)]
                name = f"shards/{height}x{width}/{prefix}{split}-{counts[group]:06d}.tar"
                shards.append(ShardSpec(name, split, height, width, len(table), generation))
                counts[group] += 1
    return shards


def _cut(ranges: Iterator[pa.Table], size: int) -> Iterator[tuple[int, pa.Table]]:
    """Every group in shards of `size` in the order of keys; keys are hashes, so each is a random sample."""
    rest = dict[int, pa.Table]()
    for table in ranges:
        groups, starts = np.unique(_numbers(table["group"]), return_index=True)
        table = table.drop_columns(["group"])
        ends = [*starts[1:], len(table)]
        for group, begin, end in zip(groups.tolist(), starts, ends, strict=True):
            rows = table.slice(begin, end - begin)
            rows = pa.concat_tables([rest.pop(group), rows]) if group in rest else rows
            for start in range(0, len(rows) - size + 1, size):
                yield group, rows.slice(start, size)
            if over := len(rows) % size:
                # A copy, since a slice would keep all of `rows` in memory.
                rest[group] = rows.take(np.arange(len(rows) - over, len(rows)))
    yield from sorted(rest.items())


def _batches(parts: list[Path], columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """The number of the first row of a batch, counted through all parts, and the batch."""
    row = 0
    for part in parts:
        with part.open("rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE, columns=columns):
                yield row, pa.Table.from_batches([batch])
                row += len(batch)


def _num_ranges(parts: list[Path], size: int) -> int:
    """In how many ranges all rows are, so that each has about `size`."""
    num_rows = 0
    for part in parts:
        with part.open("rb") as file:
            num_rows += pq.read_metadata(file).num_rows
    return min(max(-(-num_rows // size), 1), MAX_RANGES)


def key_words(keys: pa.ChunkedArray) -> np.ndarray:
    """Keys of 20 hexadecimal digits as numbers of four digits, int64 (n, 5)."""
    data = bytes.fromhex("".join(keys.to_pylist()))
    return np.frombuffer(data, ">u2").reshape(-1, 5).astype(np.int64)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.fill_null(0).to_numpy().astype(np.int64)
