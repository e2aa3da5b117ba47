"""Pictures in a folder, each described by texts beside it."""

from collections.abc import Container, Iterator
from dataclasses import replace
from typing import Literal

from data_prep.images import Rejected
from data_prep.sources.source import MAX_TEXT_BYTES, Entry, Item
from data_prep.sources.texts import TextsSource
from data_prep.sources.walk import OTHER_FILE, Walk, extension_of, stem_of
from data_prep.storage import read_head


class FolderSource(TextsSource):
    """Pictures in a folder and the folders in it, each with KEY.txt, KEY.json or both of its name KEY."""

    kind: Literal["folder"]

    def entries_of(self, walk: Walk) -> Iterator[Entry]:
        texts, pictures = dict[tuple[str, str], Entry](), set[str]()
        for file in walk.files:
            stem, extension = stem_of(file.name), extension_of(file.name)
            if self.takes(file.name):
                pictures.add(stem)
            elif extension in ("txt", "json") and self.left_out_by(file.name) != "exclude":
                texts[stem, extension] = file
        described = {text.name for (stem, _), text in texts.items() if stem in pictures}
        others = {
            stem_of(file.name).lower(): file.name
            for file in walk.files
            if file.name not in described and not self.takes(file.name)
        }
        for entry in super().entries_of(walk):
            if entry.reason == OTHER_FILE or not entry.path:
                if entry.name not in described:
                    yield entry
                continue
            stem = stem_of(entry.name)
            if caption := texts.get((stem, "txt")):
                stamp = f"{entry.stamp} {caption.stamp}"
                entry = replace(entry, caption_path=caption.path, stamp=stamp)
                # A caption of its own makes a picture of a mask.
                if entry.reason == "companion":
                    entry = replace(entry, reason=None, detail="")
            elif near := others.get(entry.name.lower()) or others.get(stem.lower()):
                hint = f"{near} is there, but its caption would be {stem}.txt"
                entry = replace(entry, detail=entry.detail or hint)
            if metadata := texts.get((stem, "json")):
                stamp = f"{entry.stamp} {metadata.stamp}"
                entry = replace(entry, metadata_path=metadata.path, stamp=stamp)
            yield entry

    def read(self, entry: Entry, class_names: list[str], fields: Container[str]) -> Iterator[Item]:
        paths = {"txt": entry.caption_path, "json": entry.metadata_path}
        try:
            texts = {e: read_head(path, MAX_TEXT_BYTES + 1) for e, path in paths.items() if path}
        except OSError as error:
            raise Rejected("caption_unreadable", error.strerror or "") from error
        said = self.describe(texts)
        yield Item(entry.name, entry.path, 0, entry.size, detail=entry.detail, **said)
