"""Rows that an earlier one makes superfluous: the same file, or a picture that looks almost the same.

What earlier generations kept is streamed from their tables, never held: memory grows with what is new.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.storage import write_atomic

HASHED = np.dtype([("hash", "u8", 2), ("row", "i8")])
# The distance is in bits of the perceptual hash; -1 stands for the same file.
DROP = np.dtype([("row", "i8"), ("original", "i8"), ("distance", "i1")])
# A picture that a generation kept: half its sha256, its dHash, its key as bytes.
KNOWN = np.dtype([("hash", "u8", 2), ("looks", "u8"), ("key", "u1", 10)])
EARLIER = np.dtype([("row", "i8"), ("generation", "i4"), ("distance", "i1"), ("key", "S20")])
# Known pictures that are read at once.
KNOWN_AT_ONCE = 1 << 20
# Places of new pictures, known ones, and the bits in which the pairs differ.
Hits = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
# Pairs of near duplicates per picture that a table may bring by chance.
CHANCE_PAIRS = 16
PAIRS_AT_ONCE = 1 << 16
# Blocks in which two close hashes agree, for which there are tables.
_CHOICES = range(1, 7)


def same_files(
    hashed: Iterable[tuple[np.ndarray, pa.ChunkedArray]], count: int, folder: Path
) -> np.ndarray:
    """DROP of every row with the content hash of an earlier one, by row.

    Rows, in order, and their sha256 come in batches and are sorted on disk, in `count` ranges of the hash, of
    which half is compared.
    """

    def tables() -> Iterator[np.ndarray]:
        for rows, column in hashed:
            found = np.zeros(len(rows), HASHED)
            found["hash"], found["row"] = hash_words(column), rows
            yield found

    drops = [np.zeros(0, DROP)]
    for found in _by_hash(tables(), HASHED, count, folder):
        again = np.zeros(len(found), bool)
        again[1:] = (found["hash"][1:] == found["hash"][:-1]).all(axis=1)
        first_row = found["row"][np.maximum.accumulate(np.where(again, 0, np.arange(len(found))))]
        drops.append(_drops(found["row"][again], first_row[again], -1))
    return np.sort(np.concatenate(drops), order="row")


def hash_words(column: pa.ChunkedArray) -> np.ndarray:
    """The first half of each sha256, uint64 (n, 2)."""
    array = column.combine_chunks()
    words = np.frombuffer(array.buffers()[1] or b"", "u8").reshape(-1, 4)
    return words[array.offset : array.offset + len(column), :2]


def _by_hash(
    tables: Iterable[np.ndarray], kind: np.dtype, count: int, folder: Path
) -> Iterator[np.ndarray]:
    """All rows in the order of their hashes, in `count` ranges that lie in the folder; equal ones as they came."""
    files = [(folder / f"hashes-{number}").open("wb") for number in range(count)]
    for found in tables:
        place = (found["hash"][:, 0] >> np.uint64(48)) * np.uint64(count) >> np.uint64(16)
        for number in np.unique(place).tolist():
            found[place == number].tofile(files[number])
    for file in files:
        file.close()
        found = np.fromfile(file.name, kind)
        yield found[np.lexsort((found["hash"][:, 1], found["hash"][:, 0]))]


def write_known(path: Path, tables: Iterable[np.ndarray], count: int, folder: Path) -> None:
    """Write KNOWN of a generation's pictures as one .npy in the order of their hashes, sorted in `count` ranges."""

    def write(temporary: Path) -> None:
        head = {"descr": np.lib.format.dtype_to_descr(KNOWN), "fortran_order": False}
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, head | {"shape": (0,)})
            ranges = _by_hash(tables, KNOWN, count, folder)
            size = sum(file.write(found.tobytes()) for found in ranges)
            # The header is as long whatever the number.
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, head | {"shape": (size // KNOWN.itemsize,)})

    write_atomic(path, write)


def _known_blocks(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        while data := file.read(KNOWN_AT_ONCE * KNOWN.itemsize):
            yield np.frombuffer(data, KNOWN)


def known_files(rows: np.ndarray, words: np.ndarray, known: Sequence[Path]) -> np.ndarray:
    """EARLIER of every row whose content hash, uint64 (n, 2), is one of a picture in a known table."""
    order = np.argsort(words[:, 0])
    ordered = words[order, 0]

    def hits(block: np.ndarray) -> Hits:
        for mine, theirs in _equal(ordered, block["hash"][:, 0]):
            mine = order[mine]
            same = words[mine, 1] == block["hash"][theirs, 1]
            yield mine[same], theirs[same], np.full(np.count_nonzero(same), -1)

    return _first_known(rows, known, hits)


def known_looks(
    rows: np.ndarray, hashes: np.ndarray, known: Sequence[Path], most: int
) -> np.ndarray:
    """EARLIER of every row whose hash is within `most` bits of that of a picture in a known table.

    The tables of `_close_pairs` are made of the new rows alone, and the known ones looked up in each.
    """
    # Each table costs a look per known row, and a comparison where bits agree by chance.
    costs = {k: comb(most + k, k) * (1 + len(rows) / 2 ** (64 * k // (most + k))) for k in _CHOICES}
    tables, bits = list[tuple[Any, ...]](), len(rows).bit_length()

    def slots(masked: np.ndarray) -> np.ndarray:
        return masked * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(60 - bits)

    for mask in _masks(most, min(costs, key=costs.__getitem__)):
        order = np.argsort(hashes & mask)
        # Most known rows find their slot empty, which is told sooner than by searching.
        filled = np.zeros(16 << bits, bool)
        filled[slots(hashes & mask)] = True
        tables.append((mask, order, (hashes & mask)[order], filled))

    def hits(block: np.ndarray) -> Hits:
        looks = np.ascontiguousarray(block["looks"])
        for mask, order, ordered, filled in tables:
            asked = np.flatnonzero(filled[slots(looks & mask)])
            for mine, theirs in _equal(ordered, looks[asked] & mask):
                mine, theirs = order[mine], asked[theirs]
                distance = np.bitwise_count(hashes[mine] ^ looks[theirs])
                close = distance <= most
                yield mine[close], theirs[close], distance[close]

    return _first_known(rows, known, hits)


def _first_known(
    rows: np.ndarray, known: Sequence[Path], hits: Callable[[np.ndarray], Hits]
) -> np.ndarray:
    """EARLIER of every row that hits a known picture, of each the least by generation, distance and key."""
    first = dict[int, tuple[int, int, bytes]]()
    for generation, path in enumerate(known):
        for block in _known_blocks(path):
            for mine, theirs, distance in hits(block):
                keys = block["key"][theirs]
                for i, place in enumerate(mine.tolist()):
                    hit = (generation, int(distance[i]), keys[i].tobytes())
                    first[place] = min(first.get(place, hit), hit)
    said = [(rows[place], g, d, key.hex()) for place, (g, d, key) in sorted(first.items())]
    return np.sort(np.array(said, EARLIER), order="row")


def _equal(ordered: np.ndarray, asked: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of equal values in `ordered`, which is sorted, and in `asked`; every pair once."""
    low, high = (np.searchsorted(ordered, asked, side) for side in ("left", "right"))
    places = np.flatnonzero(low < high)
    while len(places):
        yield low[places], places
        low[places] += 1
        places = places[low[places] < high[places]]


def near_duplicates(rows: np.ndarray, hashes: np.ndarray, most: int) -> np.ndarray:
    """DROP of every row whose hash is within `most` bits of that of an earlier row that is kept."""
    order = np.lexsort((rows, hashes))
    rows, hashes = rows[order], hashes[order]
    again = np.zeros(len(rows), bool)
    again[1:] = hashes[1:] == hashes[:-1]
    # Rows with one hash are a group, led by the earliest.
    group = np.cumsum(~again) - 1
    lead_rows, lead_hashes = rows[~again], hashes[~again]
    # For each group, the group whose leader is kept in its place.
    kept_for = np.arange(len(lead_rows))
    for earlier, later in _close_pairs(lead_rows, lead_hashes, most):
        if kept_for[later] == later and kept_for[earlier] == earlier:
            kept_for[later] = earlier
    stays = kept_for[group]
    dropped = again | (stays != group)
    distance = np.bitwise_count(hashes ^ lead_hashes[stays])
    return _drops(rows[dropped], lead_rows[stays][dropped], distance[dropped])


def _close_pairs(rows: np.ndarray, hashes: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of distinct hashes within `most` bits, in the order of the later's row.

    Cut into most + k blocks, two such hashes agree in k of them (Manku et al. 2007): each choice of k
    makes a table, in which only neighbours with the same bits are compared.
    """
    if most == 0 or len(rows) < 2:
        return
    found = [np.zeros((0, 2), np.int64)]
    for mask in _tables(len(rows), most):
        order = np.argsort(hashes & mask, kind="stable")
        bits, ordered = (hashes & mask)[order], hashes[order]
        places, step = np.arange(len(rows) - 1), 1
        while len(places := places[places + step < len(rows)]):
            places = places[bits[places] == bits[places + step]]
            close = np.bitwise_count(ordered[places] ^ ordered[places + step]) <= most
            found.append(np.stack([order[places[close]], order[places[close] + step]], axis=1))
            step += 1
    pairs = np.concatenate(found)
    swapped = rows[pairs[:, 0]] > rows[pairs[:, 1]]
    pairs[swapped] = pairs[swapped, ::-1]
    pairs = pairs[np.lexsort((rows[pairs[:, 0]], rows[pairs[:, 1]]))]
    for begin in range(0, len(pairs), PAIRS_AT_ONCE):
        yield from pairs[begin : begin + PAIRS_AT_ONCE].tolist()


def _tables(count: int, most: int) -> list[np.uint64]:
    """The masks of the tables: k just large enough that few pairs meet by chance."""
    k = next((k for k in _CHOICES if count / 2 ** (64 * k // (most + k)) <= CHANCE_PAIRS), 6)
    return _masks(most, k)


def _masks(most: int, k: int) -> list[np.uint64]:
    edges = np.linspace(0, 64, most + k + 1).astype(int).tolist()
    blocks = [(1 << end) - (1 << begin) for begin, end in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(blocks, k)]


def _drops(rows: np.ndarray, originals: np.ndarray, distance: np.ndarray | int) -> np.ndarray:
    found = np.zeros(len(rows), DROP)
    found["row"], found["original"], found["distance"] = rows, originals, distance
    return found
