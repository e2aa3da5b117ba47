"""Shards in memory: fetched, checked and mapped, and how batches are gathered from them."""

import logging
import math
import mmap
import os
import resource
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO

import numpy as np
import torch
from torch import Tensor

from data_prep.schema import index_path
from models.files import file_sha256
from pipeline.data.cache import CacheFullError, ShardError
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset, Mixture
from pipeline.data.order import Segments, Window

log = logging.getLogger(__name__)

FETCH_THREADS = 4

LARGE_ROW = 32 << 10
"""Bytes of a row from which on a copy of its own is faster."""

KEEP_BYTES = 64 << 30
"""Local shards that stay mapped, at a cost of 128 MiB of page tables."""


Mapped = tuple[mmap.mmap, np.ndarray, np.ndarray]
"""A file with some of a shard's members; address and rows of each, int64 (members, samples)."""


def map_members(
    where: str, file: IO[bytes], index: np.ndarray, rows: list[tuple[int, int]]
) -> Mapped:
    """Map a file; raises ShardError where its index does not fit.

    `rows`: each member's bytes per row, and the most rows of a text (0: no text).
    """
    # The mapping keeps the file's lock.
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin, size = np.moveaxis(index, -1, 0)  # (samples, members)
    unit, most = np.array(rows).T
    fits = np.where(most, (size % unit == 0) & (size <= most * unit), size == unit)
    inside = (begin >= 0) & (size >= 0) & (begin <= len(mapped) - size)
    if not (fits & inside).all():
        raise ShardError(f"{where}: its index does not fit the manifest's members or the file")
    address = np.frombuffer(mapped, np.uint8).__array_interface__["data"][0]
    return mapped, (begin + address).T, (size // unit).T


class Shard:
    """A shard's mapped files, and the `table` of its samples as Rows has it."""

    def __init__(self, maps: list[mmap.mmap], table: np.ndarray, texts: int):
        self.map, self.maps, self.bytes = maps[0], maps, sum(map(len, maps))
        self.table, self.texts = table, texts
        self.low, self.high = int(table[1 + texts :].min()), int(table[1 + texts :].max())


def parse_index(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """The array in an index file, which must be int64 of this shape; raises ValueError.

    np.load would parse the header with ast, which now and then fails in Python 3.11 when several
    threads do so at once.
    """
    begin = 10 + int.from_bytes(data[8:10], "little")
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}"
    if data[10:begin].rstrip() != header.encode():
        raise ValueError(f"index got {data[10:begin].rstrip()!r}, expected {header}")
    return np.frombuffer(data, np.int64, offset=begin).reshape(shape)


@dataclass(slots=True)
class Rows:
    """n samples in memory; all addresses lie in low..high, and `shards` keeps the files mapped.

    A column of `table` holds a sample's number, the number of tokens of each text, and each
    member's address; one array, so that few calls move all of it.
    """

    table: np.ndarray  # int64 (1 + texts + members, n)
    texts: int
    low: int
    high: int
    shards: list[Shard]

    @property
    def ids(self) -> np.ndarray:
        return self.table[0]

    @property
    def tokens(self) -> np.ndarray:
        return self.table[1 : 1 + self.texts]

    def address(self, member: int) -> np.ndarray:
        return self.table[1 + self.texts + member]

    def __len__(self) -> int:
        return self.table.shape[1]

    def __getitem__(self, part: slice) -> "Rows":
        return Rows(self.table[:, part], self.texts, self.low, self.high, self.shards)

    def take(self, chosen: np.ndarray) -> "Rows":
        return Rows(self.table.take(chosen, axis=1), self.texts, self.low, self.high, self.shards)

    @staticmethod
    def join(rows: "list[Rows]") -> "Rows":
        if len(rows) == 1:
            return rows[0]
        return Rows(
            np.concatenate([r.table for r in rows], axis=1),
            rows[0].texts,
            min(r.low for r in rows),
            max(r.high for r in rows),
            [shard for r in rows for shard in r.shards],
        )


@dataclass
class Skipped:
    """Skipped shards, each with the reason, and how many samples others replaced."""

    shards: dict[str, str] = field(default_factory=dict)
    samples: int = 0


class ShardStore:
    """Opens shards: threads fetch and check them ahead; they stay mapped while there is room."""

    def __init__(self, mixture: Mixture, config: DataConfig, skipped: Skipped):
        self.mixture, self.config, self.skipped = mixture, config, skipped
        self.verified = np.zeros(len(mixture.sizes), bool)
        self.bad: dict[int, ShardError] = {}
        self.opened: weakref.WeakValueDictionary[int, Shard] = weakref.WeakValueDictionary()
        self.kept: OrderedDict[int, Shard] = OrderedDict()
        # Each folder of a stack has a file of its own.
        folders = max(len(dataset.folders) for dataset in mixture.datasets)
        self.keep_files, self.keep_bytes = raise_file_limit() // 4 // folders, KEEP_BYTES
        self.coming: dict[int, Future[Shard]] = {}
        self.threads = ThreadPoolExecutor(FETCH_THREADS, "shards")
        self.lock = threading.Lock()

    def request(self, window: Window) -> None:
        """Begin to fetch a window's shards."""
        with self.lock:
            for number in window.segments.shard.tolist():
                if number not in self.opened and number not in self.bad:
                    self._come(number)

    def _come(self, number: int) -> "Future[Shard]":
        if number not in self.coming:
            self.coming[number] = self.threads.submit(self._fetch, number)
        return self.coming[number]

    def open(self, number: int) -> Shard:
        """The mapped shard; raises ShardError, the same one at every call."""
        with self.lock:
            if number in self.bad:
                raise self.bad[number]
            shard = self.opened.get(number)
            coming = None if shard else self._come(number)
        if coming is not None:
            try:
                shard = coming.result()
            except ShardError as error:
                self.bad[number] = error
                raise
        assert shard is not None
        with self.lock:
            self.coming.pop(number, None)
            self.opened[number] = shard
            # A shard of the cache is let go: its lock would keep the cache from evicting it.
            if self.mixture.dataset_of(number).is_local:
                self._keep(number, shard)
        return shard

    def _keep(self, number: int, shard: Shard) -> None:
        """Keep the shards used last mapped: mapping a file again costs as much as copying it."""
        if number not in self.kept:
            self.keep_bytes -= shard.bytes
        self.kept[number] = shard
        self.kept.move_to_end(number)
        while self.keep_bytes < 0 or len(self.kept) > self.keep_files:
            self.keep_bytes += self.kept.popitem(last=False)[1].bytes

    def _fetch(self, number: int) -> Shard:
        mixture, dataset = self.mixture, self.mixture.dataset_of(number)
        check = self.config.verify == "first_use" and not self.verified[number]
        kept, rows = dataset.kept(mixture.row_of(number)), self._rows(number)
        maps, address, lengths = list[mmap.mmap](), {}, {}
        for folder in dataset.folders:
            names = [name for name in rows if dataset.folder_of(name) is folder]
            if names:
                found = self._piece(number, folder, kept, {n: rows[n] for n in names}, check)
                maps.append(found[0])
                address |= zip(names, found[1], strict=True)
                lengths |= zip(names, found[2], strict=True)
        texts = [lengths[name] for name, (_, most) in rows.items() if most]
        ids = int(mixture.first_id[number]) + np.arange(len(kept))
        self.verified[number] |= check
        return Shard(maps, np.stack([ids, *texts, *(address[name] for name in rows)]), len(texts))

    def _piece(
        self,
        number: int,
        folder: Dataset,
        kept: np.ndarray,
        rows: dict[str, tuple[int, int]],
        check: bool,
    ) -> Mapped:
        """Some members of a shard's samples, whose rows of the index are `kept`, from one folder."""
        facts = folder.table.slice(self.mixture.row_of(number), 1).to_pylist()[0]
        name, size = facts["path"], facts["bytes"]
        where, members = f"{folder.source.path}/{name}", list(folder.manifest.members)
        shape = facts["num_samples"], len(members), 2
        most = 128 + math.prod(shape) * 8
        try:
            with _open(folder, index_path(name), facts["index_sha256"], most, True) as file:
                file.seek(0)
                index = parse_index(file.read(), shape)[kept]
            with _open(folder, name, facts["sha256"], size, check) as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    raise ShardError(f"{where}: got {found} bytes, expected {size}")
                columns = [members.index(member) for member in rows]
                return map_members(where, file, index[:, columns], list(rows.values()))
        except CacheFullError:
            raise
        except (OSError, ValueError) as error:
            raise ShardError(f"{where}: cannot be used: {error}") from error

    def _rows(self, number: int) -> dict[str, tuple[int, int]]:
        """What `map_members` checks an index against, by member."""
        manifest, rows = self.mixture.manifest, {}
        for name, shape in self.mixture.shapes(self.mixture.bucket(number)).items():
            role = manifest.text.roles.get(name)
            unit = np.dtype(manifest.members[name].stored).itemsize * math.prod(shape)
            rows[name] = unit, role.view.max_length if role else 0
        return rows

    def read(self, window: Window) -> Rows:
        """A window's samples, shuffled.

        Where unreadable shards are to be skipped, samples of the window's other shards take the places of
        theirs, so that the order of all others, and the number of samples, stay what they were.
        """
        rows, order, segments = [], window.shuffle(), window.segments
        for number, chosen in zip(segments.shard.tolist(), window.rows(), strict=True):
            try:
                rows.append(self.rows(number, chosen))
            except ShardError as error:
                if self.config.on_corrupt == "fail" or isinstance(error, CacheFullError):
                    raise
                self._count(number, error)
        if len(rows) < len(segments.shard):
            order = self._replaced(segments)[order]
        return Rows.join(rows).take(order)

    def _replaced(self, segments: Segments) -> np.ndarray:
        """int64 (n,): for each sample of a window, the readable one that takes its place."""
        readable = np.array([number not in self.bad for number in segments.shard.tolist()])
        if not readable.any():
            names = {str(self.bad[n]) for n in segments.shard.tolist()}
            raise ShardError(f"every shard of a window is unreadable: {'; '.join(sorted(names))}")
        kept = np.repeat(readable, segments.stop - segments.start)
        places = np.cumsum(kept) - 1
        lost = np.flatnonzero(~kept)
        places[lost] = np.arange(len(lost)) % (len(kept) - len(lost))
        self.skipped.samples += len(lost)
        return places

    def rows(self, number: int, chosen: np.ndarray) -> Rows:
        """Some samples of a shard; raises ShardError."""
        shard = self.open(number)
        table = shard.table.take(chosen, axis=1)
        return Rows(table, shard.texts, shard.low, shard.high, [shard])

    def _count(self, number: int, error: ShardError) -> None:
        name = self.mixture.text("path", number)
        if name not in self.skipped.shards:
            log.warning("skipped: %s", error)
        self.skipped.shards[name] = str(error)


def _open(folder: Dataset, name: str, sha256: str, size: int, check: bool) -> IO[bytes]:
    """A file of a folder, hashed where it is to be checked; raises ShardError where it is another one."""
    cache = folder.cache
    file, checked = (
        cache.open(name, sha256, size) if cache else ((folder.home / name).open("rb"), False)
    )
    if not check:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    elif not checked and (found := file_sha256(file)) != sha256:
        file.close()
        if cache is None:
            raise ShardError(f"{name}: sha256 got {found}, expected {sha256}")
        cache.forget(name)
        file, _ = cache.open(name, sha256, size)
    return file


def raise_file_limit() -> int:
    """Raise this process's limit of open files as far as possible, up to 65,536."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


class Memory:
    """A view of memory through numpy's array interface: rows of bytes, one at every address."""

    def __init__(self, base: int, length: int, row_bytes: int):
        self.__array_interface__ = {
            "data": (base, False),
            "shape": (length, row_bytes),
            "strides": (1, 1),
            "typestr": "|u1",
            "version": 3,
        }


@lru_cache(maxsize=256)
def _rows_at(low: int, high: int, row_bytes: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """A row at every address, uint8 (n, row bytes); their bytes; a place in each page of a row."""
    rows = torch.from_numpy(np.asarray(Memory(low, high - low + 1, row_bytes)))
    memory = np.asarray(Memory(low, 1, high - low + row_bytes))[0]
    return rows, memory, np.append(np.arange(0, row_bytes, mmap.PAGESIZE), row_bytes - 1)


def gather(address: np.ndarray, low: int, high: int, out: Tensor) -> None:
    """Copy from each address, int64 (n,) in low..high, into a row of `out`, uint8 (n, row bytes).

    The caller keeps the memory mapped and has checked the bounds.
    """
    if out.shape[1] >= LARGE_ROW:
        gather_ragged(address, np.full(len(address), out.shape[1]), out)
        return
    (rows, memory, places), begins = _rows_at(low, high, out.shape[1]), address - low
    if out.shape[1] >= mmap.PAGESIZE:
        # Read a byte of every page first: the misses overlap, while a copy would wait for each.
        memory.take(begins[:, None] + places)
    torch.index_select(rows, 0, torch.from_numpy(begins), out=out)


def gather_ragged(address: np.ndarray, sizes: np.ndarray, out: Tensor) -> None:
    """Copy rows of various sizes, int64 (n,) bytes; the rest of each row of `out` becomes zero.

    A call per row costs little where rows are large, and memcpy does not read `out` first.
    """
    low = int(address.min())
    memory = np.asarray(Memory(low, 1, int((address + sizes).max()) - low))[0]
    begins = address - low
    for row, begin, size in zip(out.numpy(), begins.tolist(), sizes.tolist(), strict=True):
        row[:size] = memory[begin : begin + size]
        if size < len(row):
            row[size:] = 0
