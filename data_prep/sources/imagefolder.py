"""Hugging Face's ImageFolder: pictures, and a table of metadata that names them."""
# What is an option of other tables is none here:
# pyright: reportIncompatibleVariableOverride=false

import os
import posixpath
from collections.abc import Container, Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from data_prep.images import PICTURE_EXTENSIONS
from data_prep.sources.source import Item, Source, Weight
from data_prep.sources.table import TableSource
from data_prep.sources.walk import OTHER_FILE, Entry, Walk, extension_of, walk_folder
from models.config import Entries


class ImageFolderSource(TableSource):
    """Hugging Face's ImageFolder: pictures, and metadata.csv, .jsonl or .parquet with their file_name."""

    contents = "metadata.csv, .jsonl or .parquet"
    inside = True

    kind: Literal["imagefolder"]
    image: ClassVar[str] = "file_name"
    strings: ClassVar[str] = "path"
    captions: Entries[str, Weight] = Field(default={"text": 1.0}, min_length=1)
    """Column -> weight."""

    def takes(self, name: str) -> bool:
        stem, extension = os.path.splitext(os.path.basename(name))
        return stem == "metadata" and extension[1:] in self.files

    def entries_of(self, walk: Walk) -> Iterator[Entry]:
        """Metadata comes before the pictures beside it."""
        for entry in sorted(Source.entries_of(self, walk), key=lambda e: e.reason is not None):
            if entry.reason == OTHER_FILE and extension_of(entry.name) in PICTURE_EXTENSIONS:
                detail = "none in any folder above"
                entry = replace(entry, path="", reason="no_metadata", detail=detail)
            yield entry

    def entries(self, source: str) -> Iterator[Entry]:
        """Pictures beside and below metadata are its rows, or `read` says that they have none."""
        above = list[str]()
        for entry in super().entries(source):
            if entry.reason is None:
                above.append(entry.name.removesuffix(posixpath.basename(entry.name)))
            if entry.reason != "no_metadata" or not entry.name.startswith(tuple(above)):
                yield entry

    def read(self, entry: Entry, class_names: list[str], fields: Container[str]) -> Iterator[Item]:
        named = set[str]()
        for item in super().read(entry, class_names, fields):
            named.add(posixpath.normpath(item.path))
            yield item
        # Pictures below the metadata, down to the next metadata, of which it has no row.
        others = list[str]()
        for walk in walk_folder(posixpath.dirname(entry.path)):
            if walk.name.startswith(tuple(others)):
                continue
            if walk.name and any(self.takes(file.name) for file in walk.files):
                others.append(walk.name)
                continue
            for file in walk.files:
                is_picture = extension_of(file.name) in PICTURE_EXTENSIONS
                if is_picture and posixpath.normpath(file.path) not in named:
                    full = posixpath.join(posixpath.dirname(entry.name), file.name)
                    detail = f"{posixpath.basename(entry.name)} has no row of it"
                    yield Item(full, reason="no_metadata", detail=detail)
