"""A run's datasets as they stand at one moment, checked, and mixed into one shard table."""

import bisect
import json
import tarfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from data_prep.schema import (
    EMPTY_CAPTION,
    MANIFEST,
    SHARD_TABLE,
    Manifest,
    fingerprint,
    index_path,
    read_index,
    read_manifest,
    read_shard_table,
)
from models.config import InputError, differences
from models.files import file_sha256
from models.text_conventions import Arrangement, width_stored
from pipeline.data.cache import ShardCache
from pipeline.data.config import DatasetConfig
from pipeline.data.order import Part

# pyarrow.compute ships no types.
compute: Any = pyarrow.compute
LEFT_OUT = pa.field("left_out", pa.binary())
"""Column of a run's own shard tables: a bit for each of a shard's samples, null where none is left out."""
SHARD_NAME = r"^shards/[\w-]+/[\w.-]+\.tar$"
DTYPES = ("uint8", "int8", "float16", "bfloat16", "float32", "int64")

Bucket = tuple[int, int]
"""Height and width of the pictures in pixels."""

Difference = tuple[str, Any, Any]
"""What differs, what was got, what is expected."""


def check_mixes(dataset: "Dataset", first: "Dataset") -> None:
    """Raise InputError with all that keeps a dataset from being mixed with the run's first one."""
    what = f"{dataset.source.path}: does not fit {first.source.path}, with which it is to be mixed"
    pairs = encoded_otherwise(dataset.manifest, first.manifest)
    refuse(what, pairs, "prepare both with the same encoders, or train on one of them")


def check_same(manifest: Manifest, recorded: Manifest, where: str) -> None:
    """Raise InputError unless a dataset is the recorded one, wherever it lies: it may have grown since."""
    known = [generation.fingerprint for generation in recorded.generations if generation.complete]
    got = [generation.fingerprint for generation in manifest.generations[: len(known)]]
    pairs = [("id", manifest.id, recorded.id), ("generations", got, known)]
    pairs += encoded_otherwise(manifest, recorded)
    remedy = "data.path=FOLDER of that dataset, which may have moved, or a new run"
    refuse(f"{where}: is another dataset than the run's", pairs, remedy)


def encoded_otherwise(manifest: Manifest, other: Manifest) -> list[Difference]:
    pairs = differences(_encoded_by(manifest), _encoded_by(other))
    return [(key, *both) for key, both in pairs.items()]


def _encoded_by(manifest: Manifest) -> dict[str, Any]:
    """What mixed datasets have in common: not the encoders' paths, dtypes and measured errors."""
    place, rounding = {"path", "dtype"}, {"mean_error", "worst_error"}
    return {
        "members": [(name, m.dtype, m.shape) for name, m in manifest.members.items()],
        "codec": manifest.codec.model_dump(exclude=place),
        "text": manifest.text.model_dump(exclude={"roles": {"__all__": place | rounding}}),
        "vision": manifest.vision and manifest.vision.model_dump(exclude=place),
    }


def refuse(what: str, pairs: list[Difference], remedy: str) -> None:
    """Raise InputError with every pair that is not equal; return where all are."""
    lines = [f"  {name}: got {got}, expected {want}" for name, got, want in pairs if got != want]
    if lines:
        raise InputError("\n".join([f"{what}:", *lines, f"Remedy: {remedy}."]))


