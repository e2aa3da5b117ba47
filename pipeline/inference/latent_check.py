"""Before a new run's first step: whether the codec at hand gives the pictures that the shards were made of."""

import logging
import random
import time
from typing import Any

from data_prep.schema import proof_path
from data_prep.schema.drift import drift
from data_prep.schema.proof import read_proof
from models.config import InputError
from models.vae import LatentCodec
from pipeline import distributed
from pipeline.data.cache import ShardError
from pipeline.data.loader import Loader

log = logging.getLogger(__name__)

SECONDS = 25.0
"""Time after which no further shard is begun."""


def check_latents(loader: Loader, codec: LatentCodec | None, count: int, ranks: int) -> None:
    """Decode `count` pictures per bucket, of its first and of a random shard; raises InputError on every rank.

    The first `ranks` ranks have a codec, and share the buckets. Collective.
    """
    mixture, began = loader.first.mixture, time.monotonic()
    mine = sorted(mixture.buckets().items())[distributed.rank() :: ranks] if codec else []
    problem = ""
    for _, parts in mine:
        shards = [int(shard) for part in parts for shard in part.shards]
        for shard in sorted({shards[0], random.choice(shards)}):
            if problem or codec is None or time.monotonic() - began > SECONDS:
                break
            problem = _drift_of(loader, shard, codec, (count + 1) // 2)
    problems = [found for found in distributed.gather_objects(problem) if found]
    if problems:
        raise InputError(
            f"{problems[0]}. Remedy: flowmill verify --decode 4 names every such shard; prepare them again, or give "
            "their codec as encoders.vae. data.check=0 trains on them as they are."
        )


def _drift_of(loader: Loader, number: int, codec: LatentCodec, count: int) -> str:
    """What is wrong with the latents of a shard; "" if nothing is, or where it has no proof."""
    mixture = loader.first.mixture
    dataset, path = mixture.dataset_of(number), mixture.text("path", number)
    if mixture.table["proof_sha256"][number].as_py() is None:
        return ""
    # An error on one rank alone would leave the others waiting; reading for training says what is damaged.
    try:
        shard: Any = loader.first.store.open(number)
        if dataset.cache:
            dataset.cache.refresh(proof_path(path))
        wrong = drift(shard.map, read_proof(dataset.home, path), count, codec.picture)
    except (ShardError, OSError, ValueError) as error:
        log.warning("data.check: %s is not compared with its proof: %s", path, error)
        return ""
    return wrong and f"{dataset.source.path}/{path}: {wrong}"
