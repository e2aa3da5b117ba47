"""Pictures in a folder, each captioned by a text file."""

from collections.abc import Container, Iterator
from dataclasses import replace
from typing import Literal

from data_prep.sources.source import MAX_TEXT_BYTES, Entry, Item, Source
from data_prep.sources.walk import OTHER_FILE, Walk, extension_of, stem_of
from data_prep.storage import read_head


class FolderSource(Source):
    """Pictures in a folder and the folders in it, each captioned by the .txt file of the same name."""

    kind: Literal["folder"]

    def entries_of(self, source: str, walk: Walk) -> Iterator[Entry]:
        texts = {stem_of(name): path for name, path, _ in walk.files if extension_of(name) == "txt"}
        others = {stem_of(n).lower(): n for n, _, _ in walk.files if not self.takes(n)}
        captioned = {texts.get(stem_of(n)) for n, _, _ in walk.files if self.takes(n)}
        for entry in super().entries_of(source, walk):
            stem, hint = stem_of(entry.name), ""
            if entry.reason == OTHER_FILE or not entry.path:
                if entry.path not in captioned:
                    yield entry
                continue
            if stem not in texts and (
                near := others.get(entry.name.lower()) or others.get(stem.lower())
            ):
                hint = f"{near} is there, but its caption would be {stem}.txt"
            # A caption of its own makes a picture of a mask.
            reason = None if entry.reason == "companion" and stem in texts else entry.reason
            detail = entry.detail if reason else hint
            caption = texts.get(stem)
            yield replace(entry, caption_path=caption, reason=reason, detail=detail)

    def read(self, entry: Entry, class_names: list[str], fields: Container[str]) -> Iterator[Item]:
        captions = ()
        if entry.caption_path:
            try:
                captions = ((read_head(entry.caption_path, MAX_TEXT_BYTES + 1), 1.0),)
            except OSError as error:
                detail = error.strerror or ""
                yield Item(entry.name, reason="caption_unreadable", detail=detail)
                return
        yield Item(entry.name, entry.path, 0, entry.size, captions, detail=entry.detail)
