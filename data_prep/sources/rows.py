"""Rows of Parquet, CSV and JSONL files as items, for every source that has such tables."""

import base64
import binascii
import csv
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.images import Rejected
from data_prep.sources.source import Entry, Item, Source
from data_prep.sources.walk import extension_of, is_utf8
from data_prep.storage import is_remote, local_copy, size_of
from data_prep.text import encodable, parse_json
from models.config import InputError

TABLES = ("csv", "jsonl", "parquet")
# Rows of Parquet read at once: pictures may lie in them.
ROWS_AT_ONCE = 64
# Bytes of a line of CSV and JSONL: a picture in base64.
MAX_LINE_BYTES = 128 << 20
# What is raised for a value of Arrow's that Python cannot hold.
UNREADABLE = (pa.ArrowException, ValueError, ArithmeticError, LookupError)
Row = dict[str, Any] | Rejected


class RowsSource(Source):
    """A source whose files are tables with a row per picture."""

    files = TABLES
    per_task = 1
    can_kill_its_reader = True

    label: str | None = None
    """Column of integers."""

    @property
    def labels(self) -> str:
        return "column" if self.label else ""


@dataclass(frozen=True)
class Columns:
    """What the columns of a table mean."""

    image: str
    captions: dict[str, float]
    """Column -> weight."""
    label: str | None
    base64: bool = False
    """Whether a string in the column of pictures is one in base64; else it is a path."""
    inside: bool = False
    """Whether paths must lead to pictures beside or below the table."""

    @property
    def used(self) -> set[str | None]:
        return {self.image, self.label, *self.captions}


def read_rows(entry: Entry, columns: Columns) -> Iterator[tuple[Item, str]]:
    """The rows of a table as items, each with the path that it gives; what is broken is an item too.

    Raises InputError where the table lacks a column.
    """
    reader = {"parquet": _parquet_rows, "csv": _csv_rows, "jsonl": _jsonl_rows}
    try:
        with local_copy(entry.path) as path:
            rows = reader[extension_of(entry.name)](path, entry, columns)
            for number, row in enumerate(rows):
                name = f"{entry.name}/{number:09d}"
                try:
                    if isinstance(row, Rejected):
                        raise row
                    found = _item_of_row(name, row, entry, columns)
                except Rejected as rejected:
                    found = Item(name, reason=rejected.reason, detail=rejected.detail), ""
                yield found
    except Rejected as rejected:
        yield Item(entry.name, reason=rejected.reason, detail=rejected.detail), ""
    except OSError as error:
        detail = error.strerror or type(error).__name__
        yield Item(entry.name, reason="unreadable", detail=detail), ""


def _check_columns(found: list[str], entry: Entry, columns: Columns) -> None:
    wanted = {"image": columns.image, "label": columns.label}
    wanted |= {f"captions.{name}": name for name in columns.captions}
    for option, name in wanted.items():
        if name is not None and name not in found:
            raise InputError(
                f"sources.{entry.source}.{option}: {entry.path} has no column {name!r}, "
                f"got {encodable(', '.join(found))}"
            )


def _parquet_rows(path: str, entry: Entry, columns: Columns) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        schema, groups = file.schema_arrow, range(file.num_row_groups)
        found = schema.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Rejected("broken_table", _message(error, path, entry)) from error
    _check_columns(found, entry, columns)
    used = [field.name for field in schema if field.name in columns.used]
    read = [field.name for field in schema if field.name in used or _is_fact(field.type)]
    for group in groups:
        # Where a column that nobody named is broken, the others are read without it.
        done, detail = 0, ""
        for names in (read, used):
            rows = islice(_rows_of_group(file, group, names), done, None)
            try:
                for row in rows:
                    yield row
                    done += 1
                break
            except (pa.ArrowException, OSError) as error:
                detail = f"row group {group}: {_message(error, path, entry)}"
        for _ in range(done, file.metadata.row_group(group).num_rows):
            yield Rejected("broken_table", detail)


def _message(error: Exception, path: str, entry: Entry) -> str:
    text = f"{type(error).__name__}: {str(error).split(chr(10))[0]}"
    return text.replace(path, entry.name)[:200]


def _rows_of_group(file: pq.ParquetFile, group: int, names: list[str]) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=names):
        names = batch.schema.names
        columns = [_values(*pair) for pair in zip(names, batch.columns, strict=True)]
        for cells in zip(*columns, strict=True):
            yield dict(zip(names, cells, strict=True))


