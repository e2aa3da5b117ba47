"""Tables of pictures: a row of Parquet, CSV or JSONL is a picture, by its path or by its bytes."""

import base64
import csv
import hashlib
import json
import os
import posixpath
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import islice, product
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from data_prep.images import PICTURE_EXTENSIONS, Rejected
from data_prep.sources.source import MAX_TEXT_BYTES, Item, Source, Weight, captions_of
from data_prep.sources.walk import OTHER_FILE, Entry, Walk, extension_of, is_utf8
from data_prep.storage import is_remote, local_copy, local_path, said_of, size_of
from data_prep.text import encodable, encoding_of, finite, parse_json
from models.config import Entries, InputError

# Rows of Parquet read at once: pictures may lie in them.
ROWS_AT_ONCE = 64
# Characters of a line of CSV and JSONL: a picture in base64.
MAX_LINE = 128 << 20
# Bytes of a JSONL file that is one array of rows: it is read whole.
MAX_ARRAY_BYTES = 64 << 20
Row = dict[str, Any] | Rejected
# A line of a text file and its number, from 1; None stands for one that is too long.
Line = tuple[int, str | None]


class TableSource(Source):
    """Rows of *.parquet, *.csv or *.jsonl: each is a picture, by its path or by its bytes."""

    files = ("csv", "jsonl", "parquet")
    contents = "tables"
    per_task = 1
    names_pictures = True
    # Whether paths must lead to pictures beside or below the table.
    inside: ClassVar[bool] = False

    kind: Literal["table"]
    label: str | None = None
    """Column of integers."""
    merge_rows: bool = False
    """Make one picture with all their captions of a table's rows that give the same one, as COCO's do."""
    image: str = "image"
    """Column of pictures: a path (relative to the table), bytes, or Hugging Face's struct of both."""
    strings: Literal["path", "base64"] = "path"
    """What a string in that column is."""
    captions: Entries[str, Weight] = Field(default={"caption": 1.0}, min_length=1)
    """Column -> weight."""

    @property
    def labels(self) -> str:
        return "column" if self.label else ""

    def entries_of(self, walk: Walk) -> Iterator[Entry]:
        """A picture beside tables is a row of one, or nobody asked for it."""
        for entry in super().entries_of(walk):
            if entry.reason != OTHER_FILE or extension_of(entry.name) not in PICTURE_EXTENSIONS:
                yield entry

    def read(self, entry: Entry, class_names: list[str], fields: Container[str]) -> Iterator[Item]:
        with local_copy(entry.path) as path:
            table = _Table(entry, path, self, fields)
            yield from _merged(table) if self.merge_rows else _items(table)


@dataclass(frozen=True)
class _Table:
    """A table, as a local file, and what its columns mean."""

    entry: Entry
    path: str
    source: TableSource
    fields: Container[str]
    """Columns that are metadata whatever their type."""

    def uses(self, name: str) -> bool:
        source = self.source
        return name in (source.image, source.label, *source.captions) or name in self.fields

    def check_columns(self, found: list[str]) -> None:
        """Raise InputError where a column is not there, or there twice."""
        wanted = {"image": self.source.image, "label": self.source.label}
        wanted |= {f"captions.{name}": name for name in self.source.captions}
        for option, name in wanted.items():
            if name is not None and found.count(name) != 1:
                has = "several columns" if name in found else "no column"
                raise InputError(
                    f"sources.{self.entry.source}.{option}: {self.entry.path} has {has} {name!r}, "
                    f"got {encodable(', '.join(found))[:1000]}"
                )


def _items(table: _Table) -> Iterator[Item]:
    """The rows as items; what is broken is an item too."""
    for number, row in enumerate(_rows(table)):
        name = f"{table.entry.name}/{number:09d}"
        try:
            if isinstance(row, Rejected):
                raise row
            yield _item_of_row(name, row, table)
        except Rejected as rejected:
            yield Item(name, reason=rejected.reason, detail=rejected.detail)
        except OSError as error:
            yield Item(name, reason="unreadable", detail=said_of(error))


