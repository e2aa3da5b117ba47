"""What a preparation will take, `flowmill plan CONFIG.yaml`: a random part of its pictures is prepared here and now,
and the rest is arithmetic."""

import random
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow.compute as pc
import typer
from rich.console import Console
from rich.table import Table

from data_prep.commits import ShardSpec, read_commit, shard_list
from data_prep.config import PrepareConfig
from data_prep.encode import ShardEncoder
from data_prep.images import list_buckets
from data_prep.plan import plan
from data_prep.report import Progress
from data_prep.scan import class_names, list_sources, scan_part, scan_settings
from data_prep.schema import index_path
from data_prep.settings import check_buckets, check_settings, encoder_settings
from data_prep.shards import WORK
from models.config import InputError, load_config, run_command

TAR_END = 1024 + tarfile.RECORDSIZE / 2  # bytes after the last member: two blocks, and to a record
NPY_HEADER = 128
AT_LEAST = 3  # tars or tables of a source, for they differ


@dataclass(frozen=True)
class Estimate:
    """Of the whole, from a sample of `sampled` pictures, of which `kept_share` were kept."""

    pictures: int  # in the sources
    sampled: int
    kept_share: float
    kept: int
    shards: int
    bytes_a_picture: float  # in a shard and its index
    total_bytes: float
    seconds_a_picture: float  # of one actor


def estimate(config: PrepareConfig, wanted: int, console: Console) -> Estimate:
    """Prepare about `wanted` pictures in a folder that is then deleted; raises InputError.

    A tar or table is taken whole, since only reading says how many pictures it has; those of the other tars
    and tables are reckoned by their bytes. Duplicates are found in the sample alone, so `kept` is at most.
    """
    check_settings(config)
    listing = list_sources(config)
    rng = random.Random(0)
    pictures, sampled = 0.0, 0
    with tempfile.TemporaryDirectory(prefix="flowmill-plan-") as folder:
        dataset = Path(folder)
        settings = scan_settings(config, dataset, class_names(listing))
        for number, (name, source) in enumerate(config.sources.items()):
            rows = listing.filter(pc.equal(listing["source"], name))  # pyright: ignore[reportAttributeAccessIssue]
            chosen, seen = rng.sample(range(len(rows)), len(rows)), 0
            share = -(-wanted // len(config.sources))
            if source.per_task > 1:
                some = rows.take(sorted(chosen[:share]))
                seen = scan_part(settings, f"part-{number}", source, some)
                pictures += len(rows)
            else:
                taken = 0
                while taken < len(chosen) and (seen < share or taken < AT_LEAST):
                    one = rows.take([chosen[taken]])
                    seen += scan_part(settings, f"part-{number}-{taken}", source, one)
                    taken += 1
                read, every = (
                    pc.sum(t["size"]).as_py() or 0  # pyright: ignore[reportAttributeAccessIssue]
                    for t in (rows.take(chosen[:taken]), rows)
                )
                pictures += seen * every / read if read else seen
            sampled += seen
        buckets = list_buckets(config.images)
        size = min(config.samples_per_shard, wanted)
        plan(dataset / WORK, buckets, config.filters, size, config.heldout_fraction)
        specs = list(enumerate(shard_list(dataset)))
        kept = sum(spec.num_planned for _, spec in specs)
        if not kept:
            raise InputError(f"sources: of a sample of {sampled} pictures none would be kept")
        rng.shuffle(specs)
        num, spent, size = _encode(config, dataset, specs, wanted, console)
    share = kept / sampled
    total, groups = round(pictures * share), len({(s.height, s.width, s.split) for _, s in specs})
    shards = round(total / config.samples_per_shard + groups / 2)
    return Estimate(
        pictures=round(pictures),
        sampled=sampled,
        kept_share=share,
        kept=total,
        shards=max(shards, groups),
        bytes_a_picture=size / num,
        total_bytes=total * size / num + max(shards, groups) * (TAR_END + NPY_HEADER),
        seconds_a_picture=spent / num,
    )


def _encode(
    config: PrepareConfig,
    dataset: Path,
    specs: list[tuple[int, ShardSpec]],
    wanted: int,
    console: Console,
) -> tuple[int, float, float]:
    """Pictures encoded, the seconds that took, and their bytes in shards and indices."""
    encoder = ShardEncoder(encoder_settings(config, dataset), num_decoders=1)
    encoders = encoder.describe()
    check_buckets(config, encoders.codec.downscale)
    done, spent, size = 0, 0.0, 0.0
    with Progress(console, "sample", wanted, "pictures") as progress:
        for number, spec in specs:
            begin = time.perf_counter()
            encoder.encode_shard(spec, number)
            spent += time.perf_counter() - begin
            commit = read_commit(dataset, spec.path)
            done += spec.num_planned
            if commit and commit["num_samples"]:
                with tarfile.open(dataset / spec.path) as tar:
                    blocks = (-(-info.size // tarfile.BLOCKSIZE) + 1 for info in tar)
                    size += tarfile.BLOCKSIZE * sum(blocks)
                size += (dataset / index_path(spec.path)).stat().st_size - NPY_HEADER
            progress.update(done)
            if done >= wanted:
                break
    return done, spent, size


def report(config: PrepareConfig, wanted: int, console: Console) -> Estimate:
    """Print what a preparation will take."""
    found = estimate(config, wanted, console)
    hours = found.kept * found.seconds_a_picture / 3600
    rows = [
        ("pictures", f"{found.pictures:,} in the sources"),
        ("kept", f"{found.kept:,} at most, {found.kept_share:.1%} of {found.sampled:,} looked at"),
        ("shards", f"{found.shards:,} of {config.samples_per_shard} samples"),
        ("bytes", f"{found.total_bytes / 2**30:,.3f} GiB, {found.bytes_a_picture / 1024:.1f} KiB a picture"),
        ("speed", f"{1 / found.seconds_a_picture:,.1f} pictures/s with one actor on this machine"),
        ("hours", ", ".join(f"{hours / n:,.2f} with {n} actor{'s' * (n > 1)}" for n in (1, 8, 64))),
    ]  # fmt: skip
    table = Table(title="Preparation", title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(
        "Actors: one a GPU, or one a CPU. Duplicates were looked for in the sample alone."
    )
    return found


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of a preparation")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    sample: Annotated[int, typer.Option(min=1, help="pictures to prepare, to see")] = 128,
) -> None:
    """Pictures, shards, bytes and hours of a preparation, before it starts."""
    report(load_config(PrepareConfig, config, overrides or []), sample, Console())


if __name__ == "__main__":
    run_command(main)
