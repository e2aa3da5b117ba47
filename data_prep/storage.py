"""Files on a local disk or behind any fsspec URL: read with patience, written whole or not at all."""

import errno
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import AfterValidator
from upath import UPath

from models import files
from models.config import InputError

Result = TypeVar("Result")

# Attempts at reading or putting a file, 1, 2, 4 and 8 s apart.
ATTEMPTS = 5
PERMANENT = (
    FileExistsError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)
# What a disk answers that is away: no fault of a file's or a folder's own.
AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENODEV, errno.EHOSTDOWN)
# What a store answers to names that it can have none of.
ODD = (errno.ENAMETOOLONG, errno.EINVAL)
# Errors that no name brings about, by their class, or by what the store calls them.
TROUBLE = re.compile(
    r"^\w*(Connect|Timeout|Credential)\w*:|\((5\d\d|429|ServiceUnavailable|SlowDown|InternalError|RequestTime|"
    "Expired|InvalidToken|InvalidAccessKey|Signature)"
)
# Stores that have given something to this process.
_served = set[str]()
# Names on a local disk go to it as they are: fsspec would take "::" in one for a chain of file systems.
LOCAL = LocalFileSystem()
# Stands for "::" in a name while fsspec reads a URL.
NO_CHAIN = "\0\0"


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def local_path(path: str) -> str:
    """The local path that a file:// URL stands for; any other path or URL as it is."""
    bare = re.sub(r"^(file|local):(//(localhost)?)?(?=/)", "", path)
    # Some writers of URLs escape names, others do not.
    return bare if bare == path or os.path.exists(bare) else unquote(bare)


def absolute(path: str) -> str:
    """A local path from the root on; a URL as it is."""
    path = local_path(path)
    return path if is_remote(path) else os.path.abspath(path)


AbsolutePath = Annotated[str, AfterValidator(absolute)]


def filesystem_of(path: str | Path) -> tuple[Any, str]:
    """The fsspec file system of a local path or URL, and the name there."""
    if not is_remote(path):
        return LOCAL, str(path)
    # In a chain of file systems each "::" stands before a "://"; any behind the last is part of a name.
    chain, slashes, name = str(path).rpartition("://")
    # A listing remembered from before another process wrote would hide what it wrote.
    filesystem, name = fsspec.url_to_fs(
        chain + slashes + name.replace("::", NO_CHAIN), use_listings_cache=False
    )
    return filesystem, name.replace(NO_CHAIN, "::")


def open_root(url: str, where: str) -> Path:
    """A local folder as an absolute Path, any other as a UPath; raises InputError naming the option."""
    url = local_path(url)
    if not is_remote(url):
        return Path(url).absolute()
    try:
        # A listing remembered from before another process wrote would hide what it wrote.
        path = UPath(url.rstrip("/"), use_listings_cache=False)
        path.fs  # noqa: B018 - imports the protocol's package
    except (ImportError, ValueError, OSError) as error:
        raise InputError(f"{where}: {url}: {error}") from error
    with reached(f"{where}: {url}"):
        patient(path.exists)
    return path  # pyright: ignore[reportReturnType] - a UPath does what a Path does


