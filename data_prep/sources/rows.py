"""Rows of Parquet, CSV and JSONL files as items, for every source that has such tables."""

import base64
import binascii
import csv
import hashlib
import json
import os
import posixpath
from collections import defaultdict, deque
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import islice, product
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.images import PICTURE_EXTENSIONS, Rejected
from data_prep.sources.source import MAX_TEXT_BYTES, Entry, Item, Source, captions_of
from data_prep.sources.walk import extension_of, is_utf8
from data_prep.storage import is_remote, local_copy, local_path, size_of
from data_prep.text import encodable, encoding_of, finite, parse_json
from models.config import InputError

TABLES = ("csv", "jsonl", "parquet")
# Rows of Parquet read at once: pictures may lie in them.
ROWS_AT_ONCE = 64
# Characters of a line of CSV and JSONL: a picture in base64.
MAX_LINE = 128 << 20
# Bytes of a JSONL file that is one array of rows: it is read whole.
MAX_ARRAY_BYTES = 64 << 20
# What is raised for a value of Arrow's that Python cannot hold.
UNREADABLE = (pa.ArrowException, ValueError, ArithmeticError, LookupError)
Row = dict[str, Any] | Rejected


class RowsSource(Source):
    """A source whose files are tables with a row per picture."""

    files = TABLES
    per_task = 1

    label: str | None = None
    """Column of integers."""
    merge_rows: bool = False
    """Make one picture with all their captions of a table's rows that give the same one, as COCO's do."""

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
    fields: Container[str] = ()
    """Columns that are metadata whatever their type."""
    merge: bool = False
    """Whether rows of one picture are made one."""
    base64: bool = False
    """Whether a string in the column of pictures is one in base64; else it is a path."""
    inside: bool = False
    """Whether paths must lead to pictures beside or below the table."""

    def uses(self, name: str) -> bool:
        return name in (self.image, self.label, *self.captions) or name in self.fields


def read_rows(entry: Entry, columns: Columns) -> Iterator[tuple[Item, str]]:
    """The rows of a table as items, each with the path that it gives; what is broken is an item too.

    Raises InputError where the table lacks a column.
    """
    try:
        with local_copy(entry.path) as path:
            said = defaultdict[Any, list[Any]](list)
            if columns.merge:
                with suppress(Rejected):
                    for item, _ in _items(path, entry, columns):
                        said[_picture_of(item)] += item.captions
            first = dict[Any, str]()
            for item, image in _items(path, entry, columns):
                if columns.merge and not item.reason:
                    name = first.setdefault(_picture_of(item), item.name)
                    if name == item.name:
                        item = replace(item, captions=tuple(said[_picture_of(item)]))
                    else:
                        item = Item(item.name, reason="merged", detail=f"its captions are {name}'s")
                yield item, image
    except Rejected as rejected:
        yield Item(entry.name, reason=rejected.reason, detail=rejected.detail), ""
    except OSError as error:
        detail = error.strerror or type(error).__name__
        yield Item(entry.name, reason="unreadable", detail=detail), ""


def _items(path: str, entry: Entry, columns: Columns) -> Iterator[tuple[Item, str]]:
    reader = {"parquet": _parquet_rows, "csv": _csv_rows, "jsonl": _jsonl_rows}
    for number, row in enumerate(reader[extension_of(entry.name)](path, entry, columns)):
        name = f"{entry.name}/{number:09d}"
        try:
            if isinstance(row, Rejected):
                raise row
            found = _item_of_row(name, row, entry, columns)
        except Rejected as rejected:
            found = Item(name, reason=rejected.reason, detail=rejected.detail), ""
        yield found


def _picture_of(item: Item) -> tuple[Any, ...]:
    """What two rows have in common that give the same picture under the same label."""
    return item.path, hashlib.sha256(item.data or b"").digest(), item.label


def _check_columns(found: list[str], entry: Entry, columns: Columns) -> None:
    wanted = {"image": columns.image, "label": columns.label}
    wanted |= {f"captions.{name}": name for name in columns.captions}
    for option, name in wanted.items():
        if name is not None and found.count(name) != 1:
            has = "several columns" if name in found else "no column"
            raise InputError(
                f"sources.{entry.source}.{option}: {entry.path} has {has} {name!r}, "
                f"got {encodable(', '.join(found))[:1000]}"
            )


