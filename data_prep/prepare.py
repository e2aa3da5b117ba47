"""Pictures to shards: `flowmill prepare CONFIG.yaml [section.key=value ...]`. Run it again to resume."""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from pydantic import AfterValidator, Field
from rich.console import Console

from data_prep import pool
from data_prep.catalog import (
    SHARD_LIST_SCHEMA,
    CaptionsConfig,
    FiltersConfig,
    plan,
    scan_partition,
)
from data_prep.decoder import DecodePool
from data_prep.encode import (
    EncodeConfig,
    Encoders,
    ShardEncoder,
    ShardSpec,
    TextEncoderConfig,
    VaeConfig,
    read_commit,
)
from data_prep.images import ImagesConfig, list_buckets
from data_prep.pool import ActorPool, RayConfig
from data_prep.report import Progress, contact_sheet, print_plan, print_result
from data_prep.schema import (
    CONTACT_SHEET,
    EMPTY_CAPTION,
    MANIFEST,
    REJECT_SCHEMA,
    REJECTS,
    SHARD_SCHEMA,
    SHARD_TABLE,
    BucketRecord,
    Counts,
    Manifest,
    read_manifest,
)
from data_prep.shards import WORK, file_sha256, write_atomic, write_table, write_text
from data_prep.sources import FILES_PER_PARTITION, Entry, SourceConfig, list_source
from models.config import Config, InputError, load_config, run_command
from models.weights import read_model_config, weights_sha256

SourceName = Annotated[str, Field(pattern=r"^[\w.-]+$")]
EncoderName = Annotated[
    str, Field(pattern=r"^[a-z][a-z0-9_]*$"), AfterValidator(lambda name: _free_name(name))
]
AUDITED = (SHARD_TABLE, REJECTS, EMPTY_CAPTION, CONTACT_SHEET)
OURS = (MANIFEST, *AUDITED, "shards", WORK)

console = Console(soft_wrap=True, highlight=False, markup=False)


def _free_name(name: str) -> str:
    if name in ("moments", "micro", "label", "json") or name.endswith("_pooled"):
        raise ValueError(f"{name} is the name of another member of a sample; choose another")
    return name


class PrepareConfig(Config):
    """A preparation. All but `ray` and `output` decides what is written, bit by bit."""

    sources: dict[SourceName, SourceConfig] = Field(min_length=1)
    images: ImagesConfig = ImagesConfig()
    captions: CaptionsConfig = CaptionsConfig()
    filters: FiltersConfig = FiltersConfig()
    vae: VaeConfig
    text_encoders: dict[EncoderName, TextEncoderConfig] = Field(default_factory=dict)
    encode: EncodeConfig = EncodeConfig()
    samples_per_shard: int = Field(default=1000, ge=1)
    heldout_fraction: float = Field(default=0.0, ge=0, lt=1)
    ray: RayConfig = RayConfig()
    output: str


def main(
    config: Annotated[Path, typer.Argument(help="A YAML file; see configs/prepare_*.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Check, say what would be done, do nothing.")
    ] = False,
    restart: Annotated[
        bool, typer.Option(help="Delete what an earlier preparation left in the output.")
    ] = False,
) -> None:
    """Prepare pictures for training: latents and text embeddings in shards."""
    prepare(load_config(PrepareConfig, config, overrides or []), dry_run, restart)


def prepare(config: PrepareConfig, dry_run: bool = False, restart: bool = False) -> None:
    """The whole preparation, doing only what is not done yet; raises InputError."""
    started = time.monotonic()
    settings = check_settings(config)
    entries = [e for name, source in config.sources.items() for e in list_source(name, source)]
    if dry_run:
        print_plan(console, config, entries, settings["weights"], list_buckets(config.images))
        return
    dataset = open_output(config, settings, entries, restart)
    if is_complete(dataset):
        console.print(f"{dataset} is complete; nothing to do.")
        print_result(console, dataset, read_manifest(dataset), time.monotonic() - started)
        return
    pool.connect(config.ray)
    scan(config, dataset, entries)
    shards = make_plan(config, dataset)
    actors = start_encoders(config, dataset, len(shards))
    encoders: Encoders = actors.ask("describe")
    check_buckets(config, encoders.codec.downscale)
    encode(dataset, shards, actors)
    finalise(config, dataset, shards, encoders, actors)
    print_result(console, dataset, read_manifest(dataset), time.monotonic() - started)


