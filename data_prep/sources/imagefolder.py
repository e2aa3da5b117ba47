"""Hugging Face's ImageFolder: pictures, and a table of metadata that names them."""

import os
import posixpath
from collections.abc import Container, Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field

from data_prep.images import PICTURE_EXTENSIONS
from data_prep.sources.rows import Columns, RowsSource, read_rows
from data_prep.sources.source import Entry, Item, Weight
from data_prep.sources.walk import OTHER_FILE, Walk, extension_of, walk_folder
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

    def entries_of(self, source: str, walk: Walk) -> Iterator[Entry]:
        """Pictures beside metadata are its rows, or `read` says that they have none."""
        beside = any(self.takes(name) for name, _, _ in walk.files)
        for entry in super().entries_of(source, walk):
            if entry.reason != OTHER_FILE or extension_of(entry.name) not in PICTURE_EXTENSIONS:
                yield entry
            elif not beside:
                yield replace(
                    entry, path="", reason="no_metadata", detail="none in any folder above"
                )

    def entries(self, source: str) -> Iterator[Entry]:
        """So are pictures in the folders below metadata, which come after it."""
        above = list[str]()
        for entry in super().entries(source):
            if entry.reason is None:
                above.append(entry.name.removesuffix(posixpath.basename(entry.name)))
            if entry.reason != "no_metadata" or not entry.name.startswith(tuple(above)):
                yield entry

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