def _parquet_rows(path: str, entry: Entry, columns: Columns) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        schema, groups = file.schema_arrow, range(file.num_row_groups)
        found = schema.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):
            raise
        raise Rejected("broken_table", _message(error, path, entry)) from error
    _check_columns(found, entry, columns)
    used = [field.name for field in schema if columns.uses(field.name)]
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
    if types.is_dictionary(kind):
        return _is_fact(kind.value_type)
    tests = ("integer", "floating", "decimal", "boolean", "string", "large_string", "string_view")
    return any(getattr(types, f"is_{test}")(kind) for test in tests)


class _Lines:
    """The lines of a CSV file for its reader, who may give back those of a row that was none."""

    def __init__(self, path: str):
        self._lines, self._waiting = _lines(path), deque[tuple[int, str | None]]()
        self.row, self._room = list[tuple[int, str | None]](), 0

    def begin_row(self) -> None:
        """Begin to gather the lines of a row, each with its number."""
        self.row = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        number, line = self._waiting.popleft() if self._waiting else next(self._lines)
        self.row.append((number, line))
        if line is None:
            raise csv.Error(f"over {MAX_LINE} characters")
        self._room = MAX_TEXT_BYTES if len(self.row) == 1 else self._room - len(line)
        if self._room < 0:
            raise csv.Error(f"a quote is still open {MAX_TEXT_BYTES} characters behind it")
        return line

    def give_back(self) -> None:
        """Let the row's lines but the first be read as rows of their own."""
        self._waiting.extendleft(reversed(self.row[1:]))


def _csv_rows(path: str, entry: Entry, columns: Columns) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE)
    lines, header, why = _Lines(path), list[str](), ""
    reader = csv.reader(lines, strict=True)
    while True:
        lines.begin_row()
        try:
            row = next(reader)
            why = _what_is_wrong(row, header, lines.row, columns) if header else ""
        except StopIteration:
            break
        except csv.Error as error:
            row, why = [], str(error)
        if why:
            lines.give_back()
            yield Rejected("broken_row", f"line {lines.row[0][0]}: {why}")
        elif header and row:
            texts = {columns.image, *columns.captions}
            pairs = zip(header, row, strict=True)
            yield {n: v if n in texts else _number(v) for n, v in pairs}
        elif row:
            header = row
            _check_columns(header, entry, columns)
    if not header:
        raise Rejected("broken_table", "has no line that names its columns")


def _what_is_wrong(
    row: list[str], header: list[str], lines: list[tuple[int, str | None]], columns: Columns
) -> str:
    """Why it is no row, "" if it is one: a quote that nobody closed makes values of the rows behind it."""
    if row and len(row) != len(header):
        return f"got {len(row)} fields, expected {len(header)}"
    if len(lines) == 1:
        return ""
    place, claims = header.index(columns.image), list[int]()
    for (number, line), quoting in product(lines, (csv.QUOTE_MINIMAL, csv.QUOTE_NONE)):
        cells = next(csv.reader([line or ""], quoting=quoting), [])
        if len(cells) == len(header) and _is_like(cells[place], row[place]):
            claims.append(number)
    # The row's own path lies in its first line, or behind the closed quote in its last.
    first, last = lines[0][0], lines[-1][0]
    for number in claims:
        if number != (first if first in claims else last):
            return f"a quote is open until line {last}, but line {number} looks like a row"
    return ""


def _is_like(cell: str, path: str) -> bool:
    """Whether it looks like the path of a picture, or lies in the folder of one."""
    folder = posixpath.dirname(path)
    return extension_of(cell) in PICTURE_EXTENSIONS or posixpath.dirname(cell) == folder != ""


def _number(text: str) -> Any:
    for kind in (int, finite):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def _jsonl_rows(path: str, entry: Entry, columns: Columns) -> Iterator[Row]:
    array, names = _array_in(path), dict[str, None]()
    numbered = ((f"value {i}", value) for i, value in enumerate(array))
    for row in (_row_of(value, place) for place, value in numbered) if array else _json_lines(path):
        names |= dict.fromkeys(row if isinstance(row, dict) else ())
        yield row
    if names:
        _check_columns(list(names), entry, columns)


