"""Where pictures come from: what lies there (the listing), and what each piece of it holds (the items)."""

import hashlib
import json
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from data_prep.images import PICTURE_EXTENSIONS
from models.config import Config, InputError

FILES_PER_PARTITION = 512
MAX_TEXT_BYTES = 1 << 20  # of a caption or a metadata file; no more is ever read
BLOCK = 512  # of a tar


class FolderSource(Config):
    """Pictures in a folder and the folders in it, each captioned by the .txt file of the same name."""

    kind: Literal["folder"]
    path: str


class TarSource(Config):
    """img2dataset's or any WebDataset tars: KEY.jpg (png, webp, ...), KEY.txt and KEY.json."""

    kind: Literal["tars"]
    path: str  # a folder of *.tar, or one tar


SourceConfig = Annotated[FolderSource | TarSource, Field(discriminator="kind")]


@dataclass(frozen=True)
class Entry:
    """A file of a source, or the reason why it cannot be one. `name` is relative to the source."""

    source: str
    kind: str
    name: str
    path: str
    size: int
    caption_path: str | None = None
    reason: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Item:
    """A would-be sample: the picture's address and what was said of it, or the reason of its rejection."""

    name: str
    path: str = ""
    offset: int = 0
    length: int = 0
    caption: bytes | None = None  # None: nothing was said
    metadata: str = ""  # JSON object
    label: int | None = None
    reason: str | None = None
    detail: str = ""


@dataclass
class Walk:
    """What lies under a folder, in the order of names."""

    files: list[tuple[str, str, int]] = field(default_factory=list)  # name, path, size
    rejected: list[tuple[str, str, str]] = field(default_factory=list)  # name, reason, detail
    extensions: Counter[str] = field(default_factory=Counter)


def sample_key(source: str, name: str) -> str:
    """Our own key, safe in any tar, and the same when the source grows."""
    return hashlib.sha256(f"{source}\0{name}".encode()).hexdigest()[:20]


def read_bytes(path: str, offset: int, length: int) -> bytes:
    """Exactly those bytes; raises OSError where there are fewer."""
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(length)
    if len(data) != length:
        raise OSError(0, f"got {len(data)} bytes of {length}")
    return data


def list_source(source: str, config: FolderSource | TarSource) -> list[Entry]:
    """The files of a source in a fixed order; raises InputError where there are none."""
    root = Path(config.path).absolute()
    wanted = PICTURE_EXTENSIONS if config.kind == "folder" else ("tar",)
    if root.is_file() and config.kind == "tars":
        return [Entry(source, config.kind, root.name, str(root), root.stat().st_size)]
    if not root.is_dir():
        raise InputError(
            f"sources.{source}.path: {config.path}: no such folder (looked in {root.parent}). "
            "Remedy: give the folder that holds the pictures."
        )
    walk = walk_folder(root)
    captions = {_stem(name): path for name, path, _ in walk.files if _extension(name) == "txt"}
    entries = [
        Entry(source, config.kind, name, path, size, captions.get(_stem(name)))
        for name, path, size in walk.files
        if _extension(name) in wanted
    ]
    if not entries:
        found = ", ".join(
            f"{n} .{e}" if e else f"{n} without extension"
            for e, n in walk.extensions.most_common(6)
        )
        raise InputError(
            f"sources.{source}.path: {config.path}: no {'pictures' if config.kind == 'folder' else 'tars'} "
            f"there; got {found or 'an empty folder'}, expected files ending in "
            f"{', '.join('.' + e for e in wanted)}."
        )
    rejects = [
        Entry(source, config.kind, name, "", 0, reason=reason, detail=detail)
        for name, reason, detail in walk.rejected
    ]
    return sorted(entries + rejects, key=lambda entry: entry.name)


def walk_folder(root: Path) -> Walk:
    """Every file below, links followed; a folder that two paths reach is listed once."""
    walk, seen, folders = Walk(), set[tuple[int, int]](), [("", str(root))]
    while folders:
        prefix, folder = folders.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                walk.rejected.append((prefix, "folder_already_listed", os.path.realpath(folder)))
                continue
            seen.add((status.st_dev, status.st_ino))
            names = sorted(os.listdir(folder), reverse=True)
        except OSError as error:
            walk.rejected.append((prefix, "unreadable", error.strerror or type(error).__name__))
            continue
        for file_name in names:
            name, path = prefix + file_name, os.path.join(folder, file_name)
            if not _is_utf8(name):
                readable = name.encode("utf-8", "backslashreplace").decode()
                walk.rejected.append((readable, "name_not_utf8", ""))
                continue
            try:
                status = os.stat(path)
            except OSError as error:
                walk.rejected.append((name, "unreadable", error.strerror or type(error).__name__))
                continue
            if stat.S_ISDIR(status.st_mode):
                folders.append((name + "/", path))
            elif stat.S_ISREG(status.st_mode):
                walk.files.append((name, path, status.st_size))
                walk.extensions[_extension(name)] += 1
            elif _extension(name) in PICTURE_EXTENSIONS:
                walk.rejected.append((name, "not_a_regular_file", ""))
    return walk


