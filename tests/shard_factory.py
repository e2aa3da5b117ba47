"""Small datasets that obey the shard contract, in which every array tells which sample it is of."""

import io
import json
import tarfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from data_prep.schema import (
    EMPTY_CAPTION,
    MANIFEST,
    REJECT_SCHEMA,
    REJECTS,
    SHARD_SCHEMA,
    SHARD_TABLE,
    BaseRecord,
    BucketRecord,
    CodecRecord,
    Counts,
    Generation,
    Manifest,
    Member,
    TextRecord,
    captions_sha256,
    index_path,
    read_manifest,
    read_shard_table,
)
from models.files import file_sha256
from models.text_conventions import width_stored

Bucket = tuple[int, int]
Sample = dict[str, np.ndarray]


@dataclass(frozen=True)
class Kind:
    """What the samples of a dataset have; encoders: name -> (longest text, width)."""

    encoders: dict[str, tuple[int, int]] = field(default_factory=lambda: {"mini": (5, 4)})
    ragged: bool = True
    label: bool = False
    deterministic: bool = False
    channels: int = 2
    downscale: int = 8
    bare: bool = False  # moments and tokens only
    pads: str = "masked"
    only: tuple[str, ...] = ()  # members that are stored of all: a layer's, or its base's
    caption: str = "number"
    int8: tuple[str, ...] = ()  # encoders whose tokens are stored so

    @property
    def own(self) -> dict[str, tuple[int, int]]:
        return {n: e for n, e in self.encoders.items() if not self.only or n in self.only}

    def members(self) -> dict[str, Member]:
        whole = self.whole_members()
        return {n: member for n, member in whole.items() if not self.only or n in self.only}

    def whole_members(self) -> dict[str, Member]:
        depth = self.channels * (1 if self.deterministic else 2)
        members = {"moments": Member(dtype="float16", shape=(depth, None, None))}
        for name, (_, dim) in self.encoders.items():
            store = "int8" if name in self.int8 else "float16"
            members[name] = Member(dtype=store, shape=(None, width_stored(store, dim)))
            members[f"{name}_pooled"] = Member(dtype="float16", shape=(dim,))
        members["micro"] = Member(dtype="float32", shape=(4,))
        if self.label:
            members["label"] = Member(dtype="int64", shape=())
        kept = ("moments", *self.encoders) if self.bare else members
        return {name: member for name, member in members.items() if name in kept}

    def sample(self, number: int, bucket: Bucket) -> Sample:
        """micro[0] is the sample's number; its other arrays are drawn from it."""
        rng, arrays = np.random.default_rng(number), {}
        for name, member in self.whole_members().items():
            shape = tuple(side for side in member.shape if side is not None)
            if name == "moments":
                shape = *shape, bucket[0] // self.downscale, bucket[1] // self.downscale
            elif name in self.encoders:
                longest = self.encoders[name][0]
                shape = int(rng.integers(2, longest + 1)) if self.ragged else longest, *shape
            values = rng.random(shape, np.float32)
            if member.dtype == "int8":
                scale = rng.uniform(1e-3, 1, (len(values), 1)).astype("<f2")
                numbers = (values * 255 - 127.5).round().astype(np.int8)
                values = np.concatenate([numbers[:, :-2], scale.view(np.int8)], axis=1)
            arrays[name] = values.astype(member.dtype)
        if not self.bare:
            arrays["micro"] = np.array([number, *bucket, 0], np.float32)
        if self.label:
            arrays["label"] = np.array(number % 10, np.int64)
        return {name: arrays[name] for name in self.members()}


