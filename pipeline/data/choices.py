"""What a run leaves out of its datasets: pictures named by their keys, and those whose scores are out of a range.

Which samples of a shard these are is kept as a bit for each in the run's own shard table, so that the order needs to
know no more of them than each shard's size.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from data_prep.schema import REJECTS, fingerprint, work_folder
from models.config import InputError
from models.files import as_os_errors
from pipeline.data.config import DataConfig
from pipeline.data.datasets import LEFT_OUT, Dataset, Mixture, compute

# It ships no types.
csv: Any = pyarrow.csv


class Choice:
    """Pictures that are left out, or with `stay` those that are not, by their keys."""

    def __init__(self, name: str, keys: list[np.ndarray], stay: bool = False):
        self.name, self.stay, self.left_out = name, stay, 0
        every = np.sort(np.concatenate([np.zeros(0, "S1"), *keys]))
        # np.unique takes ten times as long for bytes.
        again = np.flatnonzero(every[1:] == every[:-1]) + 1
        self.keys = np.delete(every, again)  # bytes (n,)
        self.found = np.zeros(len(self.keys), bool)

    def wants(self, first: bytes, last: bytes) -> bool:
        """Whether pictures with keys from `first` to `last` may be left out."""
        low, high = np.searchsorted(self.keys, first), np.searchsorted(self.keys, last, "right")
        return self.stay or bool(low < high)

    def leaves_out(self, keys: np.ndarray) -> np.ndarray:
        """bool (n,)"""
        if not len(self.keys):
            return np.full(len(keys), self.stay)
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        hit = self.keys[places] == keys
        self.found[places[hit]] = True
        return hit != self.stay

    @property
    def said(self) -> str:
        strays = int((~self.found).sum())
        more = f"; {strays:,} of its {len(self.keys):,} keys are of no picture" if strays else ""
        return f"{self.name}: {self.left_out:,} pictures left out{more}"


def choose(mixture: Mixture, config: DataConfig) -> Mixture:
    """The mixture without what the files now say is left out, and with all else; raises InputError."""
    choices = [*_excluded(config), *_filtered(config)]
    if not choices and not mixture.left_out:
        return mixture
    datasets = [_choose(dataset, choices) for dataset in mixture.datasets]
    left_out = {choice.name: choice.left_out for choice in choices if choice.left_out}
    chosen = Mixture(datasets, mixture.arrangement, mixture.mix, left_out)
    chosen.notes += [choice.said for choice in choices]
    return chosen


def stamps(config: DataConfig) -> list[str]:
    """What tells that neither of the files has changed; a store's listing from before would not."""
    found = list[str]()
    for path in filter(None, (config.exclude, config.scores)):
        # What keeps it from being read is said where it is read.
        with contextlib.suppress(OSError), as_os_errors():
            filesystem, name = fsspec.url_to_fs(path, use_listings_cache=False)
            found.append(str(filesystem.info(name)))
    return found


def _excluded(config: DataConfig) -> Iterator[Choice]:
    if config.exclude:
        keys = [key_bytes(t["key"]) for t in _read("data.exclude", config.exclude, [])]
        yield Choice("data.exclude", keys)


