"""Folders on disks and in stores: what lies in them, in one order for both."""

import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_prep.storage import filesystem_of, is_remote, patient, reached, said_of

# Reasons of what is no picture; counts of pictures leave it out.
OTHER_FILE, HIDDEN_FOLDER, EMPTY_FOLDER = "other_file", "hidden_folder", "empty_folder"
NO_PICTURES = OTHER_FILE, HIDDEN_FOLDER, EMPTY_FOLDER


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source, or the reason why it cannot be one. `name` is relative to the source."""

    source: str
    name: str
    path: str
    size: int
    caption_path: str | None = None
    metadata_path: str | None = None
    class_name: str | None = None
    reason: str | None = None
    detail: str = ""
    stamp: str = ""
    """Another where the file, or that of its caption, was written again: its time, or a store's tag of it."""


@dataclass
class Walk:
    """What lies in one folder of a source, in the order of names.

    `name` is relative to the root and ends in a slash; the root's own is empty.
    """

    source: str
    name: str
    path: str
    files: list[Entry] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    """Names like its own."""
    rejected: list[Entry] = field(default_factory=list)

    def add(self, name: str, size: int | None, stamp: str = "") -> None:
        """What lies there by its name in the folder: a file of so many bytes, or where that is None a folder."""
        full = self.name + name
        if not is_utf8(name):
            self.reject(full, "name_not_utf8")
        elif size is None and is_hidden(name):
            self.reject(f"{full}/", HIDDEN_FOLDER, "with all in it")
        elif size is None:
            self.folders.append(f"{full}/")
        elif name.startswith("."):
            self.reject(full, OTHER_FILE, "hidden")
        else:
            self.files.append(Entry(self.source, full, f"{self.path}/{name}", size, stamp=stamp))

    def reject(self, name: str, reason: str, detail: str = "") -> None:
        entry = Entry(self.source, readable(name), "", 0, reason=reason, detail=detail)
        self.rejected.append(entry)


def walk_folder(root: str, source: str = "") -> Iterator[Walk]:
    """Every folder below: first the folder itself, then those in it, each level in the order of names.

    Links are followed; a folder that two paths reach is listed once. Hidden and system folders are left out.
    """
    tree = _read_store(root) if is_remote(root) else None
    seen, waiting = set[tuple[int, int]](), [""]
    while waiting:
        name = waiting.pop()
        walk = Walk(source, name, f"{root}/{name}".removesuffix("/"))
        if tree is None:
            _look_on_disk(walk, seen)
        else:
            for name, found in sorted(tree[walk.name].items(), key=lambda e: e[0].rstrip("/")):
                size, stamp = found or (None, "")
                walk.add(name.removesuffix("/"), size, stamp)
        yield walk
        waiting += reversed(walk.folders)


def _look_on_disk(walk: Walk, seen: set[tuple[int, int]]) -> None:
    """Add what lies in the folder, unless it is among the seen ones."""
    try:
        status = os.stat(walk.path)
        if (status.st_dev, status.st_ino) in seen:
            where = readable(os.path.realpath(walk.path))
            walk.reject(walk.name, "folder_already_listed", where)
            return
        seen.add((status.st_dev, status.st_ino))
        names = sorted(os.listdir(walk.path))
    except OSError as error:
        walk.reject(walk.name, "unreadable", said_of(error))
        return
    for name in names:
        try:
            status = os.stat(f"{walk.path}/{name}")
        except OSError as error:
            walk.reject(walk.name + name, "unreadable", said_of(error))
            continue
        if stat.S_ISDIR(status.st_mode):
            walk.add(name, None)
        elif stat.S_ISREG(status.st_mode):
            walk.add(name, status.st_size, str(status.st_mtime_ns))
        else:
            walk.reject(walk.name + name, "not_a_regular_file")


def _read_store(root: str) -> dict[str, dict[str, tuple[int, str] | None]]:
    """Folder -> name in it -> bytes and stamp; a folder's own name ends in a slash, and it has neither.

    So does the name of the empty object that stands for a folder on S3.
    """
    filesystem, top = filesystem_of(root)
    begin = len(top.rstrip("/")) + 1
    with reached(root):
        found = patient(lambda: filesystem.find(top, detail=True))
        # An empty folder of the root is in no list of files.
        listed = patient(lambda: filesystem.ls(top, detail=True)) if found else []
    folders = [f"{info['name'].rstrip('/')}/" for info in listed if info["type"] == "directory"]
    tree = defaultdict[str, dict[str, tuple[int, str] | None]](dict)
    for path in (*found, *folders):
        name = path[begin:]
        while name:
            end = name.rfind("/", 0, len(name) - 1) + 1
            folder, last = name[:end], name[end:]
            if last in tree[folder]:
                break
            info = None if last.endswith("/") else found[path]
            tree[folder][last] = info and (info["size"] or 0, stamp_of(info))
            name = folder
    return tree


def stamp_of(info: dict[str, Any]) -> str:
    """What a file system says of a file that is another where the file was written again."""
    return str(info.get("ETag") or info.get("LastModified") or info.get("mtime") or "")


def is_hidden(folder: str) -> bool:
    """Whether people mean no folder of that name when they speak of their files: .git, @eaDir, __MACOSX."""
    return folder not in (".", "..") and (folder[:1] in (".", "@") or folder == "__MACOSX")


def hidden_part(name: str) -> str:
    """A name up to the first hidden folder in it, with a slash; empty where there is none."""
    parts = name.split("/")
    hidden = next((i for i, part in enumerate(parts[:-1]) if is_hidden(part)), -1)
    return "".join(f"{part}/" for part in parts[: hidden + 1])


def extension_of(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def stem_of(name: str) -> str:
    return os.path.splitext(name)[0]


def readable(text: str) -> str:
    """A name that is not UTF-8 as text that is."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_utf8(text: str) -> bool:
    return readable(text) == text
