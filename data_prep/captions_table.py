"""Captions from a table: its rows sorted by the pictures' keys, so that a shard reads those of its own."""

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.config import LayerCaptions
from data_prep.images import Rejected
from data_prep.plan import read_ranges, spill
from data_prep.schema import REJECT_SCHEMA, fingerprint
from data_prep.shards import new_table
from data_prep.sources.source import captions_of, sample_key
from data_prep.sources.table import TableSource, read_rows
from data_prep.sources.walk import Entry
from data_prep.storage import is_remote, local_copy
from data_prep.text import encodable
from models.config import InputError
from models.files import file_sha256

# The columns by which a row names its picture.
NAMES = {"key": ("key",), "name": ("source", "name")}
SAID, STRAYS = "captions.parquet", "caption_rejects.parquet"
ROWS_AT_ONCE = 1 << 16
# Rows of a row group, which a shard reads whole.
ROWS_PER_GROUP = 1 << 14
# Ranges of keys, each sorted in memory at once.
RANGES = 16
SAID_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        # One for all: `read_ranges` sorts by it first.
        ("group", pa.int64()),
        ("name", pa.large_string()),
        ("text", pa.large_binary()),
        ("weight", pa.float64()),
        # Why it is no text; null where it is one.
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
Said = tuple[tuple[bytes | Rejected, float], ...]


def table_sha256(config: LayerCaptions) -> str:
    """The hash of the table's files and their names; raises InputError where there are none."""
    found = dict[str, str]()
    with _named_as_table():
        for entry in _source(config).entries("captions"):
            if not entry.reason:
                with local_copy(entry.path) as file:
                    found[entry.name] = file_sha256(Path(file))
    return fingerprint(found)


def sort_captions(
    config: LayerCaptions, work: Path, keys: Iterable[tuple[bool, pa.ChunkedArray]]
) -> None:
    """Write what the table says of some pictures in the order of their keys, unless that was done.

    `keys` are those of the base, and whether captions of theirs are wanted; rows that are of none are rejects.
    Raises InputError where the table lacks a column.
    """
    if (work / SAID).is_file():
        return
    local = None if is_remote(work) else work
    # A killed run leaves its folder behind.
    for leftover in work.glob("captions-*.tmp") if local else ():
        shutil.rmtree(leftover)
    if local:
        local.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".tmp", "captions-", local) as folder:
        paths, own = (
            [Path(folder) / f"{what}-{number}.arrow" for number in range(RANGES)]
            for what in ("said", "keys")
        )
        broken = list[dict[str, Any]]()
        spill(_tables(_captions(config, broken)), paths)
        some = (pa.table({"key": k, "group": [int(wanted)] * len(k)}) for wanted, k in keys)
        spill(filter(len, some), own)
        # The captions' own table appears last.
        tables = new_table(work / SAID, SAID_SCHEMA), new_table(work / STRAYS, REJECT_SCHEMA)
        with tables[0] as write_said, tables[1] as write:
            write(pa.Table.from_pylist(broken, REJECT_SCHEMA))
            for said, mine in zip(paths, own, strict=True):
                _match(said, mine, write_said, write)


def _match(said: Path, own: Path, write_said: Any, write: Any) -> None:
    """Write a range's captions, and as rejects those of pictures that the base has not."""
    table = next(read_ranges([said]), SAID_SCHEMA.empty_table())
    keys = next(read_ranges([own]), SAID_SCHEMA.empty_table())
    wanted = keys.filter(pc.field("group") == 1)["key"].combine_chunks()
    kept = table.filter(pc.field("key").isin(wanted))
    for begin in range(0, len(kept), ROWS_PER_GROUP):
        write_said(kept.slice(begin, ROWS_PER_GROUP))
    strays = table.filter(~pc.field("key").isin(keys["key"].combine_chunks()))
    detail = "its key is of no picture of the base"
    rows = dict.fromkeys((row["key"], row["name"]) for row in strays.to_pylist())
    rejects = [_reject(key, name, "caption_no_picture", detail) for key, name in rows]
    write(pa.Table.from_pylist(rejects, REJECT_SCHEMA))


