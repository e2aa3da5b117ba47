"""Properties of the order, for random shard tables, mixes, batches, partitions, windows and seeds."""

import hashlib
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import InputError
from pipeline.data.config import choose_partitions
from pipeline.data.order import ROWS, Order, Part, Plan, Segments, permutation

Sample = tuple[int, int]  # shard, row
Tables = dict[tuple[int, int], list[Part]]

REPEATS = [Fraction(text) for text in ("1", "2", "3", "0.3", "0.5", "2.5", "0.07")]


@st.composite
def tables(draw: st.DrawFn, repeats: list[Fraction] = REPEATS) -> Tables:
    """Up to three buckets of up to two datasets, some shards empty or far smaller than others."""
    buckets: Tables = {}
    first = 0
    for number in range(draw(st.integers(1, 3))):
        parts = []
        for _ in range(draw(st.integers(1, 2))):
            sizes = draw(st.lists(st.integers(1, 25), min_size=1, max_size=7))
            shards = np.arange(first, first + len(sizes))
            first += len(sizes)
            parts.append(Part(shards, np.array(sizes), draw(st.sampled_from(repeats))))
        buckets[256, 64 * (number + 1)] = parts
    return buckets


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    batch = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
    partitions = draw(st.sampled_from([d for d in range(1, batch + 1) if batch % d == 0]))
    return Plan(draw(st.integers(0, 2**40)), batch, partitions, draw(st.integers(1, 4)))


def read(order: Order, step: int, count: int, world_size: int) -> list[dict[int, Sample]]:
    """The global batches of some steps, as `world_size` ranks read them: place in the batch -> sample.

    Every rank works alone, from the step and its own partitions, as the loader does.
    """
    plan, batches = order.plan, [{} for _ in range(count)]
    share = plan.global_batch // plan.partitions
    for rank in range(world_size):
        for partition in range(rank, plan.partitions, world_size):
            streams = {}
            for place in range(count):
                epoch, bucket, number = order.locate(step + place)
                if bucket not in streams:
                    start = order.buckets[bucket], number * share, epoch - plan.first_epoch
                    streams[bucket] = stream(*start, partition)
                for i in range(partition * share, (partition + 1) * share):
                    assert i not in batches[place]
                    batches[place][i] = next(streams[bucket])
    return batches


def stream(bucket, position, epoch, partition):
    for window in bucket.windows(partition, position, epoch):
        pieces = zip(window.segments.shard.tolist(), window.rows(), strict=True)
        samples = [(shard, row) for shard, rows in pieces for row in rows.tolist()]
        yield from (samples[i] for i in window.shuffle())


def some_steps(order: Order, most: int = 60) -> int:
    return min(most, order.first_step(5) + 3)


@settings(deadline=None, max_examples=30)
@given(tables(), plans())
def test_the_global_batches_are_the_same_for_every_world_size_that_divides(buckets, plan):
    order = Order(buckets, plan)
    steps = some_steps(order, 12)
    alone = read(order, 0, steps, 1)
    assert all(sorted(batch) == list(range(plan.global_batch)) for batch in alone)
    for world_size in range(2, plan.partitions + 1):
        if plan.partitions % world_size == 0:
            assert read(Order(buckets, plan), 0, steps, world_size) == alone


@settings(deadline=None, max_examples=30)
@given(tables(), plans(), st.data())
def test_resuming_at_any_step_gives_the_remaining_sequence(buckets, plan, data):
    order = Order(buckets, plan)
    steps = some_steps(order, 30)
    whole = read(order, 0, steps, 1)
    start = data.draw(st.integers(0, steps))
    assert read(Order(buckets, plan), start, steps - start, 1) == whole[start:]


