"""Where pictures come from: each kind of source in its own file, with its config and how it is read."""

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from data_prep.sources.source import Entry, Item, Source, read_entries, sample_key

__all__ = ["KINDS", "Entry", "Item", "Source", "SourceConfig", "read_entries", "sample_key"]

# A new kind of source is a file in this folder and a line here: file -> class.
KINDS = {
    "classes": "ClassesSource",
    "folder": "FolderSource",
    "imagefolder": "ImageFolderSource",
    "table": "TableSource",
    "tars": "TarSource",
}

if TYPE_CHECKING:
    SourceConfig = Source
else:
    _classes = [getattr(import_module(f"{__name__}.{file}"), name) for file, name in KINDS.items()]
    SourceConfig = Annotated[Union[tuple(_classes)], Field(discriminator="kind")]  # noqa: UP007