def check_settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the result, the encoders' weights included; raises InputError where one is not there."""
    folders = {"vae": (config.vae.path, "a diffusers autoencoder")}
    for name, text in config.text_encoders.items():
        folders[f"text_encoders.{name}"] = (text.path, "a transformers text encoder")
    weights = {}
    for name, (path, what) in folders.items():
        try:
            read_model_config(Path(path), what)
            weights[name] = weights_sha256(Path(path))
        except InputError as error:
            raise InputError(f"{name}.path: {error}") from None
    decisive = config.model_dump(mode="json", exclude={"ray", "output"})
    return {"config": decisive, "weights": weights}


def check_buckets(config: PrepareConfig, downscale: int) -> None:
    """Raises InputError where a bucket's sides are not whole latents."""
    if config.images.bucket_multiple % downscale:
        raise InputError(
            f"images.bucket_multiple: got {config.images.bucket_multiple}, expected a multiple of "
            f"{downscale}, the downscale of {config.vae.path}, times the patch size of the model."
        )


def open_output(
    config: PrepareConfig, settings: dict[str, Any], entries: list[Entry], restart: bool
) -> Path:
    """The output folder, ours and of these settings and sources; raises InputError where it is not."""
    if pool.in_ray_job() and not os.path.isabs(config.output):
        raise InputError(
            f"output: got {config.output}, expected an absolute path: in a Ray job a relative one lies in "
            "Ray's copy of the working directory. Remedy: output=/shared/disk/..."
        )
    dataset = Path(config.output).absolute()
    work = dataset / WORK
    try:
        strangers = (
            sorted(p.name for p in dataset.iterdir() if p.name not in OURS)
            if dataset.exists()
            else []
        )
        if strangers and not (work / "config.json").exists():
            raise InputError(
                f"output: {config.output} holds other files ({', '.join(strangers[:3])}), expected a folder "
                "that is new, empty, or of an earlier preparation."
            )
        if restart:
            _delete_earlier(dataset)
        work.mkdir(parents=True, exist_ok=True)
        if (work / "config.json").exists():
            _refuse_other_settings(config.output, work, settings)
            _refuse_other_sources(config.output, work, entries)
        else:
            write_table(work / "listing.parquet", _listing(entries))
            write_text(work / "config.json", json.dumps(settings, indent=1))
    except OSError as error:
        raise InputError(
            f"output: cannot write {config.output}: {error.strerror or error}"
        ) from error
    return dataset


def _delete_earlier(dataset: Path) -> None:
    # config.json, and with it the right to resume, goes first.
    for path in [dataset / WORK / "config.json", *(dataset / name for name in OURS)]:
        if path.is_dir():
            console.print(
                f"deleting {path} ({sum(1 for p in path.rglob('*') if p.is_file())} files)"
            )
            shutil.rmtree(path)
        elif path.exists():
            console.print(f"deleting {path}")
            path.unlink()


def _refuse_other_settings(output: str, work: Path, settings: dict[str, Any]) -> None:
    before, now = _flat(json.loads((work / "config.json").read_text())), _flat(settings)
    changes = [
        f"  {key.removeprefix('config.')}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted(before | now)
        if before.get(key, "absent") != now.get(key, "absent")
    ]
    if changes:
        raise InputError(
            f"output: {output} was begun with another config:\n" + "\n".join(changes) + "\n"
            "Remedy: restore these, choose another output, or --restart to delete it and start anew."
        )


