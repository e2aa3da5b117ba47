"""What all kinds of sources share: the files in them (entries) and what each file holds (items)."""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from data_prep.images import PICTURE_EXTENSIONS, UNDECODABLE, Rejected
from data_prep.sources.walk import (
    NO_PICTURES,
    OTHER_FILE,
    Entry,
    Walk,
    extension_of,
    stamp_of,
    stem_of,
    walk_folder,
)
from data_prep.storage import AbsolutePath, filesystem_of, is_remote, patient, reached, said_of
from models.config import Config, InputError

# No more is ever read of a caption or a metadata file.
MAX_TEXT_BYTES = 1 << 20

# Rows for files that are no pictures, of each extension; one more row counts the rest.
MAX_OTHER_ROWS = 1000
SPLIT = re.compile(
    "(?:(?P<train>train|training)|(?P<validation>validation|valid|val|dev)|(?P<test>test|testing|eval))"
    r"(?![^\W_])",
    re.IGNORECASE,
)
COMPANION = re.compile(
    r"(.+)[._-](?:masks?|alpha|matte|trimap|seg|segmentation|depth|disparity|normals?|canny|openpose)"
    r"(?:[._-]?\d+)?",
    re.IGNORECASE,
)
Weight = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Item:
    """A would-be sample: the picture's address and what was said of it, or the reason of its rejection."""

    name: str
    path: str = ""
    offset: int = 0
    length: int = 0
    # Captions with their weights; none: nothing was said. A Rejected says why one is no text.
    captions: tuple[tuple[bytes | Rejected, float], ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    label: int | None = None
    reason: str | None = None
    # Without a reason, what is said as well should its captions not be taken.
    detail: str = ""
    # A local copy of the file at `path`, while its partition is read.
    copy: str = ""
    # The picture itself, where no address could find it again.
    data: bytes | None = None


class OtherFiles(Counter[str]):
    """Files that are no pictures: rows for the first of each extension, and one for the rest."""

    def has_row(self, name: str) -> bool:
        """Count a file; returns whether it gets a row of its own."""
        extension = extension_of(name)
        self[extension] += 1
        return self[extension] <= MAX_OTHER_ROWS

    def rest(self) -> Iterator[tuple[str, str]]:
        """Name and detail of the rows that stand for several files."""
        for extension, count in sorted(self.items()):
            if count > MAX_OTHER_ROWS:
                yield f"*.{extension}".rstrip("."), f"{count - MAX_OTHER_ROWS} more"


def files_of(listing: pa.Table, source: str) -> pa.Table:
    """The files of a source that are to be read."""
    return listing.filter((pc.field("source") == source) & pc.field("reason").is_null())


def num_files(rows: pa.Table) -> pa.ChunkedArray:
    """How many files each row of a listing or of rejects stands for: `OtherFiles` makes one for several."""
    compute: Any = pc
    found = compute.extract_regex(rows["detail"], r"^(?P<number>[0-9]{1,12}) more$")
    return compute.struct_field(found, "number").cast(pa.int64()).fill_null(1)


def count_rejects(rows: pa.Table) -> tuple[Counter[str], Counter[str]]:
    """Pictures by reason, and beside them other files by extension and folders by reason."""
    pictures, others = Counter[str](), Counter[str]()
    columns = (column.to_pylist() for column in (rows["name"], rows["reason"], num_files(rows)))
    for name, reason, number in zip(*columns, strict=True):
        if reason == OTHER_FILE:
            others[extension_of(name)] += number
        else:
            (others if reason in NO_PICTURES else pictures)[reason] += 1
    return pictures, others


class Source(Config, ABC):
    """A place of pictures. A kind of source says here what its files are and how one is read."""

    # Extensions of its files, and what those are called in messages.
    files: ClassVar[tuple[str, ...]] = PICTURE_EXTENSIONS
    contents: ClassVar[str] = "pictures"
    # Files that one scan task reads; over 1 where every file is a picture, else `path` may be one itself.
    per_task: ClassVar[int] = 512
    # Whether its files name pictures that lie elsewhere.
    names_pictures: ClassVar[bool] = False

    kind: Any
    path: AbsolutePath
    """A local path, or any fsspec URL such as s3://bucket/folder."""
    include: tuple[str, ...] = ("*",)
    """Patterns of the names that are taken, relative to the path; * stands for slashes as well."""
    exclude: tuple[str, ...] = ()
    """Patterns of names that are not taken, such as masks/*."""
    split: Literal["train", "validation", "test"] | None = None
    """The one that is taken of the splits that names of files or folders begin with, as Hugging Face's do."""

    @property
    def labels(self) -> str:
        """Where the samples' labels come from; "" where they have none."""
        return ""

    def takes(self, name: str) -> bool:
        """Whether a file of that name is one of its files."""
        return extension_of(name) in self.files

    def left_out_by(self, name: str) -> str:
        """The option that leaves a file of that name out, "" where none does."""
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return "exclude"
        if not any(fnmatchcase(name, pattern) for pattern in self.include):
            return "include"
        return "split" if self.split not in (None, split_of(name)) else ""

    def entries_of(self, walk: Walk) -> Iterator[Entry]:
        """A folder's files, and why others are none."""
        pictures = {
            stem_of(file.name)
            for file in walk.files
            if self.takes(file.name) and extension_of(file.name) in PICTURE_EXTENSIONS
        }
        for file in walk.files:
            if not self.takes(file.name):
                package = UNDECODABLE.get(extension_of(file.name))
                detail = f"{package} is not installed" if package else ""
                yield replace(file, reason=OTHER_FILE, detail=detail)
            elif option := self.left_out_by(file.name):
                yield replace(file, reason="left_out", detail=option)
            elif (main := main_of(stem_of(file.name))) in pictures:
                yield replace(file, reason="companion", detail=f"beside {main}")
            else:
                yield file
        yield from walk.rejected

    @abstractmethod
    def read(self, entry: Entry, class_names: list[str], fields: Container[str]) -> Iterator[Item]:
        """The items of a file in a fixed order.

        Raises InputError where a table lacks a column, Rejected or OSError where no more can be read.
        Metadata of the names in `fields` is wanted whatever its type.
        """

    def entries(self, source: str) -> Iterator[Entry]:
        """The files of all folders in a fixed order; raises InputError where there are none."""
        where, root = f"sources.{source}.path: {self.path}", self.path.rstrip("/")
        name, endings = root.rsplit("/", 1)[-1], ", ".join(f".{e}" for e in self.files)
        one = self.per_task == 1
        if one and self.takes(name) and (found := _file_at(root, where)) is not None:
            yield Entry(source, name, root, found["size"], stamp=stamp_of(found))
            return
        if not is_remote(root) and not os.path.isdir(root):
            raise InputError(
                f"{where}: no such folder{f', nor a file ending in {endings}' if one else ''}. Remedy: give "
                f"the folder that holds the {self.contents}."
            )
        count, extensions, others = 0, Counter[str](), OtherFiles()
        # A class is known by its files, whatever those are.
        classes = set[str | None]([None])
        for walk in walk_folder(root, source):
            extensions.update(extension_of(file.name) for file in walk.files)
            for entry in self.entries_of(walk):
                count += entry.reason not in (OTHER_FILE, "left_out") and bool(entry.path)
                new = entry.class_name not in classes
                if new or entry.reason != OTHER_FILE or others.has_row(entry.name):
                    classes.add(entry.class_name)
                    yield entry
        for name, detail in others.rest():
            yield Entry(source, name, "", 0, reason=OTHER_FILE, detail=detail)
        if not count:
            found = ", ".join(
                f"{n} .{e}" if e else f"{n} without extension" for e, n in extensions.most_common(6)
            )
            raise InputError(
                f"{where}: no {self.contents} there; got {found or 'an empty folder'}, "
                f"expected files ending in {endings} that include, exclude and split leave in."
            )


def split_of(name: str) -> str:
    """The split that the name of a file or of a folder of it begins with, "" where none does."""
    found = [SPLIT.match(part) for part in name.split("/")]
    return next((match.lastgroup or "" for match in found[::-1] if match), "")


def main_of(stem: str) -> str:
    """The picture that one of such a name is the mask or the depth map of; "" where of none."""
    match = COMPANION.fullmatch(stem)
    return match[1] if match else ""


def _file_at(path: str, where: str) -> dict[str, Any] | None:
    """What is known of a file, None of what is no file; raises InputError where a store does not answer."""
    try:
        filesystem, name = filesystem_of(path)
    except (ImportError, ValueError, OSError) as error:
        raise InputError(f"{where}: {error}") from error
    with reached(where):
        return patient(filesystem.info, name) if patient(filesystem.isfile, name) else None


def read_entries(
    entries: list[Entry],
    config: Source,
    class_names: list[str] | None = None,
    fields: Container[str] = (),
) -> Iterator[Item]:
    """The items of some entries, in a fixed order; raises InputError where a table lacks a column."""
    for entry in entries:
        try:
            if entry.reason:
                raise Rejected(entry.reason, entry.detail)
            yield from config.read(entry, class_names or [], fields)
        except Rejected as rejected:
            yield Item(entry.name, reason=rejected.reason, detail=rejected.detail)
        except OSError as error:
            yield Item(entry.name, reason="unreadable", detail=said_of(error))


def captions_of(field: str, value: Any, weight: float) -> list[tuple[bytes | Rejected, float]]:
    """The captions that a field holds, a text or a list of equally good ones, which share its weight."""
    values = [each for each in (value if isinstance(value, list) else [value]) if each is not None]
    return [(_caption(field, each), weight / len(values)) for each in values]


def _caption(field: str, value: Any) -> bytes | Rejected:
    """Bytes of a text, broken where it was read from broken bytes or is itself, to be found so later."""
    if not isinstance(value, str):
        return Rejected("caption_type", f"{field}: got {type(value).__name__}, expected text")
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass")


def sample_key(source: str, name: str) -> str:
    """Our own key, safe in any tar, and the same when the source grows."""
    return hashlib.sha256(f"{source}\0{name}".encode()).hexdigest()[:20]
