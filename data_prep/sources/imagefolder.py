"""Hugging Face's ImageFolder: pictures, and a table of metadata that names them."""

import os
import posixpath
from collections.abc import Container, Iterator
from typing import Literal

from pydantic import Field

from data_prep.images import PICTURE_EXTENSIONS
from data_prep.sources.rows import Columns, RowsSource, read_rows
from data_prep.sources.source import Entry, Item, Weight
from data_prep.sources.walk import extension_of, walk_folder
from models.config import Entries


class ImageFolderSource(RowsSource):
    """Hugging Face's ImageFolder: pictures, and metadata.csv, .jsonl or .parquet with their file_name."""

    contents = "metadata.csv, .jsonl or .parquet"

    kind: Literal["imagefolder"]
    captions: Entries[str, Weight] = Field(default={"text": 1.0}, min_length=1)
    """Column -> weight."""

    def takes(self, name: str) -> bool:
        stem, extension = os.path.splitext(os.path.basename(name))
        return stem == "metadata" and extension[1:] in self.files

    def read(self, entry: Entry, class_names: list[str], fields: Container[str]) -> Iterator[Item]:
        columns = Columns(
            "file_name", self.captions, self.label, fields, self.merge_rows, inside=True
        )
        named = set[str]()
        for item, path in read_rows(entry, columns):
            named.add(path)
            yield item
        yield from self._unnamed(entry, named)

    def _unnamed(self, entry: Entry, named: set[str]) -> Iterator[Item]:
        """Pictures below the metadata, down to the next metadata, of which it has no row."""
        folder, others = posixpath.dirname(entry.path), list[str]()
        for walk in walk_folder(folder):
            names = [name for name, _, _ in walk.files]
            if walk.name.startswith(tuple(others)):
                continue
            if walk.name and any(self.takes(name) for name in names):
                others.append(walk.name)
                continue
            for name in names:
                if extension_of(name) in PICTURE_EXTENSIONS and name not in named:
                    full = posixpath.join(posixpath.dirname(entry.name), name)
                    detail = f"{posixpath.basename(entry.name)} has no row of it"
                    yield Item(full, reason="no_metadata", detail=detail)