def _values(name: str, column: pa.Array) -> list[Any]:
    """The values of a column; where one cannot be converted, a Rejected is in its place."""
    try:
        return column.to_pylist()
    except UNREADABLE:
        return [_value(name, cell) for cell in column]


def _value(name: str, cell: Any) -> Any:
    try:
        return cell.as_py()
    except UNREADABLE as error:
        if isinstance(cell, pa.BinaryScalar):
            return cell.as_buffer().to_pybytes().decode(errors="surrogateescape")
        if isinstance(cell, pa.ListScalar):
            return [_value(name, inner) for inner in cell.values]
        if isinstance(cell, pa.StructScalar):
            return {key: _value(name, inner) for key, inner in cell.items()}
        if isinstance(cell, pa.DictionaryScalar | pa.ExtensionScalar):
            return _value(name, cell.value)
        return Rejected("broken_value", f"{name}: {type(error).__name__}: {error}"[:200])


def _is_fact(kind: pa.DataType) -> bool:
    """Whether a column of that type is a picture's metadata: texts, numbers and booleans are."""
    types = pa.types
    return (
        types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or _is_text(kind)
    )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _csv_rows(path: str, entry: Entry, columns: Columns) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _check_columns(list(reader.fieldnames or []), entry, columns)
            for row in reader:
                if None in row or None in row.values():
                    yield Rejected("broken_row", f"line {reader.line_num}: not as many fields")
                else:
                    texts = {columns.image, *columns.captions}
                    yield {n: v if n in texts else _number(v) for n, v in row.items()}
        except csv.Error as error:
            detail = f"line {reader.line_num}: {error}"
            raise Rejected("broken_table", detail) from error


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def _jsonl_rows(path: str, entry: Entry, columns: Columns) -> Iterator[Row]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
                raise Rejected("broken_table", f"line {number}: over {MAX_LINE_BYTES} bytes")
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                yield Rejected("broken_json", f"line {number}: {str(error)[:200]}")
                continue
            yield row if isinstance(row, dict) else Rejected("broken_json", f"line {number}")


def _item_of_row(
    name: str, row: dict[str, Any], entry: Entry, columns: Columns
) -> tuple[Item, str]:
    """The item, and the path that its row gives; raises Rejected."""
    for column in columns.used:
        if isinstance(broken := row.get(column or ""), Rejected):
            raise broken
    image, label = row.get(columns.image), None
    if isinstance(image, dict):  # Hugging Face's Image
        image = image.get("bytes") or image.get("path")
    if columns.label is not None:
        label = row.get(columns.label)
        if type(label) is not int or not 0 <= label < 2**63:
            got = f"{columns.label}: got {label!r}"[:150]
            raise Rejected("no_label", f"{got}, expected an integer from 0 to 2^63 - 1")
    captions = tuple(
        (_utf8(text), weight / len(texts))
        for column, weight in columns.captions.items()
        for texts in [_texts(row.get(column))]
        for text in texts
    )
    facts = {
        key: value
        for key, value in row.items()
        if isinstance(value, str | int | float | bool) and key not in columns.captions
    }
    if isinstance(image, str) and columns.base64:
        facts.pop(columns.image, None)
        try:
            image = base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Rejected("broken_base64", str(error)[:200]) from error
    if isinstance(image, bytes):
        size = len(image)
        return Item(name, "", 0, size, captions, facts, label, data=image), ""
    if not isinstance(image, str) or not image:
        raise Rejected("no_picture", f"{columns.image}: got {type(image).__name__}")
    path = _resolve(image, entry, columns.inside)
    try:
        size = size_of(path)
    except OSError as error:
        raise Rejected("unreadable", error.strerror or type(error).__name__) from error
    return Item(name, path, 0, size, captions, facts, label), posixpath.normpath(image)


def _texts(value: Any) -> list[str]:
    """A caption, or a list of equally good ones."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _utf8(text: str) -> bytes:
    """Bytes of a text, broken where it was read from broken bytes or is itself, to be found so later."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _resolve(text: str, entry: Entry, inside: bool) -> str:
    """The full path of a row's picture; raises Rejected where a row may not point there."""
    if "\0" in text or not is_utf8(text):
        raise Rejected("name_not_utf8", ascii(text)[:200])
    if is_remote(text):
        if text.split("://")[0] != entry.path.split("://")[0]:
            raise Rejected("foreign_url", "nothing is downloaded here: use img2dataset first")
        return text
    if (inside or is_remote(entry.path)) and (
        os.path.isabs(text) or posixpath.normpath(text).startswith("..")
    ):
        raise Rejected("path_outside", text[:200])
    return posixpath.join(posixpath.dirname(entry.path), text)
