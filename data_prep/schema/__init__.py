"""The shard contract: what a prepared dataset's files hold. Written by data_prep, read by pipeline.

numpy, pyarrow and pydantic only, so that the loader and the audit need nothing else.
"""
# pyarrow ships no types:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

import hashlib
import io
import json
import tarfile
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.codec_layouts import PIXELS, Normalisation
from models.config import Config, InputError, parse_config
from models.text_conventions import (
    CONVENTIONS,
    Arrangement,
    Combination,
    Convention,
    Store,
    View,
    combination,
    fixed,
    width_stored,
)

FORMAT_VERSION = 2

MANIFEST = "manifest.json"
SHARD_TABLE = "shards.parquet"
REJECTS = "rejects.parquet"
# Folder of a dataset with everything that resuming needs.
WORK = "work"
EMPTY_CAPTION = "empty_caption.safetensors"
CONTACT_SHEET = "contact_sheet.png"
REPORT = "report.html"
# Files beside the manifest whose hashes it has.
AUDITED = (SHARD_TABLE, REJECTS, EMPTY_CAPTION, CONTACT_SHEET, REPORT)

SPLITS = ("train", "heldout")
# Of all normalised latents; outside it the codec's scale does not fit the pictures.
STD_RANGE = (0.5, 2.0)