def patient(function: Callable[..., Result], *arguments: Any) -> Result:
    """The result, asked for again where the failure may pass: an I/O error, a store that is away.

    Raises OSError, whatever the package that speaks to the store raises.
    """
    for attempt in range(ATTEMPTS):
        try:
            with files.as_os_errors():
                return function(*arguments)
        except PERMANENT:
            raise
        except OSError as error:
            if error.errno in files.FULL:
                raise
            if attempt == ATTEMPTS - 1:
                why = (error.errno and error.strerror) or type(error.__cause__ or error).__name__
                raise OSError(0, f"{ATTEMPTS} attempts failed: {why}") from error
            time.sleep(2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _why(error: BaseException) -> str:
    """What the store, or the disk, said itself."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


@contextmanager
def reached(place: str | Path, *expected: type[OSError]) -> Iterator[None]:
    """Raise InputError where a store does not let us at what is asked for there, but for what the caller expects."""
    try:
        yield
    except expected:
        raise
    except OSError as error:
        if not is_remote(place) or error.errno in files.FULL:
            raise
        raise InputError(f"{place}: {_why(error)}. Remedy: {files.ACCESS}") from error


@contextmanager
def own_fault(path: str, named: bool = False) -> Iterator[None]:
    """Let an OSError be a file's own fault; raises InputError where `refuse_away` does."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except OSError as error:
        if error.errno not in files.FULL:
            refuse_away(path, _why(error), named)
        raise
    if is_remote(path):
        _served.add(_store_of(path))


def refuse_away(path: str, why: str, named: bool = False) -> None:
    """Raise InputError where a file cannot be read because its disk or store is away, or lets nobody in any more.

    Not even its folder can be looked at then; or else each picture would be a reject. One that a table's row `named` may
    be in a place that never was, or is not for us: there what is said tells, and whether the store has given anything.
    """
    # Hosts of the web come and go by themselves.
    if re.match("https?://", path):
        return
    filesystem, name = filesystem_of(path)
    try:
        with files.as_os_errors():
            filesystem.info(os.path.dirname(name.rstrip("/")))
    except FileNotFoundError:
        return
    except OSError as error:
        said, away = _why(error), True
        if filesystem is LOCAL:
            away = error.errno in AWAY
        elif named:
            trouble = any(map(TROUBLE.search, (why, said)))
            away = error.errno not in ODD and (trouble or _store_of(path) in _served)
        if away:
            raise InputError(
                f"{path}: {why}; nor can its folder be looked at: {said}. Remedy: {files.ACCESS}"
            ) from error


def _store_of(path: str) -> str:
    """The bucket, say, of a URL."""
    return "/".join(path.split("/")[:3])


def said_of(error: OSError) -> str:
    """What an error of a disk or a store says, without the place."""
    return error.strerror or type(error).__name__


def read_bytes(path: str, offset: int, length: int, named: bool = False) -> bytes:
    """Exactly those bytes; raises OSError where there are fewer, or where no attempt succeeds."""
    filesystem, name = filesystem_of(path)
    with own_fault(path, named):
        data = patient(lambda: filesystem.cat_file(name, start=offset, end=offset + length))
    if len(data) != length:
        raise OSError(0, f"got {len(data)} bytes of {length}")
    return data


def read_head(path: str, length: int) -> bytes:
    """The first bytes, no more than `length`; raises OSError where no attempt succeeds."""
    filesystem, name = filesystem_of(path)
    with own_fault(path):
        return patient(filesystem.head, name, length)


def size_of(path: str) -> int:
    """Bytes of a file that a row names; raises OSError where there is none, or where no attempt succeeds."""
    filesystem, name = filesystem_of(path)
    with own_fault(path, named=True):
        return patient(filesystem.size, name) or 0


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """The file itself, or a temporary copy of a remote one."""
    if not is_remote(path):
        yield path
        return
    filesystem, name = filesystem_of(path)
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "copy")
        # No fault of the file, which would be rejected for it.
        with files.full_disk_is_said(path), own_fault(path):
            patient(filesystem.get_file, name, target)
        yield target


def find_files(folder: Path) -> dict[str, int]:
    """Name relative to the folder -> size, of all files below that are not temporary ones."""
    filesystem, top = filesystem_of(folder)
    with reached(folder):
        listed = patient(lambda: filesystem.find(top, detail=True))
    cut = len(top.rstrip("/")) + 1
    return {
        name[cut:]: info["size"] or 0
        for name, info in listed.items()
        # S3's object of a folder has no base name.
        if not (os.path.basename(name) or ".").startswith(".")
    }


def names_in(folder: Path) -> list[str]:
    """What lies directly in a folder; nothing where there is none."""
    filesystem, top = filesystem_of(folder)
    try:
        with reached(folder, FileNotFoundError):
            listed = patient(filesystem.ls, top, False)
    except FileNotFoundError:
        return []
    # S3's object of the folder itself has no name there.
    return [name for path in listed if (name := path[len(top.rstrip("/")) + 1 :].strip("/"))]


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then put it at `path` whole, durably."""
    if not is_remote(path):
        return files.write_whole(path, write)
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / path.name
        write(temporary)
        publish(temporary, path)


def temporary_for(path: Path) -> Path:
    """A new local name for what will become `path`: beside it, or in the temporary folder of a remote one."""
    if is_remote(path):
        return Path(tempfile.gettempdir()) / f"flowmill-{uuid.uuid4().hex}.tmp"
    return files.temporary_for(path)


def publish(temporary: Path, path: Path) -> None:
    """Make a local file appear at `path`: by fsync and rename, on an object store by one put."""
    if not is_remote(path):
        return files.publish(temporary, path)
    filesystem, name = filesystem_of(path)
    with reached(path):
        patient(filesystem.put_file, str(temporary), name)


def delete(path: Path) -> int:
    """Delete a file or a folder with all in it; returns how many files that were."""
    filesystem, name = filesystem_of(path)
    if not path.exists():
        return 0
    count = 1 if path.is_file() else len(find_files(path))
    with reached(path):
        patient(filesystem.rm, name, True)
    return count
