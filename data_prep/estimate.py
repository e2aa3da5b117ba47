"""`flowmill plan CONFIG.yaml` of a preparation: runs its stages on a random sample of the pictures and extrapolates."""

import os
import random
import sys
import tarfile
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from data_prep.config import PrepareConfig, check_settings
from data_prep.encode import EncoderSettings, ShardEncoder, encode_shards
from data_prep.encoders import weight_of
from data_prep.plan import ShardSpec, make_plan
from data_prep.publish import latent_statistics
from data_prep.report import Listing, Progress, console, warn
from data_prep.scan import Intake, list_sources, scan
from data_prep.schema import CodecRecord, proof_path
from data_prep.shards import WORK
from data_prep.sources.classes import count_classes
from data_prep.sources.source import files_of
from data_prep.storage import find_files
from data_prep.workers import Actors, connect, share_out
from models.command import duration, load_config, run_command

# Bytes of a shard that belong to no picture: two blocks, half a record on average, and the index's header.
SHARD_END = 1024 + tarfile.RECORDSIZE / 2 + 128
# Tars or tables that are read per source: several, since they differ.
TABLES = 3


@dataclass(frozen=True)
class Estimate:
    """The whole preparation, from a sample of `sampled` pictures, of which `kept_share` were kept."""

    pictures: int
    sampled: int
    kept_share: float
    kept: int
    shards: int
    bytes_per_picture: float
    """Bytes in a shard and its index."""
    total_bytes: float
    seconds_per_picture: float
    """Seconds that one actor takes."""
    doubt: str
    """A warning about the latents; "" where they are as they should be."""


def estimate(config: PrepareConfig, wanted: int) -> Estimate:
    """Prepare about `wanted` pictures in a folder that is then deleted; raises InputError.

    Duplicates are found within the sample only, so `kept` is an upper bound.
    """
    check_settings(config)
    listing = list_sources(config)
    sample = sample_of(config, listing, wanted)
    small = min(config.samples_per_shard, wanted)
    # The folder is this machine's own, which no other node could write to.
    os.environ.pop("RAY_ADDRESS", None)
    connect(config.ray)
    with tempfile.TemporaryDirectory(prefix="flowmill-plan-") as folder:
        dataset = Path(folder)
        classes = list(count_classes(config.sources, sample))
        scan(config, Intake(dataset / WORK, sample, classes))
        shards = make_plan(config.model_copy(update={"samples_per_shard": small}), dataset / WORK)
        num, spent, size, proof, doubt = _encode(config, dataset, shards, wanted)
        catalog = pq.read_table(dataset / WORK / "catalog", columns=["source"])
    seen, pictures = Counter(catalog["source"].to_pylist()), 0.0
    for name, source in config.sources.items():
        every, read = (files_of(t, name)["size"].to_numpy() for t in (listing, sample))
        # Those of the tars and tables that were not read are reckoned by their bytes.
        of_all = seen[name] * every.sum() / max(read.sum(), 1)
        pictures += len(every) if source.per_task > 1 else of_all
    kept_share = sum(spec.num_planned for spec in shards) / seen.total()
    kept, groups = round(pictures * kept_share), len({(s.height, s.width, s.split) for s in shards})
    num_shards = max(round(kept / config.samples_per_shard + groups / 2), groups)
    return Estimate(
        pictures=round(pictures),
        sampled=seen.total(),
        kept_share=kept_share,
        kept=kept,
        shards=num_shards,
        bytes_per_picture=size / num,
        total_bytes=kept * size / num + num_shards * (SHARD_END + proof),
        seconds_per_picture=spent / num,
        doubt=doubt,
    )


def sample_of(config: PrepareConfig, listing: pa.Table, wanted: int) -> pa.Table:
    """A random part of the listing, of every source alike.

    A tar or table is taken whole, since only reading says how many pictures it has.
    """
    rng, parts = random.Random(0), []
    for name, source in config.sources.items():
        rows = files_of(listing, name)
        count = -(-wanted // len(config.sources)) if source.per_task > 1 else TABLES
        parts.append(rows.take(sorted(rng.sample(range(len(rows)), min(count, len(rows))))))
    return pa.concat_tables(parts)


def _encode(
    config: PrepareConfig, dataset: Path, shards: list[ShardSpec], wanted: int
) -> tuple[int, float, float, float, str]:
    """Pictures encoded by one actor, the seconds that took, their bytes, those of one proof, and a warning."""
    todo, num = list[tuple[ShardSpec, int]](), 0
    for number in random.Random(0).sample(range(len(shards)), len(shards)):
        if num < wanted:
            todo.append((shards[number], number))
            num += shards[number].num_planned
    # The actor gets what each would get where there are as many as there is room for.
    shares = share_out(config.ray, config.encode.threads, sys.maxsize, weight_of(config))
    settings = EncoderSettings(config, dataset)
    with Actors(ShardEncoder, settings, replace(shares, num_actors=1), console.print) as actors:
        encoders, commits = actors.describe(), list[dict[str, Any]]()
        begin = time.perf_counter()
        with Progress("sample", num, "pictures") as progress:
            for _, commit in encode_shards(actors, todo):
                commits.append(commit)
                progress.update(sum(commit["num_planned"] for commit in commits))
        spent = time.perf_counter() - begin
    sizes = find_files(dataset / "shards")
    proofs = [size for name, size in sizes.items() if name.endswith(proof_path(""))]
    size = sum(sizes.values()) - sum(proofs) - SHARD_END * len(todo)
    codec = CodecRecord.model_validate(encoders.record["codec"])
    doubt = codec.doubt(*latent_statistics(commits))
    return num, spent, size, sum(proofs) / max(len(proofs), 1), doubt


def report(config: PrepareConfig, wanted: int) -> Estimate:
    """Print what a preparation will take."""
    found = estimate(config, wanted)
    spent = found.kept * found.seconds_per_picture
    for doubt in filter(None, (config.vae.doubt(), found.doubt)):
        warn(doubt)
    rows = [
        ("pictures", f"{found.pictures:,} in the sources"),
        ("kept", f"{found.kept:,} at most, {found.kept_share:.1%} of {found.sampled:,} looked at"),
        ("shards", f"{found.shards:,} of {config.samples_per_shard} samples"),
        ("bytes", f"{found.total_bytes / 2**30:,.3f} GiB, {found.bytes_per_picture / 1024:.1f} KiB per picture"),
        ("speed", f"{1 / found.seconds_per_picture:,.1f} pictures/s with one actor on this machine"),
        ("time", ", ".join(f"{duration(spent / n)} with {n} actor{'s' * (n > 1)}" for n in (1, 8, 64))),
    ]  # fmt: skip
    Listing("Preparation", ("", ""), rows, words=2).print()
    console.print(
        "Actors: one per GPU, or one per CPU. Duplicates were looked for in the sample only."
    )
    return found


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of a preparation")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    sample: Annotated[int, typer.Option(min=1, help="pictures to prepare, to see")] = 128,
) -> None:
    """Pictures, shards, bytes and hours of a preparation, before it starts."""
    report(load_config(PrepareConfig, config, overrides or []), sample)


if __name__ == "__main__":
    run_command(main)
