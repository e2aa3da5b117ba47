"""Pictures to shards: `flowmill prepare CONFIG.yaml [section.key=value ...]`. Run it again to resume."""

import json
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer
from pydantic import AfterValidator, Field, model_validator
from rich.console import Console

from data_prep import pool
from data_prep.catalog import STAGED, CaptionsConfig, FiltersConfig, scan_partition
from data_prep.decoder import DecodePool
from data_prep.encode import (
    COMMITS,
    EncodeConfig,
    Encoders,
    ShardEncoder,
    ShardSpec,
    TextEncoderConfig,
    VaeConfig,
    VisionEncoderConfig,
    commit_name,
    read_commit,
)
from data_prep.images import ImagesConfig, list_buckets
from data_prep.plan import SHARD_LIST_SCHEMA, plan
from data_prep.pool import ActorPool, RayConfig
from data_prep.report import Progress, contact_sheet, html_report, print_plan, print_result
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
    read_manifest,
)
from data_prep.shards import WORK, NewTable, file_sha256, read_table, write_table, write_text
from data_prep.sources import FILES_PER_PARTITION, Entry, SourceConfig, list_source
from data_prep.storage import delete, find_files, is_remote, open_root, patient, write_atomic
from models.config import Config, InputError, load_config, run_command
from models.weights import read_model_config, weights_sha256

SourceName = Annotated[str, Field(pattern=r"^[\w.-]+$")]
EncoderName = Annotated[
    str, Field(pattern=r"^[a-z][a-z0-9_]*$"), AfterValidator(lambda name: _free_name(name))
]
AUDITED = (SHARD_TABLE, REJECTS, EMPTY_CAPTION, CONTACT_SHEET, REPORT)
ENTRIES_AT_ONCE = 1 << 16
READERS = 16  # of commits, which on an object store wait for each other's round trips
LISTING_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("kind", pa.string()),
        ("name", pa.large_string()),
        ("path", pa.large_string()),
        ("size", pa.int64()),
        ("caption_path", pa.large_string()),
        ("class_name", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
OURS = (MANIFEST, *AUDITED, "shards", WORK)

INDECISIVE = {"publish_every_shards", "ray", "output"}  # of the config

console = Console(soft_wrap=True, highlight=False, markup=False)


def _free_name(name: str) -> str:
    if name in ("moments", "micro", "label", "vision", "json") or name.endswith("_pooled"):
        raise ValueError(f"{name} is the name of another member of a sample; choose another")
    return name


class PrepareConfig(Config):
    """A preparation. All but the last three decides what is written, bit by bit, when it is complete."""

    sources: dict[SourceName, SourceConfig] = Field(min_length=1)
    images: ImagesConfig = ImagesConfig()
    captions: CaptionsConfig = CaptionsConfig()
    filters: FiltersConfig = FiltersConfig()
    vae: VaeConfig
    text_encoders: dict[EncoderName, TextEncoderConfig] = Field(default_factory=dict)
    vision_encoder: VisionEncoderConfig | None = None
    encode: EncodeConfig = EncodeConfig()
    samples_per_shard: int = Field(default=1000, ge=1)
    heldout_fraction: float = Field(default=0.0, ge=0, lt=1)
    # Shards made between a manifest of what is there so far and the next; null: one, at the end.
    publish_every_shards: int | None = Field(default=None, ge=1)
    ray: RayConfig = RayConfig()
    output: str  # a local path, or any fsspec URL such as s3://bucket/folder

    @model_validator(mode="after")
    def _labels_are_of_one_kind(self) -> Self:
        kinds = {
            name: "classes" if source.kind == "classes" else "column" * has_labels(source)
            for name, source in self.sources.items()
        }
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"{name}: {kind or 'none'}" for name, kind in kinds.items())
            raise ValueError(
                f"sources: got labels by {found}, expected all from classes' folders, all from a column "
                "of integers, or none"
            )
        return self


def has_labels(source: SourceConfig) -> bool:
    return source.kind == "classes" or getattr(source, "label", None) is not None


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


