"""The shard contract: what a prepared dataset's files hold. Written by data_prep, read by pipeline.

numpy, pyarrow and pydantic only, so that the loader and the audit need nothing else.
"""
# pyarrow ships no types:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from models.config import Config, InputError, parse_config

FORMAT_VERSION = 1

MANIFEST = "manifest.json"
SHARD_TABLE = "shards.parquet"
REJECTS = "rejects.parquet"
EMPTY_CAPTION = "empty_caption.safetensors"
CONTACT_SHEET = "contact_sheet.png"
REPORT = "report.html"

SPLITS = ("train", "heldout")

SHARD_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # shards/HxW/SPLIT-000000.tar, relative to the dataset
        ("split", pa.string()),  # "train" or "heldout"
        ("height", pa.int32()),  # of the bucket, pixels
        ("width", pa.int32()),
        ("num_samples", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("index_sha256", pa.string()),  # of the .idx.npy file beside the tar
    ]
)
REJECT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("name", pa.string()),  # the input's own name in its source: a file, or TAR/KEY
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


class Member(Config):
    """One array of a sample: file KEY.{name}.npy. A None in `shape` is a length that varies by sample."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class CodecRecord(Config):
    """The latent codec that made `moments`, so that training and sampling can insist on the same one."""

    path: str
    weights_sha256: str
    dtype: str
    latent_channels: int
    downscale: int
    scaling_factor: float
    shift_factor: float
    deterministic: bool = False


class TextEncoderRecord(Config):
    """A text encoder whose tokens are member `NAME` and whose pooled vector is `NAME_pooled`."""

    path: str
    weights_sha256: str
    dtype: str
    max_length: int
    dim: int
    pooled_dim: int


class VisionEncoderRecord(Config):
    """The vision transformer of member `vision`: one vector a square of `patch_pixels` of the picture."""

    path: str
    weights_sha256: str
    dtype: str
    dim: int
    patch_pixels: int


class BucketRecord(Config):
    """Pictures of one size; every sample of a shard has its bucket's size."""

    height: int
    width: int
    num_samples: int


class Counts(Config):
    """seen = kept + all rejected; `rejected` by reason."""

    seen: int
    kept: int
    rejected: dict[str, int]


class Manifest(Config):
    """manifest.json: written last, so a dataset that has one is whole."""

    format_version: int = FORMAT_VERSION
    codec: CodecRecord
    text_encoders: dict[str, TextEncoderRecord]
    members: list[Member]  # in the column order of every index
    latent_mean: list[float]  # measured, per channel, raw (unscaled) latents
    latent_std: list[float]
    buckets: list[BucketRecord]  # train split
    counts: Counts
    prepare_config: dict[str, Any]
    files: dict[str, str] = Field(
        default_factory=dict
    )  # name -> sha256 of the tables and pictures beside the manifest
    # Added since the first datasets were made; left out of the fingerprint where they say nothing.
    class_names: list[str] = Field(default_factory=list)  # of class folders, by label
    reconstruction_psnr_db: float | None = None  # of the contact sheet's pictures
    vision_encoder: VisionEncoderRecord | None = None
    fingerprint: str = ""

    def with_fingerprint(self) -> "Manifest":
        return self.model_copy(update={"fingerprint": self.compute_fingerprint()})

    def compute_fingerprint(self) -> str:
        """sha256 of everything else in the manifest, canonical JSON."""
        names = ("class_names", "reconstruction_psnr_db", "vision_encoder")
        later = {name for name in names if not getattr(self, name)}
        return fingerprint(self.model_dump(mode="json", exclude={"fingerprint", *later}))

    def shape_in_bucket(self, member: Member, height: int, width: int) -> tuple[int | None, ...]:
        """A member's shape in samples of a bucket, pixels; None is left of a text's number of tokens."""
        cell = {"moments": self.codec.downscale}
        if self.vision_encoder is not None:
            cell["vision"] = self.vision_encoder.patch_pixels
        if member.name not in cell:
            return member.shape
        side = cell[member.name]
        return member.shape[0], height // side, width // side


def fingerprint(data: dict[str, Any]) -> str:
    """sha256 of plain data in canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(
        json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def read_manifest(dataset: Path) -> Manifest:
    """Read and check manifest.json; raises InputError if absent, of another format, or edited."""
    path = dataset / MANIFEST
    if not path.is_file():
        state = (
            "a preparation that has not finished" if (dataset / "work").is_dir() else "no dataset"
        )
        raise InputError(
            f"{path}: no such file; {dataset} holds {state}. Remedy: run (again) flowmill prepare."
        )
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}). Remedy: prepare again.") from error
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        got = data.get("format_version") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path}: format version got {got}, expected {FORMAT_VERSION}")
    manifest = parse_config(Manifest, cast(dict[str, Any], data), str(path))
    if manifest.fingerprint != manifest.compute_fingerprint():
        raise InputError(f"{path}: was edited: its fingerprint does not match its content")
    return manifest


def read_shard_table(dataset: Path) -> pa.Table:
    """shards.parquet, in the order of `path`."""
    with (dataset / SHARD_TABLE).open("rb") as file:
        return pq.read_table(file, schema=SHARD_SCHEMA)


def index_path(shard: str) -> str:
    """The index file beside a shard: NAME.tar -> NAME.idx.npy."""
    return shard.removesuffix(".tar") + ".idx.npy"


def read_index(path: Path) -> np.ndarray:
    """int64 (num_samples, num_members, 2): offset of the array's first byte in the tar, and bytes of it.

    The offset points past the .npy header: dtype and shape are the manifest's, and a varying
    length is bytes / itemsize / the other dimensions.
    """
    index = np.load(path, mmap_mode="r", allow_pickle=False)
    if index.dtype != np.int64 or index.ndim != 3 or index.shape[2] != 2:
        raise InputError(
            f"{path}: got {index.dtype} {index.shape}, expected int64 (samples, members, 2)"
        )
    return index