def read_entries(entries: list[Entry]) -> Iterator[Item]:
    """The items of a partition, in a fixed order."""
    for entry in entries:
        if entry.reason:
            yield Item(entry.name, reason=entry.reason, detail=entry.detail)
        elif entry.kind == "tars":
            yield from _read_tar(entry)
        else:
            yield _read_file(entry)


def _read_file(entry: Entry) -> Item:
    caption = None
    if entry.caption_path:
        try:
            with open(entry.caption_path, "rb") as file:
                caption = file.read(MAX_TEXT_BYTES + 1)
        except OSError as error:
            return Item(entry.name, reason="caption_unreadable", detail=error.strerror or "")
    return Item(entry.name, entry.path, 0, entry.size, caption)


@dataclass
class _Group:
    """Members of one key: extension -> (offset, size)."""

    pictures: dict[str, tuple[int, int]] = field(default_factory=dict)
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)
    problem: tuple[str, str] | None = None


def _read_tar(entry: Entry) -> Iterator[Item]:
    """Samples of a tar grouped by key wherever their members lie; what is broken in it is an item too."""
    groups: dict[str, _Group] = {}
    try:
        with open(entry.path, "rb") as file:
            broken = _scan_headers(file, groups)
            last = next(reversed(groups), None)
            for key, group in groups.items():
                name = f"{entry.name}/{key}"
                if broken and key == last and not group.problem:
                    group.problem = (
                        "broken_tar",
                        "the last sample before the break; may lack parts",
                    )
                yield _item_of_group(file, entry.path, name, group)
    except OSError as error:
        yield Item(entry.name, reason="unreadable", detail=error.strerror or type(error).__name__)
        return
    if broken:
        yield Item(entry.name, reason="broken_tar", detail=broken)


def _scan_headers(file: Any, groups: dict[str, _Group]) -> str:
    """Fill `groups` from the headers; returns what is wrong with the tar, "" if nothing."""
    size, end = os.fstat(file.fileno()).st_size, -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    return f"cut at byte {size}, inside {member.name!r}"
                if member.offset_data <= end:  # a negative size would loop for ever
                    return f"header at byte {member.offset} points backwards"
                end = member.offset_data
                _add_member(groups, member)
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] - it would keep them all
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, IndexError, KeyError) as error:
        return str(error) or type(error).__name__
    # tarfile takes a damaged header for the end: the end is where a block of zeros says so.
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        return f"no end-of-archive mark at byte {end}: cut there, or a damaged header"
    return ""


def _add_member(groups: dict[str, _Group], member: tarfile.TarInfo) -> None:
    extension = _extension(member.name)
    if extension not in (*PICTURE_EXTENSIONS, "txt", "json"):
        return
    group = groups.setdefault(_stem(member.name), _Group())
    place = (member.offset_data, member.size)
    if not member.isreg() or member.issparse():
        group.problem = ("not_a_regular_file", f"{extension} is a link or special")
    elif extension in group.pictures or extension in group.texts:
        group.problem = ("duplicate_key", f"two members end in .{extension}")
    elif extension in ("txt", "json"):
        group.texts[extension] = place
    else:
        group.pictures[extension] = place


def _item_of_group(file: Any, path: str, name: str, group: _Group) -> Item:
    if not _is_utf8(name):
        readable = name.encode("utf-8", "backslashreplace").decode()
        return Item(readable, reason="name_not_utf8")
    if len(group.pictures) > 1 and not group.problem:
        group.problem = ("duplicate_key", f"pictures {', '.join(group.pictures)} share it")
    if group.problem:
        return Item(name, reason=group.problem[0], detail=group.problem[1])
    texts = {}
    for extension, (offset, size) in group.texts.items():
        file.seek(offset)
        texts[extension] = file.read(min(size, MAX_TEXT_BYTES + 1))
    try:
        facts = _parse_json(texts.get("json", b"{}"))
    except ValueError as error:
        return Item(name, reason="broken_json", detail=str(error)[:200])
    if facts.get("status", "success") != "success":
        detail = f"{facts['status']}: {facts.get('error_message') or ''}"[:200]
        return Item(name, reason="source_status", detail=detail)
    if not group.pictures:
        return Item(name, reason="no_picture", detail=f"only {', '.join(group.texts)}")
    caption = texts.get("txt")
    if caption is None and isinstance(facts.get("caption"), str):
        caption = facts["caption"].encode("utf-8", "surrogatepass")
    (offset, size), *_ = group.pictures.values()
    return Item(name, path, offset, size, caption, json.dumps(facts) if facts else "")


def _parse_json(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"over {MAX_TEXT_BYTES} bytes")
    try:
        facts = json.loads(data, parse_constant=lambda _: None)  # NaN is no JSON
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(facts, dict):
        raise ValueError(f"got {type(facts).__name__}, expected an object")
    return facts


def _extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