def _filtered(config: DataConfig) -> Iterator[Choice]:
    """Choices by scores: of those that reject pictures without one, keys of the others; else of what is out of range."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in config.filters}
    for table in _read("data.scores", config.scores, list(found)) if config.scores else ():
        keys = key_bytes(table["key"])
        for name, wanted in config.filters.items():
            # Those without a number are taken, or not, like those that are not named.
            takes = wanted.takes_numbers(table[name].to_numpy())
            found[name].append(keys[takes == (wanted.missing == "reject")])
    for name, wanted in config.filters.items():
        yield Choice(f"data.filters.{name}", found[name], wanted.missing == "reject")


@contextlib.contextmanager
def _opened(url: str) -> Iterator[Any]:
    """A file here or on a store; whatever goes wrong there is an OSError."""
    with as_os_errors(), fsspec.open(url, "rb") as file:
        yield file


def _read(where: str, path: str, numbers: list[str]) -> Iterator[pa.Table]:
    """The columns `key` and of `numbers`, float64 with NaN for none, a piece at a time; raises InputError."""
    kinds = {"key": pa.string()} | dict.fromkeys(numbers, pa.float64())
    kind = PurePath(path).suffix
    try:
        with _opened(path) as file:
            # An empty file of lines leaves nothing out.
            if kind == ".parquet":
                batches = pq.ParquetFile(file).iter_batches(columns=list(kinds))
            else:
                names = csv.ReadOptions(column_names=None if kind == ".csv" else ["key"])
                options = names, None, csv.ConvertOptions(column_types=kinds)
                batches = csv.open_csv(file, *options) if file.read(1) and not file.seek(0) else ()
            for batch in batches:
                if lacking := kinds.keys() - set(batch.schema.names):
                    raise InputError(f"{where}: {path}: got no column {min(lacking)}")
                table = pa.Table.from_batches([batch]).select(list(kinds)).cast(pa.schema(kinds))
                yield table.filter(table["key"].is_valid())
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{where}: {path}: {error}") from error


def _choose(dataset: Dataset, choices: list[Choice]) -> Dataset:
    """A dataset without what is left out, and with what was left out before and is not any more."""
    place = dataset.table.schema.get_field_index(LEFT_OUT.name)
    table = dataset.table.set_column(place, LEFT_OUT, pa.nulls(len(dataset.table), LEFT_OUT.type))
    rows = dict(zip(table["path"].to_pylist(), itertools.count(), strict=False))
    whole = replace(dataset, table=table)
    bits: list[bytes | None] = [None] * len(rows)
    for path, keys in _keys(whole, choices) if choices else ():
        facts = table.slice(row := rows[path], 1).to_pylist()[0]
        each = dataset.manifest.samples_per_picture[facts["split"]]
        if (count := facts["num_samples"] + len(facts["missing"] or ())) != len(keys) * each:
            raise InputError(
                f"{dataset.source.path}/{path}: work/ knows {len(keys)} pictures of it, expected {count // each}. Remedy: "
                "the work/ with which it was prepared"
            )
        pictures = whole.kept(row) // each
        there, out = np.bincount(pictures, minlength=len(keys)) > 0, np.zeros(len(keys), bool)
        for choice in choices:
            more = choice.leaves_out(keys) & there & ~out
            choice.left_out += int(more.sum())
            out |= more
        if (samples := out[pictures]).any():
            bits[row] = np.packbits(samples).tobytes()
    column = pa.array(bits, LEFT_OUT.type)
    if dataset.table["left_out"].combine_chunks().equals(column):
        return dataset
    said: dict[str, Any] = {name: table[name].to_pylist() for name in ("path", "sha256")}
    said |= {"manifest": dataset.manifest.fingerprint, "left_out": [b and b.hex() for b in bits]}
    table = table.set_column(place, LEFT_OUT, column)
    return replace(dataset, table=table, identity=fingerprint(said))


def _keys(dataset: Dataset, choices: list[Choice]) -> Iterator[tuple[str, np.ndarray]]:
    """Path and keys of each shard of which pictures may be left out, from the plan in the base's work/.

    Raises InputError where that is not there.
    """
    place, known = dataset.folders[0].source.path, set(dataset.table["path"].to_pylist())
    try:
        with _opened(f"{place}/{REJECTS}") as file:
            rejected = np.sort(key_bytes(pq.read_table(file, columns=["key"])["key"]))
        for generation in sorted(set(dataset.table["generation"].to_pylist())):
            work = f"{place}/{work_folder(generation)}"
            with _opened(f"{work}/shard_list.parquet") as file:
                paths = pq.read_table(file, columns=["path"])["path"].to_pylist()
            done = 0
            for number in itertools.count():
                if done == len(paths):
                    break
                with _opened(f"{work}/plan/{number:06d}.parquet") as file:
                    plan = pq.ParquetFile(file)
                    for group in range(plan.num_row_groups):
                        path = paths[done + group]
                        ends = plan.metadata.row_group(group).column(0).statistics
                        first, last = ends.min.encode(), ends.max.encode()
                        if path in known and any(choice.wants(first, last) for choice in choices):
                            keys = key_bytes(plan.read_row_group(group, ["key"])["key"])
                            low, high = np.searchsorted(rejected, [first, last])
                            yield path, keys[~np.isin(keys, rejected[low : high + 1])]
                done += plan.num_row_groups
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{place}: its work/ and rejects.parquet, from which the keys of its pictures are read for data.exclude and "
            f"data.filters, cannot be read: {error}. Remedy: copy {place}/work too"
        ) from error


def key_bytes(keys: pa.ChunkedArray) -> np.ndarray:
    """Keys as numpy compares them, bytes (n,)."""
    texts = compute.utf8_trim_whitespace(keys.fill_null("")).combine_chunks()
    longest = compute.max(compute.binary_length(texts)).as_py() or 1
    # All of one length lie one behind the other.
    data = compute.ascii_rpad(texts, longest, "\0").buffers()[2]
    return np.frombuffer(data or b"", f"S{longest}", len(texts))