@settings(deadline=None, max_examples=30)
@given(tables(), plans())
def test_an_epoch_lays_out_each_sample_as_often_as_its_repeat_factor_says(buckets, plan):
    order = Order(buckets, plan)
    for bucket in order.buckets:
        counts: Counter[Sample] = Counter()
        for epoch in range(1, 5):
            pieces = bucket.layout(epoch - 1).segments
            for shard, size, cycle, start, stop in np.stack(pieces, axis=1).tolist():
                rows = permutation(size, plan.seed, ROWS, shard, cycle)[start:stop]
                counts.update((shard, row) for row in rows.tolist())
            for part in bucket.parts:
                sizes = zip(part.shards.tolist(), part.sizes.tolist(), strict=True)
                seen = [counts[shard, row] for shard, size in sizes for row in range(size)]
                often = epoch * part.repeat
                assert sum(seen) == int(often * len(seen))
                # Equally often, or once more; exactly so where the repeats make up whole cycles.
                assert set(seen) <= {int(often), -int(-often // 1)}


@settings(deadline=None, max_examples=30)
@given(tables(), plans())
def test_batches_hold_all_that_is_laid_out_but_less_than_one_batch_a_bucket(buckets, plan):
    order = Order(buckets, plan)
    epochs = 1
    while order.first_step(epochs) < 5:
        epochs += 1
    steps = order.first_step(epochs)
    if steps > 400:
        return
    taken: dict[int, Counter[Sample]] = {number: Counter() for number in range(len(buckets))}
    for step, batch in enumerate(read(order, 0, steps, 1)):
        taken[order.locate(step)[1]].update(batch.values())
    for number, bucket in enumerate(order.buckets):
        laid = bucket.drawn(epochs)
        assert laid - plan.global_batch < taken[number].total() <= laid
        assert {shard for shard, _ in taken[number]} <= {s for p in bucket.parts for s in p.shards}


@settings(deadline=None, max_examples=30)
@given(tables([Fraction(1)]), plans())
def test_a_pass_over_the_data_takes_each_sample_exactly_once(buckets, plan):
    order = Order(buckets, plan)
    for bucket in order.buckets:
        passes = 3
        length = bucket.drawn(1)
        counts: Counter[Sample] = Counter()
        for partition in range(plan.partitions):
            samples = stream(bucket, 0, 0, partition)
            share = (passes * length + partition) // plan.partitions
            counts.update(next(samples) for _ in range(share))
        assert len(counts) == length
        assert set(counts.values()) == {passes}


@settings(deadline=None, max_examples=30)
@given(tables(), plans())
def test_only_shards_on_a_boundary_are_read_by_two_partitions(buckets, plan):
    order = Order(buckets, plan)
    for bucket in order.buckets:
        layout = bucket.layout(1)
        whole = Segments.join([p for n in range(len(bucket.parts)) for p in bucket._draw(n, 1)])
        lengths = whole.stop - whole.start
        parts = [layout.partition(number) for number in range(plan.partitions)]
        assert sum(len(part.shard) for part in parts) <= len(whole.shard) + plan.partitions - 1
        assert sum(int((part.stop - part.start).sum()) for part in parts) == lengths.sum()
        for part in parts:  # whole segments inside, cut ones at the two ends only
            assert np.isin((part.stop - part.start)[1:-1], lengths).all()


@settings(deadline=None, max_examples=30)
@given(tables(), plans())
def test_every_rank_has_the_same_bucket_and_the_epoch_counts_add_up(buckets, plan):
    order = Order(buckets, plan)
    for epoch in range(3):
        first, end = order.first_step(epoch), order.first_step(epoch + 1)
        sequence = order.sequence(epoch)
        assert len(sequence) == end - first
        for step in range(first, min(end, first + 20)):
            located = order.locate(step)
            assert located[:2] == (epoch, sequence[step - first])
        for number, bucket in enumerate(order.buckets):
            expected = bucket.batches(epoch + 1) - bucket.batches(epoch)
            assert np.count_nonzero(sequence == number) == expected


def test_epochs_and_seeds_differ():
    buckets = {(64, 64): [Part(np.arange(8), np.full(8, 50))]}
    orders = [Order(buckets, Plan(seed, 40, 8, 2)) for seed in (0, 1)]
    batches = [read(order, step, 1, 1)[0] for order in orders for step in (0, 10)]
    for i, one in enumerate(batches):
        for other in batches[:i]:
            assert set(one.values()) != set(other.values())


def test_a_permutation_never_changes():
    """The order of every run so far depends on it: change neither it nor these numbers."""
    assert permutation(10, 7, ROWS, 3, 0).tolist() == GOLDEN
    assert sorted(permutation(1000, 2**40, ROWS, 1).tolist()) == list(range(1000))
    assert permutation(0, 1, ROWS).tolist() == []


GOLDEN = [2, 1, 9, 5, 6, 8, 4, 0, 7, 3]


def test_the_batches_never_change():
    """The same for layouts and windows: a run goes on with a newer version of this code."""
    sizes = [25, 3, 11, 40, 1, 18, 30], [9, 20, 14], [5, 17, 8]
    parts = [
        Part(np.arange(7), np.array(sizes[0])),
        Part(np.arange(7, 10), np.array(sizes[1]), Fraction(5, 2)),
        Part(np.arange(10, 13), np.array(sizes[2]), Fraction(1, 3)),
    ]
    order = Order({(64, 64): parts[:2], (64, 96): parts[2:]}, Plan(7, 12, 4, 3))
    batches = [[batch[place] for place in range(12)] for batch in read(order, 0, 80, 1)]
    assert order.epoch_of(79) == 3
    assert hashlib.sha256(repr(batches).encode()).hexdigest().startswith("63ea90c15ac9cc3d")


def test_batches_mix_samples_from_all_over_the_data():
    """Against a perfect shuffle, by source positions; 256 shards of 64, in the order of their source."""
    shards, size, share, window = 256, 64, 4, 4
    buckets = {(64, 64): [Part(np.arange(shards), np.full(shards, size))]}
    batches = read(Order(buckets, Plan(0, 64, 16, window)), 0, 200, 1)
    source = np.array([[s * size + row for s, row in (b[i] for i in range(64))] for b in batches])
    # Neighbours of different partitions: 3,000 pairs, so a perfect shuffle's correlation has a
    # standard deviation of 0.018.
    apart = source[:, share - 1 : -1 : share], source[:, share::share]
    assert abs(np.corrcoef(apart[0].ravel(), apart[1].ravel())[0, 1]) < 0.06
    # Neighbours of one partition come from the same of its window's four shards once in four times.
    together = source[:, ::share], source[:, 1::share]
    assert np.corrcoef(together[0].ravel(), together[1].ravel())[0, 1] < 1 / window + 0.06
    # The mean over a batch strays no more than 1.5 times as far as with a perfect shuffle.
    means = source.mean(axis=1) / (shards * size)
    assert means.std() < 1.5 * np.sqrt(1 / 12 / 64)


@pytest.mark.parametrize(
    ("batch", "partitions"), [(256, 64), (1, 1), (24, 8), (96, 32), (77, 1), (2048, 64)]
)
def test_the_default_partitions_are_a_power_of_two_that_divides_the_batch(batch, partitions):
    assert choose_partitions(None, batch, 1) == partitions


def test_no_samples_at_all_is_the_users_error():
    with pytest.raises(InputError, match="no training samples"):
        Order({}, Plan(0, 4, 1, 1))
