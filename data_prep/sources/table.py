"""Tables of pictures: a row is a picture, by its path or by its bytes."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from data_prep.images import PICTURE_EXTENSIONS
from data_prep.sources.rows import RowsSource
from data_prep.sources.source import Weight
from data_prep.sources.walk import OTHER_FILE, Entry, Walk, extension_of
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

    def entries_of(self, walk: Walk) -> Iterator[Entry]:
        """A picture beside tables is a row of one, or nobody asked for it."""
        for entry in super().entries_of(walk):
            if entry.reason != OTHER_FILE or extension_of(entry.name) not in PICTURE_EXTENSIONS:
                yield entry
