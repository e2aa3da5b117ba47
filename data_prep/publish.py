"""Commits to a dataset that can be trained on: tables, report, and last the manifest."""

import json
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep import schema
from data_prep.config import INDECISIVE, PrepareConfig
from data_prep.encode import Encoders
from data_prep.page import Shown, contact_sheet, html_report, shown_pictures
from data_prep.report import bucket_samples, training_rows
from data_prep.shards import WORK, new_table, write_table, write_text
from data_prep.sources.source import count_rejects
from data_prep.storage import write_atomic
from models.config import InputError
from models.files import file_sha256

# Rejects of each reason on the page.
EXAMPLES = 3


def finalise(
    config: PrepareConfig, dataset: Path, commits: list[dict[str, Any]], encoders: Encoders
) -> None:
    """Tables, the empty caption, the contact sheet, the report, and last the manifest."""
    if not any(commit["num_samples"] for commit in commits):
        _write_rejects(dataset, commits)
        raise InputError(f"{dataset}: every picture was rejected; see {schema.REJECTS}")
    shown = shown_pictures(dataset, commits)
    sheet = contact_sheet(shown)
    write_atomic(dataset / schema.CONTACT_SHEET, lambda path: sheet.save(path, "PNG"))
    publish(config, dataset, commits, encoders, shown)


def publish(
    config: PrepareConfig,
    dataset: Path,
    commits: list[dict[str, Any]],
    encoders: Encoders,
    shown: list[Shown] | None = None,
) -> None:
    """Make of these commits a dataset that can be trained on; without `shown` more are still to come.

    Of a preparation that goes on, `seen` counts what was decided so far. The table and the manifest that
    has its hash are replaced one after the other; readers look again where they do not match.
    """
    from safetensors.numpy import save

    table = [c | {"generation": 0} for c in commits if c["num_samples"]]
    table.sort(key=lambda c: c["path"])
    if not any(commit["split"] == "train" for commit in table) and shown is None:
        return
    rejected, others, examples = _write_rejects(dataset, commits)
    rows = pa.Table.from_pylist(table, schema=schema.SHARD_SCHEMA)
    write_table(dataset / schema.SHARD_TABLE, rows)
    if encoders.empty_caption:
        # save_file would make it a file that its owner alone may read.
        data = save(encoders.empty_caption)
        write_atomic(dataset / schema.EMPTY_CAPTION, lambda path: path.write_bytes(data))
    manifest = _manifest(config, dataset, table, (rejected, others), encoders)
    if shown is not None:
        manifest = manifest.completed()
        write_text(dataset / schema.REPORT, html_report(manifest, table, shown, examples))
    files = [name for name in schema.AUDITED if (dataset / name).is_file()]
    hashes = {name: file_sha256(dataset / name) for name in files}
    manifest = manifest.model_copy(update={"files": hashes}).with_fingerprint()
    write_text(dataset / schema.MANIFEST, manifest.model_dump_json(indent=1))


def _write_rejects(
    dataset: Path, commits: list[dict[str, Any]]
) -> tuple[dict[str, int], dict[str, int], list[dict[str, str]]]:
    """Those of scan and plan in the order of the sources, then those of encoding.

    Returns how many pictures there are by reason, how many other files by extension, and the first few
    of each reason.
    """
    rejected, others, kind = Counter[str](), Counter[str](), schema.REJECT_SCHEMA
    examples = defaultdict[str, list[dict[str, str]]](list)
    encoded = [reject for commit in commits for reject in commit["rejects"]]
    with (dataset / WORK / "plan_rejects.parquet").open("rb") as file:
        batches = pq.ParquetFile(file).iter_batches()
        planned = (pa.Table.from_batches([batch], kind) for batch in batches)
        with new_table(dataset / schema.REJECTS, kind) as write:
            for table in chain(planned, [pa.Table.from_pylist(encoded, schema=kind)]):
                write(table)
                for reason in table["reason"].unique().to_pylist():
                    few, mine = examples[reason], table.filter(pc.field("reason") == reason)
                    few += mine.slice(0, EXAMPLES - len(few)).to_pylist()
                for counts, new in zip((rejected, others), count_rejects(table), strict=True):
                    counts.update(new)
    shown = [row for _, few in sorted(examples.items()) for row in few]
    return dict(sorted(rejected.items())), dict(sorted(others.items())), shown


def _manifest(
    config: PrepareConfig,
    dataset: Path,
    commits: list[dict[str, Any]],
    rejects: tuple[dict[str, int], dict[str, int]],
    encoders: Encoders,
) -> schema.Manifest:
    rejected, others = rejects
    begun = json.loads((dataset / WORK / "config.json").read_text())
    # What decides how a picture is prepared, whatever the sources are.
    decisive = {k: v for k, v in begun["settings"]["config"].items() if k != "sources"}
    settings = begun["settings"] | {"config": decisive}
    kept = sum(commit["num_planned"] - len(commit["rejects"]) for commit in commits)
    cut = sum((Counter(commit["cut_captions"]) for commit in commits), Counter[str]())
    counts = schema.Counts(
        seen=kept + sum(rejected.values()),
        kept=kept,
        rejected=rejected,
        other_files=others,
        cut_captions={name: cut[name] for name in encoders.record["text"]["roles"]},
    )
    training = training_rows(commits)
    latent_mean, latent_std = latent_statistics(training)
    flips, drawn = config.images.flip, config.captions.per_picture
    return schema.Manifest(
        id=schema.fingerprint({"settings": settings, "listing": begun["listing_sha256"]})[:32],
        **encoders.record,
        members=encoders.members,
        latent_mean=latent_mean,
        latent_std=latent_std,
        buckets=[
            schema.BucketRecord(height=h, width=w, num_samples=n)
            for (h, w), n in sorted(bucket_samples(training).items())
        ],
        classes=begun["classes"],
        counts=counts,
        samples_per_picture={"train": drawn * (1 + flips), "heldout": drawn},
        generations=[_generation(begun, settings, commits, counts)],
        base=None,
        prepare_config=config.model_dump(mode="json", exclude=INDECISIVE),
        files={},
    )


def _generation(
    begun: dict[str, Any],
    settings: dict[str, Any],
    commits: list[dict[str, Any]],
    counts: schema.Counts,
) -> schema.Generation:
    columns = ("path", "num_samples", "sha256", "index_sha256", "captions_sha256")
    link: dict[str, Any] = {
        "previous": "",
        "settings_sha256": schema.fingerprint(settings),
        "listing_sha256": begun["listing_sha256"],
        "counts": counts.model_dump(mode="json"),
        "num_labels": max(len(begun["classes"]), *(commit["num_labels"] for commit in commits)),
        "shards": [[commit[name] for name in columns] for commit in commits],
    }
    return schema.Generation(
        number=0,
        complete=False,
        listed=begun["listed"],
        counts=counts,
        num_shards=len(commits),
        num_labels=link["num_labels"],
        psnr_db=round(mean(value for commit in commits for value in commit["psnr_db"]), 2),
        listing_sha256=begun["listing_sha256"],
        fingerprint=schema.fingerprint(link),
    )


def latent_statistics(commits: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the raw latents by channel."""
    count = sum(commit["latent_count"] for commit in commits)
    means, squares = (
        [sum(values) / count for values in zip(*(c[name] for c in commits), strict=True)]
        for name in ("latent_sum", "latent_square_sum")
    )
    return means, [max(s - m * m, 0.0) ** 0.5 for s, m in zip(squares, means, strict=True)]