def read_rows(entry: Entry, source: TableSource) -> Iterator[Row]:
    """A table's rows as they are, for those who make no pictures of them; raises Rejected, InputError."""
    with local_copy(entry.path) as path:
        yield from _rows(_Table(entry, path, source, ()))


def _rows(table: _Table) -> Iterator[Row]:
    rows = {"parquet": _parquet_rows, "csv": _csv_rows, "jsonl": _jsonl_rows}
    yield from rows[extension_of(table.entry.name)](table)


def _merged(table: _Table) -> Iterator[Item]:
    """The items, of which the first of a picture has the captions of all."""
    said, first = defaultdict[Any, list[Any]](list), dict[Any, str]()
    # What is raised here is raised again below.
    with suppress(Rejected):
        for item in _items(table):
            said[_picture_of(item)] += item.captions
    for item in _items(table):
        if not item.reason:
            name = first.setdefault(_picture_of(item), item.name)
            if name == item.name:
                item = replace(item, captions=tuple(said[_picture_of(item)]))
            else:
                item = Item(item.name, reason="merged", detail=f"its captions are {name}'s")
        yield item


def _picture_of(item: Item) -> tuple[Any, ...]:
    """What two rows have in common that give the same picture under the same label."""
    return item.path, hashlib.sha256(item.data or b"").digest(), item.label


def _parquet_rows(table: _Table) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(table.path, buffer_size=1 << 20, pre_buffer=False)
        schema, groups = file.schema_arrow, range(file.num_row_groups)
        found = schema.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):
            raise
        raise Rejected("broken_table", _message(error, table)) from error
    table.check_columns(found)
    used = [name for name in found if table.uses(name)]
    read = [field.name for field in schema if field.name in used or _is_fact(field.type)]
    for group in groups:
        # Where a column that nobody named is broken, the others are read without it.
        done, detail = 0, ""
        for names in (read, used):
            try:
                for row in islice(_rows_of_group(file, group, names), done, None):
                    yield row
                    done += 1
                break
            except (pa.ArrowException, OSError) as error:
                detail = f"row group {group}: {_message(error, table)}"
        for _ in range(done, file.metadata.row_group(group).num_rows):
            yield Rejected("broken_table", detail)


def _message(error: Exception, table: _Table) -> str:
    text = f"{type(error).__name__}: {str(error).split(chr(10))[0]}"
    return text.replace(table.path, table.entry.name)[:200]


def _rows_of_group(file: pq.ParquetFile, group: int, names: list[str]) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=names):
        names = batch.schema.names
        pairs = zip(names, batch.columns, strict=True)
        for cells in zip(*([_value(n, cell) for cell in c] for n, c in pairs), strict=True):
            yield dict(zip(names, cells, strict=True))


def _value(name: str, cell: Any) -> Any:
    """A cell as Python has it; a Rejected in its place where that cannot hold it."""
    try:
        return cell.as_py()
    except (pa.ArrowException, ValueError, ArithmeticError, LookupError) as error:
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


def _csv_rows(table: _Table) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE)
    lines, again, header = _lines(table.path), deque[Line](), list[str]()
    texts = {table.source.image, *table.source.captions}

    def following() -> Line | None:
        return again.popleft() if again else next(lines, None)

    while line := following():
        read = [line]
        try:
            row = next(csv.reader(_until_closed(read, following), strict=True), [])
            if header and row:
                _check_row(row, header, read, header.index(table.source.image))
                pairs = zip(header, row, strict=True)
                yield {name: v if name in texts else _number(v) for name, v in pairs}
            elif row:
                header = row
                table.check_columns(header)
        except csv.Error as error:
            # The lines behind the first may be rows of their own.
            again.extendleft(reversed(read[1:]))
            yield Rejected("broken_row", f"line {line[0]}: {error}")
    if not header:
        raise Rejected("broken_table", "has no line that names its columns")


def _until_closed(read: list[Line], following: Callable[[], Line | None]) -> Iterator[str]:
    """The first line of a row, and while a quote is open the next; `read` gathers them. Raises csv.Error."""
    room = MAX_TEXT_BYTES
    while room >= 0:
        if (text := read[-1][1]) is None:
            raise csv.Error(f"over {MAX_LINE} characters")
        yield text
        if not (line := following()):
            return
        read.append(line)
        room -= len(line[1] or "")
    raise csv.Error(f"a quote is still open {MAX_TEXT_BYTES} characters behind it")


