"""Where pictures come from: each kind of source in its own file, with its config and how it is read."""

from typing import Annotated

from pydantic import Field

from data_prep.sources.classes import ClassesSource
from data_prep.sources.folder import FolderSource
from data_prep.sources.imagefolder import ImageFolderSource
from data_prep.sources.source import Entry, Item, Source, read_entries, sample_key
from data_prep.sources.table import TableSource
from data_prep.sources.tars import TarSource

__all__ = ["Entry", "Item", "Source", "SourceConfig", "read_entries", "sample_key"]

# A new kind of source is a file in this folder and a name here.
Kinds = ClassesSource | FolderSource | ImageFolderSource | TableSource | TarSource
SourceConfig = Annotated[Kinds, Field(discriminator="kind")]
