"""Tars of pictures, grouped by key, as img2dataset and WebDataset write them."""

import os
import tarfile
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from data_prep.images import PICTURE_EXTENSIONS, Rejected
from data_prep.sources.folder import TextsSource
from data_prep.sources.source import MAX_TEXT_BYTES, Item, OtherFiles, main_of
from data_prep.sources.walk import (
    HIDDEN_FOLDER,
    OTHER_FILE,
    Entry,
    extension_of,
    hidden_part,
    is_utf8,
    readable,
    stem_of,
)
from data_prep.storage import local_copy, patient

# Extensions of what is said of a picture.
TEXTS = frozenset(("txt", "json"))
# Bytes of a tar's block.
BLOCK = 512
# Bytes of a picture with holes, which is put together in memory.
MAX_SPARSE_BYTES = 128 << 20


class TarSource(TextsSource):
    """img2dataset's or any WebDataset tars: KEY.jpg (png, webp, ...), KEY.txt and KEY.json."""

    files = ("tar",)
    contents = "tars"
    per_task = 1

    kind: Literal["tars"]

    def read(self, entry: Entry, class_names: list[str], fields: Container[str]) -> Iterator[Item]:
        """Samples grouped by key wherever their members lie; what is broken in the tar is an item too."""
        with local_copy(entry.path) as path, open(path, "rb") as file:
            contents = patient(_scan_headers, file)
            for key, group in contents.groups.items():
                name = f"{entry.name}/{key}"
                try:
                    contents.check(key)
                    item = self._item(name, entry.path, file, group)
                except Rejected as rejected:
                    item = Item(readable(name), reason=rejected.reason, detail=rejected.detail)
                yield replace(item, copy=path if path != entry.path else "")
        for name, (reason, detail) in contents.rows.items():
            yield Item(f"{entry.name}/{readable(name)}", reason=reason, detail=detail)
        if contents.broken:
            yield Item(entry.name, reason="broken_tar", detail=contents.broken)

    def _item(self, name: str, path: str, file: Any, group: "_Group") -> Item:
        """The item of a key's members; raises Rejected."""
        read = partial(patient, _read_member, file)
        texts = {e: read(group[e], MAX_TEXT_BYTES + 1) for e in group if e in TEXTS}
        said = self.describe(texts)
        place = next((place for e, place in group.items() if e not in TEXTS), None)
        if place is None:
            raise Rejected("no_picture", f"only {', '.join(group)}")
        if place.sparse and place.size > MAX_SPARSE_BYTES:
            raise Rejected("too_many_bytes", f"{place.size} > {MAX_SPARSE_BYTES}, with holes")
        data = read(place, place.size) if place.sparse else None
        return Item(name, path, place.offset, place.size, data=data, **said)


class _Place(NamedTuple):
    """Where a member's bytes lie; the header of a sparse one says where its holes are."""

    offset: int
    size: int
    sparse: tarfile.TarInfo | None = None


# The members of one key by extension.
_Group = dict[str, _Place]


@dataclass
class _Contents:
    """What the headers of a tar tell."""

    groups: dict[str, _Group] = field(default_factory=dict)
    """By key."""
    problems: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By key, the reason and the detail of those that are no samples."""
    rows: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By name, those of hidden folders and of files that belong to no sample."""
    others: OtherFiles = field(default_factory=OtherFiles)
    broken: str = ""
    """What is wrong with the tar."""

    def check(self, key: str) -> None:
        """Raise Rejected where the members of a key are no sample, as far as their headers tell."""
        group, main = self.groups[key], main_of(key)
        pictures = [extension for extension in group if extension not in TEXTS]
        if not is_utf8(key):
            raise Rejected("name_not_utf8")
        if key in self.problems:
            raise Rejected(*self.problems[key])
        if self.groups.get(main, {}).keys() - TEXTS and not group.keys() & TEXTS:
            raise Rejected("companion", f"beside {main}")
        if len(pictures) > 1:
            raise Rejected("duplicate_key", f"pictures {', '.join(pictures)} share it")


