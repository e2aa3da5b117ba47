"""Rows that an earlier one makes superfluous: the same file, or a picture that looks almost the same.

What earlier generations kept is streamed, never held: memory grows with what is new.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from math import comb
from pathlib import Path

import numpy as np
import pyarrow as pa

HASHED = np.dtype([("hash", "u8", 2), ("row", "i8")])
# What a row is a duplicate of: a row of its own generation, which is then -1, or the picture that another one kept.
# The distance is in bits of the perceptual hash; -1 stands for the same file.
DROP = np.dtype(
    [("row", "i8"), ("original", "i8"), ("distance", "i1"), ("generation", "i2"), ("key", "u1", 10)]
)
# Hashes and keys of the pictures that a generation kept, some at a time.
Known = Iterable[tuple[np.ndarray, pa.ChunkedArray]]
# Places of new pictures, known ones, and the bits in which the pairs differ.
Hits = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
PAIRS_AT_ONCE = 1 << 16
# Blocks in which two close hashes agree, for which there are tables.
CHOICES = range(1, 7)
EVERY_BIT = np.uint64(2**64 - 1)


def same_files(
    hashed: Iterable[tuple[np.ndarray, np.ndarray]], count: int, folder: Path
) -> np.ndarray:
    """DROP of every row with the content hash of an earlier one.

    Rows, in order, and their hashes, uint64 (n, 2), come in batches and are sorted on disk, in `count` ranges of
    the hash.
    """
    files = [(folder / f"hashes-{number}").open("wb") for number in range(count)]
    for rows, words in hashed:
        found = np.zeros(len(rows), HASHED)
        found["hash"], found["row"] = words, rows
        place = (words[:, 0] >> np.uint64(48)) * np.uint64(count) >> np.uint64(16)
        for number in np.unique(place).tolist():
            found[place == number].tofile(files[number])
    drops = list[np.ndarray]()
    for file in files:
        file.close()
        found = np.fromfile(file.name, HASHED)
        # Equal ones stay as they came.
        found = found[np.lexsort((found["hash"][:, 1], found["hash"][:, 0]))]
        again = np.zeros(len(found), bool)
        again[1:] = (found["hash"][1:] == found["hash"][:-1]).all(axis=1)
        first_row = found["row"][np.maximum.accumulate(np.where(again, 0, np.arange(len(found))))]
        drops.append(_drops(found["row"][again], first_row[again], -1))
    return np.concatenate(drops)


class Lookup:
    """Hashes, uint64 (n,), in which others are looked up by the bits of a mask."""

    def __init__(self, hashes: np.ndarray, mask: np.uint64 = EVERY_BIT):
        masked, self._mask, self._bits = hashes & mask, mask, len(hashes).bit_length()
        self.order = np.argsort(masked)
        self._sorted = masked[self.order]
        # Most that are asked for find their slot empty, which is told sooner than by searching.
        self._filled = np.zeros(16 << self._bits, bool)
        self._filled[self._slots(masked)] = True

    def _slots(self, masked: np.ndarray) -> np.ndarray:
        return masked * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(60 - self._bits)

    def pairs(self, asked: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places of hashes and of those asked for that agree in the bits; every pair once."""
        asked = asked & self._mask
        places = np.flatnonzero(self._filled[self._slots(asked)])
        low, high = (np.searchsorted(self._sorted, asked[places], s) for s in ("left", "right"))
        while len(places):
            there = low < high
            places, low, high = places[there], low[there], high[there]
            yield self.order[low], places
            low = low + 1


def known_files(rows: np.ndarray, words: np.ndarray, known: Sequence[Known]) -> np.ndarray:
    """DROP of every row whose content hash, uint64 (n, 2), is one of a picture that a generation kept."""
    table = Lookup(words[:, 0])

    def hits(block: np.ndarray) -> Hits:
        for mine, theirs in table.pairs(block[:, 0]):
            same = words[mine, 1] == block[theirs, 1]
            yield mine[same], theirs[same], np.full(np.count_nonzero(same), -1)

    return _first_known(rows, known, hits)


