"""The eras of a run: which samples its epochs use. One ends where a dataset has grown, or others are left out."""

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.schema import SHARD_SCHEMA, Manifest, parse_manifest
from models.config import InputError
from models.files import write_text
from pipeline.data.choices import choose, stamps
from pipeline.data.config import DataConfig
from pipeline.data.datasets import LEFT_OUT, Dataset, Mixture, check_mixes, check_same, compute
from pipeline.data.stacks import CacheOf, open_dataset

log = logging.getLogger(__name__)

ERAS = "eras"
"""Folder of a run that holds its eras."""

TABLE_SCHEMA = SHARD_SCHEMA.append(LEFT_OUT)

WAIT_S = 6 * 3600.0
"""Longest wait of a rank for rank 0 to settle an epoch: a look at every picture. That it lives the watchdog sees."""


class Eras:
    """Every era so far; rank 0 settles each epoch's data in a folder that all ranks see.

    A run that is killed and resumed finds its own decisions there and repeats them. Without such a
    folder, or where `settles` is False, each run uses the datasets as they are.
    """

    settles = True

    def __init__(
        self,
        folder: Path | None,
        rank: int,
        stop: threading.Event,
        config: DataConfig,
        cache_of: CacheOf,
        num_classes: int = 0,
    ):
        """`stop` ends the waiting for rank 0.

        Data that need more classes than `num_classes` are not taken up, where that is not 0.
        """
        self.folder, self.rank, self.stop, self.config = folder, rank, stop, config
        self.cache_of, self.num_classes = cache_of, num_classes
        self._chosen: tuple[Mixture, dict[str, str], list[str]] | None = None
        settled = settled_epochs(folder)
        self.now = self._look() if settled else self._choose(self._look())
        self.entries = [self._entry(0, 0)]
        for entry in settled:
            self._follow(entry)

    def _look(self) -> Mixture:
        """The datasets as they are now, with all their samples."""
        sources = self.config.sources.items()
        datasets = [open_dataset(name, source, self.cache_of) for name, source in sources]
        return Mixture(datasets, self.config.text, self.config.mix)

    def _choose(self, mixture: Mixture) -> Mixture:
        """The mixture without what is now left out; where nothing has changed since, what it was at the last call.

        Choosing among 10 million pictures takes 7 s.
        """
        given, now = mixture.identities(), stamps(self.config)
        if self._chosen is not None:
            chosen, before, files = self._chosen
            if files == now and given in (before, chosen.identities()):
                return chosen
        chosen = choose(mixture, self.config)
        self._chosen = chosen, given, now
        return chosen

    def _entry(self, epoch: int, first_step: int) -> dict[str, Any]:
        """What is settled of an epoch; `left_out` counts pictures by what leaves them out."""
        data = {"datasets": self.now.identities(), "left_out": self.now.left_out}
        return {"epoch": epoch, "first_step": first_step} | data

    def _follow(self, entry: dict[str, Any]) -> None:
        """Take in what was settled of an epoch: one before the last era's is known already."""
        if entry["epoch"] == 0:
            self.entries[0] = entry
        elif entry["epoch"] > (last := self.entries[-1])["epoch"]:
            self.entries += [entry] * (entry["datasets"] != last["datasets"])

    def settle(self, epoch: int, first_step: int) -> bool:
        """Agree with all ranks on an epoch's data; whether that changed the known eras.

        Later epochs' are those of the first unless the datasets may grow, or samples are left out.
        """
        left_out = self.entries[-1].get("left_out")
        changes = self.config.grow or self.config.exclude or self.config.filters or left_out
        if self.folder is None or not self.settles or (epoch and not changes):
            return False
        before, path = list(self.entries), self.folder / f"epoch_{epoch:08d}.json"
        if self.rank == 0 and not path.is_file():
            if epoch:
                self.now = self._next()
            self._decide(path, self._entry(epoch, first_step))
        end = time.monotonic() + WAIT_S
        while not path.is_file():
            if time.monotonic() > end or self.stop.wait(0.05):
                raise TimeoutError(f"{path}: rank 0 has not settled the data of epoch {epoch}")
        self._follow(json.loads(path.read_text()))
        return self.entries != before

    def _next(self) -> Mixture:
        """The datasets as they are now, or as they were in the last era where they hold something else."""
        last = self.mixture(len(self.entries) - 1)
        try:
            found = self._look() if self.config.grow else last
            for old, new in zip(last.datasets, found.datasets, strict=True):
                if new.identity != old.identity:
                    check_mixes(new, old)
                    _check_contains(new, old.manifest, old.table)
                    self._check_classes(new)
            return self._choose(found)
        except InputError as error:
            log.warning("warning: data: not taken up, the run goes on with what it has: %s", error)
            return last

    def _check_classes(self, dataset: Dataset) -> None:
        last = max(dataset.manifest.generations, key=lambda generation: generation.num_labels)
        if self.num_classes and last.num_labels > self.num_classes:
            raise InputError(
                f"generation {last.number} of {dataset.source.path} has {last.num_labels} classes, "
                f"model.num_classes is {self.num_classes}. Remedy: a new run with {last.num_labels} that starts "
                "from this one."
            )

    def _decide(self, path: Path, entry: dict[str, Any]) -> None:
        """Let the run use the datasets as they are now from an epoch on."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for dataset in self.now.datasets:
            kept = path.with_name(dataset.identity)
            if not kept.with_suffix(".json").is_file():
                pq.write_table(dataset.table, kept.with_suffix(".parquet"))
                # Its fingerprint is of what its file says, which an older version wrote with fewer fields.
                said = dataset.manifest.model_dump_json(exclude_unset=True)
                write_text(kept.with_suffix(".json"), said)
        write_text(path, json.dumps(entry))

    def mixture(self, number: int) -> Mixture:
        """An era's data; raises InputError where the datasets no longer hold all its shards."""
        entry = self.entries[number]
        identities, left_out = entry["datasets"], entry.get("left_out")
        if identities != self.now.identities():
            self.now = self._look()
        if self.folder is None or identities == self.now.identities():
            return self.now
        if list(identities) != [dataset.name for dataset in self.now.datasets]:
            raise InputError(
                f"data.datasets: got {[d.name for d in self.now.datasets]}, expected {list(identities)}, "
                f"as {self.folder} records of this run. Remedy: a new run, or the old datasets."
            )
        datasets = []
        for dataset in self.now.datasets:
            identity = identities[dataset.name]
            record = self.folder / f"{identity}.json"
            manifest = parse_manifest(record.read_text(), record)
            table = pq.read_table(record.with_suffix(".parquet"), schema=TABLE_SCHEMA)
            _check_contains(dataset, manifest, table)
            datasets.append(dataset.recorded(manifest, table, identity))
        return Mixture(datasets, self.now.arrangement, self.now.mix, left_out)