@dataclass(frozen=True)
class Dataset:
    """One dataset as it stands at one moment: a folder, or a base and its layers.

    `home` holds its small files, here or in the cache; `identity` hashes manifest and shard table.
    """

    name: str
    source: DatasetConfig
    home: Path
    manifest: Manifest
    table: pa.Table
    identity: str
    cache: ShardCache | None = None
    parts: tuple["Dataset", ...] = ()
    """The base and its layers, whose tables have the rows of this one's; none of a single folder."""
    owners: dict[str, int] = field(default_factory=dict)
    """The part that each member is read from."""
    captions_of: int = 0
    """The part whose captions the text is of."""
    note: str = ""
    """What is to be said of layers that reach less far than their base."""

    @property
    def folders(self) -> tuple["Dataset", ...]:
        return self.parts or (self,)

    @property
    def is_local(self) -> bool:
        return all(folder.cache is None for folder in self.folders)

    def folder_of(self, member: str) -> "Dataset":
        return self.folders[self.owners.get(member, 0)]

    def kept(self, row: int) -> np.ndarray:
        """The rows of a shard's index that every part has and that are not left out: those of its samples."""
        facts = self.table.slice(row, 1).to_pylist()[0]
        missing = np.array(facts["missing"] or (), np.int64)
        rows = np.delete(np.arange(facts["num_samples"] + len(missing)), missing)
        left_out = np.frombuffer(facts["left_out"] or bytes(-(-len(rows) // 8)), np.uint8)
        return rows[np.unpackbits(left_out, count=len(rows)) == 0]

    def recorded(self, manifest: Manifest, table: pa.Table, identity: str) -> "Dataset":
        """The dataset as it was when a run recorded it, of which all shards are still there."""
        rows = compute.index_in(table["path"], value_set=self.table["path"])
        parts = tuple(replace(p, table=p.table.take(rows).combine_chunks()) for p in self.parts)
        return replace(self, manifest=manifest, table=table, identity=identity, parts=parts)


def read_dataset(name: str, source: DatasetConfig, cache: ShardCache | None) -> Dataset:
    """The dataset as it is now; raises InputError if it is not whole, or a path leads out of it."""
    home = cache.folder if cache else Path(source.path)
    for attempt in range(3):
        # Someone may replace the two files between one read and the next.
        time.sleep(min(attempt, 1))
        if cache:
            for file in (MANIFEST, SHARD_TABLE, EMPTY_CAPTION):
                try:
                    cache.refresh(file)
                except FileNotFoundError as error:
                    if file == MANIFEST:
                        raise InputError(
                            f"{source.path}/{file}: no such file. Remedy: run (again) flowmill prepare, or give "
                            "the place of what it wrote"
                        ) from error
        manifest, found = read_manifest(home), file_sha256(home / SHARD_TABLE)
        if manifest.files.get(SHARD_TABLE, found) == found:
            break
    else:
        raise InputError(f"{source.path}: {SHARD_TABLE} is not the one that {MANIFEST} names")
    table = read_shard_table(home)
    table = table.append_column(LEFT_OUT, pa.nulls(len(table), LEFT_OUT.type))
    if not compute.all(compute.match_substring_regex(table["path"], SHARD_NAME)).as_py():
        raise InputError(
            f"{source.path}: {SHARD_TABLE} holds a path that is not shards/BUCKET/NAME.tar"
        )
    check_members(manifest, home / MANIFEST)
    identity = fingerprint({"manifest": manifest.fingerprint, SHARD_TABLE: found})
    return Dataset(name, source, home, manifest, table, identity, cache)


def check_members(manifest: Manifest, where: Path) -> None:
    """Raise InputError unless the loader can read the members: anyone may have written them."""
    roles, members = manifest.text.roles, manifest.members
    texts = [(n, m.dtype, m.shape) for n, m in members.items() if n in roles]
    widths = {name: width_stored(role.store, role.dim) for name, role in roles.items() if role.dim}
    expected = [(name, roles[name].store, (None, width)) for name, width in widths.items()]
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


class Mixture:
    """The datasets of a run as they stand at one moment, in one shard table."""

    def __init__(
        self,
        datasets: list[Dataset],
        arrangement: Arrangement | None = None,
        mix: str = "repeat",
        left_out: dict[str, int] | None = None,
    ):
        """`left_out` counts pictures by what leaves them out."""
        self.datasets, self.arrangement, self.mix = datasets, arrangement, mix
        self.left_out, self.notes = left_out or {}, [f"data: {d.note}" for d in datasets if d.note]
        self.manifest = datasets[0].manifest.arranged(arrangement)
        for other in datasets[1:]:
            check_mixes(other, datasets[0])
        sizes = [len(dataset.table) for dataset in datasets]
        self.dataset = np.repeat(np.arange(len(datasets)), sizes)
        self.table = pa.concat_tables([dataset.table for dataset in datasets]).combine_chunks()
        bits = (int.from_bytes(b or b"").bit_count() for b in self.table["left_out"].to_pylist())
        self.sizes = self._column("num_samples") - np.fromiter(bits, np.int64, len(self.table))
        self.bytes = self._column("bytes")
        self.heights, self.widths = self._column("height"), self._column("width")
        self.heldout = compute.equal(self.table["split"], "heldout").to_numpy()
        self.first_id = np.cumsum(self.sizes) - self.sizes
        self.first_shard = np.cumsum([0, *sizes])
        trained = np.where(self.heldout, 0, self.sizes)
        self.totals = np.bincount(self.dataset, trained, len(datasets)).astype(int).tolist()
        self.repeats = [Fraction(str(dataset.source.repeat)) for dataset in datasets]
        if mix == "equal":
            whole = sum(self.totals)
            self.repeats = [Fraction(whole, max(len(datasets) * n, 1)) for n in self.totals]

    def _column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy().astype(np.int64)

    def dataset_of(self, shard: int) -> Dataset:
        return self.datasets[self.dataset[shard]]

    def row_of(self, shard: int) -> int:
        """The shard's row in its dataset's table."""
        return shard - int(self.first_shard[self.dataset[shard]])

    def doubts(self) -> list[str]:
        """Warnings about what the datasets hold."""
        doubts = [(d.source.path, d.manifest.latent_doubt()) for d in self.datasets]
        return self.notes + [f"warning: {path}: {doubt}" for path, doubt in doubts if doubt]

    def epochs(self, images: int) -> list[str]:
        """What so many pictures of training are of each dataset, where there are several."""
        drawn = float(sum(r * n for r, n in zip(self.repeats, self.totals, strict=True)))
        every = zip(self.datasets, self.totals, self.repeats, strict=True)
        lines = [f"{d.name}: {n:,} pictures, {images * r / drawn:.2f} epochs" for d, n, r in every]
        return lines if len(lines) > 1 else []

    def identities(self) -> dict[str, str]:
        return {dataset.name: dataset.identity for dataset in self.datasets}

    def text(self, column: str, shard: int) -> str:
        return self.table[column][shard].as_py()

    def locate(self, sample_id: int) -> dict[str, Any]:
        """Dataset, shard and row of a sample; key and caption too where its shard is here."""
        shard = int(np.searchsorted(self.first_id, sample_id, "right")) - 1
        row, path = sample_id - int(self.first_id[shard]), self.text("path", shard)
        found = {"dataset": self.dataset_of(shard).name, "shard": path, "row": row}
        if samples := self.keys_and_captions(shard):
            found["key"], found["caption"] = samples[row]
        return found

    def keys_and_captions(self, shard: int) -> list[tuple[str, str]]:
        """Those of every sample of a shard; none where it is not on this machine."""
        dataset, path = self.dataset_of(shard), self.text("path", shard)
        homes = [dataset.folders[part].home for part in (0, dataset.captions_of)]
        files = [(home / path, home / index_path(path)) for home in homes]
        if not all(file.is_file() for pair in files for file in pair):
            return []
        keys, captions = (keys_and_captions(*pair) for pair in files)
        return [(keys[row][0], captions[row][1]) for row in dataset.kept(self.row_of(shard))]

    def bucket(self, shard: int) -> Bucket:
        return int(self.heights[shard]), int(self.widths[shard])

    def buckets(self, heldout: bool = False, among: Any = True) -> dict[Bucket, list[Part]]:
        """Shards of one split, `among` a choice of them, by bucket and dataset, in the table's order."""
        kept = (self.heldout == heldout) & (self.sizes > 0) & among
        found: dict[Bucket, list[Part]] = {}
        sides = self.heights << 32 | self.widths
        for both in np.unique(sides[kept]).tolist():
            mine = kept & (sides == both)
            for number, repeat in enumerate(self.repeats):
                shards = np.flatnonzero(mine & (self.dataset == number))
                if len(shards):
                    part = Part(shards, self.sizes[shards], repeat)
                    found.setdefault((both >> 32, both & 0xFFFFFFFF), []).append(part)
        return found

    def shapes(self, bucket: Bucket) -> dict[str, tuple[int, ...]]:
        """The shape of every member in a bucket, or of one token where the member is a text."""
        shape = self.manifest.shape_in_bucket
        members = self.manifest.members
        return {n: tuple(s for s in shape(n, *bucket) if s is not None) for n in members}


@lru_cache(maxsize=16)
def keys_and_captions(tar_path: Path, index: Path) -> list[tuple[str, str]]:
    """Key and caption (empty without KEY.json) of every sample of a shard, in the order of its index.

    A picture's samples are its captions in turn, then its mirror image's.
    """
    with tarfile.open(tar_path) as tar:
        members = tar.getmembers()
        facts = {m.name: json.loads(tar.extractfile(m).read()) for m in members if m.name.endswith(".json")}  # pyright: ignore[reportOptionalMemberAccess]  # fmt: skip
    ends = [member.offset_data + member.size for member in members]
    found, turns = list[tuple[str, str]](), Counter[str]()
    for offset in read_index(index)[:, 0, 0].tolist():
        if not offset:
            # A layer lacks the row.
            found.append(("", ""))
            continue
        key = members[bisect.bisect_right(ends, offset)].name.split(".", 1)[0]
        said = facts.get(f"{key}.json", {})
        captions = said.get("captions") or [said.get("caption") or ""]
        found.append((key, str(captions[turns[key] % len(captions)])))
        turns[key] += 1
    return found
