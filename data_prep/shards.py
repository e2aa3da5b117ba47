"""Shards on disk: the same bytes for the same samples, and whole or not there at all."""

import hashlib
import io
import json
import os
import tarfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.schema import index_path

WORK = "work"  # of the dataset: everything needed to resume


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it there whole, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text))


def write_table(path: Path, table: pa.Table) -> None:
    write_atomic(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """A shard being written under a temporary name; `commit` makes it and its index appear.

    The tar is plain WebDataset in USTAR with times and owners zero. Two writers of one shard write the
    same bytes, so it does not matter whose rename comes last.
    """

    def __init__(self, dataset: Path, path: str, members: list[str]):
        self._target, self._members = dataset / path, members
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._target.with_name(f".{self._target.name}.{uuid.uuid4().hex}.tmp")
        self._file = _HashingFile(self._temporary)
        self._tar = tarfile.TarFile(
            fileobj=self._file,  # pyright: ignore[reportArgumentType]
            mode="w",
            format=tarfile.USTAR_FORMAT,
        )
        self._index: list[list[tuple[int, int]]] = []

    def add(self, key: str, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        """Append a sample: every member's array, and KEY.json."""
        places = []
        for name in self._members:
            array = arrays[name]
            end = self._append(f"{key}.{name}.npy", npy_bytes(array))
            places.append((end - array.nbytes, array.nbytes))
        text = json.dumps(facts, ensure_ascii=False, sort_keys=True)
        self._append(f"{key}.json", text.encode())
        self._index.append(places)

    def _append(self, name: str, data: bytes) -> int:
        """Offset just past the data."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        padding = -len(data) % tarfile.BLOCKSIZE
        return self._tar.offset - padding

    def commit(self) -> dict[str, Any]:
        """Make shard and index appear, durably; returns num_samples, bytes and hashes.

        A shard without samples leaves no file.
        """
        if not self._index:
            return {"num_samples": 0, "bytes": 0, "sha256": "", "index_sha256": ""}
        self._tar.close()
        self._file.close()
        index = np.array(self._index, dtype=np.int64).reshape(-1, len(self._members), 2)
        index_data = npy_bytes(index)
        write_atomic(
            self._target.parent / index_path(self._target.name),
            lambda path: path.write_bytes(index_data),
        )
        os.replace(self._temporary, self._target)
        _sync_folder(self._target.parent)
        return {
            "num_samples": len(self._index),
            "bytes": self._file.num_bytes,
            "sha256": self._file.sha256.hexdigest(),
            "index_sha256": hashlib.sha256(index_data).hexdigest(),
        }

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._file.close(sync=False)
        self._temporary.unlink(missing_ok=True)


class _HashingFile:
    """A file for tarfile to write to that knows its hash at the end."""

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=1 << 20)
        self.sha256, self.num_bytes = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.num_bytes

    def close(self, sync: bool = True) -> None:
        if sync and not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
