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

    def entries_of(self, source: str, walk: Walk) -> Iterator[Entry]:
        texts = dict[tuple[str, str], str]()
        for name, path, _ in walk.files:
            if extension_of(name) in ("txt", "json") and self.left_out_by(name) != "exclude":
                texts[stem_of(name), extension_of(name)] = path
        pictures = {stem_of(name) for name, _, _ in walk.files if self.takes(name)}
        described = {path for (stem, _), path in texts.items() if stem in pictures}
        others = {
            stem_of(n).lower(): n
            for n, p, _ in walk.files
            if p not in described and not self.takes(n)
        }
        for entry in super().entries_of(source, walk):
            stem, hint = stem_of(entry.name), ""
            if entry.reason == OTHER_FILE or not entry.path:
                if entry.path not in described:
                    yield entry
                continue
            caption, metadata = texts.get((stem, "txt")), texts.get((stem, "json"))
            if not caption and (near := others.get(entry.name.lower()) or others.get(stem.lower())):
                hint = f"{near} is there, but its caption would be {stem}.txt"
            # A caption of its own makes a picture of a mask.
            reason = None if entry.reason == "companion" and caption else entry.reason
            detail = entry.detail if reason else hint
            yield replace(
                entry, caption_path=caption, metadata_path=metadata, reason=reason, detail=detail
            )

    def read(self, entry: Entry, class_names: list[str], fields: Container[str]) -> Iterator[Item]:
        paths = {"txt": entry.caption_path, "json": entry.metadata_path}
        try:
            texts = {e: read_head(path, MAX_TEXT_BYTES + 1) for e, path in paths.items() if path}
            said = self.describe(texts)
        except OSError as error:
            yield Item(entry.name, reason="caption_unreadable", detail=error.strerror or "")
        except Rejected as rejected:
            yield Item(entry.name, reason=rejected.reason, detail=rejected.detail)
        else:
            yield Item(entry.name, entry.path, 0, entry.size, detail=entry.detail, **said)
