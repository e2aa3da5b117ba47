"""Small datasets that obey the shard contract, in which every array tells which sample it is of."""

import hashlib
import io
import tarfile
from pathlib import Path

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

DOWNSCALE = 8
CHANNELS = 2


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def write_tar(path: Path, samples: list[dict[str, np.ndarray]], keys: list[str]) -> np.ndarray:
    """A plain WebDataset shard; returns its index, (offset past the header, bytes) of every member."""
    spans = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, sample in zip(keys, samples, strict=True):
            for name, array in sample.items():
                data = _npy(array)
                info = tarfile.TarInfo(f"{key}.{name}.npy")
                info.size = len(data)
                begin = tar.offset + 512
                tar.addfile(info, io.BytesIO(data))
                spans.append((begin + len(data) - array.nbytes, array.nbytes))
    return np.array(spans, np.int64).reshape(len(samples), -1, 2)


def _members(
    encoders: dict[str, tuple[int, int]], label: bool, deterministic: bool
) -> list[Member]:
    depth = CHANNELS if deterministic else 2 * CHANNELS
    members = [Member(name="moments", dtype="float16", shape=(depth, None, None))]
    for name, (_, dim) in encoders.items():
        members.append(Member(name=name, dtype="float16", shape=(None, dim)))
        members.append(Member(name=f"{name}_pooled", dtype="float16", shape=(dim,)))
    members.append(Member(name="micro", dtype="float32", shape=(4,)))
    if label:
        members.append(Member(name="label", dtype="int64", shape=()))
    return members


def make_sample(
    number: int,
    bucket: tuple[int, int],
    encoders: dict[str, tuple[int, int]],
    ragged: bool,
    label: bool,
    deterministic: bool,
) -> dict[str, np.ndarray]:
    """Sample `number`: micro[0] is its number; its other arrays are drawn from it."""
    rng = np.random.default_rng(number)
    depth = CHANNELS if deterministic else 2 * CHANNELS
    sides = bucket[0] // DOWNSCALE, bucket[1] // DOWNSCALE
    sample = {"moments": rng.standard_normal((depth, *sides)).astype(np.float16)}
    for name, (length, dim) in encoders.items():
        length = int(rng.integers(2, length + 1)) if ragged else length
        sample[name] = rng.standard_normal((length, dim)).astype(np.float16)
        sample[f"{name}_pooled"] = rng.standard_normal(dim).astype(np.float16)
    sample["micro"] = np.array([number, bucket[0], bucket[1], 0], np.float32)
    if label:
        sample["label"] = np.array(number % 10, np.int64)
    return sample


def make_dataset(
    folder: Path,
    shards: list[tuple[tuple[int, int], int]],
    *,
    heldout: list[tuple[tuple[int, int], int]] | None = None,
    encoders: dict[str, tuple[int, int]] | None = None,
    ragged: bool = True,
    label: bool = False,
    deterministic: bool = False,
    first: int = 0,
    codec_sha256: str = "c0dec",
) -> Path:
    """Write a dataset of shards (bucket, samples), numbered from `first`; encoders: name -> (length, dim)."""
    encoders = {"mini": (5, 4)} if encoders is None else encoders
    rows, number = [], first
    plan = [("train", *shard) for shard in shards] + [
        ("heldout", *shard) for shard in heldout or []
    ]
    for serial, (split, bucket, count) in enumerate(plan):
        path = f"shards/{bucket[0]}x{bucket[1]}/{split}-{serial:06d}.tar"
        numbers = range(number, number + count)
        number += count
        samples = [make_sample(n, bucket, encoders, ragged, label, deterministic) for n in numbers]
        index = write_tar(folder / path, samples, [f"{n:08d}" for n in numbers])
        np.save(folder / index_path(path), index)
        rows.append(
            {
                "path": path,
                "split": split,
                "height": bucket[0],
                "width": bucket[1],
                "num_samples": count,
                "bytes": (folder / path).stat().st_size,
                "sha256": _sha256(folder / path),
                "index_sha256": _sha256(folder / index_path(path)),
            }
        )
    rows.sort(key=lambda row: row["path"])
    pq.write_table(pa.Table.from_pylist(rows, SHARD_SCHEMA), folder / SHARD_TABLE)
    members = _members(encoders, label, deterministic)
    _write_manifest(folder, plan, encoders, members, codec_sha256, deterministic)
    if encoders:
        empty = {name: torch.full((2, dim), 0.5).half() for name, (_, dim) in encoders.items()}
        empty |= {
            f"{name}_pooled": torch.full((d,), 0.25).half() for name, (_, d) in encoders.items()
        }
        save_file(empty, folder / EMPTY_CAPTION)
    return folder


def _write_manifest(
    folder: Path,
    plan: list[tuple[str, tuple[int, int], int]],
    encoders: dict[str, tuple[int, int]],
    members: list[Member],
    codec_sha256: str,
    deterministic: bool,
) -> None:
    buckets: dict[tuple[int, int], int] = {}
    for split, bucket, count in plan:
        buckets[bucket] = buckets.get(bucket, 0) + count * (split == "train")
    total = sum(count for _, _, count in plan)
    manifest = Manifest(
        codec=CodecRecord(
            path="vae",
            weights_sha256=codec_sha256,
            dtype="fp32",
            latent_channels=CHANNELS,
            downscale=DOWNSCALE,
            scaling_factor=0.5,
            shift_factor=0.0,
            deterministic=deterministic,
        ),
        text_encoders={
            name: TextEncoderRecord(
                path=name,
                weights_sha256=name,
                dtype="fp32",
                max_length=length,
                dim=dim,
                pooled_dim=dim,
            )
            for name, (length, dim) in encoders.items()
        },
        members=members,
        latent_mean=[0.0] * CHANNELS,
        latent_std=[1.0] * CHANNELS,
        buckets=[
            BucketRecord(height=h, width=w, num_samples=count) for (h, w), count in buckets.items()
        ],
        counts=Counts(seen=total, kept=total, rejected={}),
        prepare_config={},
    )
    (folder / MANIFEST).write_text(manifest.with_fingerprint().model_dump_json(indent=2))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
