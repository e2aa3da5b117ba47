"""Configs of what a run reads: datasets, their mixture, the cache. Pydantic alone, so that reading one imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from models.config import Config


class CacheConfig(Config):
    path: str  # a folder on a local disk
    max_gib: float = Field(gt=0)  # of all shards in it, whichever run or rank put them there
    attempts: int = Field(default=6, ge=1)  # at a file, waiting 1, 2, 4, ... 30 s in between


def is_remote(path: str) -> bool:
    return "://" in path


class DatasetConfig(Config):
    path: str
    repeat: float = Field(default=1.0, gt=0)  # times that a sample comes in an epoch


class DataConfig(Config):
    """Either `path`, one dataset, or `datasets`, several mixed by their repeat factors."""

    path: str | None = None
    datasets: dict[str, DatasetConfig] = Field(default_factory=dict)
    # What changes the order, beside the run's seed and global batch.
    canonical_partitions: Annotated[int, Field(ge=1)] | None = None  # None: see choose_partitions
    window_shards: int = Field(4, ge=1)  # shuffled together, in every partition and bucket
    grow: bool = False  # look for more shards at the beginning of every epoch
    on_corrupt: Literal["fail", "skip"] = "fail"  # skip: others take the places of its samples
    # What changes the tensors.
    text_length: Annotated[int, Field(ge=1)] | None = None  # tokens kept; None: all prepared
    pad_text: Literal["max", "longest"] = "max"  # to text_length, or to the batch's longest
    # Reading.
    verify: Literal["first_use", "size"] = "first_use"  # hash each shard once, or trust its size
    prefetch: int = Field(2, ge=0)  # batches read ahead by a thread; 0 reads when asked
    cache: CacheConfig | None = None  # for datasets at URLs

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.path is None) == (not self.datasets):
            raise ValueError("give either path (one dataset) or datasets (several), and not both")
        remote = [source.path for source in self.sources.values() if is_remote(source.path)]
        if remote and not self.cache:
            raise ValueError(f"{remote[0]} is remote: give cache.path and cache.max_gib")
        if self.cache and not remote:
            raise ValueError("cache has no effect: every dataset is a local folder")
        return self

    @property
    def sources(self) -> dict[str, DatasetConfig]:
        return self.datasets or {"data": DatasetConfig(path=self.path or "")}