def _refuse_other_sources(output: str, work: Path, entries: list[Entry]) -> None:
    before, now = pq.read_table(work / "listing.parquet"), _listing(entries)
    if before.equals(now):
        return
    old = {(row["source"], row["name"]): row for row in before.to_pylist()}
    new = {(row["source"], row["name"]): row for row in now.to_pylist()}
    changed = [name for name in old.keys() & new.keys() if old[name] != new[name]]
    groups = {"added": new.keys() - old.keys(), "gone": old.keys() - new.keys(), "changed": changed}
    found = [f"{len(g)} {word} ({'/'.join(min(g))}, ...)" for word, g in groups.items() if g]
    raise InputError(
        f"sources: not what they were when {output} was begun: files {', '.join(found)}. "
        "Remedy: restore them, choose another output, or --restart to delete it and start anew."
    )


def _listing(entries: list[Entry]) -> pa.Table:
    names = ["source", "kind", "name", "path", "caption_path", "reason", "detail"]
    schema = pa.schema([*((name, pa.string()) for name in names), ("size", pa.int64())])
    return pa.Table.from_pylist([asdict(entry) for entry in entries], schema=schema)


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        return {prefix: data}
    return {k: v for key in data for k, v in _flat(data[key], f"{prefix}.{key}".strip(".")).items()}


def is_complete(dataset: Path) -> bool:
    """Whether there is a manifest and every shard that it speaks of."""
    if not (dataset / MANIFEST).is_file():
        return False
    read_manifest(dataset)
    return not _missing(dataset, _shard_list(dataset))


def scan(config: PrepareConfig, dataset: Path, entries: list[Entry]) -> None:
    """One catalog part a partition of the sources; parts that exist are not made again."""
    work = []
    for number, partition in enumerate(_partitions(entries)):
        part = dataset / WORK / "catalog" / f"part-{number:06d}.parquet"
        if not part.is_file():
            work.append((part, partition, config.images, config.captions))
    with Progress(console, "scan", len(work), "parts") as progress:
        for done, _ in enumerate(pool.run_tasks(_scan_task, work)):
            progress.update(done + 1)


_probes: dict[
    ImagesConfig, DecodePool
] = {}  # a worker's own, so that its child serves many partitions


def _scan_task(
    part: Path, entries: list[Entry], images: ImagesConfig, captions: CaptionsConfig
) -> None:
    probes = _probes.setdefault(images, DecodePool(images, num_children=1))
    scan_partition(part, entries, images, captions, probes)


