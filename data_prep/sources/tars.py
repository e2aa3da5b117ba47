"""Tars of pictures, grouped by key, as img2dataset and WebDataset write them."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field

from data_prep.images import PICTURE_EXTENSIONS
from data_prep.sources.source import MAX_TEXT_BYTES, Entry, Item, Source, Weight
from data_prep.sources.walk import extension_of, is_utf8, readable, stem_of
from data_prep.storage import local_copy, patient
from data_prep.text import parse_json

# Bytes of a tar's block.
BLOCK = 512


class TarSource(Source):
    """img2dataset's or any WebDataset tars: KEY.jpg (png, webp, ...), KEY.txt and KEY.json."""

    files = ("tar",)
    contents = "tars"
    may_be_one_file = True
    per_task = 1

    kind: Literal["tars"]
    captions: dict[str, Weight] = Field(default_factory=dict)
    """JSON field, or txt for KEY.txt -> weight; empty: txt, or where there is none the field caption."""

    def read(self, entry: Entry, class_names: list[str]) -> Iterator[Item]:
        """Samples grouped by key wherever their members lie; what is broken in the tar is an item too."""
        try:
            with local_copy(entry.path) as path, open(path, "rb") as file:
                groups, broken = patient(_scan_headers, file)
                last = next(reversed(groups), None)
                for key, group in groups.items():
                    if broken and key == last and not group.problem:
                        detail = "the last sample before the break; may lack parts"
                        group.problem = ("broken_tar", detail)
                    name = f"{entry.name}/{key}"
                    item = _item_of_group(file, entry.path, name, group, self.captions)
                    yield replace(item, copy=path if path != entry.path else "")
        except OSError as error:
            detail = error.strerror or type(error).__name__
            yield Item(entry.name, reason="unreadable", detail=detail)
            return
        if broken:
            yield Item(entry.name, reason="broken_tar", detail=broken)


@dataclass
class _Group:
    """Members of one key: extension -> (offset, size)."""

    pictures: dict[str, tuple[int, int]] = field(default_factory=dict)
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)
    problem: tuple[str, str] | None = None


def _scan_headers(file: Any) -> tuple[dict[str, _Group], str]:
    """Samples by key as the headers tell, and what is wrong with the tar, "" if nothing."""
    groups: dict[str, _Group] = {}
    size, end = os.fstat(file.fileno()).st_size, -1
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    return groups, f"cut at byte {size}, inside {member.name!r}"
                # A negative size would loop for ever.
                if member.offset_data <= end:
                    return groups, f"header at byte {member.offset} points backwards"
                end = member.offset_data
                _add_member(groups, member)
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] - it would keep them all
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, IndexError, KeyError) as error:
        return groups, str(error) or type(error).__name__
    # tarfile takes a damaged header for the end: the end is where a block of zeros says so.
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        return groups, f"no end-of-archive mark at byte {end}: cut there, or a damaged header"
    return groups, ""


def _add_member(groups: dict[str, _Group], member: tarfile.TarInfo) -> None:
    extension = extension_of(member.name)
    if extension not in (*PICTURE_EXTENSIONS, "txt", "json"):
        return
    group = groups.setdefault(stem_of(member.name), _Group())
    place = (member.offset_data, member.size)
    if not member.isreg() or member.issparse():
        group.problem = ("not_a_regular_file", f"{extension} is a link or special")
    elif extension in group.pictures or extension in group.texts:
        group.problem = ("duplicate_key", f"two members end in .{extension}")
    elif extension in ("txt", "json"):
        group.texts[extension] = place
    else:
        group.pictures[extension] = place


def _item_of_group(
    file: Any, path: str, name: str, group: _Group, weights: dict[str, float]
) -> Item:
    if not is_utf8(name):
        return Item(readable(name), reason="name_not_utf8")
    if len(group.pictures) > 1 and not group.problem:
        group.problem = ("duplicate_key", f"pictures {', '.join(group.pictures)} share it")
    if group.problem:
        return Item(name, reason=group.problem[0], detail=group.problem[1])
    texts = {}
    for extension, (offset, size) in group.texts.items():
        texts[extension] = patient(_read_member, file, offset, min(size, MAX_TEXT_BYTES + 1))
    try:
        facts = _parse_json(texts.get("json", b"{}"))
    except ValueError as error:
        return Item(name, reason="broken_json", detail=str(error)[:200])
    if facts.get("status", "success") != "success":
        detail = f"{facts['status']}: {facts.get('error_message') or ''}"[:200]
        return Item(name, reason="source_status", detail=detail)
    if not group.pictures:
        return Item(name, reason="no_picture", detail=f"only {', '.join(group.texts)}")
    (offset, size), *_ = group.pictures.values()
    said = {n: t.encode("utf-8", "surrogatepass") for n, t in facts.items() if isinstance(t, str)}
    if "txt" in texts:
        said["txt"] = texts["txt"]
    wanted = weights or {"txt" if "txt" in said else "caption": 1.0}
    captions = tuple((said[name], weight) for name, weight in wanted.items() if name in said)
    return Item(name, path, offset, size, captions, facts)


def _read_member(file: Any, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _parse_json(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"over {MAX_TEXT_BYTES} bytes")
    facts = parse_json(data)
    if not isinstance(facts, dict):
        raise ValueError(f"got {type(facts).__name__}, expected an object")
    return facts