SHARD_SCHEMA = pa.schema(
    [
        # shards/HxW/SPLIT-000000.tar, relative to the dataset; g0001-SPLIT-... of generation 1
        ("path", pa.string()),
        ("generation", pa.int32()),
        # The bucket's, in pixels.
        ("height", pa.int32()),
        ("width", pa.int32()),
        # One of SPLITS.
        ("split", pa.string()),
        ("num_samples", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        # The hashes of NAME.idx.npy and NAME.proof.safetensors beside the tar.
        ("index_sha256", pa.string()),
        ("proof_sha256", pa.string()),
        # The hash of [[key, captions as drawn], ...]; null where no sample has a caption.
        ("captions_sha256", pa.string()),
        # Of a layer alone: the hash of the base's tar, and the rows of its index that the layer lacks.
        ("base_sha256", pa.string()),
        ("missing", pa.list_(pa.int32())),
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
    """One array of a sample: file KEY.NAME.npy. A None in `shape` is a length that varies by sample."""

    dtype: str
    shape: tuple[int | None, ...]

    @property
    def stored(self) -> str:
        """numpy's dtype of the file: that of bfloat16 holds its bits."""
        return "uint16" if self.dtype == "bfloat16" else self.dtype


class CodecRecord(Config):
    """The latent codec that made `moments`, so that training and sampling can insist on the same one."""

    class_name: str
    """The class of diffusers, or `pixels`."""
    path: str
    weights_sha256: str
    dtype: str
    channels: int
    downscale: int
    deterministic: bool
    normalisation: Normalisation

    def doubt(self, means: Sequence[float], stds: Sequence[float]) -> str:
        """A warning where the std of all normalised latents is far from 1; "" where it is not.

        Takes what was measured per channel on raw latents.
        """
        norm, (low, high) = self.normalisation, STD_RANGE
        channels = list(zip(means, stds, norm.mean, norm.std, strict=True))
        spread = pstdev((mean - shift) / scale for mean, _, shift, scale in channels)
        std = (spread**2 + fmean((std / scale) ** 2 for _, std, _, scale in channels)) ** 0.5
        if low <= std <= high or self.class_name == PIXELS:
            return ""
        factor = 1 / (fmean(norm.std) * std) if std else 1.0
        return (
            f"normalised latents have a std of {std:.3g}, expected {low:g} to {high:g}: the objectives' noise "
            "levels are made for 1. Remedy: the config.json and the weights of one vae; where it scales all "
            f"channels alike, a scaling_factor of about {factor:.4g} fits these pictures. Prepare again."
        )


class RoleRecord(Config):
    """A text encoder whose tokens are member ROLE and whose vector is `ROLE_pooled`, where its view has them."""

    family: str
    """The class of transformers."""
    path: str
    weights_sha256: str
    tokenizer_sha256: str
    dtype: str
    view: View
    store: Store = "float16"
    dim: int
    """Width of the stored rows; 0 where none are stored."""
    pooled_dim: int
    mean_error: float | None = None
    """1 - cosine of a token and what int8 makes of it, over all; null of other stores."""
    worst_error: float | None = None

    @property
    def row_bytes(self) -> int:
        return width_stored(self.store, self.dim) * (1 if self.store == "int8" else 2)


class TextRecord(Combination):
    """How captions became tokens, and how a network reads them."""

    convention: str = "plain"
    roles: dict[str, RoleRecord]
    absent: dict[str, tuple[int, int]] = {}
    """Zeros that stand for a role which the convention can do without: rows and width."""

    @property
    def views(self) -> dict[str, View]:
        return {name: role.view for name, role in self.roles.items()}

    @property
    def used(self) -> dict[str, RoleRecord]:
        """The roles that a network reads, in the order of the convention's pipeline."""
        named = CONVENTIONS.get(self.convention)
        order = named.roles if named else self.roles
        return {n: self.roles[n] for n in order if n in self.names and n in self.roles}

    def shape(self, name: str) -> tuple[int, int]:
        """Rows of a role's tokens, at most, and their width."""
        if name in self.absent:
            return self.absent[name]
        return self.roles[name].view.max_length, self.roles[name].dim

    def unmasked(self, name: str) -> bool:
        """Whether a network reads every row of a role."""
        return name in self.absent or fixed(self.roles[name].view)

    @property
    def width(self) -> int:
        """Width of the text that a network reads; 0 without text."""
        return max((sum(self.shape(n)[1] for n in group) for group in self.tokens), default=0)

    @property
    def pooled_members(self) -> list[str]:
        return [f"{name}_pooled" for name in self.pooled]

    @property
    def pooled_width(self) -> int:
        return sum(self.roles[name].pooled_dim for name in self.pooled)

    def arranged(self, wanted: Arrangement | None) -> "TextRecord":
        """The record of a run that reads the roles so; raises InputError where it cannot."""
        if wanted is None:
            return self
        wanted.check(self.views)
        return self.model_copy(update=dict(wanted) | {"absent": {}})


class VisionRecord(Config):
    """The vision transformer of member `vision`: one vector per square of `patch_pixels` of the picture."""

    family: str
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
    cut_captions: dict[str, int] = {}
    """By text encoder, the drawn captions of kept pictures that were longer than its max_length."""
    other_files: dict[str, int] | None = None
    """The sources' files that are no pictures, by extension, and folders left out, by reason; null: not counted."""


class Generation(Config):
    """What one growth of the sources brought. Its fingerprint goes on from the one before."""

    number: int
    complete: bool
    listed: int
    counts: Counts
    num_shards: int
    num_labels: int
    psnr_db: float | None
    """The mean over the proofs' pictures, decoded from their latents."""
    listing_sha256: str
    fingerprint: str
    missing: int = 0
    """Files of earlier generations that were gone or changed when it was begun; their samples stay."""


class BaseRecord(Config):
    """The dataset that a layer lies over."""

    path: str
    id: str
    fingerprint: str
    """That of its last generation which the layer reaches."""


class Manifest(Config):
    """manifest.json: written last, so a dataset that has one is whole."""

    format: int = FORMAT_VERSION
    id: str
    """Made once, of the settings and sources that it was begun with; the same for a copy."""
    codec: CodecRecord
    text: TextRecord
    vision: VisionRecord | None
    captioner: dict[str, str] = {}
    """sha256 of what a layer's captioner is made of; `prepare_config` has what it was asked."""
    members: dict[str, Member]
    """In the column order of every index."""
    latent_mean: list[float]
    """Measured per channel on raw latents: for people and checks, never for normalising."""
    latent_std: list[float]
    buckets: list[BucketRecord]
    """The train split's."""
    classes: list[str]
    """Names of class folders, by label."""
    counts: Counts
    samples_per_picture: dict[str, int]
    """By split: captions drawn for a picture, and as many again of its mirror image."""
    generations: list[Generation]
    base: BaseRecord | None
    prepare_config: dict[str, Any]
    files: dict[str, str]
    """sha256 of the tables and pictures beside the manifest, by name."""
    fingerprint: str = ""

    def encoders(self) -> dict[str, CodecRecord | RoleRecord | VisionRecord]:
        """The record of every encoder by name; a layer has its own alone."""
        found = {"vae": None if self.base else self.codec, **self.text.roles, "vision": self.vision}
        return {name: record for name, record in found.items() if record}

    def text_members(self) -> list[str]:
        """The members with tokens and vectors of roles."""
        return [name for name in self.members if name.removesuffix("_pooled") in self.text.roles]

    def arranged(self, wanted: Arrangement | None) -> "Manifest":
        """The manifest as a run sees it that reads the text so; raises InputError where it cannot."""
        return self.model_copy(update={"text": self.text.arranged(wanted)})

    def latent_doubt(self) -> str:
        """What is to be said of the measured latents; "" where they are as the objectives expect, or the base's."""
        return "" if self.base else self.codec.doubt(self.latent_mean, self.latent_std)

    def with_fingerprint(self) -> "Manifest":
        content = self.model_dump(mode="json")
        # Every field is set, as in a file of these.
        return self.model_validate(content | {"fingerprint": _content_fingerprint(content)})

    def shape_in_bucket(self, name: str, height: int, width: int) -> tuple[int | None, ...]:
        """A member's shape in samples of a bucket, pixels; None is left of a text's number of tokens."""
        shape = self.members[name].shape
        if name == "vision" and self.vision:
            cell = self.vision.patch_pixels
        elif name == "moments":
            cell = self.codec.downscale
        else:
            return shape
        return shape[0], height // cell, width // cell


def _content_fingerprint(manifest: dict[str, Any]) -> str:
    """sha256 of all that the file says but this itself; the members' order counts."""
    content = {name: value for name, value in manifest.items() if name != "fingerprint"}
    return fingerprint({"content": content, "order": list(manifest["members"])})


def work_folder(generation: int) -> str:
    """The folder, within a dataset's, with what resuming a generation needs, but for its shards' commits."""
    return f"{WORK}/g{generation:04d}" if generation else WORK


def fingerprint(data: dict[str, Any]) -> str:
    """sha256 of plain data in canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(dataset: Path) -> Manifest:
    """Read and check manifest.json; raises InputError if absent, of another format, or edited."""
    path = dataset / MANIFEST
    if not path.is_file():
        unfinished = (dataset / "work").is_dir()
        state = "a preparation that has not finished" if unfinished else "no dataset"
        raise InputError(
            f"{path}: no such file; {dataset} holds {state}. Remedy: run (again) flowmill prepare."
        )
    return parse_manifest(path.read_text(), path)


def parse_manifest(text: str, path: Path) -> Manifest:
    """Check what `path` holds; raises InputError where that is of another format, or edited."""
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}). Remedy: prepare again.") from error
    data: dict[str, Any] = parsed if isinstance(parsed, dict) else {}
    if data.get("format") != FORMAT_VERSION:
        got = data.get("format", data.get("format_version"))
        raise InputError(
            f"{path}: format got {got}, expected {FORMAT_VERSION}. Remedy: prepare the pictures again."
        )
    manifest = parse_config(Manifest, data, str(path))
    if manifest.fingerprint != _content_fingerprint(data):
        raise InputError(f"{path}: was edited: its fingerprint does not match its content")
    return manifest


def text_record(text: str | Combination, roles: dict[str, Any], views: dict[str, View]) -> Any:
    """TextRecord's fields of roles that are read so; raises InputError where their views do not fit it."""
    read, absent = combination(text, views), dict[str, tuple[int, int]]()
    if isinstance(read, Convention):
        missing = read.optional.keys() - views.keys()
        absent = {n: (read.roles[n].max_length, read.optional[n]) for n in missing}
    name = text if isinstance(text, str) else "custom"
    said = {"convention": name, "roles": roles, "absent": absent}
    return said | {key: getattr(read, key) for key in Combination.model_fields}


def captions_sha256(captions: Sequence[tuple[str, list[str] | None]]) -> str | None:
    """The hash of a shard's keys and captions as drawn; None where none of its pictures has a caption.

    Of a layer all pictures of the base's shard count, with null for those that got no caption.
    """
    if not any(any(texts or ()) for _, texts in captions):
        return None
    text = json.dumps(captions, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_shard_table(dataset: Path) -> pa.Table:
    """shards.parquet, in the order of `generation` and `path`."""
    with (dataset / SHARD_TABLE).open("rb") as file:
        return pq.read_table(file, schema=SHARD_SCHEMA)


def index_path(shard: str) -> str:
    """The index file beside a shard: NAME.tar -> NAME.idx.npy."""
    return shard.removesuffix(".tar") + ".idx.npy"


def proof_path(shard: str) -> str:
    """The proof beside a shard: NAME.tar -> NAME.proof.safetensors."""
    return shard.removesuffix(".tar") + ".proof.safetensors"


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


Stored = tuple[str, dict[str, tuple[int, int]], dict[str, np.ndarray], dict[str, Any]]


def read_pictures(tar: IO[bytes], keys: Container[str] | None = None) -> Iterator[Stored]:
    """Each picture of a shard, or of `keys`: key, places and arrays by name, and what KEY.json says.

    A place is the offset in the tar and the bytes of an array. Raises ValueError where members are not
    grouped by key, each with its KEY.json as the last.
    """
    places, arrays, last = dict[str, tuple[int, int]](), dict[str, np.ndarray](), ""
    tar.seek(0)
    with tarfile.open(fileobj=tar, mode="r:") as members:
        for info in members:
            key, _, name = info.name.partition(".")
            if keys is not None and key not in keys:
                continue
            if last not in ("", key):
                raise ValueError(f"member {info.name!r} where one of {last!r} was expected")
            tar.seek(info.offset_data)
            data, last = tar.read(info.size), key
            if name == "json":
                yield key, places, arrays, json.loads(data)
                places, arrays, last = {}, {}, ""
            else:
                array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
                name = name.removesuffix(".npy")
                places[name] = info.offset_data + info.size - array.nbytes, array.nbytes
                arrays[name] = array
    if last:
        raise ValueError(f"ends within {last}")
