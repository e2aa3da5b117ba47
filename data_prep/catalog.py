"""Which pictures there are: one catalog Parquet part per partition of the sources, its rows what is known."""

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from data_prep.decoder import Address, Answer, DecodePool, Probe, ProbeRequest
from data_prep.images import ImagesConfig, Rejected
from data_prep.schema.metadata import MetadataFilter, refusal
from data_prep.sources import Entry, Item, SourceConfig, read_entries, sample_key
from data_prep.storage import publish, temporary_for
from data_prep.text import encodable, encoding_of
from models.config import Config, Entries

CATALOG_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        # The picture's own name within its source.
        ("name", pa.large_string()),
        ("path", pa.large_string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        # sha256 of the picture's bytes.
        ("content_hash", pa.binary(32)),
        # Null unless near duplicates are looked for.
        ("perceptual_hash", pa.uint64()),
        # Both as seen, with the EXIF orientation applied.
        ("height", pa.int32()),
        ("width", pa.int32()),
        # Drawn by weight; one may be there twice.
        ("captions", pa.list_(pa.large_string())),
        # A JSON object, or empty.
        ("metadata", pa.large_string()),
        ("label", pa.int64()),
        # Why the picture was rejected; null where it was taken.
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
# Pictures that pass to a child in one message; as many again are read meanwhile.
PROBES_AT_ONCE = 16
ROWS_AT_ONCE = 8192
# Folder within the working folder.
STAGED = "staged"


class CaptionsConfig(Config):
    """Which captions are taken."""

    empty: Literal["reject", "keep"] = "reject"
    """What becomes of a picture of which nothing, or only blanks, is said."""
    min_chars: int = Field(default=1, ge=1)
    """Shorter captions are rejected, empty ones by `empty`."""
    max_chars: int = Field(default=4096, ge=1)
    """Longer captions are rejected; encoders cut at their max_length."""
    lines: Literal["join", "each"] = "join"
    """What several lines of text are: one caption, or one each, of which any may be drawn."""
    per_picture: int = Field(default=1, ge=1, le=64)
    """Captions drawn by the sources' weights; each makes a sample of the picture."""

    @model_validator(mode="after")
    def _some_length_is_allowed(self) -> Self:
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} is over max_chars {self.max_chars}")
        return self


class FiltersConfig(Config):
    """Which pictures are taken. Null switches a filter off."""

    min_side: int | None = Field(default=None, ge=1)
    """Pixels of the shorter side, before resizing."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Long over short side, before cropping."""
    metadata: Entries[str, MetadataFilter] = Field(default_factory=dict)
    """Field of the picture's metadata -> what it must be, as in `aesthetic: {min: 5}`."""
    duplicates: Literal["reject", "keep"] = "reject"
    """What becomes of the same file again, in any source."""
    near_duplicates: int | None = Field(default=None, ge=0, le=8)
    """Bits of the 64-bit dHash in which a near duplicate may differ; 0: none, but looks alike to it."""

    def rules(self, height: np.ndarray, width: np.ndarray) -> dict[str, np.ndarray]:
        """By reason, in the order in which they apply, which pictures of these sizes (N,) are rejected."""
        short, long = np.minimum(height, width), np.maximum(height, width)
        return {
            "too_small": short < (self.min_side or 0),
            "aspect": long > (self.max_aspect or np.inf) * np.maximum(short, 1),
        }


@dataclass(frozen=True)
class ScanSettings:
    """What is the same for all parts of a catalog, which lies in `work`."""

    work: Path
    class_names: list[str]
    images: ImagesConfig
    captions: CaptionsConfig
    filters: FiltersConfig
    check: Callable[[], None] = lambda: None
    """Raises InputError where the folder is another process's by now."""


def scan_partition(
    settings: ScanSettings, name: str, source: SourceConfig, entries: list[Entry], pool: DecodePool
) -> int:
    """Write the catalog part NAME.parquet of some entries; returns its captions of joined lines.

    Pictures that came as bytes in a table are laid end to end in STAGED/NAME, for a row of a compressed
    column has no address of its own; that file appears first, and the part is then NAME.staged.parquet.
    """
    work, staged = settings.work, settings.work / STAGED / name
    temporary, staging = temporary_for(work / "catalog" / name), temporary_for(staged)
    name_of, named = entries[0].source, source.names_pictures
    scan = _Scan(settings, name_of, pool, staging, staged, named)
    items = read_entries(entries, source, settings.class_names, settings.filters.metadata)
    try:
        with pq.ParquetWriter(temporary, CATALOG_SCHEMA, compression="zstd") as writer:
            rows = scan.rows(items)
            while some := list(islice(rows, ROWS_AT_ONCE)):
                writer.write_table(pa.Table.from_pylist(some, CATALOG_SCHEMA))
        settings.check()
        kind = "parquet"
        if staging.exists():
            publish(staging, staged)
            kind = "staged.parquet"
        publish(temporary, work / "catalog" / f"{name}.{kind}")
    finally:
        temporary.unlink(missing_ok=True)
        staging.unlink(missing_ok=True)
    return scan.joined


# A row as far as it is known, and the question about its picture.
_Begun = tuple[dict[str, Any], ProbeRequest | None]


