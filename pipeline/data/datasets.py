"""A run's datasets as they stood at one moment, checked, and the record of which epoch uses which."""

import contextlib
import json
import tarfile
import threading
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data_prep.schema import (
    EMPTY_CAPTION,
    MANIFEST,
    SHARD_SCHEMA,
    SHARD_TABLE,
    Manifest,
    fingerprint,
    index_path,
    parse_manifest,
    read_index,
    read_manifest,
    read_shard_table,
)
from models.config import InputError, differences
from models.files import file_sha256, write_text
from models.networks import NetworkConfig
from pipeline.data.cache import ShardCache
from pipeline.data.config import DatasetConfig
from pipeline.data.order import Part

compute: Any = pyarrow.compute  # which ships no types
SHARD_NAME = r"^shards/[\w-]+/[\w.-]+\.tar$"
SNAPSHOTS = "snapshots"  # of a run: its Record
DTYPES = ("float16", "float32", "int64")
Bucket = tuple[int, int]  # height and width of the pictures, pixels


Difference = tuple[str, Any, Any]  # what, got, expected


def check_fits(manifest: Manifest, where: str, model: NetworkConfig) -> None:
    """Raise InputError with every difference between a dataset and what a network takes; a size of 0 takes any."""
    records, codec = manifest.text.roles.values(), manifest.codec
    pairs: list[Difference] = [("latent channels", codec.channels, model.latent_channels)]
    if model.text_dim:
        pairs.append(("text width", max((r.dim for r in records), default=0), model.text_dim))
    if model.pooled_dim:
        pairs.append(("pooled text width", sum(r.pooled_dim for r in records), model.pooled_dim))
    if model.num_classes:
        pairs.append(("class labels", "label" in manifest.members, True))
    if getattr(model, "alignment", None) is not None:
        # The square of pixels that one of the network's patches stands for.
        vision, cell = manifest.vision, model.latent_multiple * codec.downscale
        pairs.append(("vision_encoder.patch_pixels", vision and vision.patch_pixels, cell))
    for bucket in manifest.buckets:
        sides = bucket.height // codec.downscale, bucket.width // codec.downscale
        if any(side % model.latent_multiple for side in sides):
            what = f"latents of bucket {bucket.height}x{bucket.width}"
            pairs.append((what, sides, f"multiples of {model.latent_multiple}"))
    remedy = "change the config, or prepare the pictures again with what it names"
    _refuse(f"{where}: does not fit the training config", pairs, remedy)


def check_mixes(dataset: "Dataset", first: "Dataset") -> None:
    """Raise InputError with all that keeps a dataset from being mixed with a run's first one."""
    got, want = _mixed_by(dataset.manifest), _mixed_by(first.manifest)
    pairs = [(key, *both) for key, both in differences(got, want).items()]
    what = f"{dataset.source.path}: does not fit {first.source.path}, with which it is to be mixed"
    _refuse(what, pairs, "prepare both with the same encoders, or train on one of them")


def _mixed_by(manifest: Manifest) -> dict[str, Any]:
    """What must be the same of datasets that are mixed; where the encoders lie and their dtype need not."""
    place = {"path", "dtype"}
    rounding = {"mean_error", "worst_error"}
    return {
        "members": [(name, m.dtype, m.shape) for name, m in manifest.members.items()],
        "codec": manifest.codec.model_dump(exclude=place),
        "text": manifest.text.model_dump(exclude={"roles": {"__all__": place | rounding}}),
        "vision": manifest.vision and manifest.vision.model_dump(exclude=place),
    }


def _refuse(what: str, pairs: list[Difference], remedy: str) -> None:
    """Raise InputError where any of what was got is not what is expected."""
    lines = [f"  {name}: got {got}, expected {want}" for name, got, want in pairs if got != want]
    if lines:
        raise InputError("\n".join([f"{what}:", *lines, f"Remedy: {remedy}."]))


@dataclass(frozen=True)
class Dataset:
    """One dataset as it stood at one moment; `home` holds its small files, here or in the cache."""

    name: str
    source: DatasetConfig
    home: Path
    manifest: Manifest
    table: pa.Table
    identity: str  # sha256 of manifest and shard table
    cache: ShardCache | None = None