def prepare(
    config: PrepareConfig, dry_run: bool = False, restart: bool = False
) -> dict[str, float]:
    """The whole preparation, doing only what is not done yet; returns seconds by stage. Raises InputError."""
    clock = _Clock()
    settings = check_settings(config)
    listing = list_sources(config)
    if dry_run:
        print_plan(console, config, listing, settings["weights"], list_buckets(config.images))
        return {}
    dataset = open_output(config, settings, listing, restart)
    if is_complete(dataset):
        console.print(f"{dataset} is complete; nothing to do.")
    else:
        clock.mark("list")
        pool.connect(config.ray)
        clock.mark("start Ray")
        scan(config, dataset, listing)
        clock.mark("scan")
        shards = make_plan(config, dataset)
        clock.mark("plan")
        actors = start_encoders(config, len(shards))
        encoders: Encoders = actors.ask("describe", tick=lambda: _say(actors.unscheduled()))
        check_buckets(config, encoders.codec.downscale)
        clock.mark("load encoders")
        commits = encode(config, dataset, shards, actors, encoders)
        clock.mark("encode")
        finalise(config, dataset, shards, commits, encoders, actors, class_names(listing))
        clock.mark("finalise")
    delete(dataset / WORK / STAGED)
    print_result(console, dataset, read_manifest(dataset), clock.spent)
    return clock.spent


class _Clock:
    """Seconds by stage."""

    def __init__(self):
        self._last, self.spent = time.monotonic(), dict[str, float]()

    def mark(self, stage: str) -> None:
        """What came since the last mark was this."""
        now = time.monotonic()
        self.spent[stage], self._last = now - self._last, now


def _say(message: str | None) -> None:
    if message:
        console.print(message)


def check_settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the result, the encoders' weights included; raises InputError where one is not there."""
    folders = {"vae": (config.vae.path, "a diffusers autoencoder")}
    for name, text in config.text_encoders.items():
        folders[f"text_encoders.{name}"] = (text.path, "a transformers text encoder")
    if config.vision_encoder is not None:
        folders["vision_encoder"] = (config.vision_encoder.path, "a vision transformer")
    weights = {}
    for name, (path, what) in folders.items():
        try:
            read_model_config(Path(path), what)
            weights[name] = weights_sha256(Path(path))
        except InputError as error:
            raise InputError(f"{name}.path: {error}") from None
    decisive = config.model_dump(mode="json", exclude=INDECISIVE)
    return {"config": decisive, "weights": weights}


def check_buckets(config: PrepareConfig, downscale: int) -> None:
    """Raises InputError where a bucket's sides are not whole latents."""
    if config.images.bucket_multiple % downscale:
        raise InputError(
            f"images.bucket_multiple: got {config.images.bucket_multiple}, expected a multiple of "
            f"{downscale}, the downscale of {config.vae.path}, times the patch size of the model."
        )
    vision = config.vision_encoder
    if vision is not None and config.images.bucket_multiple % vision.patch_pixels:
        raise InputError(
            f"vision_encoder.patch_pixels: got {vision.patch_pixels}, expected a divisor of "
            f"images.bucket_multiple, {config.images.bucket_multiple}"
        )


def list_sources(config: PrepareConfig) -> pa.Table:
    """Every file of every source, in a fixed order: the fields of an Entry."""
    entries = (e for name, source in config.sources.items() for e in list_source(name, source))
    names, batches = LISTING_SCHEMA.names, list[pa.RecordBatch]()
    while rows := [{n: getattr(e, n) for n in names} for e in islice(entries, ENTRIES_AT_ONCE)]:
        batches.append(pa.RecordBatch.from_pylist(rows, schema=LISTING_SCHEMA))
    return pa.Table.from_batches(batches, LISTING_SCHEMA)


def class_names(listing: pa.Table) -> list[str]:
    """Of class folders, in the order of their labels."""
    return sorted(listing["class_name"].drop_null().unique().to_pylist())


def open_output(
    config: PrepareConfig, settings: dict[str, Any], listing: pa.Table, restart: bool
) -> Path:
    """The output folder, ours and of these settings and sources; raises InputError where it is not."""
    if pool.in_ray_job() and not (is_remote(config.output) or os.path.isabs(config.output)):
        raise InputError(
            f"output: got {config.output}, expected an absolute path: in a Ray job a relative one lies in "
            "Ray's copy of the working directory. Remedy: output=/shared/disk/..."
        )
    dataset = open_root(config.output, "output")
    for name, source in config.sources.items():
        if f"{dataset}/".startswith(f"{open_root(source.path, 'path')}/"):
            raise InputError(
                f"output: {config.output} lies in sources.{name}.path {source.path}, whose files it would "
                "add to. Remedy: choose a folder beside it."
            )
    work = dataset / WORK
    try:
        there = patient(lambda: [p.name for p in dataset.iterdir()] if dataset.exists() else [])
        strangers = sorted(name for name in there if name not in OURS)
        if strangers and not (work / "config.json").exists():
            raise InputError(
                f"output: {config.output} holds other files ({', '.join(strangers[:3])}), expected a folder "
                "that is new, empty, or of an earlier preparation."
            )
        if restart:
            _delete_earlier(dataset)
        if (work / "config.json").exists():
            _refuse_other_settings(config.output, work, settings)
            _refuse_other_sources(config.output, work, listing)
        else:
            write_table(work / "listing.parquet", listing)
            write_text(work / "config.json", json.dumps(settings, indent=1))
    except OSError as error:
        raise InputError(
            f"output: cannot write {config.output}: {error.strerror or error}"
        ) from error
    return dataset


