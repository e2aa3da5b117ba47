"""Commits to a dataset that can be trained on: tables, report, and last the manifest."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.commits import ShardSpec
from data_prep.config import INDECISIVE, PrepareConfig
from data_prep.encode import Encoders
from data_prep.report import contact_sheet, html_report
from data_prep.schema import (
    CONTACT_SHEET,
    EMPTY_CAPTION,
    MANIFEST,
    REJECT_SCHEMA,
    REJECTS,
    REPORT,
    SHARD_SCHEMA,
    SHARD_TABLE,
    BucketRecord,
    Counts,
    Manifest,
)
from data_prep.shards import WORK, NewTable, write_table, write_text
from data_prep.storage import is_remote, write_atomic
from data_prep.workers import Actors
from models.config import InputError
from models.files import file_sha256

AUDITED = (SHARD_TABLE, REJECTS, EMPTY_CAPTION, CONTACT_SHEET, REPORT)


def finalise(
    config: PrepareConfig,
    dataset: Path,
    shards: list[ShardSpec],
    commits: list[dict[str, Any]],
    encoders: Encoders,
    actors: Actors,
    names: list[str],
) -> None:
    """Tables, the empty caption, the contact sheet, the report, and last the manifest."""
    if not any(commit["num_samples"] for commit in commits):
        _write_rejects(dataset, commits)
        raise InputError(f"{dataset}: every picture was rejected; see {REJECTS}")
    sheet, psnr = contact_sheet(dataset, shards, commits, encoders, actors)
    write_atomic(dataset / CONTACT_SHEET, lambda path: sheet.save(path, format="PNG"))
    facts = {"class_names": names, "reconstruction_psnr_db": psnr}
    publish(config, dataset, commits, encoders, facts)
    for leftover in [] if is_remote(dataset) else dataset.rglob(".*.tmp"):  # of killed processes
        leftover.unlink(missing_ok=True)


def publish(
    config: PrepareConfig,
    dataset: Path,
    commits: list[dict[str, Any]],
    encoders: Encoders,
    facts: dict[str, Any] | None = None,
) -> None:
    """Make of these commits a dataset that can be trained on; without `facts` more are still to come.

    Of a preparation that goes on, `seen` counts what was decided so far. The table and the manifest that
    has its hash are replaced one after the other; readers look again where they do not match.
    """
    from safetensors.numpy import save_file

    table = [c for c in sorted(commits, key=lambda c: c["path"]) if c["num_samples"]]
    if not any(commit["split"] == "train" for commit in table) and facts is None:
        return
    rejected = _write_rejects(dataset, commits)
    write_table(dataset / SHARD_TABLE, pa.Table.from_pylist(table, schema=SHARD_SCHEMA))
    if encoders.empty_caption:
        write_atomic(dataset / EMPTY_CAPTION, lambda path: save_file(encoders.empty_caption, path))
    manifest = _manifest(config, table, rejected, encoders).model_copy(update=facts or {})
    if facts is not None:
        write_text(dataset / REPORT, html_report(dataset, manifest, table))
    files = [name for name in AUDITED if (dataset / name).is_file()]
    hashes = {name: file_sha256(dataset / name) for name in files}
    manifest = manifest.model_copy(update={"files": hashes}).with_fingerprint()
    write_text(dataset / MANIFEST, manifest.model_dump_json(indent=1))


def _write_rejects(dataset: Path, commits: list[dict[str, Any]]) -> dict[str, int]:
    """Those of scan and plan in the order of the sources, then those of encoding; returns counts by reason."""
    counts: Counter[str] = Counter()
    encoded = [reject for commit in commits for reject in commit["rejects"]]
    with (dataset / WORK / "plan_rejects.parquet").open("rb") as file:
        planned = (
            pa.Table.from_batches([b], REJECT_SCHEMA) for b in pq.ParquetFile(file).iter_batches()
        )
        with NewTable(dataset / REJECTS, REJECT_SCHEMA) as writer:
            for table in (*planned, pa.Table.from_pylist(encoded, schema=REJECT_SCHEMA)):
                writer.write(table)
                counts.update(table["reason"].to_pylist())
    return dict(sorted(counts.items()))


def _manifest(
    config: PrepareConfig,
    commits: list[dict[str, Any]],
    rejected: dict[str, int],
    encoders: Encoders,
) -> Manifest:
    train = [commit for commit in commits if commit["split"] == "train"] or commits
    count = sum(commit["latent_count"] for commit in train)
    mean = [sum(values) / count for values in zip(*(c["latent_sum"] for c in train), strict=True)]
    square = [
        sum(values) / count for values in zip(*(c["latent_square_sum"] for c in train), strict=True)
    ]
    buckets: Counter[tuple[int, int]] = Counter()
    for commit in train:
        buckets[commit["height"], commit["width"]] += commit["num_samples"]
    kept = sum(commit["num_planned"] - len(commit["rejects"]) for commit in commits)
    return Manifest(
        codec=encoders.codec.model_copy(update={"path": config.vae.path}),
        text_encoders={
            name: record.model_copy(update={"path": config.text_encoders[name].path})
            for name, record in encoders.text_encoders.items()
        },
        vision_encoder=config.vision_encoder
        and encoders.vision_encoder
        and encoders.vision_encoder.model_copy(update={"path": config.vision_encoder.path}),
        members=encoders.members,
        latent_mean=mean,
        latent_std=[(s - m * m) ** 0.5 for s, m in zip(square, mean, strict=True)],
        buckets=[
            BucketRecord(height=h, width=w, num_samples=n) for (h, w), n in sorted(buckets.items())
        ],
        counts=Counts(seen=kept + sum(rejected.values()), kept=kept, rejected=rejected),
        prepare_config=config.model_dump(mode="json", exclude=INDECISIVE),
    )
