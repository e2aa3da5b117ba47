"""Which sample stands where in an endless run: a pure function of (seed, epoch, step), for any number of ranks.

A bucket's shards are permuted, laid end to end and cut into C equal ranges, the canonical partitions;
inside a partition samples are shuffled in windows of a few shards. Every global batch takes its size / C
next samples of each partition, so whoever reads partition c, the batch is the same.

A bucket is a stream that never ends: what an epoch's last whole batch leaves over (less than one batch per
bucket) opens the next epoch. Nothing is dropped, a bucket smaller than a batch is trained too, and at any
moment two samples of one dataset and bucket have been laid out equally often or once more.
"""

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from models.config import InputError

# Purposes, so that no two permutations share a random stream.
CYCLE, SHARDS, ROWS, WINDOW, SEQUENCE = range(5)


MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: Any) -> Any:
    """SplitMix64's output function (Steele et al. 2014, doi 10.1145/2660193.2660195), int or uint64 array."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def permutation(length: int, seed: int, purpose: int, *key: int) -> np.ndarray:
    """int64 (length,), a pure function of its arguments, for good: numpy may change its own permutations.

    The low bits of each random number make way for its place, so that a sort gives the permutation.
    """
    state = 0
    for number in (seed, purpose, *key):
        state = _mix((state ^ number) + GOLDEN & MASK)
    places = np.arange(length, dtype=np.uint64)
    keys = _mix(np.uint64(state) + places * np.uint64(GOLDEN))
    low = np.uint64((1 << length.bit_length()) - 1)
    keys = keys & ~low | places
    keys.sort()
    return (keys & low).astype(np.int64)


@dataclass(frozen=True)
class Part:
    """One dataset's shards of one bucket; each sample comes `repeat` times an epoch."""

    shards: np.ndarray  # int64 (S,), rows of the shard table
    sizes: np.ndarray  # int64 (S,), samples
    repeat: Fraction = Fraction(1)

    @cached_property
    def total(self) -> int:
        return int(self.sizes.sum())

    def drawn(self, epochs: int) -> int:
        """Samples that the first `epochs` epochs take."""
        return epochs * self.repeat.numerator * self.total // self.repeat.denominator


@dataclass(frozen=True)
class Segments:
    """Pieces of shards: rows start..stop of each shard's permutation of cycle `cycle`; all int64 (m,)."""

    shard: np.ndarray
    size: np.ndarray  # of the whole shard
    cycle: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def take(self, chosen: np.ndarray | slice) -> "Segments":
        columns = (self.shard, self.size, self.cycle, self.start, self.stop)
        return Segments(*(column[chosen] for column in columns))

    @staticmethod
    def join(pieces: "list[Segments]") -> "Segments":
        empty = np.zeros(0, np.int64)
        names = Segments.__dataclass_fields__
        return Segments(*(np.concatenate([empty, *(getattr(p, n) for p in pieces)]) for n in names))


@lru_cache(maxsize=64)
def _rows(size: int, seed: int, shard: int, cycle: int) -> np.ndarray:
    """The permutation of a shard that windows share pieces of."""
    rows = permutation(size, seed, ROWS, shard, cycle)
    rows.flags.writeable = False
    return rows


