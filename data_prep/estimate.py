"""`flowmill plan CONFIG.yaml` of a preparation: runs its stages on a random sample of the pictures and extrapolates."""

import os
import random
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from data_prep.config import PrepareConfig, check_settings
from data_prep.encode import Encoders, EncoderSettings, ShardEncoder, encode_shards
from data_prep.encoders import weight_of
from data_prep.plan import ShardSpec, make_plan
from data_prep.publish import latent_statistics
from data_prep.report import Listing, console, status, warn
from data_prep.scan import Intake, list_sources, scan
from data_prep.schema import WORK, CodecRecord, index_path, proof_path, read_index
from data_prep.sources.classes import count_classes
from data_prep.sources.source import files_of
from data_prep.workers import Actors, connect, share_out
from models.command import duration, load_config, run_command
from models.config import InputError

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
    members: dict[str, tuple[str, float]]
    """By member its dtype, and the bytes of its arrays per picture."""
    total_bytes: float
    """Bytes of all shards with their indices and proofs."""
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
        encoders, commits, spent = _encode(config, dataset, shards, wanted)
        made = [commit["path"] for commit in commits if commit["num_samples"]]
        if not made:
            reasons = {reject["reason"] for commit in commits for reject in commit["rejects"]}
            raise InputError(
                f"sources: every picture of the sample was rejected: {', '.join(sorted(reasons))}. Remedy: other "
                "pictures, or flowmill prepare, whose rejects.parquet says more of each."
            )
        sizes = bytes_by_member(dataset, made, encoders.members)
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
    files = [item for commit in commits for item in commit.get("sizes", {}).items()]
    proofs = sum(size for name, size in files if name.endswith(proof_path("")))
    num, whole = sum(commit["num_planned"] for commit in commits), sum(size for _, size in files)
    of_pictures = whole - proofs - len(made) * SHARD_END
    codec = CodecRecord.model_validate(encoders.record["codec"])
    return Estimate(
        pictures=round(pictures),
        sampled=seen.total(),
        kept_share=kept_share,
        kept=kept,
        shards=num_shards,
        members={n: (m.dtype, sizes[n] / num) for n, m in encoders.members.items()},
        total_bytes=kept * of_pictures / num + num_shards * (SHARD_END + proofs / len(made)),
        seconds_per_picture=spent / num,
        doubt=codec.doubt(*latent_statistics(commits)),
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
) -> tuple[Encoders, list[dict[str, Any]], float]:
    """What the encoders say of themselves, the commits of some shards, made by one actor, and the seconds that took."""
    todo, num = list[tuple[ShardSpec, int]](), 0
    for number in random.Random(0).sample(range(len(shards)), len(shards)):
        if num < wanted:
            todo.append((shards[number], number))
            num += shards[number].num_planned
    # The actor gets what each would get where there are as many as there is room for.
    shares = share_out(config.ray, config.encode.threads, sys.maxsize, weight_of(config))
    settings = EncoderSettings(config, dataset)
    with Actors(ShardEncoder, settings, replace(shares, num_actors=1), console.print) as actors:
        encoders, begin = actors.describe(), time.perf_counter()
        with status(f"encoding a sample of {num:,} pictures"):
            commits = [commit for _, commit in encode_shards(actors, todo)]
        return encoders, commits, time.perf_counter() - begin


def bytes_by_member(dataset: Path, shards: list[str], members: Collection[str]) -> Counter[str]:
    """Bytes of each member's arrays in some shards; the samples of one picture may share an array."""
    found = Counter[str]()
    for shard in shards:
        index = read_index(dataset / index_path(shard))
        for name, places in zip(members, index.swapaxes(0, 1), strict=True):
            found[name] += int(np.unique(places, axis=0)[:, 1].sum())
    return found


def report(config: PrepareConfig, wanted: int, rate: float | None = None) -> Estimate:
    """Print what a preparation will take, at `rate` pictures/s of an actor or as many as were measured."""
    found = estimate(config, wanted)
    speed = rate or 1 / found.seconds_per_picture
    where = "as stated" if rate else "on this machine"
    for doubt in filter(None, (config.vae.doubt(), found.doubt)):
        warn(doubt)
    rows = [
        ("pictures", f"{found.pictures:,} in the sources"),
        ("kept", f"{found.kept:,} at most, {found.kept_share:.1%} of {found.sampled:,} looked at"),
        ("shards", f"{found.shards:,} of {config.samples_per_shard} samples"),
        ("speed", f"{speed:,.1f} pictures/s with one actor, {where}"),
        ("time", ", ".join(f"{duration(found.kept / speed / n)} with {n} actor{'s' * (n > 1)}" for n in (1, 8, 64))),
    ]  # fmt: skip
    Listing("Preparation", ("", ""), rows, words=2).print()
    sizes = [(name, *each) for name, each in found.members.items()]
    whole = found.total_bytes / found.kept
    sizes += [("headers, JSON, proofs", "", whole - sum(size for *_, size in sizes))]
    rows = [
        (name, dtype, f"{size / 1024:,.1f}", f"{found.kept * size / 2**30:,.3f}")
        for name, dtype, size in [*sizes, ("whole", "", whole)]
    ]
    head = ("member", "stored as", "KiB per picture", "GiB in all")
    Listing("Bytes", head, rows, words=2).print()
    console.print(
        "Actors: one per GPU, or one per CPU. Duplicates were looked for in the sample only."
    )
    return found


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of a preparation")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    sample: Annotated[int, typer.Option(min=1, help="pictures to prepare, to see")] = 128,
    rate: Annotated[
        float | None, typer.Option(min=1e-3, help="pictures/s of an actor elsewhere; as measured")
    ] = None,
) -> None:
    """Pictures, shards, bytes by member and hours of a preparation, before it starts."""
    report(load_config(PrepareConfig, config, overrides or []), sample, rate)


if __name__ == "__main__":
    run_command(main, "data_prep/README.md#how-much-disk-how-many-hours")