def _delete_earlier(dataset: Path) -> None:
    # config.json, and with it the right to resume, goes first.
    for path in [dataset / WORK / "config.json", *(dataset / name for name in OURS)]:
        if count := delete(path):
            console.print(f"deleted {path} ({count} files)")


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


def _refuse_other_sources(output: str, work: Path, now: pa.Table) -> None:
    before = read_table(work / "listing.parquet")
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


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        return {prefix: data}
    return {k: v for key in data for k, v in _flat(data[key], f"{prefix}.{key}".strip(".")).items()}


def is_complete(dataset: Path) -> bool:
    """Whether there is a manifest and every shard that it speaks of."""
    if not (dataset / MANIFEST).is_file():
        return False
    read_manifest(dataset)
    return all(read_commits(dataset, shard_list(dataset)))


def scan(config: PrepareConfig, dataset: Path, listing: pa.Table) -> None:
    """One catalog part a partition of the sources; parts that exist are not made again."""
    names, partitions = class_names(listing), _partitions(config, listing)
    done, staged = (find_files(dataset / WORK / name) for name in ("catalog", STAGED))
    todo = []
    for number, (source, begin, end) in enumerate(partitions):
        name = f"part-{number:06d}"
        # A part whose pictures were staged wants them there, so long as shards are to be made.
        there = f"{name}.staged.parquet" in done and name in staged
        if there or f"{name}.parquet" in done:
            continue
        todo.append((dataset / WORK, name, source, begin, end))
    settings = (names, config.images, config.captions, config.filters)
    work = (
        (folder, name, listing.slice(begin, end - begin), config.sources[source], *settings)
        for folder, name, source, begin, end in todo
    )
    with Progress(console, "scan", len(todo), "parts") as progress:
        for count, _ in enumerate(pool.run_tasks(_scan_task, work, _scan_lost, console.print)):
            progress.update(count + 1)


def scan_entries(
    config: PrepareConfig, dataset: Path, name: str, rows: pa.Table, names: list[str]
) -> int:
    """Write the catalog part of some of a source's entries, here; returns its pictures."""
    source = config.sources[rows["source"][0].as_py()]
    settings = (names, config.images, config.captions, config.filters)
    return _scan_task(dataset / WORK, name, rows, source, *settings)


_probes: dict[
    ImagesConfig, DecodePool
] = {}  # a worker's own, so that its child serves many partitions


def _scan_task(
    work: Path,
    name: str,
    rows: pa.Table,
    source: SourceConfig,
    names: list[str],
    images: ImagesConfig,
    captions: CaptionsConfig,
    filters: FiltersConfig,
) -> int:
    probes = _probes.setdefault(images, DecodePool(images, num_children=1))
    entries = [Entry(**row) for row in rows.to_pylist()]
    return scan_partition(work, name, entries, source, names, captions, filters, probes)


def _scan_lost(attempts: int, work: Path, name: str, rows: pa.Table, *settings: Any) -> bool:
    """Reject a table that kills whoever reads it; other partitions do not, so theirs is another trouble."""
    if settings[0].kind not in ("table", "imagefolder"):
        return False
    detail = f"its reader died {attempts} times"
    columns = {"reason": "scan_crash", "detail": detail}
    for column, value in columns.items():
        place = rows.schema.get_field_index(column)
        rows = rows.set_column(place, column, pa.array([value] * len(rows), pa.string()))
    _scan_task(work, name, rows, *settings)
    return True


