"""Remote shards on local disk: a bounded cache that any number of processes of a node share.

Whoever uses a cached file holds a shared lock on it (flock, on the open descriptor), whoever writes one an
exclusive lock, so whatever can be locked may be deleted for room, and a killed process leaves no lock.
"""

import errno
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import fsspec

from models.config import InputError
from pipeline.data.config import CacheConfig

Result = TypeVar("Result")
log = logging.getLogger(__name__)

CHUNK = 8 << 20
GIB = 1 << 30
SUFFIXES = (".tar", ".npy", ".part")  # what counts, and may be evicted


class ShardError(OSError):
    """A shard cannot be read, or is not what the shard table says."""


class CacheFullError(ShardError):
    """No room for a shard: never skipped, for the shards after it would not fit either."""


class ShardCache:
    """The files of one remote dataset; names are relative to it. `stop` ends the waiting between attempts."""

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
        """A file beside the shards as it is now, outside the bound; FileNotFoundError if there is none."""
        path = self.folder / name
        temporary = path.with_name(f"{name}.{os.getpid()}")
        self._try(name, lambda: self._copy(name, temporary.open("wb")))
        return temporary.replace(path)

    def open(self, name: str, sha256: str, size: int) -> tuple[IO[bytes], bool]:
        """A file that stays in the cache while it is open, and whether it was just fetched and checked.

        Raises ShardError when every attempt has failed.
        """
        path = self.folder / name
        if file := _open_shared(path):
            return file, False
        return self._try(name, lambda: self._download(name, path, sha256, size)), True

    def forget(self, name: str) -> None:
        """Drop a file that turned out to be damaged."""
        (self.folder / name).unlink(missing_ok=True)

    def _try(self, name: str, work: Callable[[], Result]) -> Result:
        attempt = 1
        while True:
            try:
                return work()
            except (FileNotFoundError, CacheFullError):
                raise
            except Exception as error:
                log.warning("%s/%s: attempt %d: %r", self.url, name, attempt, error)
                if attempt == self.config.attempts or self.stop.wait(min(2 ** (attempt - 1), 30)):
                    where = f"{self.url}/{name}"
                    raise ShardError(f"{where}: {attempt} attempts failed: {error!r}") from error
            attempt += 1

    def _download(self, name: str, path: Path, sha256: str, size: int) -> IO[bytes]:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            file = self._reserve(temporary, name, size)
            found = self._copy(name, file)
            if found != sha256:
                raise ShardError(f"sha256 got {found}, expected {sha256}")
            with self._locked():  # or who makes room may count it under neither name
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
        """A new file of `size` bytes, locked, after deleting as many least recently used ones as it needs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._make_room(size, name)
            file = path.open("w+b")
            fcntl.flock(file, fcntl.LOCK_EX)
            os.posix_fallocate(file.fileno(), 0, size)
        return file

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.top / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int, name: str) -> None:
        limit = int(self.config.max_gib * GIB)
        files = [p for p in self.top.rglob("*") if p.suffix in SUFFIXES]
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
    try:
        return path.stat()
    except FileNotFoundError:  # its download failed, or it was damaged
        return None


def _open_shared(path: Path) -> IO[bytes] | None:
    """The file, locked shared and marked as used now; None if it is not there."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if os.fstat(file.fileno()).st_nlink == 0:  # evicted before it was locked
        file.close()
        return None
    os.utime(path)
    return file


def _unlink_unused(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return False
    except BlockingIOError:  # in use
        return False
    return True
