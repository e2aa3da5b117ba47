"""Real pictures to compare drawn ones with: a prepared dataset's, decoded, or a folder's; their features kept."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.schema import fingerprint
from data_prep.schema.recorded import open_codec
from models.config import InputError
from models.files import file_sha256, write_whole
from pipeline import distributed
from pipeline.data.batch import Batch
from pipeline.data.datasets import Mixture
from pipeline.data.loader import Loader
from pipeline.data.randomness import make_generator
from pipeline.evaluation.metrics import FeatureNetwork
from pipeline.inference.grid import read_picture

KINDS = "png jpg jpeg jfif jpe webp avif bmp gif tif tiff"
SUFFIXES = tuple(f".{kind}" for kind in KINDS.split())
# What systems put beside pictures: ._NAME, @eaDir/NAME, __MACOSX/NAME.
HIDDEN = re.compile(r"(^|/)([.@]|__MACOSX/)")


def find_pictures(folder: Path) -> list[Path]:
    """Every picture under a folder in the order of their names; raises InputError where there is none."""
    every = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    paths = sorted(p for p in every if not HIDDEN.search(p.relative_to(folder).as_posix()))
    if not paths:
        raise InputError(f"{folder}: got no picture, expected {', '.join(SUFFIXES)} files")
    return paths


@dataclass(frozen=True)
class FilePictures:
    """Pictures in files; cut to `size` (height, width) about the middle if given."""

    name: str
    paths: list[Path]
    size: tuple[int, int] | None = None

    @property
    def identity(self) -> Any:
        return [self.size, [file_sha256(path) for path in self.paths]]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, begin: int, end: int) -> Iterator[Tensor]:
        """Pictures begin to end, uint8 (3, H, W)."""
        yield from (read_picture(path, self.size) for path in self.paths[begin:end])


class DatasetPictures:
    """A prepared dataset's samples, decoded from the means of their latents: what the autoencoder can show.

    Whole shards in an order drawn once, cut at `limit`; so more samples begin with the same ones.
    """

    def __init__(
        self, loader: Loader, split: str, limit: int, vae: str | None, device: torch.device
    ):
        self.loader, self.vae, self.device = loader, vae, device
        self.mixture: Mixture = loader.first.mixture
        buckets = self.mixture.buckets(heldout=split == "heldout")
        shards = sorted(int(n) for parts in buckets.values() for p in parts for n in p.shards)
        if not shards:
            raise InputError(
                f"{split} split: got no sample. Remedy: --split train, or prepare with heldout_fraction=0.05"
            )
        order = make_generator(0, "reference").permutation(len(shards))
        every = [
            (shards[i], row) for i in order for row in range(int(self.mixture.sizes[shards[i]]))
        ]
        self.samples = every[:limit]
        paths = ", ".join(d.source.path for d in self.mixture.datasets)
        self.name, self.split = f"{paths}: {split}, decoded", split

    @property
    def identity(self) -> Any:
        return [self.mixture.identities(), self.split, len(self.samples)]

    def __len__(self) -> int:
        return len(self.samples)

    def sizes(self) -> list[tuple[int, int]]:
        return [self.mixture.bucket(shard) for shard, _ in self.samples]

    def read(self, begin: int, end: int) -> Iterator[Tensor]:
        codec = open_codec(self.loader.manifest.codec, self.vae, self.device)
        for _, _, batch in self._batches(begin, end):
            yield from codec.decode_mean(batch.moments).cpu()

    def prompts(self, count: int, with_class: bool) -> list[str]:
        """What the first `count` samples are of, as a prompt: caption, or "CLASS: CAPTION", or CLASS."""
        prompts: list[str] = []
        for shard, rows, batch in self._batches(0, count):
            if not (samples := self.mixture.keys_and_captions(shard)):
                raise InputError(
                    f"{self.mixture.text('path', shard)}: its captions are not on this machine. Remedy: "
                    "--prompts-file"
                )
            captions = [samples[row][1] for row in rows]
            if with_class and batch.label is not None:
                pairs = zip(batch.label.tolist(), captions, strict=True)
                captions = [f"{label}: {caption}".removesuffix(": ") for label, caption in pairs]
            prompts += captions
        return prompts

    def _batches(self, begin: int, end: int) -> Iterator[tuple[int, list[int], Batch]]:
        """Samples begin to end, 16 of a shard at a time: shard, rows and what lies there."""
        for shard, group in itertools.groupby(self.samples[begin:end], key=itemgetter(0)):
            while rows := [row for _, row in itertools.islice(group, 16)]:
                found = self.loader.first.store.rows(shard, np.array(rows))
                bucket, places = self.mixture.bucket(shard), torch.arange(len(rows))
                yield shard, rows, self.loader.first.assemble(found, bucket, places, 0, 0)


Pictures = FilePictures | DatasetPictures
"""Pictures in a fixed order; `name` says what they are, `identity` what a cache of them hangs on."""


def features_of(
    network: FeatureNetwork, pictures: Pictures, batch_size: int, device: torch.device, cache: Path
) -> Tensor:
    """Features (n, D) of all pictures, in order, each rank computing its share, or as cached. Collective."""
    found: tuple[Path, bool] | None = None
    if distributed.is_main():
        key = fingerprint({"pictures": pictures.identity, "network": network.sha256})
        path = cache / f"{network.name}_{key[:16]}.safetensors"
        found = path, path.is_file()
    path, cached = distributed.gather_objects(found)[0]
    if cached:
        return load_file(path)["features"]
    begin, end = share(len(pictures))
    mine = network.features(pictures.read(begin, end), batch_size, device)
    features = torch.cat([f for f in distributed.gather_objects(mine) if len(f)])
    if distributed.is_main():
        write_whole(path, lambda temporary: save_file({"features": features}, temporary))
    distributed.barrier()
    return features


def share(count: int) -> tuple[int, int]:
    """This rank's part of `count` things in a row: begin, end."""
    rank, ranks = distributed.rank(), distributed.world_size()
    return count * rank // ranks, count * (rank + 1) // ranks