def _partitions(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Neighbours of one source: many files, or one tar."""
    batch: list[Entry] = []
    for entry in entries:
        size = 1 if entry.kind == "tars" else FILES_PER_PARTITION
        if batch and (batch[0].source != entry.source or len(batch) >= size):
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def make_plan(config: PrepareConfig, dataset: Path) -> list[ShardSpec]:
    """The shards to be made; raises InputError if no picture is left to fill one."""
    work = dataset / WORK
    if not (work / "shard_list.parquet").is_file():
        plan(work, config.images, config.filters, config.samples_per_shard, config.heldout_fraction)
    shards = _shard_list(dataset)
    if not shards:
        rejects = pq.read_table(work / "plan_rejects.parquet")
        counts = Counter(rejects["reason"].to_pylist()).most_common()
        raise InputError(
            f"sources: of {len(rejects)} pictures none is left: "
            + ", ".join(f"{count} {reason}" for reason, count in counts)
            + f" (see {work}/plan_rejects.parquet). Remedy: other pictures, captions or filters, and --restart."
        )
    return shards


def _shard_list(dataset: Path) -> list[ShardSpec]:
    table = pq.read_table(dataset / WORK / "shard_list.parquet", schema=SHARD_LIST_SCHEMA)
    return [ShardSpec(**row) for row in table.to_pylist()]


def _missing(dataset: Path, shards: list[ShardSpec]) -> list[int]:
    """Places in the list of the shards without a whole commit."""
    return [i for i, spec in enumerate(shards) if read_commit(dataset, spec.path) is None]


def start_encoders(config: PrepareConfig, dataset: Path, num_shards: int) -> ActorPool:
    """The actors; they open their encoders when they are first asked."""
    vae = config.vae.model_copy(update={"path": os.path.abspath(config.vae.path)})
    texts = {
        name: text.model_copy(update={"path": os.path.abspath(text.path)})
        for name, text in config.text_encoders.items()
    }
    arguments = (dataset, vae, texts, config.images, config.encode)
    return ActorPool(ShardEncoder, arguments, config.ray, config.encode.threads, most=num_shards)


def encode(dataset: Path, shards: list[ShardSpec], actors: ActorPool) -> None:
    """Every shard that is not committed yet."""
    missing = _missing(dataset, shards)
    rows = pq.ParquetFile(dataset / WORK / "plan.parquet")
    work = ((shards[i], rows.read_row_group(i)) for i in missing)
    total = sum(shard.num_planned for shard in shards)
    done, rejected = total - sum(shards[i].num_planned for i in missing), 0
    with Progress(console, "encode", total, "pictures", done) as progress:

        def tick() -> None:
            progress.update(done + actors.poll("num_in_flight"), rejected)

        for commit in actors.run("encode_shard", work, tick):
            done += commit["num_samples"] + len(commit["rejects"])
            rejected += len(commit["rejects"])


def finalise(
    config: PrepareConfig,
    dataset: Path,
    shards: list[ShardSpec],
    encoders: Encoders,
    actors: ActorPool,
) -> None:
    """Tables, the empty caption, the contact sheet, and last the manifest."""
    from safetensors.numpy import save_file

    commits = [read_commit(dataset, spec.path) for spec in shards]
    assert all(commits), "encode returned before every shard was committed"
    whole: list[dict[str, Any]] = [commit for commit in commits if commit]
    rejects = _all_rejects(dataset, whole)
    table = [c for c in sorted(whole, key=lambda c: c["path"]) if c["num_samples"]]
    if not table:
        raise InputError(f"{dataset}: every picture was rejected; see {REJECTS}")
    write_table(dataset / REJECTS, rejects)
    write_table(dataset / SHARD_TABLE, pa.Table.from_pylist(table, schema=SHARD_SCHEMA))
    if encoders.empty_caption:
        write_atomic(dataset / EMPTY_CAPTION, lambda path: save_file(encoders.empty_caption, path))
    sheet = contact_sheet(dataset, shards, whole, encoders, actors)
    write_atomic(dataset / CONTACT_SHEET, lambda path: sheet.save(path, format="PNG"))
    for leftover in dataset.rglob(".*.tmp"):  # of killed processes
        leftover.unlink(missing_ok=True)
    files = [name for name in AUDITED if (dataset / name).is_file()]
    manifest = _manifest(config, table, rejects, encoders).model_copy(
        update={"files": {name: file_sha256(dataset / name) for name in files}}
    )
    write_text(dataset / MANIFEST, manifest.with_fingerprint().model_dump_json(indent=1))


def _all_rejects(dataset: Path, commits: list[dict[str, Any]]) -> pa.Table:
    planned = pq.read_table(dataset / WORK / "plan_rejects.parquet", schema=REJECT_SCHEMA)
    encoded = [reject for commit in commits for reject in commit["rejects"]]
    table = pa.concat_tables([planned, pa.Table.from_pylist(encoded, schema=REJECT_SCHEMA)])
    return table.sort_by([("source", "ascending"), ("name", "ascending"), ("key", "ascending")])


def _manifest(
    config: PrepareConfig, commits: list[dict[str, Any]], rejects: pa.Table, encoders: Encoders
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
    kept = sum(commit["num_samples"] for commit in commits)
    return Manifest(
        codec=encoders.codec.model_copy(update={"path": config.vae.path}),
        text_encoders={
            name: record.model_copy(update={"path": config.text_encoders[name].path})
            for name, record in encoders.text_encoders.items()
        },
        members=encoders.members,
        latent_mean=mean,
        latent_std=[(s - m * m) ** 0.5 for s, m in zip(square, mean, strict=True)],
        buckets=[
            BucketRecord(height=h, width=w, num_samples=n) for (h, w), n in sorted(buckets.items())
        ],
        counts=Counts(
            seen=kept + len(rejects),
            kept=kept,
            rejected=dict(sorted(Counter(rejects["reason"].to_pylist()).items())),
        ),
        prepare_config=config.model_dump(mode="json", exclude={"ray", "output"}),
    )


if __name__ == "__main__":
    run_command(main)