def read_dataset(name: str, source: DatasetConfig, cache: ShardCache | None) -> Dataset:
    """The dataset as it is now; raises InputError if it is not whole, or names a shard outside itself."""
    home, attempt = Path(source.path), 0
    while True:
        if cache:
            home = cache.folder
            for file in (MANIFEST, SHARD_TABLE, EMPTY_CAPTION):
                with contextlib.suppress(FileNotFoundError):
                    cache.refresh(file)
        manifest = read_manifest(home)
        found = file_sha256(home / SHARD_TABLE)
        if manifest.files.get(SHARD_TABLE, found) == found:
            break
        attempt += 1  # both may be replaced between one look and the next
        if attempt == 3:
            raise InputError(f"{source.path}: {SHARD_TABLE} is not the one that {MANIFEST} names")
        time.sleep(1)
    table = read_shard_table(home)
    if not compute.all(compute.match_substring_regex(table["path"], SHARD_NAME)).as_py():
        raise InputError(
            f"{source.path}: {SHARD_TABLE} holds a path that is not shards/BUCKET/NAME.tar"
        )
    _check_members(manifest, home / MANIFEST)
    identity = fingerprint({"manifest": manifest.fingerprint, SHARD_TABLE: found})
    return Dataset(name, source, home, manifest, table, identity, cache)


def _check_members(manifest: Manifest, where: Path) -> None:
    """Raise InputError unless the members are what the loader reads: whoever wrote the file may be anyone."""
    roles, members = manifest.text.roles, manifest.members
    texts = [(n, m.dtype, m.shape) for n, m in members.items() if n in roles]
    expected = [(n, "float16", (None, r.dim)) for n, r in roles.items()]
    if texts != expected:
        raise InputError(f"{where}: text members got {texts}, expected {expected}")
    for name, member in members.items():
        grids = {"moments", "vision"} if manifest.vision else {"moments"}
        free = 2 if name in grids else int(name in roles)
        sides = [side for side in member.shape if side is not None]
        if (
            member.dtype not in DTYPES
            or len(member.shape) - len(sides) != free
            or min(sides, default=1) < 1
        ):
            raise InputError(
                f"{where}: member {name}, {member}, cannot be read; dtypes: {', '.join(DTYPES)}"
            )


class Snapshot:
    """The datasets of a run as they stood at one moment, and one shard table of all."""

    def __init__(self, datasets: list[Dataset]):
        self.datasets, self.manifest = datasets, datasets[0].manifest
        for other in datasets[1:]:
            check_mixes(other, datasets[0])
        sizes = [len(dataset.table) for dataset in datasets]
        self.dataset = np.repeat(np.arange(len(datasets)), sizes)
        self.table = pa.concat_tables([dataset.table for dataset in datasets]).combine_chunks()
        self.sizes, self.bytes = self._column("num_samples"), self._column("bytes")
        self.heights, self.widths = self._column("height"), self._column("width")
        self.heldout = compute.equal(self.table["split"], "heldout").to_numpy()
        self.first_id = np.cumsum(self.sizes) - self.sizes

    def _column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy().astype(np.int64)

    def identities(self) -> dict[str, str]:
        return {dataset.name: dataset.identity for dataset in self.datasets}

    def text(self, column: str, shard: int) -> str:
        return self.table[column][shard].as_py()

    def locate(self, sample_id: int) -> dict[str, Any]:
        """Where a sample lies: dataset, shard and row; key and caption too where the shard is on this machine."""
        shard = int(np.searchsorted(self.first_id, sample_id, "right")) - 1
        row, path = sample_id - int(self.first_id[shard]), self.text("path", shard)
        dataset = self.datasets[self.dataset[shard]]
        found = {"dataset": dataset.name, "shard": path, "row": row}
        tar, index = dataset.home / path, dataset.home / index_path(path)
        if tar.is_file() and index.is_file():
            offset = int(read_index(index)[row, 0, 0])
            found["key"], found["caption"] = _key_and_caption(tar, offset)
        return found

    def bucket(self, shard: int) -> Bucket:
        return int(self.heights[shard]), int(self.widths[shard])

    def buckets(self, heldout: bool = False) -> dict[Bucket, list[Part]]:
        """One split by bucket and dataset, in the order of the table."""
        kept = (self.heldout == heldout) & (self.sizes > 0)
        found: dict[Bucket, list[Part]] = {}
        sides = self.heights << 32 | self.widths
        for both in np.unique(sides[kept]).tolist():
            mine = kept & (sides == both)
            for number, dataset in enumerate(self.datasets):
                shards = np.flatnonzero(mine & (self.dataset == number))
                if len(shards):
                    part = Part(shards, self.sizes[shards], Fraction(str(dataset.source.repeat)))
                    found.setdefault((both >> 32, both & 0xFFFFFFFF), []).append(part)
        return found

    def shapes(self, bucket: Bucket) -> list[tuple[int, ...]]:
        """Every member's shape in a bucket; of a text, the shape of one token."""
        shapes = [self.manifest.shape_in_bucket(name, *bucket) for name in self.manifest.members]
        return [tuple(side for side in shape if side is not None) for shape in shapes]


