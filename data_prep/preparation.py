"""Pictures to shards: the stages of a preparation, each of which does only what is not done yet."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors.numpy import load

from data_prep.catalog import STAGED
from data_prep.config import PrepareConfig, check_settings
from data_prep.dry_run import print_plan
from data_prep.encode import Encoders, EncoderSettings, ShardEncoder, encode_shards
from data_prep.encoders import weight_of
from data_prep.output import begin, lock_output, open_output, refuse_changes, unfinished
from data_prep.plan import ShardSpec, make_plan
from data_prep.publish import finalise, publish
from data_prep.report import Progress, console, print_result, status, warn
from data_prep.scan import Intake, list_sources, scan
from data_prep.schema import EMPTY_CAPTION, read_manifest
from data_prep.shards import read_commits, sealed_commits, work_of
from data_prep.storage import delete, is_remote
from data_prep.workers import Actors, connect, share_out
from models.files import full_disk_is_said, is_temporary
from models.lock import Lock


def prepare(
    config: PrepareConfig,
    dry_run: bool = False,
    restart: bool = False,
    allow_missing: bool = False,
) -> dict[str, float]:
    """The whole preparation, doing only what is not done yet; returns seconds by stage. Raises InputError.

    A generation that was begun is finished first, as it was listed; what is new in the sources makes the next.
    """
    spent = dict[str, float]()
    with stage(spent, "list", "listing the sources and checking the encoders"):
        settings = check_settings(config)
        listing = list_sources(config)
    if doubt := config.vae.doubt():
        warn(doubt)
    if dry_run:
        print_plan(config, listing, settings["hashes"])
        return {}
    with lock_output(config) as lock, full_disk_is_said(f"output: {config.output}"):
        dataset, found = open_output(config, settings, listing, restart)
        tidy(dataset)
        found = refuse_changes(config, found, allow_missing, lock.check)
        todo, intakes = unfinished(dataset), found.begun
        if not (todo or found.num_new):
            console.print(f"{dataset} is complete; nothing to do.")
        else:
            with stage(spent, "start Ray", "starting Ray"):
                connect(config.ray)
        for number in todo:
            _make(config, dataset, intakes[number], lock, spent)
        if found.num_new:
            lock.check()
            intakes = [*intakes, begin(config, dataset, settings, found)]
            console.print(f"generation {len(found.begun)}: {found.num_new:,} new files")
            _make(config, dataset, intakes[-1], lock, spent)
        lock.check()
        for intake in intakes:
            delete(intake.work / STAGED)
        tidy(dataset)
        print_result(dataset, read_manifest(dataset), spent)
    return spent


def tidy(dataset: Path) -> None:
    """Delete what killed processes left, which may be what fills the disk."""
    for path in filter(is_temporary, [] if is_remote(dataset) else dataset.rglob(".*.tmp")):
        path.unlink(missing_ok=True)


def _make(
    config: PrepareConfig, dataset: Path, intake: Intake, lock: Lock, spent: dict[str, float]
) -> None:
    """Scan, plan, encode and finalise a generation; raises InputError where another preparation takes over."""
    with stage(spent, "scan"):
        scan(config, intake, lock.check)
    lock.check()
    with stage(spent, "plan", "planning the shards"):
        earlier = [work_of(dataset, number) for number in range(intake.number)]
        shards = make_plan(config, intake.work, earlier)
    if not shards:
        console.print(f"generation {intake.number}: every new picture was rejected")
        return finalise(config, dataset, intake.number, [], _recorded(dataset))
    settings = EncoderSettings(config, dataset, lock.check)
    commits, encoders = encode(ShardEncoder, settings, shards, spent)
    lock.check()
    with stage(spent, "finalise", "writing tables and report"):
        finalise(config, dataset, intake.number, commits, encoders)


def _recorded(dataset: Path) -> Encoders:
    """What the encoders said of themselves when an earlier generation was made."""
    manifest, empty = read_manifest(dataset), dataset / EMPTY_CAPTION
    record = manifest.model_dump(include={"codec", "text", "vision"}, mode="json")
    caption = load(empty.read_bytes()) if empty.is_file() else {}
    return Encoders(record, manifest.members, caption)


@contextmanager
def stage(spent: dict[str, float], name: str, doing: str = "") -> Iterator[None]:
    """Count what is done as this stage, and say so where it draws no bar of its own."""
    start = time.monotonic()
    with status(doing) if doing else nullcontext():
        yield
    spent[name] = spent.get(name, 0.0) + time.monotonic() - start


def encode(
    body: type[ShardEncoder],
    settings: EncoderSettings,
    shards: Sequence[ShardSpec],
    spent: dict[str, float],
) -> tuple[list[dict[str, Any]], Encoders]:
    """Let actors of that body make every shard that is not committed yet.

    Returns all commits in the order of the list, and what the encoders say of themselves.
    """
    config, dataset = settings.config, settings.dataset
    threads = (config.encode or settings.pictures.encode).threads
    shares = share_out(config.ray, threads, len(shards), weight_of(config))
    with Actors(body, settings, shares, console.print) as actors:
        with stage(spent, "load encoders", "loading the encoders"):
            encoders: Encoders = actors.describe()
        commits = read_commits(dataset, [spec.path for spec in shards])
        todo = [(shards[i], i) for i, commit in enumerate(commits) if commit is None]
        total = sum(shard.num_planned for shard in shards)
        generation, every = shards[0].generation, None
        # One that lost a shard is published whole, and so is a layer.
        if isinstance(config, PrepareConfig) and not sealed_commits(work_of(dataset, generation)):
            every = config.publish_every_shards
        done, rejected = sum(commit["num_planned"] for commit in commits if commit), 0
        with stage(spent, "encode"), Progress("encode", total, "pictures", done) as progress:
            for count, (number, commit) in enumerate(encode_shards(actors, todo), start=1):
                commits[number] = commit
                done += commit["num_planned"]
                rejected += len(commit["rejects"])
                progress.update(done, rejected)
                if isinstance(config, PrepareConfig) and every and count % every == 0:
                    publish(config, dataset, generation, [c for c in commits if c], encoders)
    assert all(commits), "the actors returned before every shard was committed"
    return [commit for commit in commits if commit], encoders
