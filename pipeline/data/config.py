"""Configs of what a run reads: datasets, their mixture, the cache. They import no torch."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from data_prep.schema.metadata import MetadataFilter
from models.config import Config, Entries, InputError, Place
from models.text_conventions import Arrangement


class CacheConfig(Config):
    path: Place
    """Folder on a local disk."""
    max_gib: float = Field(gt=0)
    """Size of all shards in it, whichever run or rank fetched them."""
    attempts: int = Field(default=6, ge=1)
    """Attempts to fetch a file, with waits of 1, 2, 4, ... 30 s in between."""


def is_remote(path: str) -> bool:
    return "://" in path


class DatasetConfig(Config):
    path: Place
    layers: dict[str, Place] = Field(default_factory=dict)
    """Layers over the dataset by a name of one's own: each hides members of the same name below it."""
    repeat: float = Field(default=1.0, gt=0)
    """How often a sample comes per epoch."""


class DataConfig(Config):
    """Either `path`, one dataset, or `datasets`, several mixed by their repeat factors."""

    path: Place | None = None
    """A dataset, or a layer, which is read with its base."""
    layers: dict[str, Place] = Field(default_factory=dict)
    """Layers over `path`, as in a dataset of several."""
    datasets: dict[str, DatasetConfig] = Field(default_factory=dict)
    mix: Literal["repeat", "equal"] = "repeat"
    """equal: each dataset makes up the same share of an epoch, which stays as long as all are together (i1 2606.11289)."""
    # What changes the order, beside the run's seed and global batch.
    canonical_partitions: Annotated[int, Field(ge=1)] | None = None
    """Ranges per bucket; null: the largest power of two up to 64 that divides the batch."""
    window_shards: int = Field(4, ge=1)
    """Shards whose samples are shuffled together, in every partition and bucket."""
    grow: bool = False
    """Looks for more shards at the beginning of every epoch."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """With skip, other samples take the places of a damaged shard's."""
    # What is left out: taken up at an epoch's beginning, and recorded.
    exclude: Place | None = None
    """Keys of pictures that are left out: column `key` of a file .parquet or .csv, or lines of text."""
    scores: Place | None = None
    """A file .parquet or .csv with column `key` and columns of numbers, for `filters`."""
    filters: Entries[str, MetadataFilter] = Field(default_factory=dict)
    """Column of `scores` -> what it must be, as in `aesthetic: {min: 5}`; other pictures are left out."""
    # What changes the tensors.
    text: Arrangement | None = None
    """How the network reads the stored encoders, or some of them; null: as the convention of the data says."""
    text_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens kept; null: all that were prepared."""
    pad_text: Literal["max", "longest"] = "max"
    """Pads texts to text_length, or to the next multiple of 16 from the longest of the batch."""
    # Reading.
    check: int = Field(8, ge=0)
    """Pictures per bucket that a new run which draws prompts decodes, to see that their latents are the codec's."""
    verify: Literal["first_use", "size"] = "first_use"
    """Hashes each shard once, or trusts its size."""
    prefetch: int = Field(2, ge=0)
    """Batches that a thread reads ahead; 0 reads when asked."""
    cache: CacheConfig | None = None
    """For datasets at URLs."""

    def refusals(self) -> Iterator[str]:
        if (self.path is None) == (not self.datasets):
            yield "give either path (one dataset) or datasets (several), and not both"
        repeats = {dataset.repeat for dataset in self.datasets.values()}
        if self.mix == "equal" and repeats != {1}:
            yield "mix: equal weighs several datasets alike. Remedy: no repeat, and datasets"
        if bool(self.scores) != bool(self.filters):
            yield "scores, filters: got one of the two, which has no effect; give both"
        if self.layers and self.path is None:
            yield "layers: no effect beside datasets; give datasets.NAME.layers"
        places = [place for s in self.sources.values() for place in (s.path, *s.layers.values())]
        remote = [place for place in places if is_remote(place)]
        if remote and not self.cache:
            yield f"{remote[0]} is remote: give cache.path and cache.max_gib"
        if self.cache and not remote:
            yield "cache has no effect: every dataset is a local folder"

    @property
    def sources(self) -> dict[str, DatasetConfig]:
        return self.datasets or {"data": DatasetConfig(path=self.path or "", layers=self.layers)}


def choose_partitions(wanted: int | None, global_batch: int, world_size: int) -> int:
    """`wanted`, or else the largest power of two, at most 64, that divides the batch.

    Raises InputError with the valid numbers.
    """
    small = [d for d in range(1, math.isqrt(global_batch) + 1) if global_batch % d == 0]
    divisors = sorted({*small, *(global_batch // d for d in small)})
    if wanted is None:
        # The number of ranks plays no part, or the order would depend on it.
        wanted = max(d for d in divisors if d <= 64 and d & (d - 1) == 0)
    if wanted not in divisors:
        raise InputError(
            f"data.canonical_partitions: got {wanted}, which does not divide the global batch of "
            f"{global_batch}; valid: {', '.join(map(str, divisors))}"
        )
    if wanted % world_size:
        ranks = ", ".join(str(r) for r in range(1, wanted + 1) if wanted % r == 0)
        others = ", ".join(str(d) for d in divisors if d % world_size == 0)
        remedy = f"canonical_partitions of {others}" if others else "another global batch"
        raise InputError(
            f"data.canonical_partitions: {wanted} cannot be shared equally by {world_size} ranks; valid "
            f"numbers of ranks: {ranks}. Remedy: that many ranks, or {remedy} (which changes the order)."
        )
    return wanted
