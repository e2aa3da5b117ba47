"""Shards as the loader sees them: what a run's datasets hold, and where each sample lies in memory."""

import mmap
import weakref
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from data_prep.schema import (
    Manifest,
    TextEncoderRecord,
    index_path,
    read_index,
    read_manifest,
    read_shard_table,
)
from models.config import Config, InputError
from pipeline.order import Part, Window

Bucket = tuple[int, int]  # height and width of the pictures, pixels


class DatasetConfig(Config):
    path: str
    repeat: float = Field(default=1.0, gt=0)  # times that a sample comes in an epoch


class ShardError(OSError):
    """A shard cannot be read, or is not what the shard table says."""


def check_dataset(
    manifest: Manifest,
    where: str,
    *,
    codec: dict[str, Any] | None = None,
    text_encoders: dict[str, TextEncoderRecord] | None = None,
    latent_channels: int | None = None,
    latent_multiple: int = 1,
    text_dim: int | None = None,
    pooled_dim: int | None = None,
    labels: bool = False,
) -> None:
    """Raise InputError with every difference between a dataset and what a run expects; None expects nothing.

    codec: fields of a CodecRecord, of which path and dtype may differ; path of an encoder likewise.
    latent_multiple: what the network needs the sides of the latents to be a multiple of.
    """
    pairs: list[tuple[str, Any, Any]] = []
    for name, value in (codec or {}).items():
        if name not in ("path", "dtype"):
            pairs.append((f"codec.{name}", getattr(manifest.codec, name), value))
    if text_encoders is not None:
        pairs.append(("text_encoders", list(manifest.text_encoders), list(text_encoders)))
        for name in manifest.text_encoders.keys() & text_encoders.keys():
            got, expected = manifest.text_encoders[name], text_encoders[name]
            for key in ("weights_sha256", "max_length", "dim", "pooled_dim"):
                pairs.append((f"{name}.{key}", getattr(got, key), getattr(expected, key)))
    records = manifest.text_encoders.values()
    if latent_channels is not None:
        pairs.append(("latent channels", manifest.codec.latent_channels, latent_channels))
    if text_dim is not None:
        pairs.append(("text width", max((r.dim for r in records), default=0), text_dim))
    if pooled_dim is not None:
        pairs.append(("pooled text width", sum(r.pooled_dim for r in records), pooled_dim))
    if labels:
        pairs.append(("class labels", any(m.name == "label" for m in manifest.members), True))
    for bucket in manifest.buckets:
        sides = bucket.height // manifest.codec.downscale, bucket.width // manifest.codec.downscale
        if any(side % latent_multiple for side in sides):
            what = f"latents of bucket {bucket.height}x{bucket.width}"
            pairs.append((what, sides, f"multiples of {latent_multiple}"))
    lines = [f"  {what}: got {got}, expected {want}" for what, got, want in pairs if got != want]
    if lines:
        raise InputError(
            f"{where}: does not fit the training config:\n" + "\n".join(lines) + "\n"
            "Remedy: change the config, or prepare the pictures again with what it names."
        )


class Snapshot:
    """The datasets of a run as they stood at one moment: manifests, and one shard table of all."""

    def __init__(self, sources: dict[str, DatasetConfig]):
        self.folders = [Path(source.path) for source in sources.values()]
        self.repeats = [Fraction(str(source.repeat)) for source in sources.values()]
        manifests = [read_manifest(folder) for folder in self.folders]
        self.manifest = manifests[0]
        for folder, manifest in zip(self.folders, manifests, strict=True):
            if manifest.members != self.manifest.members:
                raise InputError(
                    f"{folder}: its members are not those of {self.folders[0]}, to mix with"
                )
            codec, encoders = self.manifest.codec.model_dump(), self.manifest.text_encoders
            check_dataset(manifest, str(folder), codec=codec, text_encoders=encoders)
        tables = [read_shard_table(folder) for folder in self.folders]
        self.dataset = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        self.table = pa.concat_tables(tables).combine_chunks()
        self.sizes, self.bytes = self._column("num_samples"), self._column("bytes")
        self.heights, self.widths = self._column("height"), self._column("width")
        self.heldout = self.table["split"].to_numpy() == "heldout"
        self.first_id = np.cumsum(self.sizes) - self.sizes

    def _column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy().astype(np.int64)

    def path(self, shard: int) -> Path:
        return self.folders[self.dataset[shard]] / self.table["path"][shard].as_py()

    def bucket(self, shard: int) -> Bucket:
        return int(self.heights[shard]), int(self.widths[shard])

    def buckets(self, heldout: bool = False) -> dict[Bucket, list[Part]]:
        """One split by bucket and dataset, in the order of the table."""
        kept = (self.heldout == heldout) & (self.sizes > 0)
        found: dict[Bucket, list[Part]] = {}
        for height, width in np.unique(np.stack([self.heights, self.widths])[:, kept], axis=1).T:
            mine = kept & (self.heights == height) & (self.widths == width)
            for number, repeat in enumerate(self.repeats):
                shards = np.flatnonzero(mine & (self.dataset == number))
                if len(shards):
                    part = Part(shards, self.sizes[shards], repeat)
                    found.setdefault((int(height), int(width)), []).append(part)
        return found

    def shapes(self, bucket: Bucket) -> list[tuple[int, ...]]:
        """Every member's shape in a bucket; of a text, the shape of one token."""
        down = self.manifest.codec.downscale
        sides = bucket[0] // down, bucket[1] // down
        shapes = [
            (m.shape[0], *sides) if m.name == "moments" else m.shape for m in self.manifest.members
        ]
        return [tuple(side for side in shape if side is not None) for shape in shapes]


