"""The loader: a prepared dataset's shards to batches. The order is order.py's; this module reads.

A shard is mapped, its index turned into addresses, and a batch gathered from them into a reused buffer, by
one call per member, or a call per row where rows are large or of various lengths. No tar is parsed.
"""

import contextlib
import logging
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
from pipeline.data.batch import Assembler, Batch, EmptyCaption, load_empty_caption
from pipeline.data.cache import ShardCache
from pipeline.data.config import DataConfig, is_remote
from pipeline.data.datasets import Record, Snapshot, check_fits, read_dataset
from pipeline.data.order import Order, Plan, Window, choose_partitions
from pipeline.data.shards import Rows, ShardStore, Skipped

__all__ = ["Batch", "DataConfig", "EmptyCaption", "Loader", "check_fits", "load_empty_caption"]

log = logging.getLogger(__name__)

BLOCK = 256  # samples of a partition whose addresses are put together at once


class PartitionReader:
    """The samples of one partition of a bucket, one after another; its next window is on the way."""

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
    """This rank's share of a bucket's batches, from one place on: (epoch, bucket, batch number)."""

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
        """The rows of the next `count` batches at once, so that a partition costs little a batch."""
        rows = Rows.join([r for reader in self.readers for r in reader.take(count * self.share)])
        # (..., partitions * count * share) -> (count, ..., partitions * share)
        parts = rows.table.reshape(-1, len(self.readers), count, self.share).transpose(2, 0, 1, 3)
        for table in parts.reshape(count, len(rows.table), -1):
            self.batches.append(Rows(table, rows.texts, rows.low, rows.high, rows.shards))


@dataclass(frozen=True)
class Era:
    """Epochs that use one snapshot, from plan.first_epoch on."""

    snapshot: Snapshot
    plan: Plan
    order: Order
    store: ShardStore
    assemble: Assembler