def _key_and_caption(path: Path, offset: int) -> tuple[str, str]:
    """The sample of a tar to which the byte at `offset` belongs; an empty caption where it has no KEY.json."""
    with tarfile.open(path) as tar:
        member = next(m for m in tar if m.offset_data <= offset < m.offset_data + m.size)
        key = member.name.split(".", 1)[0]
        facts = next((m for m in tar if m.name == f"{key}.json"), None)
        file = tar.extractfile(facts) if facts else None
        return key, str(json.load(file).get("caption", "")) if file else ""


class Record:
    """Which snapshot each epoch of a run uses, in a folder that all ranks see; rank 0 decides.

    A run that is killed and resumed finds its own decisions here and repeats them.
    """

    def __init__(self, folder: Path, rank: int, stop: threading.Event):
        self.folder, self.rank, self.stop = folder, rank, stop

    def entries(self) -> list[dict[str, Any]]:
        """What was decided, in the order of the epochs: epoch, first_step and the datasets' identities."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("epoch_*.json"))]

    def entry(self, epoch: int) -> dict[str, Any] | None:
        path = self.folder / f"epoch_{epoch:08d}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def decide(self, epoch: int, first_step: int, snapshot: Snapshot) -> dict[str, Any]:
        """Rank 0: let the run use `snapshot` from `epoch` on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for dataset in snapshot.datasets:
            path = self.folder / dataset.identity
            if not path.with_suffix(".json").is_file():
                pq.write_table(dataset.table, path.with_suffix(".parquet"))
                write_text(path.with_suffix(".json"), dataset.manifest.model_dump_json())
        entry = {"epoch": epoch, "first_step": first_step, "datasets": snapshot.identities()}
        write_text(self.folder / f"epoch_{epoch:08d}.json", json.dumps(entry))
        return entry

    def wait(self, epoch: int, timeout_s: float = 600) -> dict[str, Any]:
        """Other ranks: what rank 0 decided for an epoch."""
        end = time.monotonic() + timeout_s
        while (entry := self.entry(epoch)) is None:
            if time.monotonic() > end or self.stop.wait(0.05):
                raise TimeoutError(
                    f"{self.folder}: rank 0 has not settled the data of epoch {epoch}"
                )
        return entry

    def load(self, identities: dict[str, str], now: Snapshot) -> Snapshot:
        """A recorded snapshot; raises InputError where the datasets of today do not hold all its shards."""
        if list(identities) != [dataset.name for dataset in now.datasets]:
            raise InputError(
                f"data.datasets: got {[d.name for d in now.datasets]}, expected {list(identities)}, "
                f"as {self.folder} records of this run. Remedy: a new run, or the old datasets."
            )
        if identities == now.identities():
            return now
        datasets = []
        for dataset in now.datasets:
            path = self.folder / identities[dataset.name]
            record = path.with_suffix(".json")
            manifest = parse_manifest(record.read_text(), record)
            table = pq.read_table(path.with_suffix(".parquet"), schema=SHARD_SCHEMA)
            if not _contains(dataset.table, table):
                raise InputError(
                    f"{dataset.source.path}: was prepared again with other shards since this run began. "
                    "Remedy: a new run, or the dataset as it was."
                )
            identity = identities[dataset.name]
            datasets.append(replace(dataset, manifest=manifest, table=table, identity=identity))
        return Snapshot(datasets)


def _contains(table: pa.Table, part: pa.Table) -> bool:
    """Whether every shard of `part` is in `table`, by path and content."""
    keys = [compute.binary_join_element_wise(t["path"], t["sha256"], " ") for t in (table, part)]
    return compute.all(compute.is_in(keys[1], value_set=keys[0])).as_py()