def _json_lines(path: str) -> Iterator[Row]:
    for number, line in _lines(path):
        if line is None:
            yield Rejected("broken_json", f"line {number}: over {MAX_LINE} characters")
        elif line.strip():
            try:
                row = _row_of(parse_json(line), f"line {number}")
            except ValueError as error:
                row = Rejected("broken_json", f"line {number}: {error}"[:200])
            yield row


def _row_of(value: Any, place: str) -> Row:
    if isinstance(value, dict):
        return value
    return Rejected("broken_json", f"{place}: got {type(value).__name__}, expected an object")


def _array_in(path: str) -> list[Any]:
    """The array that the whole file is, empty where it is none; raises Rejected where it is too large."""
    first = next((line for _, line in _lines(path) if line is None or line.strip()), None)
    if not (first or "").lstrip().startswith("["):
        return []
    if os.path.getsize(path) > MAX_ARRAY_BYTES:
        detail = f"an array of over {MAX_ARRAY_BYTES} bytes, expected an object per line"
        raise Rejected("broken_table", detail)
    try:
        return parse_json("".join(line or "" for _, line in _lines(path)))
    except ValueError:
        return []


def _lines(path: str) -> Iterator[tuple[int, str | None]]:
    """The lines of a text file with their numbers, from 1; None stands for one that is too long."""
    with open(path, "rb") as file:
        encoding = encoding_of(file.read(MAX_TEXT_BYTES))
    errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
    with open(path, newline="", encoding=encoding, errors=errors) as file:
        number = 0
        try:
            while line := file.readline(MAX_LINE):
                number, cut = number + 1, False
                while len(line) == MAX_LINE and line[-1] not in "\r\n":
                    line, cut = file.readline(MAX_LINE), True
                yield number, None if cut else line
        except UnicodeDecodeError as error:
            raise Rejected("broken_table", f"after line {number}: {error}") from error


def _item_of_row(
    name: str, row: dict[str, Any], entry: Entry, columns: Columns
) -> tuple[Item, str]:
    """The item, and the path that its row gives; raises Rejected."""
    for column, value in row.items():
        if isinstance(value, Rejected) and columns.uses(column):
            raise value
    image, label = row.get(columns.image), None
    if isinstance(image, dict):  # Hugging Face's Image
        image = image.get("bytes") or image.get("path")
    if columns.label is not None:
        label = row.get(columns.label)
        if type(label) is not int or not 0 <= label < 2**63:
            got = f"{columns.label}: got {label!r}"[:150]
            raise Rejected("no_label", f"{got}, expected an integer from 0 to 2^63 - 1")
    captions = tuple(
        caption
        for column, weight in columns.captions.items()
        for caption in captions_of(column, row.get(column), weight)
    )
    facts = {
        key: fact
        for key, value in row.items()
        if key in columns.fields
        or (isinstance(value, str | int | float | Decimal) and key not in columns.captions)
        if (fact := _fact(value)) is not None
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


def _fact(value: Any) -> Any:
    """A value as JSON has it: no NaN or infinity, and a text for what JSON has no word for."""
    if isinstance(value, float | Decimal):
        return finite(value)
    if isinstance(value, str | int):
        return value
    return parse_json(json.dumps(value, default=lambda odd: str(odd)[:200]))


def _resolve(text: str, entry: Entry, inside: bool) -> str:
    """The full path of a row's picture; raises Rejected where a row may not point there."""
    if "\0" in text or not is_utf8(text):
        raise Rejected("name_not_utf8", ascii(text)[:200])
    if not is_remote(entry.path):
        text = local_path(text)
    if is_remote(text):
        if text.split("://")[0] != entry.path.split("://")[0]:
            raise Rejected("foreign_url", "nothing is downloaded here: use img2dataset first")
        return text
    if (inside or is_remote(entry.path)) and (
        os.path.isabs(text) or posixpath.normpath(text).startswith("..")
    ):
        raise Rejected("path_outside", text[:200])
    return posixpath.join(posixpath.dirname(entry.path), text)
