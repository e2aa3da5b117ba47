"""Small datasets that obey the shard contract, in which every array tells which sample it is of."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
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
    SHARD_SCHEMA,
    SHARD_TABLE,
    BucketRecord,
    CodecRecord,
    Counts,
    Manifest,
    Member,
    TextEncoderRecord,
    index_path,
)
from models.files import file_sha256

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

    def members(self) -> list[Member]:
        depth = self.channels * (1 if self.deterministic else 2)
        members = [Member(name="moments", dtype="float16", shape=(depth, None, None))]
        for name, (_, dim) in self.encoders.items():
            members.append(Member(name=name, dtype="float16", shape=(None, dim)))
            members.append(Member(name=f"{name}_pooled", dtype="float16", shape=(dim,)))
        members.append(Member(name="micro", dtype="float32", shape=(4,)))
        if self.label:
            members.append(Member(name="label", dtype="int64", shape=()))
        return [m for m in members if not self.bare or m.name in ("moments", *self.encoders)]

    def sample(self, number: int, bucket: Bucket) -> Sample:
        """micro[0] is the sample's number; its other arrays are drawn from it."""
        rng, arrays = np.random.default_rng(number), {}
        for member in self.members():
            shape = tuple(side for side in member.shape if side is not None)
            if member.name == "moments":
                shape = *shape, bucket[0] // self.downscale, bucket[1] // self.downscale
            elif member.name in self.encoders:
                longest = self.encoders[member.name][0]
                shape = int(rng.integers(2, longest + 1)) if self.ragged else longest, *shape
            arrays[member.name] = rng.random(shape, np.float32).astype(member.dtype)
        if not self.bare:
            arrays["micro"] = np.array([number, *bucket, 0], np.float32)
        if self.label:
            arrays["label"] = np.array(number % 10, np.int64)
        return arrays


def write_tar(path: Path, samples: list[Sample], keys: list[str], facts: bool = True) -> None:
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
                add(f"{key}.json", json.dumps({"caption": f"number {int(key)}"}).encode())


def make_index(path: Path, samples: list[Sample]) -> np.ndarray:
    """What schema.read_index describes, of any tar that holds these samples."""
    with tarfile.open(path) as tar:
        ends = {member.name: member.offset_data + member.size for member in tar}
    keys = list(dict.fromkeys(name.split(".", 1)[0] for name in ends))
    spans = [
        [(ends[f"{key}.{name}.npy"] - array.nbytes, array.nbytes) for name, array in sample.items()]
        for key, sample in zip(keys, samples, strict=True)
    ]
    return np.array(spans, np.int64)


def make_dataset(
    folder: Path,
    shards: list[tuple[Bucket, int]],
    kind: Kind | None = None,
    *,
    heldout: list[tuple[Bucket, int]] | None = None,
    first: int = 0,
    codec: dict[str, Any] | None = None,
    write: Callable[[Path, list[Sample], list[str]], None] = write_tar,
) -> Path:
    """Write a dataset of shards (bucket, samples), numbered from `first`; codec: fields of its record."""
    kind, rows, number = kind or Kind(), [], first
    plan = [("train", *shard) for shard in shards] + [
        ("heldout", *shard) for shard in heldout or []
    ]
    for serial, (split, bucket, count) in enumerate(plan):
        path = f"shards/{bucket[0]}x{bucket[1]}/{split}-{serial:06d}.tar"
        tar, index = folder / path, folder / index_path(path)
        tar.parent.mkdir(parents=True, exist_ok=True)
        samples = [kind.sample(n, bucket) for n in range(number, number + count)]
        tar.unlink(missing_ok=True)  # never change a file in place: it may be mapped
        write(tar, samples, [f"{n:08d}" for n in range(number, number + count)])
        np.save(index, make_index(tar, samples))
        number += count
        sizes = split, *bucket, count, tar.stat().st_size
        rows.append((path, *sizes, file_sha256(tar), file_sha256(index)))
    columns = [list(column) for column in zip(*sorted(rows), strict=True)]
    pq.write_table(pa.table(columns, schema=SHARD_SCHEMA), folder / SHARD_TABLE)
    manifest = make_manifest(kind, plan, codec or {}).with_fingerprint()
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2))
    if kind.encoders:
        empty = {name: torch.full((2, dim), 0.5) for name, (_, dim) in kind.encoders.items()}
        empty |= {f"{n}_pooled": torch.full((dim,), 0.25) for n, (_, dim) in kind.encoders.items()}
        save_file({name: value.half() for name, value in empty.items()}, folder / EMPTY_CAPTION)
    return folder


def make_manifest(
    kind: Kind, plan: list[tuple[str, Bucket, int]], codec: dict[str, Any]
) -> Manifest:
    buckets = dict.fromkeys((bucket for _, bucket, _ in plan), 0)
    for split, bucket, count in plan:
        buckets[bucket] += count * (split == "train")
    total = sum(count for _, _, count in plan)
    same = {"dtype": "fp32", "path": "somewhere"}
    default = same | {
        "weights_sha256": "c0dec",
        "latent_channels": kind.channels,
        "downscale": kind.downscale,
        "scaling_factor": 0.5,
        "shift_factor": 0.0,
        "deterministic": kind.deterministic,
    }
    return Manifest(
        codec=CodecRecord(**default | codec),
        text_encoders={
            n: TextEncoderRecord(weights_sha256=n, max_length=length, dim=d, pooled_dim=d, **same)
            for n, (length, d) in kind.encoders.items()
        },
        members=kind.members(),
        latent_mean=[0.0] * kind.channels,
        latent_std=[1.0] * kind.channels,
        buckets=[BucketRecord(height=h, width=w, num_samples=n) for (h, w), n in buckets.items()],
        counts=Counts(seen=total, kept=total, rejected={}),
        prepare_config={},
    )