def write_tar(
    path: Path,
    samples: list[Sample],
    keys: list[str],
    facts: bool = True,
    caption: str = "number",
) -> None:
    """A plain WebDataset shard with USTAR headers; facts: with KEY.json."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for key, sample in zip(keys, samples, strict=True):
            for name, array in sample.items():
                file = io.BytesIO()
                np.lib.format.write_array(file, array, allow_pickle=False)
                add(f"{key}.{name}.npy", file.getvalue())
            if facts:
                add(f"{key}.json", json.dumps({"caption": f"{caption} {int(key)}"}).encode())


def make_index(path: Path, samples: list[Sample]) -> np.ndarray:
    """What schema.read_index describes, of any tar that holds these samples."""
    with tarfile.open(path) as tar:
        ends = {member.name: member.offset_data + member.size for member in tar}
    keys = list(dict.fromkeys(name.split(".", 1)[0] for name in ends))
    spans = [
        [(ends[f"{key}.{name}.npy"] - array.nbytes, array.nbytes) for name, array in sample.items()]
        for key, sample in zip(keys, samples, strict=True)
    ]
    members = len(samples[0]) if samples else 0
    return np.array(spans, np.int64).reshape(len(samples), members, 2)


def make_dataset(
    folder: Path,
    shards: list[tuple[Bucket, int]],
    kind: Kind | None = None,
    *,
    heldout: list[tuple[Bucket, int]] | None = None,
    first: int = 0,
    codec: dict[str, Any] | None = None,
    write: Callable[[Path, list[Sample], list[str]], None] | None = None,
    missing: Collection[int] = (),
    base: Path | None = None,
) -> Path:
    """Write a dataset of shards (bucket, samples), numbered from `first`; codec: fields of its record.

    The numbers in `missing` are left out; of a layer, which lies over `base`, their rows are empty.
    """
    below = {r["path"]: r["sha256"] for r in read_shard_table(base).to_pylist()} if base else {}
    kind, rows, number = kind or Kind(), [], first
    plan = [("train", *shard) for shard in shards] + [
        ("heldout", *shard) for shard in heldout or []
    ]
    for serial, (split, bucket, count) in enumerate(plan):
        path = f"shards/{bucket[0]}x{bucket[1]}/{split}-{serial:06d}.tar"
        tar, index = folder / path, folder / index_path(path)
        tar.parent.mkdir(parents=True, exist_ok=True)
        numbers = range(number, number + count)
        there = [n for n in numbers if n not in missing]
        samples = [kind.sample(n, bucket) for n in there]
        tar.unlink(missing_ok=True)  # never change a file in place: it may be mapped
        (write or partial(write_tar, caption=kind.caption))(
            tar, samples, [f"{n:08d}" for n in there]
        )
        found, lacks = make_index(tar, samples), None
        if base:
            lacks = [n - number for n in numbers if n in missing]
            whole = np.zeros((count, len(kind.members()), 2), np.int64)
            whole[[n - number for n in there]] = found
            found = whole
        np.save(index, found)
        number += count
        said = captions_sha256([(f"{n:08d}", [f"{kind.caption} {n}"]) for n in numbers])
        hashes = file_sha256(tar), file_sha256(index), None, said, below.get(path), lacks
        rows.append((path, 0, *bucket, split, len(found), tar.stat().st_size, *hashes))
    columns = [list(column) for column in zip(*sorted(rows), strict=True)]
    pq.write_table(pa.table(columns, schema=SHARD_SCHEMA), folder / SHARD_TABLE)
    manifest = make_manifest(kind, plan, codec or {})
    if base:
        of_base = read_manifest(base)
        record = BaseRecord(path=str(base), id=of_base.id, fingerprint="f1rst")
        manifest = manifest.model_copy(update={"id": "1a7e2", "base": record})
    manifest = manifest.with_fingerprint()
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2))
    if kind.own:
        rows = {n: length if kind.pads == "kept" else 2 for n, (length, _) in kind.own.items()}
        empty = {n: torch.full((rows[n], dim), 0.5) for n, (_, dim) in kind.own.items()}
        empty |= {f"{n}_pooled": torch.full((dim,), 0.25) for n, (_, dim) in kind.own.items()}
        save_file({name: value.half() for name, value in empty.items()}, folder / EMPTY_CAPTION)
    return folder


def write_work(dataset: Path) -> Path:
    """The plan of a dataset's shards, as preparation leaves it; of each shard one more was planned, and rejected."""
    plan, paths = dataset / "work" / "plan", read_shard_table(dataset)["path"].to_pylist()
    plan.mkdir(parents=True, exist_ok=True)
    rejects = list[str]()
    with pq.ParquetWriter(plan / "000000.parquet", pa.schema([("key", pa.string())])) as writer:
        for path in paths:
            with tarfile.open(dataset / path) as tar:
                names = tar.getnames()
            keys = sorted({name.split(".")[0] for name in names})
            rejects.append(f"{keys[0]}r")
            writer.write_table(pa.table({"key": sorted([*keys, rejects[-1]])}))
    pq.write_table(pa.table({"path": paths}), plan.parent / "shard_list.parquet")
    rows = [{"key": key, "reason": "not_finite"} for key in ["", *rejects]]
    pq.write_table(pa.Table.from_pylist(rows, REJECT_SCHEMA), dataset / REJECTS)
    return dataset


def make_manifest(
    kind: Kind, plan: list[tuple[str, Bucket, int]], codec: dict[str, Any]
) -> Manifest:
    buckets = dict.fromkeys((bucket for _, bucket, _ in plan), 0)
    for split, bucket, count in plan:
        buckets[bucket] += count * (split == "train")
    total = sum(count for _, _, count in plan)
    same = {"dtype": "fp32", "path": "somewhere"}
    default = same | {
        "class_name": "AutoencoderKL",
        "weights_sha256": "c0dec",
        "channels": kind.channels,
        "downscale": kind.downscale,
        "deterministic": kind.deterministic,
        "normalisation": {"mean": [0.0] * kind.channels, "std": [2.0] * kind.channels},
    }
    role = same | {"family": "BertModel", "tokenizer_sha256": "70ken"}
    roles = {
        name: role
        | {
            "weights_sha256": name,
            "view": {
                "max_length": length,
                "pads": kind.pads,
                "pooled": "none" if kind.bare else "mean",
            },
        }
        | {"dim": dim, "pooled_dim": dim, "store": "int8" if name in kind.int8 else "float16"}
        for name, (length, dim) in kind.own.items()
    }
    text = {
        "tokens": [[name] for name in roles],
        "pooled": [] if kind.bare else list(roles),
        "roles": roles,
    }
    counts = Counts(seen=total, kept=total, rejected={})
    generation = Generation(
        number=0,
        complete=True,
        listed=total,
        counts=counts,
        num_shards=len(plan),
        num_labels=10 * kind.label,
        psnr_db=None,
        listing_sha256="115t",
        fingerprint="f1rst",
    )
    return Manifest(
        id="da7a",
        codec=CodecRecord(**default | codec),
        text=TextRecord.model_validate(text),
        vision=None,
        members=kind.members(),
        latent_mean=[0.0] * kind.channels,
        latent_std=[1.0] * kind.channels,
        buckets=[BucketRecord(height=h, width=w, num_samples=n) for (h, w), n in buckets.items()],
        classes=[],
        counts=counts,
        samples_per_picture={"train": 1, "heldout": 1},
        generations=[generation],
        base=None,
        prepare_config={},
        files={},
    )
