"""The loader: from the shards of prepared datasets to batches, in the order that order.py gives.

A shard is mapped, its index turned into addresses, and a batch gathered from them into a reused
buffer with one call per member, or one per row where rows are large or vary in length. No tar is
parsed.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.schema import Manifest
from models.config import InputError
from models.networks import NetworkConfig
from pipeline.data.batch import Assembler, Batch, EmptyCaption, load_empty_caption
from pipeline.data.cache import ShardCache
from pipeline.data.config import DataConfig, choose_partitions, is_remote
from pipeline.data.datasets import Bucket, Mixture, compute
from pipeline.data.eras import Eras
from pipeline.data.order import Order, Part, Plan, Window
from pipeline.data.shards import Rows, ShardStore, Skipped
from pipeline.distributed import own_device, say

BLOCK = 256
"""Samples of a partition whose addresses are put together at once."""


class PartitionReader:
    """The samples of one partition of a bucket, in order; the next window is fetched ahead."""

    def __init__(self, store: ShardStore, windows: Iterator[Window]):
        self.store, self.windows = store, windows
        self.rows: Rows | None = None
        self.coming = self._request()

    def _request(self) -> Window:
        window = next(self.windows)
        self.store.request(window)
        return window

    def take(self, count: int) -> list[Rows]:
        taken = []
        while count:
            if not self.rows:
                window, self.coming = self.coming, self._request()
                self.rows = self.store.read(window)
            taken.append(self.rows[:count])
            self.rows = self.rows[count:]
            count -= len(taken[-1])
        return taken


class BucketReader:
    """This rank's share of a bucket's batches from `place` on: epoch, bucket, batch number."""

    def __init__(self, era: "Era", partitions: range, place: tuple[int, int, int]):
        epoch, bucket, number = place
        order, plan = era.order.buckets[bucket], era.plan
        self.share = plan.global_batch // plan.partitions
        self.readers = [
            PartitionReader(
                era.store, order.windows(p, number * self.share, epoch - plan.first_epoch)
            )
            for p in partitions
        ]
        self.epoch_batches = order.batches(1)
        self.batches: deque[Rows] = deque()

    def next(self) -> Rows:
        if not self.batches:
            self._fill(max(1, min(BLOCK // self.share, self.epoch_batches)))
        return self.batches.popleft()

    def _fill(self, count: int) -> None:
        """Read `count` batches at once, so that a partition costs little time per batch."""
        rows = Rows.join([r for reader in self.readers for r in reader.take(count * self.share)])
        # (..., partitions * count * share) -> (count, ..., partitions * share)
        parts = rows.table.reshape(-1, len(self.readers), count, self.share).transpose(2, 0, 1, 3)
        for table in parts.reshape(count, len(rows.table), -1):
            self.batches.append(Rows(table, rows.texts, rows.low, rows.high, rows.shards))


@dataclass(frozen=True)
class Era:
    """The epochs from plan.first_epoch on that use the same shards."""

    mixture: Mixture
    plan: Plan
    order: Order
    store: ShardStore
    assemble: Assembler


class Loader:
    """Batches of one rank. The step is its whole state: `batches(step)` goes on from anywhere.

    A batch holds the rank's `global_batch / world_size` samples. Raises InputError where global
    batch, partitions and ranks do not divide each other.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        global_batch: int,
        seed: int,
        rank_of: tuple[int, int] = (0, 1),
        eras: Path | None = None,
        model: NetworkConfig | None = None,
    ):
        """`rank_of` is this rank's number and the number of ranks.

        `eras` is a folder that all ranks see, for class Eras. `model` is the network to be trained, for
        which batches hold noise and, if it aligns with them, vision features.
        """
        self.config, self.model = config, model
        rank, self.world_size = rank_of
        self._stop = threading.Event()
        partitions = choose_partitions(config.canonical_partitions, global_batch, self.world_size)
        self.plan = Plan(seed, global_batch, partitions, config.window_shards)
        self.partitions = range(rank, partitions, self.world_size)
        share = global_batch // partitions
        self.indices = torch.cat([p * share + torch.arange(share) for p in self.partitions])
        # Seconds that `batches` has made its caller wait.
        self.wait_s = 0.0
        self._threads: list[threading.Thread] = []
        self._cache_of = lru_cache(maxsize=None)(self._make_cache)
        self.skipped = Skipped()
        classes = model.num_classes if model else 0
        self.eras = Eras(eras, rank, self._stop, config, self._cache_of, classes)
        self._era = lru_cache(maxsize=2)(self._make_era)
        self.first = self._era(0)

    def _make_cache(self, path: str) -> ShardCache | None:
        """The cache of a URL; None of a local folder."""
        if not is_remote(path):
            return None
        if self.config.cache is None:
            raise InputError(f"{path} is remote: give data.cache.path and data.cache.max_gib")
        return ShardCache(path, self.config.cache, self._stop)

    def _make_era(self, number: int) -> Era:
        entry, mixture = self.eras.entries[number], self.eras.mixture(number)
        plan = replace(self.plan, first_epoch=entry["epoch"], first_step=entry["first_step"])
        return Era(
            mixture,
            plan,
            Order(mixture.buckets(), plan),
            ShardStore(mixture, self.config, self.skipped),
            Assembler(mixture, self.config, self.model),
        )

    @property
    def manifest(self) -> Manifest:
        return self.first.mixture.manifest

    @cached_property
    def empty_caption(self) -> EmptyCaption | None:
        return load_empty_caption(self.first.mixture.datasets[0], self.manifest)

    def era_at(self, step: int) -> Era:
        """The era of a step, as far as is known: a dataset may still grow."""
        return self._era(sum(entry["first_step"] <= step for entry in self.eras.entries) - 1)

    def era_of_epoch(self, epoch: int) -> Era:
        """The era of an epoch, as far as is known."""
        return self._era(sum(entry["epoch"] <= epoch for entry in self.eras.entries) - 1)

    def steps_per_epoch(self, epoch: int) -> int:
        order = self.era_of_epoch(epoch).order
        return order.first_step(epoch + 1) - order.first_step(epoch)

    def batches(self, start_step: int = 0, draws_step: int | None = None) -> Iterator[Batch]:
        """This rank's part of every global batch from `start_step` on, without end.

        The first one's noise is that of `draws_step`: `start_step`, unless the batch size has changed.
        """
        ahead = 0 if draws_step is None else draws_step - start_step
        produce = self._produce(start_step, ahead)
        if not self.config.prefetch:
            yield from self._timed(produce.__next__)
        ready: queue.Queue[Batch | Exception] = queue.Queue(self.config.prefetch)
        stop = threading.Event()
        arguments = produce, ready, lambda: stop.is_set() or self._stop.is_set()
        thread = threading.Thread(target=_read_ahead, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)
        try:
            yield from self._timed(lambda: self._await(ready))
        finally:
            stop.set()

    def _await(self, ready: "queue.Queue[Batch | Exception]") -> Batch | Exception:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                return ready.get(timeout=0.1)
        raise RuntimeError("the loader is closed")

    def _timed(self, get: Callable[[], Batch | Exception]) -> Iterator[Batch]:
        while True:
            begin = time.perf_counter()
            batch = get()
            self.wait_s += time.perf_counter() - begin
            if isinstance(batch, Exception):
                raise batch
            yield batch
            # Its buffer is to be free while the next one is awaited.
            del batch

    def _produce(self, step: int, ahead: int) -> Iterator[Batch]:
        if self.eras.settle(0, 0):
            self._era.cache_clear()
            self.first = self._era(0)
        era, readers = self.era_at(step), {}
        epoch = era.order.epoch_of(step)
        while True:
            if step == era.order.first_step(epoch):
                self.eras.settle(epoch, step)
            if era is not (latest := self.era_at(step)):
                local, batch = epoch - era.plan.first_epoch, era.plan.global_batch
                left = sum(bucket.drawn(local) % batch for bucket in era.order.buckets)
                notes = [*latest.mixture.notes, f"{left} samples carried over wait their turn"]
                say(f"epoch {epoch}: other data; {'; '.join(notes)}")
                era, readers = latest, {}
            first, sequence = era.order.first_step(epoch), era.order.sequence(epoch)
            for bucket in sequence[step - first :].tolist():
                if bucket not in readers:
                    readers[bucket] = BucketReader(era, self.partitions, era.order.locate(step))
                key = era.order.buckets[bucket].key
                batch = era.assemble(readers[bucket].next(), key, self.indices, step, epoch)
                batch.draw(self.plan.seed, step + ahead)
                yield batch
                # Its buffer is to be free while the next one is put together.
                del batch
                step += 1
            epoch += 1

    def heldout_batches(self, size: int) -> list[Batch]:
        """The same `size` held-out samples at each call, or all there are, a batch per bucket.

        Every bucket of every dataset gives its share; none are there where nothing is held out.
        """
        newest = self._era(len(self.eras.entries) - 1)
        # A growth is not to move figures; what is left out by now is not measured.
        known = self.first.mixture.table["sha256"]
        first = compute.is_in(newest.mixture.table["sha256"], value_set=known).to_numpy()
        # No step draws noise for them.
        assemble = Assembler(newest.mixture, self.config)
        buckets = newest.mixture.buckets(heldout=True, among=first)
        parts = [(bucket, part) for bucket, found in buckets.items() for part in found]
        ends = np.cumsum([0, *(part.total for _, part in parts)])
        shares = np.diff(ends * min(size, int(ends[-1])) // max(1, int(ends[-1])))
        rows: dict[Bucket, list[Rows]] = {}
        for (bucket, part), share in zip(parts, shares.tolist(), strict=True):
            rows.setdefault(bucket, []).extend(first_rows(newest.store, part, share))
        batches, count = list[Batch](), 0
        for bucket, found in rows.items():
            if found:
                indices = torch.arange(count, count := count + sum(map(len, found)))
                batches.append(assemble(Rows.join(found), bucket, indices, 0, 0))
        return batches

    def close(self) -> None:
        """Stop reading ahead; a caller that still waits for a batch gets a RuntimeError."""
        self._stop.set()
        for thread in self._threads:
            thread.join()


def first_rows(store: ShardStore, part: Part, count: int) -> Iterator[Rows]:
    """The first `count` samples of a part's shards."""
    for number, size in zip(part.shards.tolist(), part.sizes.tolist(), strict=True):
        if count > 0:
            yield store.rows(number, np.arange(min(size, count)))
            count -= size


def _read_ahead(
    produce: Iterator[Batch], ready: "queue.Queue[Any]", stopped: Callable[[], bool]
) -> None:
    """Put batches, or what went wrong, into the queue until told to stop."""
    # For this thread alone: its copies are bound by memory, and the trainer needs the cores.
    torch.set_num_threads(1)
    # It pins memory, and waits for copies.
    own_device()
    while not stopped():
        try:
            item: Any = next(produce)
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits for the batch
            item = error
        while not stopped():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                break
        if isinstance(item, Exception):
            return
        # Its buffer is to be free while the next one is read.
        del item
