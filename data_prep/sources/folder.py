"""Pictures in a folder, each described by KEY.txt and KEY.json beside it, which img2dataset writes in tars as well."""

from collections.abc import Container, Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from data_prep.images import Rejected
from data_prep.sources.source import MAX_TEXT_BYTES, Item, Source, Weight, captions_of
from data_prep.sources.walk import OTHER_FILE, Entry, Walk, extension_of, stem_of
from data_prep.storage import read_head
from data_prep.text import parse_json
from models.config import Entries


class TextsSource(Source):
    """A source whose pictures have texts beside them."""

    captions: Entries[str, Weight] = Field(default_factory=dict)
    """JSON field, or txt for KEY.txt -> weight; empty: txt, or where there is none the field caption."""

    def describe(self, texts: dict[str, bytes]) -> dict[str, Any]:
        """The captions and metadata of an Item from its texts by extension; raises Rejected."""
        data = texts.get("json", b"{}")
        if len(data) > MAX_TEXT_BYTES:
            raise Rejected("broken_json", f"over {MAX_TEXT_BYTES} bytes")
        try:
            facts = parse_json(data)
        except ValueError as error:
            raise Rejected("broken_json", str(error)[:200]) from error
        if not isinstance(facts, dict):
            raise Rejected("broken_json", f"got {type(facts).__name__}, expected an object")
        # No other tool's status says so.
        if str(facts.get("status")).startswith("failed_to_"):
            detail = f"{facts['status']}: {facts.get('error_message') or ''}"[:200]
            raise Rejected("source_status", detail)
        captions = list[tuple[bytes | Rejected, float]]()
        default = {"txt" if "txt" in (texts | facts) else "caption": 1.0}
        for said, weight in (self.captions or default).items():
            if said == "txt" in texts:
                captions.append((texts["txt"], weight))
            else:
                captions += captions_of(said, facts.get(said), weight)
        return {"captions": tuple(captions), "metadata": facts}


class FolderSource(TextsSource):
    """Pictures in a folder and the folders in it, each with KEY.txt, KEY.json or both of its name KEY."""

    kind: Literal["folder"]

    def entries_of(self, walk: Walk) -> Iterator[Entry]:
        pictures = {stem_of(file.name) for file in walk.files if self.takes(file.name)}
        texts, others = dict[tuple[str, str], Entry](), dict[str, str]()
        for file in walk.files:
            stem, extension = stem_of(file.name), extension_of(file.name)
            is_text = extension in ("txt", "json") and self.left_out_by(file.name) != "exclude"
            if is_text and stem in pictures:
                texts[stem, extension] = file
            elif not self.takes(file.name):
                others[stem.lower()] = file.name
        described = {text.name for text in texts.values()}
        for entry in super().entries_of(walk):
            stem = stem_of(entry.name)
            if entry.path and entry.reason != OTHER_FILE:
                for extension, field in (("txt", "caption_path"), ("json", "metadata_path")):
                    if text := texts.get((stem, extension)):
                        stamp = f"{entry.stamp} {text.stamp}"
                        entry = replace(entry, stamp=stamp, **{field: text.path})
                near = others.get(entry.name.lower()) or others.get(stem.lower())
                # A caption of its own makes a picture of a mask.
                if entry.caption_path and entry.reason == "companion":
                    entry = replace(entry, reason=None, detail="")
                elif near and not (entry.caption_path or entry.detail):
                    hint = f"{near} is there, but its caption would be {stem}.txt"
                    entry = replace(entry, detail=hint)
            if entry.name not in described:
                yield entry

    def read(self, entry: Entry, class_names: list[str], fields: Container[str]) -> Iterator[Item]:
        paths = {"txt": entry.caption_path, "json": entry.metadata_path}
        try:
            texts = {e: read_head(path, MAX_TEXT_BYTES + 1) for e, path in paths.items() if path}
        except OSError as error:
            raise Rejected("caption_unreadable", error.strerror or "") from error
        said = self.describe(texts)
        yield Item(entry.name, entry.path, 0, entry.size, detail=entry.detail, **said)
