"""Which shards are to be made, and which are made: the plan's list, the commits, and how one leads to the other."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.plan import SHARD_LIST_SCHEMA
from data_prep.shards import WORK, read_table
from data_prep.storage import find_files
from data_prep.workers import LOST, Actors

COMMITS = "commits"  # of the working folder
READERS = 16  # of commits, which on an object store wait for each other's round trips


@dataclass(frozen=True)
class ShardSpec:
    """One line of the plan's list."""

    path: str
    split: str
    height: int
    width: int
    num_planned: int  # pictures


def commit_name(shard: str) -> str:
    return shard.removeprefix("shards/").removesuffix(".tar") + ".json"


def commit_path(dataset: Path, shard: str) -> Path:
    """The record that says that a shard is whole: written last."""
    return dataset / WORK / COMMITS / commit_name(shard)


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


def shard_list(dataset: Path) -> list[ShardSpec]:
    table = read_table(dataset / WORK / "shard_list.parquet", SHARD_LIST_SCHEMA)
    return [ShardSpec(**row) for row in table.to_pylist()]


def read_commits(dataset: Path, shards: list[ShardSpec]) -> list[dict[str, Any] | None]:
    """The commit of every shard, None where it is to be made."""
    there = find_files(dataset / WORK / COMMITS)

    def read(spec: ShardSpec) -> dict[str, Any] | None:
        return read_commit(dataset, spec.path) if commit_name(spec.path) in there else None

    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(read, shards))


def encode_shards(actors: Actors, todo: list[tuple[ShardSpec, int]]) -> Iterator[dict[str, Any]]:
    """The commit of every shard, in any order; a picture that kills its encoders is rejected."""
    lost = list[tuple[ShardSpec, int]]()
    for (spec, number), commit in actors.run("encode_shard", ([shard] for shard in todo)):
        if commit is LOST:
            lost.append((spec, number))
        else:
            yield commit
    # Each picture alone shows which of them kill. The others are then encoded as if those had been
    # rejected earlier, so that a shard's bytes depend on its pictures and not on what its search met.
    deadly: dict[int, list[int]] = {number: [] for _, number in lost}
    pictures = ([(*shard, place) for place in range(shard[0].num_planned)] for shard in lost)
    for (_, number, place), answer in actors.run("try_picture", pictures):
        if answer is LOST:
            deadly[number].append(place)
    again = ([(spec, number, sorted(deadly[number]))] for spec, number in lost)
    for (spec, *_), commit in actors.run("encode_shard", again):
        if commit is LOST:
            raise RuntimeError(
                f"{spec.path}: kills its encoders, though none of its pictures does alone. Remedy: where "
                "memory is short, lower encode.batch_size."
            )
        yield commit
