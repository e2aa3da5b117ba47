"""Pictures in a folder per class."""

from collections.abc import Container, Iterator
from dataclasses import replace
from typing import Literal

from pydantic import field_validator

from data_prep.sources.source import Entry, Item, Source
from data_prep.sources.walk import Walk


class ClassesSource(Source):
    """One folder per class: the label is the place of its name among all, the caption is made of the name."""

    kind: Literal["classes"]
    caption: str = "{name}"
    """`{name}` stands for the folder's name, with blanks for underscores."""

    @field_validator("caption")
    @classmethod
    def _knows_its_fields(cls, caption: str) -> str:
        try:
            # What works for a name of one letter works for any.
            caption.format(name="n")
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{type(error).__name__} ({error}); expected text with {{name}}, and {{{{ for a brace"
            ) from error
        return caption

    @property
    def labels(self) -> str:
        return "classes"

    def entries_of(self, source: str, walk: Walk) -> Iterator[Entry]:
        for entry in super().entries_of(source, walk):
            if "/" in entry.name:
                yield replace(entry, class_name=entry.name.split("/")[0])
            else:
                yield replace(entry, reason="no_class", detail="lies in no class's folder")

    def read(self, entry: Entry, class_names: list[str], fields: Container[str]) -> Iterator[Item]:
        name = entry.class_name or ""
        caption = self.caption.format(name=name.replace("_", " ")).encode()
        label = class_names.index(name)
        yield Item(entry.name, entry.path, 0, entry.size, ((caption, 1.0),), label=label)