def _reject(key: str, name: str, reason: str, detail: str) -> dict[str, str]:
    return {"key": key, "source": "captions", "name": name, "reason": reason, "detail": detail}


def read_said(work: Path, keys: list[str]) -> dict[str, Said]:
    """What the table says of the pictures of a shard, whose keys are in order; by key, in the table's order."""
    between = [("key", ">=", keys[0]), ("key", "<=", keys[-1])]
    with (work / SAID).open("rb") as file:
        rows = pq.read_table(file, filters=between).to_pylist()
    found = dict[str, Said]()
    for row in rows:
        found[row["key"]] = (*found.get(row["key"], ()), (_text(row), row["weight"]))
    return found


def _tables(rows: Iterator[dict[str, Any]]) -> Iterator[pa.Table]:
    while some := list(islice(rows, ROWS_AT_ONCE)):
        yield pa.Table.from_pylist(some, SAID_SCHEMA)


def some_captions(config: LayerCaptions, count: int) -> list[Said]:
    """What the first rows of the table say; raises InputError as `sort_captions` does."""
    return [((_text(row), 1.0),) for row in islice(_captions(config, []), count)]


def _text(row: dict[str, Any]) -> bytes | Rejected:
    return Rejected(row["reason"], row["detail"]) if row.get("reason") else row["text"]


def _captions(config: LayerCaptions, broken: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every caption of every row; rows that cannot be read, or have no key, are `broken`."""
    first, *others = NAMES[config.by]
    texts = dict.fromkeys((config.caption, *others), 1.0)
    source = _source(config).model_copy(update={"image": first, "captions": texts})
    with _named_as_table():
        rows = (row for entry in source.entries("captions") for row in _read(entry, source))
        for name, row in rows:
            try:
                if isinstance(row, Rejected):
                    raise row
                yield from _said(config, name, row)
            except Rejected as rejected:
                broken.append(_reject("", name, rejected.reason, rejected.detail))


def _source(config: LayerCaptions) -> TableSource:
    return TableSource(kind="table", path=config.table or "")


def _read(entry: Entry, source: TableSource) -> Iterator[tuple[str, Any]]:
    """The rows of a file by name, a Rejected where one, or what is left of the file, cannot be read."""
    number = 0
    try:
        for row in () if entry.reason else read_rows(entry, source):
            yield f"{entry.name}/{number:09d}", row
            number += 1
    except Rejected as rejected:
        yield f"{entry.name}/{number:09d}", rejected


@contextmanager
def _named_as_table() -> Iterator[None]:
    """Let a message about a source be one about the table of captions."""
    try:
        yield
    except InputError as error:
        text = re.sub(r"sources\.captions(\.\w+)+", "captions.table", str(error))
        raise InputError(text) from None


def _said(config: LayerCaptions, name: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The captions of a row; raises Rejected."""
    names = NAMES[config.by]
    for column in (*names, config.caption):
        if isinstance(row.get(column), Rejected):
            raise row[column]
    said = [row.get(column) for column in names]
    key = said[0] if config.by == "key" else sample_key(*map(str, said))
    if not isinstance(key, str) or len(key) != 20 or set(key) - set("0123456789abcdef"):
        detail = f"got {encodable(str(key))[:100]!r}, expected a key of 20 hexadecimal digits"
        raise Rejected("caption_no_picture", detail)
    weight = 1.0 if config.weight is None else row.get(config.weight)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < inf:
        got = encodable(str(weight))[:100]
        raise Rejected("caption_weight", f"{config.weight}: got {got}, expected a number over 0")
    for text, part in captions_of(config.caption, row.get(config.caption), float(weight)) or [
        (None, weight)
    ]:
        facts = {"key": key, "group": 0, "name": name, "weight": part}
        if isinstance(text, Rejected):
            yield facts | {"reason": text.reason, "detail": text.detail}
        else:
            yield facts | {"text": text}