def known_looks(
    rows: np.ndarray, hashes: np.ndarray, most: int, known: Sequence[Known]
) -> np.ndarray:
    """DROP of every row whose hash is within `most` bits of that of a picture that a generation kept."""
    # Of the new rows alone; the known ones are looked up in each.
    tables = [Lookup(hashes, mask) for mask in _masks(len(rows), most)]

    def hits(block: np.ndarray) -> Hits:
        for table in tables:
            for mine, theirs in table.pairs(block):
                distance = np.bitwise_count(hashes[mine] ^ block[theirs])
                close = distance <= most
                yield mine[close], theirs[close], distance[close]

    return _first_known(rows, known, hits)


def _first_known(
    rows: np.ndarray, known: Sequence[Known], hits: Callable[[np.ndarray], Hits]
) -> np.ndarray:
    """DROP of every row that hits a known picture, of each the least by generation, distance and key."""
    first = dict[int, tuple[int, int, str]]()
    for generation, blocks in enumerate(known):
        for block, keys in blocks:
            for mine, theirs, distance in hits(block):
                names = keys.take(theirs).to_pylist()
                for place, bits, key in zip(mine.tolist(), distance.tolist(), names, strict=True):
                    hit = (generation, bits, key)
                    first[place] = min(first.get(place, hit), hit)
    said = [(rows[i], -1, d, g, tuple(bytes.fromhex(key))) for i, (g, d, key) in first.items()]
    return np.array(said, DROP)


def near_duplicates(rows: np.ndarray, hashes: np.ndarray, most: int) -> np.ndarray:
    """DROP of every row, in order, whose hash is within `most` bits of that of an earlier row that is kept."""
    # Rows with one hash are a group, led by the first.
    leads, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    # For each group, the group whose leader is kept in its place.
    kept_for = np.arange(len(leads))
    for earlier, later in _close_pairs(leads, first, most):
        if kept_for[later] == later and kept_for[earlier] == earlier:
            kept_for[later] = earlier
    original = first[kept_for[group]]
    dropped = original != np.arange(len(rows))
    distance = np.bitwise_count(hashes ^ hashes[original])
    return _drops(rows[dropped], rows[original[dropped]], distance[dropped])


def _close_pairs(hashes: np.ndarray, first: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of distinct hashes within `most` bits, in the order of the later's first row."""
    found = [np.zeros((0, 2), np.int64)]
    for mask in _masks(len(hashes), most):
        table = Lookup(hashes, mask)
        # In their order they are found faster.
        for earlier, later in table.pairs(hashes[table.order]):
            later = table.order[later]
            close = np.bitwise_count(hashes[earlier] ^ hashes[later]) <= most
            close &= first[earlier] < first[later]
            found.append(np.stack([earlier[close], later[close]], axis=1))
    pairs = np.concatenate(found)
    pairs = pairs[np.lexsort((first[pairs[:, 0]], first[pairs[:, 1]]))]
    for begin in range(0, len(pairs), PAIRS_AT_ONCE):
        yield from pairs[begin : begin + PAIRS_AT_ONCE].tolist()


def _masks(count: int, most: int) -> list[np.uint64]:
    """The bits by which each table finds some of the pairs within `most` bits, among so many hashes.

    Cut into most + k blocks, two such hashes agree in k of them (Manku et al. 2007): each choice of k makes a table.
    """

    def cost(k: int) -> float:
        # Each table costs a look per hash, and a comparison where bits agree by chance.
        return comb(most + k, k) * (1 + count / 2 ** (64 * k // (most + k)))

    k = min(CHOICES, key=cost)
    edges = np.linspace(0, 64, most + k + 1).astype(int).tolist()
    blocks = [(1 << end) - (1 << begin) for begin, end in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(blocks, k)]


def _drops(rows: np.ndarray, originals: np.ndarray, distance: np.ndarray | int) -> np.ndarray:
    found = np.zeros(len(rows), DROP)
    found["row"], found["original"], found["distance"] = rows, originals, distance
    found["generation"] = -1
    return found
