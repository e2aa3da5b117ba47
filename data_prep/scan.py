"""Listing and scan: which files the sources have, and which pictures are in them."""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.catalog import CATALOG_SCHEMA, STAGED, ScanSettings, scan_partition
from data_prep.config import PrepareConfig
from data_prep.decoder import DecodePool
from data_prep.images import ImagesConfig
from data_prep.report import Progress, console
from data_prep.shards import read_table, write_table
from data_prep.sources import Entry, SourceConfig
from data_prep.sources.source import files_of, split_of
from data_prep.sources.table import TableSource
from data_prep.sources.walk import NO_PICTURES
from data_prep.storage import delete, find_files, is_remote
from data_prep.workers import ATTEMPTS, LOST, Tasks, connect, num_cpus
from models.config import InputError

ENTRIES_AT_ONCE = 1 << 16
# Parts that one task of Ray scans, since a task costs 4 ms of CPU by itself.
PARTS_AT_ONCE = 8
# How the files of a catalog's part end.
PARTS = (".parquet", ".staged.parquet")

LISTING = "listing.parquet"
LISTING_SCHEMA = pa.schema(
    [(f.name, pa.int64() if f.type is int else pa.large_string()) for f in fields(Entry)]
)
# What of an entry decides a result; a stamp is a hint.
DECISIVE = [name for name in LISTING_SCHEMA.names if name != "stamp"]
# What of a catalog's row is its content, and where that lies.
CONTENT = ["key", "source", "name", "content_hash", "captions", "metadata", "label", "reason"]
PLACE = ["offset", "length"]
# The name of a catalog's part, and the entries of a source that it is of.
Part = tuple[str, SourceConfig, pa.Table]


@dataclass(frozen=True)
class Intake:
    """What a generation takes of the sources: its own entries, and where its work lies."""

    work: Path
    listing: pa.Table
    classes: list[str]
    """Names by label, those of earlier generations first."""
    number: int = 0


def list_sources(config: PrepareConfig) -> pa.Table:
    """Every file of every source, in a fixed order, last those that are no pictures: the fields of an Entry."""
    entries = (e for name, source in config.sources.items() for e in source.entries(name))
    names, batches = LISTING_SCHEMA.names, list[pa.RecordBatch]()
    while rows := [{n: getattr(e, n) for n in names} for e in islice(entries, ENTRIES_AT_ONCE)]:
        batches.append(pa.RecordBatch.from_pylist(rows, schema=LISTING_SCHEMA))
    listing = pa.concat_tables(split_others(pa.Table.from_batches(batches, LISTING_SCHEMA)))
    for name, source in config.sources.items():
        files = files_of(listing, name)["name"] if source.per_task == 1 else ()
        splits = Counter(split_of(str(file)) for file in files)
        if len(splits) > 1:
            found = ", ".join(f"{n} of {split or 'none'}" for split, n in sorted(splits.items()))
            console.print(
                f"sources.{name}: files of several splits are taken: {found}; "
                f"sources.{name}.split=train takes those of one."
            )
    return listing


