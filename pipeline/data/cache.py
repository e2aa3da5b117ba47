"""Remote shards on local disk: a bounded cache that any number of processes on a node share.

A process that uses a cached file holds a shared lock on it (flock, on the open descriptor), one
that writes it an exclusive lock. So whatever can be locked may be deleted for room, and a killed
process leaves no lock.
"""

import errno
import fcntl
import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import fsspec

from models.config import InputError
from models.files import ACCESS
from pipeline.data.config import CacheConfig

Result = TypeVar("Result")
log = logging.getLogger(__name__)

CHUNK = 8 << 20
GIB = 1 << 30

SUFFIXES = (".tar", ".npy", ".part")
"""Files that count towards the bound and may be evicted."""


class ShardError(InputError, OSError):
    """A shard that cannot be read, or is not what the shard table says."""


class CacheFullError(ShardError):
    """No room for a shard: never skipped, because the next shards would not fit either."""


class ShardCache:
    """The files of one remote dataset. `stop` ends the waits between attempts."""

    def __init__(self, url: str, config: CacheConfig, stop: threading.Event):
        self.url, self.config, self.stop = url.rstrip("/"), config, stop
        self.top = Path(config.path)
        self.folder = self.top / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        try:
            self.filesystem, self.root = fsspec.url_to_fs(self.url)
            self.folder.mkdir(parents=True, exist_ok=True)
        except (ImportError, ValueError, OSError) as error:
            raise InputError(f"{url}, cached in {self.top}: {error}") from error

    def refresh(self, name: str) -> Path:
        """Fetch a file beside the shards anew, outside the bound; may raise FileNotFoundError."""
        path = self.folder / name
        temporary = path.with_name(f"{name}.{os.getpid()}")
        self._try(name, lambda: self._copy(name, temporary.open("wb")))
        return temporary.replace(path)

    def open(self, name: str, sha256: str, size: int) -> tuple[IO[bytes], bool]:
        """A file, which stays cached while it is open, and whether it was just fetched and checked.

        Raises ShardError when every attempt has failed.
        """
        path = self.folder / name
        if file := _open_shared(path):
            return file, False
        return self._try(name, lambda: self._download(name, path, sha256, size)), True

    def forget(self, name: str) -> None:
        """Drop a file that is damaged."""
        (self.folder / name).unlink(missing_ok=True)

    def _try(self, name: str, work: Callable[[], Result]) -> Result:
        for attempt in itertools.count(1):
            try:
                return work()
            except (FileNotFoundError, CacheFullError):
                raise
            except Exception as error:
                where = f"{self.url}/{name}"
                log.warning("%s: attempt %d: %r", where, attempt, error)
                if attempt == self.config.attempts or self.stop.wait(min(2 ** (attempt - 1), 30)):
                    remedy = "" if isinstance(error, ShardError) else f". Remedy: {ACCESS}"
                    failed = f"{where}: {attempt} attempts failed: {error!r}{remedy}"
                    raise ShardError(failed) from error
        raise AssertionError

    def _download(self, name: str, path: Path, sha256: str, size: int) -> IO[bytes]:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            file = self._reserve(temporary, name, size)
            found = self._copy(name, file)
            if found != sha256:
                raise ShardError(f"sha256 got {found}, expected {sha256}")
            # Without the lock a process that makes room might see it under neither name.
            with self._locked():
                temporary.replace(path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise CacheFullError(f"{self.url}/{name}: cannot be cached: {error}") from error
            raise
        fcntl.flock(file, fcntl.LOCK_SH)
        return file

    def _copy(self, name: str, target: IO[bytes]) -> str:
        """Fill an open file; returns the sha256."""
        digest = hashlib.sha256()
        with self.filesystem.open(f"{self.root}/{name}", "rb") as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                target.write(chunk)
        target.flush()
        return digest.hexdigest()

    def _reserve(self, path: Path, name: str, size: int) -> IO[bytes]:
        """A new locked file of `size` bytes; the least recently used ones make room."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._make_room(size, name)
            file = path.open("w+b")
            fcntl.flock(file, fcntl.LOCK_EX)
            os.posix_fallocate(file.fileno(), 0, size)
        return file

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.top / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int, name: str) -> None:
        limit = int(self.config.max_gib * GIB)
        # A folder per dataset; all else below `top` is not ours.
        files = [p for p in self.top.glob(f"{'[0-9a-f]' * 16}/**/*") if p.suffix in SUFFIXES]
        stats = sorted((s.st_mtime_ns, s.st_size, p) for p in files if (s := _stat(p)))
        total = size + sum(length for _, length, _ in stats)
        for _, length, path in stats:
            if total <= limit:
                return
            if _unlink_unused(path):
                total -= length
        if total > limit:
            raise CacheFullError(
                f"{self.url}/{name}: no room in {self.top}: data.cache.max_gib got {self.config.max_gib:.6g}, "
                f"expected at least {total / GIB:.6g} for the shards now in use and this one. Remedy: raise "
                "it, or lower data.window_shards or data.canonical_partitions (which change the order)."
            )


def _stat(path: Path) -> os.stat_result | None:
    """None where the file is gone: its download failed, or it was damaged."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _open_shared(path: Path) -> IO[bytes] | None:
    """The file with a shared lock, marked as used now; None if it is not there."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if os.fstat(file.fileno()).st_nlink == 0:
        # It was evicted before it was locked.
        file.close()
        return None
    os.utime(path)
    return file


def _unlink_unused(path: Path) -> bool:
    """Delete a file unless it is gone or in use; whether it was deleted."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (FileNotFoundError, BlockingIOError):
        return False
    return True
