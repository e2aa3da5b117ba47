"""Folders on disks and in stores: what lies in them, in one order for both."""

import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_prep.images import PICTURE_EXTENSIONS
from data_prep.storage import filesystem_of, is_remote, patient


@dataclass
class Walk:
    """What lies in one folder, in the order of names."""

    files: list[tuple[str, str, int]] = field(default_factory=list)
    """Name relative to the root, full path, size."""
    rejected: list[tuple[str, str, str]] = field(default_factory=list)
    """Name, reason, detail."""


def walk_folder(root: str) -> Iterator[Walk]:
    """Every folder below: first the folder itself, then those in it, each level in the order of names.

    Links are followed; a folder that two paths reach is listed once.
    """
    if is_remote(root):
        yield from _walk_remote(root)
        return
    seen, folders = set[tuple[int, int]](), [("", root)]
    while folders:
        prefix, folder = folders.pop()
        walk, below = Walk(), list[tuple[str, str]]()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                walk.rejected.append(
                    (prefix, "folder_already_listed", readable(os.path.realpath(folder)))
                )
                names = []
            else:
                seen.add((status.st_dev, status.st_ino))
                names = sorted(os.listdir(folder))
        except OSError as error:
            walk.rejected.append((prefix, "unreadable", error.strerror or type(error).__name__))
            names = []
        for file_name in names:
            _look_at(walk, below, prefix + file_name, os.path.join(folder, file_name))
        yield walk
        folders += reversed(below)


def _look_at(walk: Walk, folders: list[tuple[str, str]], name: str, path: str) -> None:
    """Add one name of a folder to what it is."""
    if not is_utf8(name):
        walk.rejected.append((readable(name), "name_not_utf8", ""))
        return
    try:
        status = os.stat(path)
    except OSError as error:
        walk.rejected.append((name, "unreadable", error.strerror or type(error).__name__))
        return
    if stat.S_ISDIR(status.st_mode):
        folders.append((name + "/", path))
    elif stat.S_ISREG(status.st_mode):
        walk.files.append((name, path, status.st_size))
    elif extension_of(name) in PICTURE_EXTENSIONS:
        walk.rejected.append((name, "not_a_regular_file", ""))


def _walk_remote(root: str) -> Iterator[Walk]:
    """One listing of all objects, put into the order in which a local folder is walked."""
    filesystem, top = filesystem_of(root)
    folders, broken = defaultdict[str, list[tuple[str, str, int]]](list), Walk()
    for path, info in patient(lambda: filesystem.find(top, detail=True)).items():
        name = path[len(top.rstrip("/")) + 1 :]
        if is_utf8(name):
            folders[os.path.dirname(name)].append((name, f"{root}/{name}", info["size"] or 0))
        else:
            broken.rejected.append((readable(name), "name_not_utf8", ""))
    for folder in sorted(folders, key=lambda folder: folder.split("/") if folder else []):
        yield Walk(files=sorted(folders[folder]))
    yield broken


def extension_of(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def stem_of(name: str) -> str:
    return os.path.splitext(name)[0]


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(text: str) -> str:
    """A name that is not UTF-8 as text that is."""
    return text.encode("utf-8", "backslashreplace").decode()
