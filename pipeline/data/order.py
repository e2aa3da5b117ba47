"""The order of samples in an endless run: a pure function of (seed, epoch, step).

The shards of a bucket are permuted, laid end to end and cut into C equal ranges, the canonical
partitions; within a partition samples are shuffled in windows of a few shards. Every global batch
takes its size / C next samples of each partition, so it does not depend on the number of ranks.

A bucket is a stream without end: what an epoch's last whole batch leaves over (less than one batch
per bucket) opens the next epoch. Nothing is dropped, and a bucket smaller than a batch is trained on
too. Two samples of one dataset and bucket are laid out equally often, or one of them once more.
"""

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

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
    """int64 (length,), a function of its arguments alone: numpy may change its own permutations.

    Each random number's low bits are replaced by its place, so sorting yields the permutation.
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
    """One dataset's shards of one bucket, rows of the shard table; `repeat` is per epoch."""

    shards: np.ndarray  # int64 (S,)
    sizes: np.ndarray  # int64 (S,)
    repeat: Fraction = Fraction(1)

    @cached_property
    def total(self) -> int:
        return int(self.sizes.sum())

    def drawn(self, epochs: int) -> int:
        """Number of samples that the first `epochs` epochs take."""
        return epochs * self.repeat.numerator * self.total // self.repeat.denominator


class Segments(NamedTuple):
    """Rows start..stop of the permutations of shards of `size` samples in a cycle; int64 (m,)."""

    shard: np.ndarray
    size: np.ndarray
    cycle: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def take(self, chosen: np.ndarray | slice) -> "Segments":
        return Segments(*(column[chosen] for column in self))

    @staticmethod
    def join(pieces: "list[Segments]") -> "Segments":
        none = Segments(*[np.zeros(0, np.int64)] * 5)
        return Segments(*map(np.concatenate, zip(none, *pieces, strict=True)))


@lru_cache(maxsize=64)
def _rows(size: int, seed: int, shard: int, cycle: int) -> np.ndarray:
    """A shard's permutation, of which several windows hold pieces."""
    rows = permutation(size, seed, ROWS, shard, cycle)
    rows.flags.writeable = False
    return rows


@dataclass(frozen=True)
class Window:
    """Pieces of shards, `length` samples shuffled together; the first `skip` are taken."""

    segments: Segments
    length: int
    seed: int
    key: tuple[int, ...]
    skip: int = 0

    def rows(self) -> list[np.ndarray]:
        """Each segment's rows, int64; those of a whole shard in order, for `shuffle` mixes them."""
        return [
            np.arange(size)
            if stop - start == size
            else _rows(size, self.seed, shard, cycle)[start:stop]
            for shard, size, cycle, start, stop in np.stack(self.segments, axis=1).tolist()
        ]

    def shuffle(self) -> np.ndarray:
        """int64 (n,): the order of the concatenated rows, less the skipped ones."""
        return permutation(self.length, self.seed, WINDOW, *self.key)[self.skip :]


@dataclass(frozen=True)
class Layout:
    """One epoch of a bucket laid end to end, and cut where the C partitions begin.

    `edges` are the samples before each of the m pieces, and all; `cuts` the pieces before each
    partition, and all.
    """

    segments: Segments
    edges: np.ndarray  # int64 (m + 1,)
    cuts: np.ndarray  # int64 (C + 1,)

    @staticmethod
    def cut(laid: Segments, cuts: np.ndarray) -> "Layout":
        """Cut whole pieces; `cuts` are the samples before each partition, int64 (C + 1,)."""
        ends = np.cumsum(laid.stop - laid.start)
        edges = np.union1d(ends, cuts)
        # The whole piece that each piece comes from, and where row 0 of its shard would be.
        of = ends.searchsorted(edges[1:])
        begins = (ends - laid.stop)[of]
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
    """The endless streams of one bucket's samples, one stream per partition."""

    def __init__(self, parts: list[Part], key: tuple[int, int], plan: "Plan"):
        self.parts, self.key, self.plan = parts, key, plan
        self.layout = lru_cache(maxsize=2)(self._layout)

    def drawn(self, epochs: int) -> int:
        """Number of samples that the first `epochs` epochs lay out."""
        return sum(part.drawn(epochs) for part in self.parts)

    def batches(self, epochs: int) -> int:
        """Number of whole global batches in the first `epochs` epochs."""
        return self.drawn(epochs) // self.plan.global_batch

    def _offset(self, epoch: int, partition: Any) -> Any:
        """Samples of the partition before the epoch: equal for all partitions, to within one.

        The sum over the partitions is drawn(epoch) (Hermite's identity), so that they share every
        epoch without a remainder. `partition` is a number or an array of numbers.
        """
        return (self.drawn(epoch) + partition) // self.plan.partitions

    def _layout(self, epoch: int) -> Layout:
        seed, absolute = self.plan.seed, self.plan.first_epoch + epoch
        laid = Segments.join([p for n in range(len(self.parts)) for p in self._draw(n, epoch)])
        laid = laid.take(permutation(len(laid.shard), seed, SHARDS, *self.key, absolute))
        partitions = np.arange(self.plan.partitions)
        shares = self._offset(epoch + 1, partitions) - self._offset(epoch, partitions)
        return Layout.cut(laid, np.concatenate([[0], np.cumsum(shares)]))

    def _draw(self, number: int, epoch: int) -> list[Segments]:
        """Samples of a part in an epoch: its next `repeat` cycles; a cycle holds each sample once."""
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
        """Windows of a partition from sample `position` on, which lies in epoch_hint or before."""
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
    """What the order depends on beside the shards; the era begins with the first epoch and step."""

    seed: int
    global_batch: int
    partitions: int
    window_shards: int
    first_epoch: int = 0
    first_step: int = 0


class Order:
    """Bucket and batch number of every step, from an era's first step on."""

    def __init__(self, buckets: dict[tuple[int, int], list[Part]], plan: Plan):
        self.plan = plan
        self.buckets = [BucketOrder(parts, key, plan) for key, parts in sorted(buckets.items())]
        if not self.samples_per_epoch:
            raise InputError(
                "the datasets hold no training samples, so there is no batch to train on"
            )
        self.sequence = lru_cache(maxsize=2)(self._sequence)

    @property
    def samples_per_epoch(self) -> float:
        """Number of samples that an epoch takes on average, a repeated one as often as it comes."""
        parts = [part for bucket in self.buckets for part in bucket.parts]
        return float(sum(part.repeat * part.total for part in parts))

    def first_step(self, epoch: int) -> int:
        """The step that begins an epoch of the run, one of this era."""
        local = epoch - self.plan.first_epoch
        return self.plan.first_step + sum(bucket.batches(local) for bucket in self.buckets)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to; an epoch too small for a batch has no step."""
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
        """Epoch, bucket, and the bucket's batch number since the era's first step, of a step."""
        epoch = self.epoch_of(step)
        sequence = self.sequence(epoch)
        place = step - self.first_step(epoch)
        bucket = int(sequence[place])
        before = int(np.count_nonzero(sequence[:place] == bucket))
        return epoch, bucket, self.buckets[bucket].batches(epoch - self.plan.first_epoch) + before
