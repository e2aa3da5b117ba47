"""Where pictures come from: what lies there (the listing), and what each piece of it holds (the items)."""

import hashlib
import json
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import fsspec
from pydantic import Field

from data_prep.images import PICTURE_EXTENSIONS
from data_prep.storage import is_remote, local_copy, patient
from models.config import Config, InputError

FILES_PER_PARTITION = 512
MAX_TEXT_BYTES = 1 << 20  # of a caption or a metadata file; no more is ever read
BLOCK = 512  # of a tar
TABLE_EXTENSIONS = ("csv", "jsonl", "parquet")

Weight = Annotated[float, Field(gt=0)]


class FolderSource(Config):
    """Pictures in a folder and the folders in it, each captioned by the .txt file of the same name."""

    kind: Literal["folder"]
    path: str  # here and below: a local path, or any fsspec URL such as s3://bucket/folder


class ClassesSource(Config):
    """A folder a class: the label is the place of its name among all, the caption is made of the name."""

    kind: Literal["classes"]
    path: str
    caption: str = "{name}"  # {name}: the folder's, with blanks for underscores


class TarSource(Config):
    """img2dataset's or any WebDataset tars: KEY.jpg (png, webp, ...), KEY.txt and KEY.json."""

    kind: Literal["tars"]
    path: str  # a folder of *.tar, or one tar
    # JSON field, or txt for KEY.txt -> weight; none: txt, or where there is none the field caption
    captions: dict[str, Weight] = Field(default_factory=dict)


class TableSource(Config):
    """Rows of *.parquet, *.csv or *.jsonl: a picture each, by its path or by its bytes."""

    kind: Literal["table"]
    path: str  # a folder of tables, or one table
    # The column of pictures: a path (relative to the table), bytes, or Hugging Face's struct of both.
    image: str = "image"
    strings: Literal["path", "base64"] = "path"  # what a string in that column is
    captions: dict[str, Weight] = Field(default={"caption": 1.0}, min_length=1)  # column -> weight
    label: str | None = None  # column of integers


class ImageFolderSource(Config):
    """Hugging Face's ImageFolder: pictures, and metadata.csv, .jsonl or .parquet with their file_name."""

    kind: Literal["imagefolder"]
    path: str
    captions: dict[str, Weight] = Field(default={"text": 1.0}, min_length=1)
    label: str | None = None


SourceConfig = Annotated[
    FolderSource | ClassesSource | TarSource | TableSource | ImageFolderSource,
    Field(discriminator="kind"),
]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source, or the reason why it cannot be one. `name` is relative to the source."""

    source: str
    kind: str
    name: str
    path: str
    size: int
    caption_path: str | None = None
    class_name: str | None = None
    reason: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Item:
    """A would-be sample: the picture's address and what was said of it, or the reason of its rejection."""

    name: str
    path: str = ""
    offset: int = 0
    length: int = 0
    captions: tuple[tuple[bytes, float], ...] = ()  # with weights; none: nothing was said
    metadata: dict[str, Any] = field(default_factory=dict)
    label: int | None = None
    reason: str | None = None
    detail: str = ""
    copy: str = ""  # a local copy of the file at `path`, while its partition is read
    data: bytes | None = None  # the picture itself, where no address could find it again


@dataclass
class Walk:
    """What lies in one folder, in the order of names."""

    files: list[tuple[str, str, int]] = field(default_factory=list)  # name, path, size
    rejected: list[tuple[str, str, str]] = field(default_factory=list)  # name, reason, detail


def sample_key(source: str, name: str) -> str:
    """Our own key, safe in any tar, and the same when the source grows."""
    return hashlib.sha256(f"{source}\0{name}".encode()).hexdigest()[:20]


