"""Shards on disk: the same bytes for the same samples, and whole or not there at all.

Each has a commit, a record that is written when all else of it is on disk.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.schema import WORK, index_path, proof_path, work_folder
from data_prep.storage import find_files, publish, temporary_for, write_atomic
from models.files import file_sha256

SEALED = "sealed.jsonl"
# Threads that read commits, each of which costs an object store's round trip.
READERS = 16


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text))


def write_table(path: Path, table: pa.Table) -> None:
    write_atomic(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


@contextmanager
def new_table(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """A Parquet file that appears when it is whole; gives what writes a piece of it, a row group each."""
    temporary = temporary_for(path)
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:

            def write(table: pa.Table) -> None:
                if len(table):
                    writer.write_table(table.combine_chunks(), row_group_size=len(table))

            yield write
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array, order="C"), allow_pickle=False)
    return buffer.getvalue()


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    with path.open("rb") as file:
        return pq.read_table(file, schema=schema)


class ShardWriter:
    """A shard being written under a temporary name; `commit` makes it and its index appear.

    The tar is plain WebDataset in USTAR with times and owners zero. Two writers of one shard write the
    same bytes, so it does not matter whose commit comes last.
    """

    def __init__(self, dataset: Path, path: str, members: list[str]):
        self._target, self._members = dataset / path, members
        self._temporary = temporary_for(self._target)
        self._tar = tarfile.TarFile(self._temporary, "w", format=tarfile.USTAR_FORMAT)
        self._rows = dict[str, list[list[tuple[int, int]]]]()

    def add(
        self,
        key: str,
        arrays: dict[str, np.ndarray],
        facts: dict[str, Any],
        variants: list[dict[str, str]] | None = None,
    ) -> None:
        """Append a picture: KEY.NAME.npy of every array, KEY.json, and a row of the index per variant.

        A variant says which array stands for a member, where it is not the one of the member's own name.
        """
        places = {}
        for name, array in arrays.items():
            end = self._append(f"{key}.{name}.npy", npy_bytes(array))
            places[name] = (end - array.nbytes, array.nbytes)
        text = json.dumps(facts, ensure_ascii=False, sort_keys=True)
        self._append(f"{key}.json", text.encode())
        self._rows[key] = [
            [places[variant.get(name, name)] for name in self._members]
            for variant in variants or [{}]
        ]

    def _append(self, name: str, data: bytes) -> int:
        """Offset just past the data."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        return self._tar.offset - -len(data) % tarfile.BLOCKSIZE

    def commit(self, proof: bytes, keys: Sequence[str] = (), each: int = 0) -> dict[str, Any]:
        """Make shard, index and proof appear, durably; returns num_samples, bytes, hashes and sizes.

        A shard without samples leaves no file. Of a layer all `keys` have `each` rows in the index, of which those
        of pictures that were not added lead nowhere.
        """
        empty = [[(0, 0)] * len(self._members)] * each
        rows = [row for key in keys or self._rows for row in self._rows.get(key, empty)]
        if not rows:
            return {"num_samples": 0, "bytes": 0}
        self._tar.close()
        num_bytes, sha256 = self._temporary.stat().st_size, file_sha256(self._temporary)
        index = np.array(rows, dtype=np.int64).reshape(-1, len(self._members), 2)
        beside = {index_path: npy_bytes(index), proof_path: proof}
        sizes = {self._target.name: num_bytes}
        for path_of, data in beside.items():
            path = self._target.parent / path_of(self._target.name)
            write_atomic(path, lambda temporary, data=data: temporary.write_bytes(data))
            sizes[path.name] = len(data)
        publish(self._temporary, self._target)
        return {
            "num_samples": len(rows),
            "bytes": num_bytes,
            "sha256": sha256,
            "index_sha256": hashlib.sha256(beside[index_path]).hexdigest(),
            "proof_sha256": hashlib.sha256(proof).hexdigest(),
            "sizes": sizes,
        }

    def abandon(self) -> None:
        """Leave nothing behind."""
        # Closing may fail once more on a full disk.
        self._temporary.unlink(missing_ok=True)
        if not self._tar.closed:  # pyright: ignore[reportAttributeAccessIssue]
            self._tar.fileobj.close()


def work_of(dataset: Path, generation: int) -> Path:
    return dataset / work_folder(generation)


def commit_path(dataset: Path, shard: str) -> Path:
    """The record that says that a shard is whole: written last."""
    return dataset / WORK / shard.replace("shards/", "commits/").replace(".tar", ".json")


def read_commit(dataset: Path, shard: str) -> dict[str, Any] | None:
    """The shard's commit record, or None where the shard must be made (again)."""
    try:
        commit = json.loads(commit_path(dataset, shard).read_text())
        folder = (dataset / shard).parent
        sizes = commit.get("sizes", {})
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except FileNotFoundError:
        return None
    return commit if whole else None


def read_commits(dataset: Path, shards: list[str]) -> list[dict[str, Any] | None]:
    """The commit of every shard, None where it is to be made."""
    folder = dataset / WORK / "commits"
    there = {str(folder / name) for name in find_files(folder)}

    def read(shard: str) -> dict[str, Any] | None:
        is_there = str(commit_path(dataset, shard)) in there
        return read_commit(dataset, shard) if is_there else None

    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(read, shards))


def seal(work: Path, commits: list[dict[str, Any]]) -> None:
    """Keep a finished generation's commits in one file, in the order of its plan: nothing is added to it."""
    write_text(work / SEALED, "".join(f"{json.dumps(commit)}\n" for commit in commits))


def sealed_commits(work: Path) -> list[dict[str, Any]] | None:
    """The commits of a finished generation; None where it has not finished."""
    path = work / SEALED
    if not path.is_file():
        return None
    with path.open() as lines:
        return [json.loads(line) for line in lines]
