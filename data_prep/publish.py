"""Commits to a dataset that can be trained on: tables, report, and last the manifest."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep import schema
from data_prep.config import INDECISIVE, PrepareConfig
from data_prep.encode import Encoders, with_errors
from data_prep.output import begun_facts, num_complete
from data_prep.page import Shown, contact_sheet, html_report, planned_captions, shown_pictures
from data_prep.report import bucket_samples, training_rows
from data_prep.shards import new_table, seal, sealed_commits, work_of, write_table, write_text
from data_prep.sources.source import count_rejects
from data_prep.storage import write_atomic
from models.config import InputError
from models.files import file_sha256

# Rejects of each reason on the page.
EXAMPLES = 3


def finalise(
    config: PrepareConfig,
    dataset: Path,
    generation: int,
    commits: list[dict[str, Any]],
    encoders: Encoders,
) -> None:
    """Seal a generation, then tables, the empty caption, the contact sheet, the report, and last the manifest.

    Raises InputError where nothing is left of the first one, or where a shard that was lost came out otherwise.
    """
    work, empty = work_of(dataset, generation), not any(c["num_samples"] for c in commits)
    if empty and not generation:
        _write_rejects(dataset, [commits])
        raise InputError(f"{dataset}: every picture was rejected; see {schema.REJECTS}")
    for before, now in zip(sealed_commits(work) or commits, commits, strict=True):
        if (got := now.get("sha256")) != (expected := before.get("sha256")):
            raise InputError(
                f"{dataset / now['path']}: was lost, and encoding it again gave other bytes than generation "
                f"{generation} recorded: sha256 got {got}, expected {expected}. Remedy: restore a copy; its "
                "sources, or this hardware, are not what they were."
            )
    seal(work, commits)
    # Where only a lost shard is back, all else is there.
    if generation >= num_complete(dataset):
        publish(config, dataset, generation, commits, encoders, complete=True)


def publish(
    config: PrepareConfig,
    dataset: Path,
    generation: int,
    commits: list[dict[str, Any]],
    encoders: Encoders,
    complete: bool = False,
) -> None:
    """Make of these commits and earlier generations a dataset that can be trained on; unless `complete` more will come.

    Of a preparation that goes on, `seen` counts what was decided so far. The table and the manifest that
    has its hash are replaced one after the other; readers look again where they do not match.
    """
    made = [*(sealed_commits(work_of(dataset, n)) or [] for n in range(generation)), commits]
    table = [c for some in made for c in sorted(some, key=lambda c: c["path"]) if c["num_samples"]]
    if not (complete or any(commit["split"] == "train" for commit in table)):
        return
    rejected, others, examples = _write_rejects(dataset, made)
    write_tables(dataset, table, encoders)
    facts, mine = begun_facts(dataset), [c for c in table if c["generation"] == generation]
    kept = sum(commit["num_planned"] - len(commit["rejects"]) for commit in mine)
    counts = counts_of(mine, kept, rejected, encoders.record["text"]["roles"])
    counts = counts.model_copy(update={"other_files": _sorted(others)})
    before = schema.read_manifest(dataset).generations[:generation] if generation else []
    generations = [*before, _generation(facts, before, mine, counts, complete)]
    manifest = _manifest(config, facts, table, generations, encoders)
    if complete:
        newest = max(n for n, some in enumerate(made) if any(c["num_samples"] for c in some))
        captions = partial(planned_captions, work_of(dataset, newest))
        shown = shown_pictures(dataset, made[newest], captions)
        write_sheet(dataset, shown)
        write_text(dataset / schema.REPORT, html_report(manifest, table, shown, examples))
    write_manifest(dataset, manifest)


def write_sheet(dataset: Path, shown: list[Shown]) -> None:
    sheet = contact_sheet(shown)
    write_atomic(dataset / schema.CONTACT_SHEET, lambda path: sheet.save(path, "PNG"))


def write_tables(dataset: Path, commits: list[dict[str, Any]], encoders: Encoders) -> None:
    """The shard table, and the empty caption where there is text."""
    from safetensors.numpy import save

    rows = pa.Table.from_pylist(commits, schema=schema.SHARD_SCHEMA)
    write_table(dataset / schema.SHARD_TABLE, rows)
    if encoders.empty_caption:
        # save_file would make it a file that its owner alone may read.
        data = save(encoders.empty_caption)
        write_atomic(dataset / schema.EMPTY_CAPTION, lambda path: path.write_bytes(data))


def write_manifest(dataset: Path, manifest: schema.Manifest) -> None:
    """The manifest with the hashes of what lies beside it."""
    files = [name for name in schema.AUDITED if (dataset / name).is_file()]
    hashes = {name: file_sha256(dataset / name) for name in files}
    manifest = manifest.model_copy(update={"files": hashes}).with_fingerprint()
    write_text(dataset / schema.MANIFEST, manifest.model_dump_json(indent=1))


def counts_of(
    commits: list[dict[str, Any]], kept: int, rejected: Counter[str], roles: Iterable[str]
) -> schema.Counts:
    """The pictures of some commits, and the captions that were cut by text encoder."""
    cut = {name: sum(commit["cut_captions"][name] for commit in commits) for name in roles}
    known = {"kept": kept, "rejected": _sorted(rejected), "cut_captions": cut}
    return schema.Counts(seen=kept + rejected.total(), **known)


def _write_rejects(
    dataset: Path, made: list[list[dict[str, Any]]]
) -> tuple[Counter[str], Counter[str], list[dict[str, str]]]:
    """Generation by generation those of scan and plan in the order of the sources, then those of encoding.

    Returns how many pictures of the last one there are by reason and how many other files by extension, and of
    all generations the first few of each reason.
    """
    pictures, others = Counter[str](), Counter[str]()
    examples = defaultdict[str, list[dict[str, str]]](list)
    with new_table(dataset / schema.REJECTS, schema.REJECT_SCHEMA) as write:
        for number, commits in enumerate(made):
            for table in _rejects(work_of(dataset, number), commits):
                write(table)
                for reason in table["reason"].unique().to_pylist():
                    few, mine = examples[reason], table.filter(pc.field("reason") == reason)
                    few += mine.slice(0, EXAMPLES - len(few)).to_pylist()
                if number == len(made) - 1:
                    of_table = count_rejects(table)
                    pictures.update(of_table[0])
                    others.update(of_table[1])
    return pictures, others, [row for _, few in sorted(examples.items()) for row in few]


def _rejects(work: Path, commits: list[dict[str, Any]]) -> Iterator[pa.Table]:
    encoded = [reject for commit in commits for reject in commit["rejects"]]
    with (work / "plan_rejects.parquet").open("rb") as file:
        for batch in pq.ParquetFile(file).iter_batches():
            yield pa.Table.from_batches([batch], schema.REJECT_SCHEMA)
    yield pa.Table.from_pylist(encoded, schema=schema.REJECT_SCHEMA)


def _manifest(
    config: PrepareConfig,
    facts: list[dict[str, Any]],
    commits: list[dict[str, Any]],
    generations: list[schema.Generation],
    encoders: Encoders,
) -> schema.Manifest:
    begun = {"settings": _decisive(facts), "listing": facts[0]["listing_sha256"]}
    training = training_rows(commits)
    latent_mean, latent_std = latent_statistics(training)
    flips, drawn = config.images.flip, config.captions.per_picture
    counts = [generation.counts for generation in generations]
    record = dict(encoders.record)
    record["text"] = with_errors(record["text"], commits)
    return schema.Manifest(
        id=schema.fingerprint(begun)[:32],
        **record,
        members=encoders.members,
        latent_mean=latent_mean,
        latent_std=latent_std,
        buckets=[
            schema.BucketRecord(height=h, width=w, num_samples=n)
            for (h, w), n in sorted(bucket_samples(training).items())
        ],
        classes=facts[len(generations) - 1]["classes"],
        counts=schema.Counts(
            seen=sum(c.seen for c in counts),
            kept=sum(c.kept for c in counts),
            rejected=_sorted(sum((Counter(c.rejected) for c in counts), Counter())),
            other_files=_sorted(sum((Counter(c.other_files) for c in counts), Counter())),
            cut_captions={
                n: sum(c.cut_captions[n] for c in counts) for n in counts[0].cut_captions
            },
        ),
        samples_per_picture={"train": drawn * (1 + flips), "heldout": drawn},
        generations=generations,
        base=None,
        prepare_config=config.model_dump(mode="json", exclude=INDECISIVE),
        files={},
    )


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _decisive(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """What decides how a picture is prepared, whatever the sources are."""
    settings = facts[0]["settings"]
    config = {name: value for name, value in settings["config"].items() if name != "sources"}
    return settings | {"config": config}


def _generation(
    facts: list[dict[str, Any]],
    before: list[schema.Generation],
    commits: list[dict[str, Any]],
    counts: schema.Counts,
    complete: bool,
) -> schema.Generation:
    """The record of the generation that comes after those before, whose fingerprint goes on from theirs."""
    number, begun = len(before), facts[len(before)]
    columns = ("path", "num_samples", "sha256", "index_sha256", "captions_sha256")
    said: dict[str, Any] = {
        "listing_sha256": begun["listing_sha256"],
        "counts": counts.model_dump(mode="json"),
        "num_labels": max([len(begun["classes"]), *(commit["num_labels"] for commit in commits)]),
    }
    link = said | {
        "previous": before[-1].fingerprint if before else "",
        "settings_sha256": schema.fingerprint(_decisive(facts)),
        "shards": [[commit[name] for name in columns] for commit in commits],
    }
    psnr = [value for commit in commits for value in commit["psnr_db"]]
    return schema.Generation(
        number=number,
        complete=complete,
        listed=begun["listed"],
        num_shards=len(commits),
        psnr_db=round(mean(psnr), 2) if psnr else None,
        fingerprint=schema.fingerprint(link),
        missing=begun.get("missing", 0),
        **said,
    )


def latent_statistics(commits: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the raw latents by channel."""
    count = sum(commit["latent_count"] for commit in commits)
    means, squares = (
        [sum(values) / count for values in zip(*(c[name] for c in commits), strict=True)]
        for name in ("latent_sum", "latent_square_sum")
    )
    return means, [max(s - m * m, 0.0) ** 0.5 for s, m in zip(squares, means, strict=True)]