def split_others(listing: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows that decide a result, and those of what is no picture, which may come and go."""
    others = pc.field("reason").isin(NO_PICTURES)
    return listing.filter(~others), listing.filter(others)


def listing_sha256(listing: pa.Table) -> str:
    """The hash of what the sources hold: neither the folders that they lie in nor times."""
    listing, _ = split_others(listing)
    compute: Any = pc
    digest = hashlib.sha256()
    for batch in listing.to_batches(max_chunksize=ENTRIES_AT_ONCE):
        columns = [batch[name] for name in ("source", "name", "class_name", "reason", "size")]
        for name in ("caption_path", "metadata_path"):
            columns.append(compute.replace_substring_regex(batch[name], ".*/", ""))
        digest.update("".join(f"{line}\n" for line in _lines(columns).to_pylist()).encode())
    return digest.hexdigest()


def _lines(columns: list[Any]) -> Any:
    """Rows of columns as one text each."""
    compute: Any = pc
    texts = [column.cast(pa.large_string()) for column in columns]
    options = {"null_handling": "replace", "null_replacement": ""}
    return compute.binary_join_element_wise(*texts, pa.scalar("\0", pa.large_string()), **options)


@dataclass(frozen=True)
class Comparison:
    """The sources as they are beside what the generations of an output took of them."""

    begun: list[Intake]
    """Every generation so far, its entries' stamps as they are now."""
    new: pa.Table
    """What none of them has, last what is no picture."""
    gone: list[str]
    changed: list[str]

    @property
    def num_new(self) -> int:
        return len(split_others(self.new)[0])

    def misses(self, where: str) -> str:
        """What is said of files that are not what they were; "" where all are."""
        groups = {"gone": self.gone, "changed": self.changed}
        found = [
            f"{len(names):,} {word} ({', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)})"
            for word, names in groups.items()
            if names
        ]
        since = f"since generation {len(self.begun) - 1} of {where}"
        return f"sources: files {', '.join(found)} {since}; earlier samples stay" if found else ""


def compare(begun: list[Intake], listing: pa.Table) -> Comparison:
    """What has become of the files since they were listed, and which are new."""
    compute: Any = pc
    now, others = split_others(listing)
    parts, none = [split_others(intake.listing) for intake in begun], LISTING_SCHEMA.empty_table()
    before, known = map(pa.concat_tables, zip((none, none), *parts, strict=True))
    names, there, seen, other = (
        _lines([table["source"], table["name"]]) for table in (before, now, known, others)
    )
    place = compute.index_in(names, value_set=there)
    found, gone = now.take(place), place.is_null()
    same = compute.equal(*(_lines([t[name] for name in DECISIVE]) for t in (before, found)))
    changed = compute.and_not(compute.invert(same), gone)
    # The stamp of what is not as it was says nothing.
    stamps = compute.if_else(same, found["stamp"], before["stamp"])
    looked, first = list[Intake](), 0
    for intake, (mine, rest) in zip(begun, parts, strict=True):
        column = stamps.slice(first, len(mine))
        mine = mine.set_column(mine.schema.get_field_index("stamp"), "stamp", column)
        looked.append(replace(intake, listing=pa.concat_tables([mine, rest])))
        first += len(mine)
    new = (
        table.filter(compute.invert(compute.is_in(mine, value_set=theirs)))
        for table, mine, theirs in ((now, there, names), (others, other, seen))
    )
    lost = (
        [f"{row['source']}/{row['name']}" for row in before.filter(which).to_pylist()]
        for which in (gone, changed)
    )
    return Comparison(looked, pa.concat_tables(new), *lost)


def scan(
    config: PrepareConfig,
    intake: Intake,
    check: Callable[[], None] = lambda: None,
    only: Container[str] | None = None,
) -> None:
    """One catalog part per partition of a generation's entries; parts that exist are not made again."""
    made, staged = (set(find_files(intake.work / name)) for name in ("catalog", STAGED))
    todo = list[Part]()
    for name, source, rows in _partitions(config, intake.listing):
        # A part whose pictures were staged wants them there, so long as shards are to be made.
        there = f"{name}.staged.parquet" in made and name in staged
        if not (there or f"{name}.parquet" in made) and (only is None or name in only):
            todo.append((name, source, rows))
    _scan_parts(config, intake, todo, check, "scan")


def changed_content(config: PrepareConfig, intake: Intake, check: Callable[[], None]) -> list[str]:
    """The pictures that were changed, or what is said of them, by a second scan of what was touched since it was listed."""
    again = replace(intake, work=intake.work / "again")
    touched = list(_touched(config, intake))
    if not touched:
        return []
    connect(config.ray)
    delete(again.work)
    _scan_parts(config, again, [part for _, part in touched], check, "check")
    changed = list[str]()
    for path, (name, *_) in touched:
        now = next(p for end in PARTS if (p := again.work / "catalog" / f"{name}{end}").is_file())
        tables = read_table(path), read_table(now)
        for columns in (CONTENT, [*CONTENT, *PLACE]):
            before, after = ({r["key"]: r for r in t.select(columns).to_pylist()} for t in tables)
            differ = [k for k in before | after if before.get(k) != after.get(k)]
            rows = [before.get(key) or after[key] for key in differ]
            changed += [f"{row['source']}/{row['name']}" for row in rows]
            if differ:
                break
    delete(again.work)
    if not changed:
        write_table(intake.work / LISTING, intake.listing)
    return changed


def _touched(config: PrepareConfig, intake: Intake) -> Iterator[tuple[Path, Part]]:
    """What was scanned of the parts whose files have another stamp than when they were listed, and these."""
    work, listing = intake.work, intake.listing
    before, made = read_table(work / LISTING, LISTING_SCHEMA), find_files(work / "catalog")
    at, since = 0, (work / LISTING).stat().st_mtime
    differs = pc.not_equal(before["stamp"], listing["stamp"]).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    for name, source, rows in _partitions(config, listing):
        mine, at = differs[at : at + len(rows)], at + len(rows)
        for end in PARTS:
            path = work / "catalog" / f"{name}{end}"
            if path.name in made and (mine.any() or _points_at_newer(source, path, rows, since)):
                yield path, (name, source, rows)


def _points_at_newer(source: SourceConfig, path: Path, rows: pa.Table, since: float) -> bool:
    """Whether a table's rows name a local picture that is gone, or was written again since then."""
    if not isinstance(source, TableSource):
        return False
    paths = set(read_table(path, pa.schema([CATALOG_SCHEMA.field("path")]))["path"].to_pylist())
    # What came as bytes in the table is as old as the table.
    staged = str(path.parents[1] / STAGED)
    for picture in paths - {"", rows["path"][0].as_py()}:
        if is_remote(picture) or picture.startswith(staged):
            continue
        try:
            status = os.stat(picture)
        except OSError:
            return True
        # A file that was put in the place of another keeps its time, but not that of its place.
        if max(status.st_mtime, status.st_ctime) > since:
            return True
    return False


def _scan_parts(
    config: PrepareConfig, intake: Intake, parts: list[Part], check: Callable[[], None], what: str
) -> None:
    settings = ScanSettings(
        intake.work, intake.classes, config.images, config.captions, config.filters, check
    )
    todo: list[Any] = [(settings, *part) for part in parts]
    # A task scans several parts, but not so many that a CPU is left without.
    size = max(1, min(PARTS_AT_ONCE, len(todo) // (4 * num_cpus())))
    groups = (todo[begin : begin + size] for begin in range(0, len(todo), size))
    with Progress(what, len(todo), "parts") as progress:
        tasks, entries = Tasks("_scan", console.print), lambda part: len(part[-1])
        joined = 0
        answers = tasks.run_all(scan_part, try_entry, groups, entries)
        for count, ((*_, rows), answer) in enumerate(answers, start=1):
            if answer is LOST:
                raise InputError(
                    f"{rows['path'][0]}: kills its readers with the {len(rows) - 1} files after it, though "
                    "none of them does alone. Remedy: more memory; run it again to go on."
                )
            joined += answer
            progress.update(count)
    if joined:
        console.print(
            f"{joined} captions of several lines were joined to one; captions.lines=each takes their "
            "lines as captions of their own."
        )


# A worker keeps its child process for all the parts that it scans.
_probes: dict[ImagesConfig, DecodePool] = {}


def scan_part(
    settings: ScanSettings,
    name: str,
    source: SourceConfig,
    rows: pa.Table,
    deadly: Container[int] = (),
) -> int:
    """Write the catalog part of some of a source's entries; returns its captions of joined lines.

    The entries in the `deadly` places are rejected for having killed their readers.
    """
    probes = _probes.setdefault(settings.images, DecodePool(settings.images, num_children=1))
    crash = {"reason": "scan_crash", "detail": f"its reader died {ATTEMPTS} times"}
    entries = [
        Entry(**row | (crash if place in deadly else {}))
        for place, row in enumerate(rows.to_pylist())
    ]
    return scan_partition(settings, name, source, entries, probes)


def try_entry(
    settings: ScanSettings, name: str, source: SourceConfig, rows: pa.Table, place: int
) -> None:
    """Scan one of a part's entries for nothing, which finds the one that kills its reader."""
    with tempfile.TemporaryDirectory() as folder:
        aside = replace(settings, work=Path(folder))
        scan_part(aside, name, source, rows.slice(place, 1))


def _partitions(config: PrepareConfig, listing: pa.Table) -> Iterator[Part]:
    """Neighbours of one source in the listing, many files, or one tar or table, by the name of their part."""
    number = 0
    for some, at_once in zip(split_others(listing), (None, ENTRIES_AT_ONCE), strict=True):
        # In the order in which they were listed.
        for name in some["source"].unique().to_pylist():
            source, rows = config.sources[name], some.filter(pc.field("source") == name)
            for begin in range(0, len(rows), size := at_once or source.per_task):
                yield f"part-{number:06d}", source, rows.slice(begin, size)
                number += 1