def _scan_headers(file: Any) -> _Contents:
    """Tars that were put one after another, as cat does, are read on behind the end mark of each."""
    contents = _Contents()
    size, begin = os.fstat(file.fileno()).st_size, 0
    try:
        while begin < size or not begin:
            begin = _behind_zeros(file, _scan_archive(file, begin, size, contents))
            if file.seek(begin) < size:
                tarfile.TarInfo.frombuf(file.read(BLOCK), tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        contents.broken = f"{size - begin} bytes behind an end-of-archive mark are no tar"
    except (tarfile.TarError, ValueError, OverflowError, IndexError, KeyError) as error:
        contents.broken = str(error) or type(error).__name__
        if contents.groups:
            last = next(reversed(contents.groups))
            detail = "the last sample before the break; may lack parts"
            contents.problems.setdefault(last, ("broken_tar", detail))
    contents.rows |= {name: (OTHER_FILE, detail) for name, detail in contents.others.rest()}
    return contents


def _scan_archive(file: Any, begin: int, size: int, contents: _Contents) -> int:
    """Add the members of the tar that begins there; returns where its end mark is, raises TarError."""
    file.seek(begin)
    end = begin - 1
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            # A sparse member's size is that of the file with its holes, of which the tar has none.
            sparse: Any = member.sparse
            pieces = [member.size] if sparse is None else [n for _, n in sparse]
            if member.offset_data + sum(pieces) > size:
                raise tarfile.ReadError(f"cut at byte {size}, inside {member.name!r}")
            # A negative size would loop for ever.
            if member.offset_data <= end:
                raise tarfile.ReadError(f"header at byte {member.offset} points backwards")
            end = member.offset_data
            _add_member(contents, member)
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue] - it would keep them all
        end = tar.offset
    # tarfile takes a damaged header for the end: the end is where a block of zeros says so.
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError(
            f"no end-of-archive mark at byte {end}: cut there, or a damaged header"
        )
    return end


def _behind_zeros(file: Any, begin: int) -> int:
    """The place of the next byte that is not zero, or the file's end."""
    file.seek(begin)
    while data := file.read(1 << 20):
        if rest := data.lstrip(b"\0"):
            return file.tell() - len(rest)
    return file.tell()


def _add_member(contents: _Contents, member: tarfile.TarInfo) -> None:
    if folder := hidden_part(member.name):
        contents.rows[folder] = HIDDEN_FOLDER, "with all in it"
        return
    key, extension = stem_of(member.name), extension_of(member.name)
    hidden = os.path.basename(member.name).startswith(".")
    if hidden or extension not in (*PICTURE_EXTENSIONS, *TEXTS):
        if not member.isdir() and contents.others.has_row(member.name):
            contents.rows[member.name] = OTHER_FILE, ""
        return
    group, place = contents.groups.setdefault(key, {}), None
    if member.islnk():
        # A hard link has no bytes of its own, but those of the member that it leads to.
        target = contents.groups.get(stem_of(member.linkname), {})
        place = target.get(extension_of(member.linkname))
    elif member.isreg():
        sparse = member if member.issparse() else None
        place = _Place(member.offset_data, member.size, sparse)
    if place is None:
        contents.problems[key] = "not_a_regular_file", f"{extension} is a link or special"
    elif extension in group:
        contents.problems[key] = "duplicate_key", f"two members end in .{extension}"
    else:
        group[extension] = place


def _read_member(file: Any, place: _Place, length: int) -> bytes:
    """Its first bytes, at most `length`; holes are zeros."""
    if place.sparse:
        return tarfile.ExFileObject(SimpleNamespace(fileobj=file), place.sparse).read(length)  # pyright: ignore[reportArgumentType]
    file.seek(place.offset)
    return file.read(min(length, place.size))