@dataclass(frozen=True)
class Window:
    """A few pieces of shards, shuffled together; its first `skip` samples have been taken already."""

    segments: Segments
    length: int  # samples
    seed: int
    key: tuple[int, ...]
    skip: int = 0

    def rows(self) -> list[np.ndarray]:
        """A segment each: rows of its shard, int64; of a whole shard in order, for `shuffle` mixes them."""
        pieces = self.segments
        columns = (pieces.shard, pieces.size, pieces.cycle, pieces.start, pieces.stop)
        return [
            np.arange(size)
            if stop - start == size
            else _rows(size, self.seed, shard, cycle)[start:stop]
            for shard, size, cycle, start, stop in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def shuffle(self) -> np.ndarray:
        """int64 (n,): the order of the concatenated rows, without the skipped ones."""
        return permutation(self.length, self.seed, WINDOW, *self.key)[self.skip :]


@dataclass(frozen=True)
class Layout:
    """One epoch of a bucket laid end to end, and cut where the C partitions begin."""

    segments: Segments  # (m,)
    edges: np.ndarray  # int64 (m + 1,), samples before each piece, and all
    cuts: np.ndarray  # int64 (C + 1,), pieces before each partition, and all

    @staticmethod
    def cut(laid: Segments, cuts: np.ndarray) -> "Layout":
        """The layout of whole pieces, and the samples before each partition, int64 (C + 1,)."""
        ends = np.cumsum(laid.stop - laid.start)
        edges = np.union1d(ends, cuts)
        of = ends.searchsorted(edges[1:])  # the whole piece that each is of
        begins = (ends - laid.stop)[of]  # where row 0 of its shard would be
        start, stop = edges[:-1] - begins, edges[1:] - begins
        pieces = Segments(laid.shard[of], laid.size[of], laid.cycle[of], start, stop)
        return Layout(pieces, edges, edges.searchsorted(cuts))

    def partition(self, number: int) -> Segments:
        return self.segments.take(slice(*self.cuts[number : number + 2]))

    def windows(self, partition: int, window_shards: int) -> np.ndarray:
        """int64 (W + 1,): pieces before each window of a partition, and the end."""
        first, after = self.cuts[partition : partition + 2].tolist()
        count = max(1, round((after - first) / window_shards))
        return first + np.arange(count + 1) * (after - first) // count


class BucketOrder:
    """The endless streams, one a partition, of the samples of one bucket."""

    def __init__(self, parts: list[Part], key: tuple[int, int], plan: "Plan"):
        self.parts, self.key, self.plan = parts, key, plan
        self.layout = lru_cache(maxsize=2)(self._layout)

    def drawn(self, epochs: int) -> int:
        """Samples laid out by the first `epochs` epochs."""
        return sum(part.drawn(epochs) for part in self.parts)

    def batches(self, epochs: int) -> int:
        """Whole global batches that the first `epochs` epochs give."""
        return self.drawn(epochs) // self.plan.global_batch

    def _offset(self, epoch: int, partition: int) -> int:
        """Samples of the partition before the epoch: equal for all partitions, to within one.

        Summed over the partitions it is drawn(epoch) (Hermite's identity), so that they share every
        epoch without a remainder.
        """
        return (self.drawn(epoch) + partition) // self.plan.partitions

    def _layout(self, epoch: int) -> Layout:
        seed, absolute = self.plan.seed, self.plan.first_epoch + epoch
        laid = Segments.join([p for n in range(len(self.parts)) for p in self._draw(n, epoch)])
        laid = laid.take(permutation(len(laid.shard), seed, SHARDS, *self.key, absolute))
        partitions = np.arange(self.plan.partitions)
        before, after = (
            (self.drawn(e) + partitions) // self.plan.partitions for e in (epoch, epoch + 1)
        )
        return Layout.cut(laid, np.concatenate([[0], np.cumsum(after - before)]))

    def _draw(self, number: int, epoch: int) -> list[Segments]:
        """The samples of a part in an epoch: the next `repeat` of its cycles, a cycle being all of it."""
        part, pieces = self.parts[number], []
        low, high = part.drawn(epoch), part.drawn(epoch + 1)
        total = part.total
        for cycle in range(low // total, -(-high // total)):
            absolute = self.plan.first_epoch + cycle
            chosen = permutation(
                len(part.shards), self.plan.seed, CYCLE, *self.key, number, absolute
            )
            sizes = part.sizes[chosen]
            ends = cycle * total + np.cumsum(sizes)
            start = np.maximum(low - (ends - sizes), 0)
            stop = sizes - np.maximum(ends - high, 0)
            cycles = np.full(len(chosen), absolute)
            whole = Segments(part.shards[chosen], sizes, cycles, start, stop)
            pieces.append(whole.take(start < stop))
        return pieces

    def windows(self, partition: int, position: int, epoch_hint: int) -> Iterator[Window]:
        """The partition's windows for ever, from its sample `position`, which epoch_hint or one before holds."""
        epochs = range(epoch_hint + 2)
        epoch = bisect.bisect_right(epochs, position, key=lambda e: self._offset(e, partition)) - 1
        while True:
            layout = self.layout(epoch)
            pieces = layout.windows(partition, self.plan.window_shards)
            edges = layout.edges[pieces].tolist()
            here = edges[0] + position - self._offset(epoch, partition)
            spans = zip(itertools.pairwise(pieces.tolist()), itertools.pairwise(edges), strict=True)
            for number, (span, (low, high)) in enumerate(spans):
                if here < high:
                    key = (*self.key, self.plan.first_epoch + epoch, partition, number)
                    segments, skip = layout.segments.take(slice(*span)), max(here - low, 0)
                    yield Window(segments, high - low, self.plan.seed, key, skip)
            epoch += 1
            position = self._offset(epoch, partition)


@dataclass(frozen=True)
class Plan:
    """What the order depends on beside the shards."""

    seed: int
    global_batch: int
    partitions: int
    window_shards: int
    first_epoch: int = 0  # of the snapshot
    first_step: int = 0


class Order:
    """Bucket and batch number of every step, from a snapshot's first step on."""

    def __init__(self, buckets: dict[tuple[int, int], list[Part]], plan: Plan):
        self.plan = plan
        self.buckets = [BucketOrder(parts, key, plan) for key, parts in sorted(buckets.items())]
        if not any(bucket.drawn(10**9) for bucket in self.buckets):
            raise InputError(
                "the datasets hold no training samples, so there is no batch to train on"
            )
        self.sequence = lru_cache(maxsize=2)(self._sequence)

    def first_step(self, epoch: int) -> int:
        """The step that begins an epoch (of the run, not before the snapshot's first)."""
        local = epoch - self.plan.first_epoch
        return self.plan.first_step + sum(bucket.batches(local) for bucket in self.buckets)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to; an epoch too small for a batch has none."""
        first, last = self.plan.first_epoch, self.plan.first_epoch + 1
        while self.first_step(last) <= step:
            last += last - first
        return first + bisect.bisect_right(range(first, last + 1), step, key=self.first_step) - 1

    def _sequence(self, epoch: int) -> np.ndarray:
        """int16 (steps of the epoch,): the bucket of each step."""
        local = epoch - self.plan.first_epoch
        counts = [bucket.batches(local + 1) - bucket.batches(local) for bucket in self.buckets]
        buckets = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
        return buckets[permutation(len(buckets), self.plan.seed, SEQUENCE, epoch)]

    def locate(self, step: int) -> tuple[int, int, int]:
        """Epoch, bucket and the bucket's batch number (since the snapshot's first step) of a step."""
        epoch = self.epoch_of(step)
        sequence = self.sequence(epoch)
        place = step - self.first_step(epoch)
        bucket = int(sequence[place])
        before = int(np.count_nonzero(sequence[:place] == bucket))
        return epoch, bucket, self.buckets[bucket].batches(epoch - self.plan.first_epoch) + before


def choose_partitions(wanted: int | None, global_batch: int, world_size: int) -> int:
    """canonical_partitions, or by default the largest power of two, at most 64, that divides the batch.

    Raises InputError with the valid numbers.
    """
    divisors = [d for d in range(1, global_batch + 1) if global_batch % d == 0]
    if wanted is None:  # never by the number of ranks: the order must not depend on it
        wanted = max(d for d in divisors if d <= 64 and d & (d - 1) == 0)
    if wanted not in divisors:
        raise InputError(
            f"data.canonical_partitions: got {wanted}, which does not divide the global batch of "
            f"{global_batch}; valid: {', '.join(map(str, divisors))}"
        )
    if wanted % world_size:
        ranks = ", ".join(str(r) for r in range(1, wanted + 1) if wanted % r == 0)
        others = ", ".join(str(d) for d in divisors if d % world_size == 0)
        remedy = f"canonical_partitions of {others}" if others else "another global batch"
        raise InputError(
            f"data.canonical_partitions: {wanted} cannot be shared equally by {world_size} ranks; valid "
            f"numbers of ranks: {ranks}. Remedy: that many ranks, or {remedy} (which changes the order)."
        )
    return wanted