def _check_row(row: list[str], header: list[str], read: list[Line], image: int) -> None:
    """Raise csv.Error where it is no row: a quote that nobody closed makes values of the rows behind it."""
    if len(row) != len(header):
        raise csv.Error(f"got {len(row)} fields, expected {len(header)}")
    if len(read) == 1:
        return
    folder, claims = posixpath.dirname(row[image]), set[int]()
    for (number, line), quoting in product(read, (csv.QUOTE_MINIMAL, csv.QUOTE_NONE)):
        cells = next(csv.reader([line or ""], quoting=quoting), [])
        if len(cells) == len(header):
            # It looks like the path of a picture, or lies in the folder of one.
            beside = posixpath.dirname(cells[image]) == folder != ""
            if beside or extension_of(cells[image]) in PICTURE_EXTENSIONS:
                claims.add(number)
    # The row's own path lies in its first line, or behind the closed quote in its last.
    first, last = read[0][0], read[-1][0]
    if others := claims - {first if first in claims else last}:
        raise csv.Error(
            f"a quote is open until line {last}, but line {min(others)} looks like a row"
        )


def _number(text: str) -> Any:
    for kind in (int, finite):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def _jsonl_rows(table: _Table) -> Iterator[Row]:
    names = dict[str, None]()
    if array := _array_in(table.path):
        values: Iterable[tuple[str, Any]] = ((f"value {n}", v) for n, v in enumerate(array))
    else:
        filled = ((n, line) for n, line in _lines(table.path) if line is None or line.strip())
        values = ((f"line {number}", _parsed(line)) for number, line in filled)
    for place, value in values:
        if isinstance(value, dict):
            names |= dict.fromkeys(value)
            yield value
        else:
            got = f"got {type(value).__name__}, expected an object"
            why = value if isinstance(value, ValueError) else got
            yield Rejected("broken_json", f"{place}: {why}"[:200])
    if names:
        table.check_columns(list(names))


def _parsed(line: str | None) -> Any:
    """The value of a line, or the ValueError that says why it has none."""
    try:
        return ValueError(f"over {MAX_LINE} characters") if line is None else parse_json(line)
    except ValueError as error:
        return error


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


def _lines(path: str) -> Iterator[Line]:
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


def _item_of_row(name: str, row: dict[str, Any], table: _Table) -> Item:
    """The item; raises Rejected, or OSError where its picture is not there."""
    source, image = table.source, row.get(table.source.image)
    for column, value in row.items():
        if isinstance(value, Rejected) and table.uses(column):
            raise value
    if isinstance(image, dict):  # Hugging Face's Image
        image = image.get("bytes") or image.get("path")
    label = None if source.label is None else row.get(source.label)
    if source.label is not None and (type(label) is not int or not 0 <= label < 2**63):
        got = f"{source.label}: got {label!r}"[:150]
        raise Rejected("no_label", f"{got}, expected an integer from 0 to 2^63 - 1")
    captions = tuple(
        caption
        for column, weight in source.captions.items()
        for caption in captions_of(column, row.get(column), weight)
    )
    facts = {
        key: fact
        for key, value in row.items()
        if key in table.fields
        or (isinstance(value, str | int | float | Decimal) and key not in source.captions)
        if (fact := _fact(value)) is not None
    }
    if isinstance(image, str) and source.strings == "base64":
        facts.pop(source.image, None)
        try:
            image = base64.b64decode(image, validate=True)
        except ValueError as error:
            raise Rejected("broken_base64", str(error)[:200]) from error
    if isinstance(image, bytes):
        return Item(name, "", 0, len(image), captions, facts, label, data=image)
    if not isinstance(image, str) or not image:
        raise Rejected("no_picture", f"{source.image}: got {type(image).__name__}")
    path = _resolve(image, table.entry, source.inside)
    return Item(name, path, 0, size_of(path), captions, facts, label)


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
