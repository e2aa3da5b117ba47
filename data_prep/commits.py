"""Which shards are made: each has a commit, a record that is written when all else of it is on disk."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_prep.plan import ShardSpec
from data_prep.shards import WORK
from data_prep.storage import find_files

# Threads that read commits, each of which costs an object store's round trip.
READERS = 16


def commit_name(shard: str) -> str:
    return shard.removeprefix("shards/").removesuffix(".tar") + ".json"


def commit_path(dataset: Path, shard: str) -> Path:
    """The record that says that a shard is whole: written last."""
    return dataset / WORK / "commits" / commit_name(shard)


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


def read_commits(dataset: Path, shards: list[ShardSpec]) -> list[dict[str, Any] | None]:
    """The commit of every shard, None where it is to be made."""
    there = find_files(dataset / WORK / "commits")

    def read(spec: ShardSpec) -> dict[str, Any] | None:
        return read_commit(dataset, spec.path) if commit_name(spec.path) in there else None

    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(read, shards))