def _partitions(config: PrepareConfig, listing: pa.Table) -> list[tuple[str, int, int]]:
    """Neighbours of one source in the listing: many files, or one tar or table."""
    found, start = list[tuple[str, int, int]](), 0
    for name, source in config.sources.items():
        end = start + (pc.sum(pc.equal(listing["source"], name)).as_py() or 0)  # pyright: ignore[reportAttributeAccessIssue]
        size = FILES_PER_PARTITION if source.kind in ("folder", "classes") else 1
        found += [(name, begin, min(begin + size, end)) for begin in range(start, end, size)]
        start = end
    return found


def make_plan(config: PrepareConfig, dataset: Path) -> list[ShardSpec]:
    """The shards to be made; raises InputError if no picture is left to fill one."""
    work = dataset / WORK
    if not (work / "shard_list.parquet").is_file():
        buckets, size = list_buckets(config.images), config.samples_per_shard
        plan(work, buckets, config.filters, size, config.heldout_fraction)
    shards = shard_list(dataset)
    if not shards:
        rejects = read_table(work / "plan_rejects.parquet")
        counts = Counter(rejects["reason"].to_pylist()).most_common()
        raise InputError(
            f"sources: of {len(rejects)} pictures none is left: "
            + ", ".join(f"{count} {reason}" for reason, count in counts)
            + f" (see {work}/plan_rejects.parquet). Remedy: other pictures, captions or filters, and --restart."
        )
    return shards


def shard_list(dataset: Path) -> list[ShardSpec]:
    table = read_table(dataset / WORK / "shard_list.parquet", SHARD_LIST_SCHEMA)
    return [ShardSpec(**row) for row in table.to_pylist()]


def read_commits(dataset: Path, shards: list[ShardSpec]) -> list[dict[str, Any] | None]:
    """The commit of every shard, None where it is to be made."""
    there = find_files(dataset / WORK / COMMITS)

    def read(spec: ShardSpec) -> dict[str, Any] | None:
        return read_commit(dataset, spec.path) if commit_name(spec.path) in there else None

    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(read, shards))


def start_encoders(config: PrepareConfig, num_shards: int) -> ActorPool:
    """The actors; they open their encoders when they are first asked."""
    output = config.output if is_remote(config.output) else os.path.abspath(config.output)
    arguments = (output, *encoder_arguments(config))
    return ActorPool(ShardEncoder, arguments, config.ray, config.encode.threads, most=num_shards)


def encoder_arguments(config: PrepareConfig) -> tuple[Any, ...]:
    """Of a ShardEncoder, but for the output before them and the number of decoders after; absolute paths."""
    vae = config.vae.model_copy(update={"path": os.path.abspath(config.vae.path)})
    texts = {
        name: text.model_copy(update={"path": os.path.abspath(text.path)})
        for name, text in config.text_encoders.items()
    }
    labels = any(has_labels(source) for source in config.sources.values())
    vision = config.vision_encoder
    if vision is not None:
        vision = vision.model_copy(update={"path": os.path.abspath(vision.path)})
    return vae, texts, vision, config.images, config.encode, labels


def encode(
    config: PrepareConfig,
    dataset: Path,
    shards: list[ShardSpec],
    actors: ActorPool,
    encoders: Encoders,
) -> list[dict[str, Any]]:
    """Every shard that is not committed yet; returns all commits in the order of the list."""
    commits = read_commits(dataset, shards)
    places = {spec.path: i for i, spec in enumerate(shards)}
    work = ((shards[i], i) for i, commit in enumerate(commits) if commit is None)
    total = sum(shard.num_planned for shard in shards)
    done, rejected = sum(commit["num_planned"] for commit in commits if commit), 0
    with Progress(console, "encode", total, "pictures", done) as progress:

        def tick() -> None:
            progress.update(done + actors.poll("num_in_flight"), rejected)
            _say(actors.unscheduled())

        for count, commit in enumerate(actors.run("encode_shard", work, tick), start=1):
            commits[places[commit["path"]]] = commit
            done += commit["num_planned"]
            rejected += len(commit["rejects"])
            if config.publish_every_shards and count % config.publish_every_shards == 0:
                publish(config, dataset, [c for c in commits if c], encoders)
    whole = [commit for commit in commits if commit]
    assert len(whole) == len(shards), "the actors returned before every shard was committed"
    return whole


def finalise(
    config: PrepareConfig,
    dataset: Path,
    shards: list[ShardSpec],
    commits: list[dict[str, Any]],
    encoders: Encoders,
    actors: ActorPool,
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


if __name__ == "__main__":
    run_command(main)