class Loader:
    """Batches of one rank. Its whole state is the step: `batches(step)` goes on from anywhere.

    A batch holds the rank's `global_batch / world_size` samples; Batch.split cuts it in micro-batches.
    `record` is a folder of the run that all ranks see, in which the run keeps which shards its epochs use;
    without it a resumed run takes the datasets as they are. Raises InputError where the batch, the
    partitions and the ranks do not divide.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
        record: Path | None = None,
        vision: bool = False,
    ):
        self.config, self.pin, self.world_size = config, pin, world_size
        self.vision = vision  # whether batches have it
        self._stop = threading.Event()
        if config.grow and record is None:
            raise ValueError("a dataset that grows needs a record")
        self.record = Record(record, rank, self._stop) if record else None
        partitions = choose_partitions(config.canonical_partitions, global_batch, world_size)
        self.plan = Plan(seed, global_batch, partitions, config.window_shards)
        self.partitions = range(rank, partitions, world_size)
        share = global_batch // partitions
        self.indices = torch.cat([p * share + torch.arange(share) for p in self.partitions])
        self.wait_s = 0.0  # that `batches` made its caller wait, in all
        self._threads: list[threading.Thread] = []
        self.caches = {
            name: ShardCache(source.path, config.cache, self._stop)
            for name, source in config.sources.items()
            if config.cache and is_remote(source.path)
        }
        self.skipped = Skipped()
        self.now = self._look()
        # First epoch, first step, and the datasets' identities, of every snapshot so far.
        self.eras: list[tuple[int, int, dict[str, str]]] = [(0, 0, self.now.identities())]
        for entry in self.record.entries() if self.record else []:
            self._follow(entry)
        self._era = lru_cache(maxsize=2)(self._make_era)
        self.first = self._era(0)

    def _look(self) -> Snapshot:
        """The datasets as they are now."""
        sources = self.config.sources.items()
        return Snapshot([read_dataset(name, s, self.caches.get(name)) for name, s in sources])

    def _make_era(self, number: int) -> "Era":
        epoch, step, identities = self.eras[number]
        if identities != self.now.identities():
            self.now = self._look()
        snapshot = self.record.load(identities, self.now) if self.record else self.now
        plan = replace(self.plan, first_epoch=epoch, first_step=step)
        store = ShardStore(snapshot, self.config.verify, self.config.on_corrupt, self.skipped)
        longest = self.config.pad_text == "longest"
        assemble = Assembler(snapshot, self.config.text_length, longest, self.pin, self.vision)
        return Era(snapshot, plan, Order(snapshot.buckets(), plan), store, assemble)

    def _follow(self, entry: dict[str, Any]) -> None:
        """Take in what the record says of an epoch: the first, or one later than all so far."""
        era = entry["epoch"], entry["first_step"], entry["datasets"]
        if entry["epoch"] == 0:
            self.eras = [era]
        elif entry["datasets"] != self.eras[-1][2]:
            self.eras.append(era)

    def _begin(self, epoch: int, step: int) -> None:
        """Settle which snapshot an epoch uses, as rank 0 finds or finds recorded."""
        if self.record is None or (epoch and not self.config.grow):
            return
        entry = self.record.entry(epoch)
        if entry is None and self.record.rank == 0:
            if epoch:
                self.now = self._look()
            entry = self.record.decide(epoch, step, self.now)
        entry = entry or self.record.wait(epoch)
        if epoch:
            self._follow(entry)
        elif entry["datasets"] != self.eras[0][2]:  # they grew before this rank looked
            self._follow(entry)
            self._era.cache_clear()
            self.first = self._era(0)

    @property
    def manifest(self) -> Manifest:
        return self.first.snapshot.manifest

    @cached_property
    def empty_caption(self) -> EmptyCaption | None:
        return load_empty_caption(self.first.snapshot.datasets[0].home, self.manifest)

    def era_at(self, step: int) -> "Era":
        """What a step uses, as far as is known."""
        return self._era(sum(first_step <= step for _, first_step, _ in self.eras) - 1)

    def epoch_of(self, step: int) -> int:
        return self.era_at(step).order.epoch_of(step)

    def era_of_epoch(self, epoch: int) -> "Era":
        return self._era(sum(first <= epoch for first, _, _ in self.eras) - 1)

    def steps_per_epoch(self, epoch: int) -> int:
        """As far as is known: a dataset may grow."""
        order = self.era_of_epoch(epoch).order
        return order.first_step(epoch + 1) - order.first_step(epoch)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This rank's part of every global batch from `start_step` on, for ever."""
        produce = self._produce(start_step)
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
            del batch  # so that its buffer is free while the next one is awaited

    def _produce(self, step: int) -> Iterator[Batch]:
        self._begin(0, 0)
        era, readers = self.era_at(step), {}
        epoch = era.order.epoch_of(step)
        while True:
            first, sequence = era.order.first_step(epoch), era.order.sequence(epoch)
            for bucket in sequence[step - first :].tolist():
                if bucket not in readers:
                    readers[bucket] = BucketReader(era, self.partitions, era.order.locate(step))
                key = era.order.buckets[bucket].key
                yield era.assemble(readers[bucket].next(), key, self.indices, step, epoch)
                step += 1
            epoch += 1
            self._begin(epoch, step)
            if era is not (latest := self.era_at(step)):
                left = sum(
                    b.drawn(epoch - era.plan.first_epoch) % b.plan.global_batch
                    for b in era.order.buckets
                )
                log.info(
                    "epoch %d: more data; %d samples carried over wait for their next turn",
                    epoch,
                    left,
                )
                era, readers = latest, {}

    def heldout_batch(self, size: int) -> Batch | None:
        """The same `size` held-out samples always (fewer if there are fewer), of the bucket that has most.

        None where the dataset holds nothing out.
        """
        snapshot = self.first.snapshot
        buckets = snapshot.buckets(heldout=True)
        if not buckets:
            return None
        counts = {
            key: sum(int(part.sizes.sum()) for part in parts) for key, parts in buckets.items()
        }
        bucket = max(counts, key=lambda key: (counts[key], key))
        rows: list[Rows] = []
        for number in np.concatenate([part.shards for part in buckets[bucket]]).tolist():
            if sum(map(len, rows)) < size:
                rows.append(self.first.store.rows(number, np.arange(int(snapshot.sizes[number]))))
        joined = Rows.join(rows)[:size]
        return self.first.assemble(joined, bucket, torch.arange(len(joined)), 0, 0)

    def close(self) -> None:
        """Stop reading ahead; whoever still waits for a batch gets a RuntimeError."""
        self._stop.set()
        for thread in self._threads:
            thread.join()


def _read_ahead(
    produce: Iterator[Batch], ready: "queue.Queue[Any]", stopped: Callable[[], bool]
) -> None:
    """The reading thread: batches, or what went wrong, into the queue until told to stop."""
    # Of this thread alone: the copies are bound by memory, and the cores are the trainer's.
    torch.set_num_threads(1)
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
        del item  # or it would hold its buffer while the next one is read