class Shard:
    """A mapped shard. `spans` int64 (num_samples, num_members, 2): address and bytes of each member."""

    def __init__(self, path: Path, num_samples: int, num_bytes: int, rows: list[tuple[int, int]]):
        """rows: bytes of a row of each member, and the rows it may have at most (0: exactly one)."""
        try:
            self.spans = np.array(read_index(Path(index_path(str(path)))))
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ShardError(f"{path}: cannot be read: {error}") from error
        if len(self.map) != num_bytes or self.spans.shape[:2] != (num_samples, len(rows)):
            raise ShardError(
                f"{path}: got {len(self.map)} bytes and an index of {self.spans.shape[:2]}, expected "
                f"{num_bytes} bytes and {(num_samples, len(rows))}"
            )
        begin, size = self.spans[..., 0], self.spans[..., 1]
        unit, most = np.array(rows).T
        fits = np.where(most, (size % unit == 0) & (size <= most * unit), size == unit)
        if not fits.all() or begin.min() < 0 or size.min() < 0 or (begin + size).max() > num_bytes:
            raise ShardError(f"{path}: its index does not fit the manifest's members or the file")
        begin += np.frombuffer(self.map, np.uint8).__array_interface__["data"][0]


@dataclass(frozen=True)
class Rows:
    """Samples in memory: spans as a Shard's, ids int64 (n,); `shards` keeps the files mapped."""

    spans: np.ndarray
    ids: np.ndarray
    shards: list[Shard]

    def __getitem__(self, chosen: slice) -> "Rows":
        return Rows(self.spans[chosen], self.ids[chosen], self.shards)


class ShardStore:
    """Opens shards, each once while anything uses it."""

    def __init__(self, snapshot: Snapshot):
        self.snapshot = snapshot
        self.opened: weakref.WeakValueDictionary[int, Shard] = weakref.WeakValueDictionary()

    def open(self, number: int) -> Shard:
        shard = self.opened.get(number)
        if shard is None:
            shard = self.opened[number] = self._open(number)
        return shard

    def _open(self, number: int) -> Shard:
        snapshot, rows = self.snapshot, []
        shapes = snapshot.shapes(snapshot.bucket(number))
        for member, shape in zip(snapshot.manifest.members, shapes, strict=True):
            unit = np.dtype(member.dtype).itemsize * int(np.prod(shape))
            encoder = snapshot.manifest.text_encoders.get(member.name)
            rows.append((unit, encoder.max_length if encoder else 0))
        size, length = int(snapshot.sizes[number]), int(snapshot.bytes[number])
        return Shard(snapshot.path(number), size, length, rows)

    def read(self, window: Window) -> Rows:
        """A window's samples, shuffled."""
        numbers = window.segments.shard
        rows, order = window.rows(), window.shuffle()
        shards = [self.open(number) for number in numbers.tolist()]
        spans = [shard.spans[row] for shard, row in zip(shards, rows, strict=True)]
        ids = [
            row + first for row, first in zip(rows, self.snapshot.first_id[numbers], strict=True)
        ]
        return Rows(np.concatenate(spans)[order], np.concatenate(ids)[order], shards)


class Memory:
    """Rows of bytes, one at every address from `base` on, as numpy's array interface shows them."""

    def __init__(self, base: int, length: int, row_bytes: int):
        self.__array_interface__ = {
            "data": (base, False),
            "shape": (length, row_bytes),
            "strides": (1, 1),
            "typestr": "|u1",
            "version": 3,
        }


def gather(addresses: np.ndarray, out: Tensor) -> None:
    """Copy from each address, int64 (n,), into a row of `out`, uint8 (n, row bytes), in one call.

    The caller keeps what lies at the addresses mapped, and has checked the bounds.
    """
    base = int(addresses.min())
    rows = np.asarray(Memory(base, int(addresses.max()) - base + 1, out.shape[1]))
    torch.index_select(torch.from_numpy(rows), 0, torch.from_numpy(addresses - base), out=out)
