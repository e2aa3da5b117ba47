"""Tables of pictures: a row is a picture, by its path or by its bytes."""

from collections.abc import Container, Iterator
from typing import Literal

from pydantic import Field

from data_prep.images import PICTURE_EXTENSIONS
from data_prep.sources.rows import Columns, RowsSource, read_rows
from data_prep.sources.source import Entry, Item, Weight
from data_prep.sources.walk import OTHER_FILE, Walk, extension_of
from models.config import Entries


class TableSource(RowsSource):
    """Rows of *.parquet, *.csv or *.jsonl: each is a picture, by its path or by its bytes."""

    contents = "tables"
    may_be_one_file = True

    kind: Literal["table"]
    image: str = "image"
    """Column of pictures: a path (relative to the table), bytes, or Hugging Face's struct of both."""
    strings: Literal["path", "base64"] = "path"
    """What a string in that column is."""
    captions: Entries[str, Weight] = Field(default={"caption": 1.0}, min_length=1)
    """Column -> weight."""

    def entries_of(self, source: str, walk: Walk) -> Iterator[Entry]:
        """A picture beside tables is a row of one, or nobody asked for it."""
        for entry in super().entries_of(source, walk):
            if entry.reason != OTHER_FILE or extension_of(entry.name) not in PICTURE_EXTENSIONS:
                yield entry

    def read(self, entry: Entry, class_names: list[str], fields: Container[str]) -> Iterator[Item]:
        base64 = self.strings == "base64"
        columns = Columns(
            self.image, self.captions, self.label, fields, self.merge_rows, base64=base64
        )
        for item, _ in read_rows(entry, columns):
            yield item
