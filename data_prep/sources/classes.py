"""Pictures in a folder per class."""

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import field_validator

from data_prep.sources.source import Entry, Item, Source
from data_prep.sources.walk import EMPTY_FOLDER, Walk


class ClassesSource(Source):
    """One folder per class: the label is the place of its name among all, the caption is made of the name."""

    kind: Literal["classes"]
    caption: str = "{name}"
    """`{name}` stands for the folder's name, with blanks for underscores."""
    classes: list[str] = []
    """Names of folders in the order of their labels; pictures in others are rejected. Empty: all, by name."""

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

    @field_validator("classes")
    @classmethod
    def _names_differ(cls, names: list[str]) -> list[str]:
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"got {twice[0]!r} twice: a class has one label")
        return names

    @property
    def labels(self) -> str:
        return " ".join(["classes", *self.classes])

    def entries_of(self, walk: Walk) -> Iterator[Entry]:
        """The name of the class goes with every file in its folder, so that no label hangs on the others."""
        name = walk.name.partition("/")[0]
        known = bool(name) and (not self.classes or name in self.classes)
        detail = f"{name} is not in classes" if name else "lies in no class's folder"
        if known and not (walk.files or walk.folders or walk.rejected):
            yield Entry(walk.source, walk.name, "", 0, class_name=name, reason=EMPTY_FOLDER)
        for entry in super().entries_of(walk):
            if known:
                entry = replace(entry, class_name=name)
            elif not entry.reason:
                entry = replace(entry, reason="no_class", detail=detail)
            yield entry

    def read(self, entry: Entry, class_names: list[str], fields: Container[str]) -> Iterator[Item]:
        name = entry.class_name or ""
        caption = self.caption.format(name=name.replace("_", " ")).encode()
        label = class_names.index(name)
        yield Item(entry.name, entry.path, 0, entry.size, ((caption, 1.0),), label=label)


def count_classes(sources: dict[str, Any], listing: Any) -> dict[str, int]:
    """Pictures of each class in a listing, in the order of the labels."""
    found = zip(listing["class_name"].to_pylist(), listing["reason"].to_pylist(), strict=True)
    counts = Counter[str]()
    for name, reason in found:
        if name is not None:
            counts[name] += reason is None
    given = [source.classes for source in sources.values() if isinstance(source, ClassesSource)]
    names = given[0] if given and given[0] else sorted(counts)
    return {name: counts[name] for name in names}
