"""Rows that an earlier one makes superfluous: the same file, or a picture that looks almost the same."""

from collections.abc import Iterable, Iterator
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

HASHED = np.dtype([("hash", "u8", 2), ("row", "i8")])
# The distance is in bits of the perceptual hash; -1 stands for the same file.
DROP = np.dtype([("row", "i8"), ("original", "i8"), ("distance", "i1")])
# Pairs of near duplicates per picture that a table may bring by chance.
CHANCE_PAIRS = 16
PAIRS_AT_ONCE = 1 << 16


def same_files(
    hashed: Iterable[tuple[np.ndarray, pa.ChunkedArray]], count: int, folder: Path
) -> np.ndarray:
    """DROP of every row with the content hash of an earlier one, by row.

    Rows and their sha256 come in batches and are sorted on disk, in `count` ranges of the hash, of which
    half is compared.
    """
    files = [(folder / f"hashes-{number}").open("wb") for number in range(count)]
    for rows, column in hashed:
        array = column.combine_chunks()
        found = np.zeros(len(rows), HASHED)
        words = np.frombuffer(array.buffers()[1] or b"", "u8").reshape(-1, 4)
        found["hash"] = words[array.offset : array.offset + len(rows), :2]
        found["row"] = rows
        place = (found["hash"][:, 0] >> np.uint64(48)) * np.uint64(count) >> np.uint64(16)
        for number in np.unique(place).tolist():
            found[place == number].tofile(files[number])
    drops = [np.zeros(0, DROP)]
    for file in files:
        file.close()
        found = np.fromfile(file.name, HASHED)
        found = found[np.lexsort((found["row"], found["hash"][:, 1], found["hash"][:, 0]))]
        again = np.zeros(len(found), bool)
        again[1:] = (found["hash"][1:] == found["hash"][:-1]).all(axis=1)
        first_row = found["row"][np.maximum.accumulate(np.where(again, 0, np.arange(len(found))))]
        drops.append(_drops(found["row"][again], first_row[again], -1))
    return np.sort(np.concatenate(drops), order="row")


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
    k = 1
    while k < 6 and count / 2 ** (64 * k // (most + k)) > CHANCE_PAIRS:
        k += 1
    edges = np.linspace(0, 64, most + k + 1).astype(int).tolist()
    blocks = [(1 << end) - (1 << begin) for begin, end in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(blocks, k)]


def _drops(rows: np.ndarray, originals: np.ndarray, distance: np.ndarray | int) -> np.ndarray:
    found = np.zeros(len(rows), DROP)
    found["row"], found["original"], found["distance"] = rows, originals, distance
    return found