@dataclass
class _Scan:
    """The rows of one partition, in the order of its items, several probes ahead."""

    settings: ScanSettings
    source: str
    pool: DecodePool
    staging: Path
    staged: Path
    named: bool
    staged_bytes: int = 0
    joined: int = 0

    def rows(self, items: Iterator[Item]) -> Iterator[dict[str, Any]]:
        begun, asked = list[_Begun](), deque[tuple[list[_Begun], Future[list[Answer]]]]()
        for item in chain(items, [None]):
            if item:
                begun.append(self._begin(item))
            # A copy may be gone with the next item.
            alone = item is None or bool(item.copy)
            if alone or len(begun) == PROBES_AT_ONCE:
                requests = [request for _, request in begun if request]
                asked.append((begun, self.pool.submit_all(requests)))
                begun = []
            while len(asked) > (0 if alone else 1):
                yield from _finish(*asked.popleft())

    def _begin(self, item: Item) -> _Begun:
        """The item's row as far as it is known without the picture, and the question about that."""
        metadata = json.dumps(item.metadata, ensure_ascii=False) if item.metadata else ""
        row: dict[str, Any] = {
            "key": sample_key(self.source, item.name),
            "source": self.source,
            "name": item.name,
            "path": item.path,
            "offset": item.offset,
            "length": item.length,
            "captions": [],
            "metadata": encodable(metadata),
            "label": item.label,
            "reason": item.reason,
            "detail": encodable(item.detail),
        }
        if item.reason:
            return row, None
        captions = self.settings.captions
        try:
            row["captions"] = draw_captions(row["key"], item.captions, captions)
            if captions.lines == "join":
                self.joined += any(len(lines_of(said)) > 1 for said, _ in item.captions)
            if why := refusal(item.metadata, self.settings.filters.metadata):
                raise Rejected("metadata", why)
        except Rejected as rejected:
            detail = "; ".join(filter(None, (rejected.detail, row["detail"])))
            return row | {"reason": rejected.reason, "detail": detail}, None
        path = item.copy or item.path
        if item.data is not None:
            row |= {"path": str(self.staged), "offset": self.staged_bytes}
            path = str(self.staging)
            with open(path, "ab") as file:
                file.write(item.data)
            self.staged_bytes += len(item.data)
        address = Address(path, row["offset"], item.length, named=self.named)
        looks = self.settings.filters.near_duplicates is not None
        return row, ProbeRequest(address, looks)


def _finish(begun: list[_Begun], asked: Future[list[Answer]]) -> Iterator[dict[str, Any]]:
    answers = iter(asked.result())
    for row, request in begun:
        answer = next(answers) if request else None
        if isinstance(answer, Rejected):
            row |= {"reason": answer.reason, "detail": answer.detail}
        elif isinstance(answer, Probe):
            # What a probe finds are columns of the catalog.
            row |= vars(answer)
        yield row


def draw_captions(
    key: str, said: tuple[tuple[bytes | Rejected, float], ...], config: CaptionsConfig
) -> list[str]:
    """`per_picture` captions: each as often as its weight says, the rest decided by the key.

    Systematic sampling: points 1/n apart from a random first one, on the weights laid end to end.
    Captions that cannot be used give way to those that can; raises Rejected where there are none.
    """
    texts, weights, why = list[str](), list[float](), None
    for whole, weight in said or ((None, 1.0),):
        parts = lines_of(whole) if config.lines == "each" else [whole]
        for data in parts:
            try:
                texts.append(clean_caption(data, config))
                weights.append(weight / len(parts))
            except Rejected as rejected:
                why = why or rejected
    if why and not texts:
        raise why
    count = config.per_picture
    if len(texts) == 1:
        return texts * count
    digest = hashlib.sha256(f"caption\0{key}".encode()).digest()
    first = int.from_bytes(digest[:4], "big") / 2**32
    ends = np.cumsum(weights) / math.fsum(weights)
    points = (first + np.arange(count)) / count
    chosen = np.minimum(np.searchsorted(ends, points, side="right"), len(texts) - 1)
    return [texts[i] for i in chosen]


def lines_of(data: bytes | Rejected | None) -> list[Any]:
    """The lines of a caption that are not blank; the caption itself where it has no two."""
    if not isinstance(data, bytes) or not (b"\n" in data or b"\r" in data):
        return [data]
    try:
        lines = [line for line in data.decode(encoding_of(data)).splitlines() if line.strip()]
    except UnicodeDecodeError:
        return [data]
    return [line.encode() for line in lines] if lines[1:] else [data]


def clean_caption(data: bytes | Rejected | None, config: CaptionsConfig) -> str:
    """Text on one line, single blanks; raises Rejected."""
    if isinstance(data, Rejected):
        raise data
    try:
        text = (data or b"").decode(encoding_of(data or b""))
        text = " ".join(text.replace("\0", " ").split())
    except UnicodeDecodeError as error:
        raise Rejected("caption_not_utf8", f"byte {error.start}") from error
    if len(text) > config.max_chars:
        raise Rejected("caption_too_long", f"over {config.max_chars} characters")
    if not text and config.empty == "reject":
        raise Rejected("caption_empty", "no caption" if data is None else "only blanks")
    if text and len(text) < config.min_chars:
        raise Rejected("caption_too_short", f"under {config.min_chars} characters")
    return text