def list_source(source: str, config: SourceConfig) -> Iterator[Entry]:
    """The files of a source in a fixed order; raises InputError where there are none."""
    where = f"sources.{source}.path: {config.path}"
    root = config.path.rstrip("/") if is_remote(config.path) else os.path.abspath(config.path)
    wanted = PICTURE_EXTENSIONS
    if config.kind in ("tars", "table"):
        wanted = ("tar",) if config.kind == "tars" else TABLE_EXTENSIONS
        if (size := _file_size(root, where)) is not None:
            yield Entry(source, config.kind, root.rsplit("/", 1)[-1], root, size)
            return
    elif config.kind == "imagefolder":
        wanted = TABLE_EXTENSIONS
    if not is_remote(root) and not os.path.isdir(root):
        raise InputError(
            f"{where}: no such folder (looked in {os.path.dirname(root)}). "
            "Remedy: give the folder that holds the pictures."
        )
    count, extensions = 0, Counter[str]()
    for walk in walk_folder(root):
        extensions.update(extension_of(name) for name, _, _ in walk.files)
        texts = {stem_of(name): path for name, path, _ in walk.files if extension_of(name) == "txt"}
        for name, path, size in walk.files:
            if extension_of(name) not in wanted:
                continue
            if config.kind == "imagefolder" and not is_metadata(name):
                continue
            count += 1
            entry = Entry(source, config.kind, name, path, size)
            if config.kind == "folder":
                entry = replace(entry, caption_path=texts.get(stem_of(name)))
            elif config.kind == "classes":
                entry = _with_class(entry)
            yield entry
        for name, reason, detail in walk.rejected:
            yield Entry(source, config.kind, name, "", 0, reason=reason, detail=detail)
    if not count:
        found = ", ".join(
            f"{n} .{e}" if e else f"{n} without extension" for e, n in extensions.most_common(6)
        )
        what = {
            "tars": "tars",
            "table": "tables",
            "imagefolder": "metadata.csv, .jsonl or .parquet",
        }
        raise InputError(
            f"{where}: no {what.get(config.kind, 'pictures')} there; got {found or 'an empty folder'}, "
            f"expected files ending in {', '.join('.' + e for e in wanted)}."
        )


def _file_size(path: str, where: str) -> int | None:
    """Bytes of a file, None of what is no file; raises InputError where a store does not answer."""
    if not is_remote(path):
        return os.path.getsize(path) if os.path.isfile(path) else None
    try:
        filesystem, name = fsspec.url_to_fs(path, use_listings_cache=False)
        return filesystem.size(name) if patient(filesystem.isfile, name) else None
    except (ImportError, ValueError, OSError) as error:
        raise InputError(f"{where}: {error}") from error


def _with_class(entry: Entry) -> Entry:
    if "/" not in entry.name:
        return replace(entry, reason="no_class", detail="lies in no class's folder")
    return replace(entry, class_name=entry.name.split("/")[0])


def walk_folder(root: str) -> Iterator[Walk]:
    """Every folder below, links followed; a folder that two paths reach is listed once."""
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
                walk.rejected.append((prefix, "folder_already_listed", os.path.realpath(folder)))
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
        readable = name.encode("utf-8", "backslashreplace").decode()
        walk.rejected.append((readable, "name_not_utf8", ""))
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
    filesystem, top = fsspec.url_to_fs(root, use_listings_cache=False)
    folders: dict[str, Walk] = {}
    for path, info in sorted(patient(lambda: filesystem.find(top, detail=True)).items()):
        name = path[len(top.rstrip("/")) + 1 :]
        walk = folders.setdefault(os.path.dirname(name), Walk())
        walk.files.append((name, f"{root}/{name}", info["size"] or 0))
    yield from folders.values()