def settled_epochs(folder: Path | None) -> list[dict[str, Any]]:
    """What a run settled of its epochs, in their order."""
    paths = sorted(folder.glob(f"epoch_{'[0-9]' * 8}.json")) if folder else []
    return [json.loads(path.read_text()) for path in paths]


def left_out_since(folder: Path) -> list[str]:
    """What a run left out, as often as that changed: the epoch, and pictures by what left them out."""
    said, before = list[str](), dict[str, int]()
    for entry in settled_epochs(folder):
        if (now := entry.get("left_out", {})) != before:
            counts = ", ".join(f"{count:,} by {name}" for name, count in now.items()) or "none"
            said.append(f"from epoch {entry['epoch']} on {counts}")
            before = now
    return said


def recorded_manifest(folder: Path) -> Manifest | None:
    """The manifest of the first dataset that a run began with; None where its eras record none."""
    for entry in settled_epochs(folder)[:1]:
        record = folder / f"{next(iter(entry['datasets'].values()))}.json"
        return parse_manifest(record.read_text(), record)
    return None


def _check_contains(dataset: Dataset, recorded: Manifest, part: pa.Table) -> None:
    """Raise InputError unless it is the recorded dataset, and has every shard of `part` by path and content."""
    check_same(dataset.manifest, recorded, dataset.source.path)
    keys = [
        compute.binary_join_element_wise(t["path"], t["sha256"], " ") for t in (dataset.table, part)
    ]
    if not compute.all(compute.is_in(keys[1], value_set=keys[0])).as_py():
        raise InputError(
            f"{dataset.source.path}: was prepared again with other shards since this run began. "
            "Remedy: a new run, or the dataset as it was."
        )
