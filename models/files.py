"""Files and folders on a local disk: whole or absent under their name, and known by their sha256."""

import errno
import hashlib
import io
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from traceback import walk_tb
from typing import Any, TextIO

from models.config import InputError

UMASK = os.umask(0o022)
os.umask(UMASK)

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What a file system answers that cannot force a name, or anything, to disk: CIFS, some of FUSE."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk answers that takes no more: full, over a user's quota, over the largest size of a file."""


BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError)
"""No store's errors, and no disk's."""

ACCESS = (
    "credentials that may list, read and write there (of S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "~/.aws), and where it is not Amazon's AWS_ENDPOINT_URL; then the same command goes on"
)
"""What helps where a store refuses, or does not answer."""

STORES = {"s3fs", "gcsfs", "adlfs", "aiohttp", "huggingface_hub"}
"""Packages that speak to stores, each of which has classes of errors of its own."""


def store_error(error: BaseException) -> str | None:
    """What to tell the user of an error that came out of a store; None of any other."""
    if isinstance(error, (InputError, *BUGS)) or getattr(error, "errno", None) in FULL:
        return None
    first = error
    while first.__cause__:
        first = first.__cause__
    frames = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(first.__traceback__))
    if not STORES & {name.split(".")[0] for name in frames}:
        return None
    return f"a store: {type(first).__name__}: {first}. Remedy: {ACCESS}"


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Raise an OSError in the place of whatever a package that speaks to a store raises."""
    try:
        yield
    except (OSError, InputError, *BUGS):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextmanager
def full_disk_is_said(where: str) -> Iterator[None]:
    """Raise InputError in the place of an OSError that says that a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = error.filename or f"there, or in {tempfile.gettempdir()}"
        raise InputError(
            f"{where}: no room to write {place} ({os.strerror(error.errno)}). Remedy: make room, and run it "
            "again: what is done is kept."
        ) from error


def file_sha256(*files: Any) -> str:
    """sha256 of the bytes of files, one after another: paths, also on a store, or open files from their beginning."""
    digest = hashlib.sha256()
    for file in files:
        with nullcontext(file) if isinstance(file, io.IOBase) else file.open("rb") as opened:
            opened.seek(0)
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk, where its file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def temporary_for(path: Path) -> Path:
    """A new hidden name beside `path`, for what will become it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether `temporary_for` gave a file its name."""
    return bool(re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", path.name)) and path.is_file()


def _follow_umask(file: Path) -> None:
    """Let others have what the umask grants them: safetensors grants them nothing."""
    mode = file.stat().st_mode
    if not mode & 0o077:
        # Where a file system has one mode for all files, nobody may change it.
        with suppress(PermissionError):
            file.chmod(mode | 0o666 & ~UMASK)


def publish(temporary: Path, path: Path) -> None:
    """Make a file, or a folder with all in it, appear at `path` in one step, after all of it is on disk."""
    for part in (*temporary.rglob("*"), temporary):
        if part.is_symlink():
            continue
        if part.is_file():
            _follow_umask(part)
        sync(part)
    os.replace(temporary, path)
    sync(path.parent)


def write_whole(path: Path, write: Callable[[Path], object], durable: bool = True) -> None:
    """Let `write` fill a temporary file, then put it at `path`: a reader sees the old one or the new one.

    Without `durable` a power cut may lose it: for the many small files that can be made again, each of
    which takes longer to force to disk than to make.
    """
    temporary = temporary_for(path)
    try:
        with naming(path):
            write(temporary)
            publish(temporary, path) if durable else os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the disk name `path`, not what will become it; Rust's libraries say its number only in words."""
    try:
        yield
    except OSError as error:
        temporary = str(path.with_name(f".{path.name}."))
        if error.errno and str(error.filename or temporary).startswith(temporary):
            error.filename = str(path)
        raise
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def append_to(path: Path) -> TextIO:
    """A file to add lines to, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