def read_entries(
    entries: list[Entry], config: SourceConfig, class_names: list[str] | None = None
) -> Iterator[Item]:
    """The items of a partition, in a fixed order; raises InputError where a table lacks a column."""
    from data_prep.tables import read_rows  # which builds on this module

    for entry in entries:
        if entry.reason:
            yield Item(entry.name, reason=entry.reason, detail=entry.detail)
        elif isinstance(config, TarSource):
            yield from _read_tar(entry, config)
        elif isinstance(config, TableSource | ImageFolderSource):
            yield from read_rows(entry, config)
        elif isinstance(config, ClassesSource):
            name = entry.class_name or ""
            caption = config.caption.format(name=name.replace("_", " ")).encode()
            label = (class_names or []).index(name)
            yield Item(entry.name, entry.path, 0, entry.size, ((caption, 1.0),), label=label)
        else:
            yield _read_file(entry)


def _read_file(entry: Entry) -> Item:
    captions = ()
    if entry.caption_path:
        try:
            captions = ((patient(_read_head, entry.caption_path), 1.0),)
        except OSError as error:
            return Item(entry.name, reason="caption_unreadable", detail=error.strerror or "")
    return Item(entry.name, entry.path, 0, entry.size, captions)


def _read_head(path: str) -> bytes:
    """A text, no further than MAX_TEXT_BYTES and one more."""
    with fsspec.open(path, "rb") if is_remote(path) else open(path, "rb") as file:
        return file.read(MAX_TEXT_BYTES + 1)  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class _Group:
    """Members of one key: extension -> (offset, size)."""

    pictures: dict[str, tuple[int, int]] = field(default_factory=dict)
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)
    problem: tuple[str, str] | None = None


def _read_tar(entry: Entry, config: TarSource) -> Iterator[Item]:
    """Samples of a tar grouped by key wherever their members lie; what is broken in it is an item too."""
    try:
        with local_copy(entry.path) as path, open(path, "rb") as file:
            groups, broken = patient(_scan_headers, file)
            last = next(reversed(groups), None)
            for key, group in groups.items():
                if broken and key == last and not group.problem:
                    detail = "the last sample before the break; may lack parts"
                    group.problem = ("broken_tar", detail)
                item = _item_of_group(file, entry.path, f"{entry.name}/{key}", group, config)
                yield replace(item, copy=path if path != entry.path else "")
    except OSError as error:
        yield Item(entry.name, reason="unreadable", detail=error.strerror or type(error).__name__)
        return
    if broken:
        yield Item(entry.name, reason="broken_tar", detail=broken)


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
                if member.offset_data <= end:  # a negative size would loop for ever
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


def _item_of_group(file: Any, path: str, name: str, group: _Group, config: TarSource) -> Item:
    if not is_utf8(name):
        readable = name.encode("utf-8", "backslashreplace").decode()
        return Item(readable, reason="name_not_utf8")
    if len(group.pictures) > 1 and not group.problem:
        group.problem = ("duplicate_key", f"pictures {', '.join(group.pictures)} share it")
    if group.problem:
        return Item(name, reason=group.problem[0], detail=group.problem[1])
    texts = {}
    for extension, (offset, size) in group.texts.items():
        texts[extension] = patient(_read_member, file, offset, min(size, MAX_TEXT_BYTES + 1))
    try:
        facts = parse_json(texts.get("json", b"{}"))
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
    wanted = config.captions or {"txt" if "txt" in said else "caption": 1.0}
    captions = tuple((said[name], weight) for name, weight in wanted.items() if name in said)
    return Item(name, path, offset, size, captions, facts)


def _read_member(file: Any, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def parse_json(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"over {MAX_TEXT_BYTES} bytes")
    try:
        facts = json.loads(data, parse_constant=lambda _: None)  # NaN is no JSON
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(facts, dict):
        raise ValueError(f"got {type(facts).__name__}, expected an object")
    return facts


def extension_of(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def is_metadata(name: str) -> bool:
    """Whether it is what Hugging Face's ImageFolder looks for."""
    stem, extension = os.path.splitext(os.path.basename(name))
    return stem == "metadata" and extension[1:] in TABLE_EXTENSIONS


def stem_of(name: str) -> str:
    return os.path.splitext(name)[0]


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
