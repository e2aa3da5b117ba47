"""A layer: more members for the pictures of a dataset, shard by shard in its order and with its rows.

Which pictures there are, their captions and how they were cut into batches is read from the base's plan and
commits; a shard of the layer is bound to the hash of the base's.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep import schema
from data_prep.captions_table import STRAYS, entries, read_said, sort_captions
from data_prep.catalog import STAGED, CaptionsConfig, draw_captions
from data_prep.config import LayerConfig
from data_prep.encode import (
    CRASH,
    Decoded,
    EncodeConfig,
    Encoders,
    EncoderSettings,
    ShardEncoder,
    TextErrors,
    reject,
    take_errors,
    with_errors,
)
from data_prep.encoders import check_encoders, weight_of
from data_prep.images import ImagesConfig, Rejected
from data_prep.output import OURS, lock_output, refuse_other_settings
from data_prep.plan import ShardSpec, read_planned, shard_list
from data_prep.preparation import encode, stage, tidy
from data_prep.report import bucket_samples, console, print_result
from data_prep.schema.proof import ProofSample, ProofSamples, make_proof
from data_prep.shards import (
    WORK,
    ShardWriter,
    read_commit,
    read_commits,
    read_table,
    sealed_commits,
    work_of,
    write_table,
    write_text,
)
from data_prep.sources.source import count_rejects
from data_prep.sources.table import TableSource
from data_prep.storage import delete, local_copy, open_root, write_atomic
from data_prep.workers import Actors, connect, share_out
from models.config import InputError
from models.files import file_sha256, full_disk_is_said

Rejects = list[dict[str, str]]


@dataclass(frozen=True)
class LayerSpec(ShardSpec):
    """A shard to be made over one of the base's; `num_planned` pictures were in the base's batches."""

    number: int = 0
    base_sha256: str = ""
    each: int = 1
    """Samples per picture."""
    rejected: tuple[tuple[str, str], ...] = ()
    """Key and reason of the pictures that the base planned and rejected."""


@dataclass(frozen=True)
class LayerSettings(EncoderSettings):
    base: Path = Path()


class LayerEncoder(ShardEncoder):
    """Encodes the captions, or the pictures, of a base's shards."""

    def __init__(self, settings: LayerSettings, num_decoders: int):
        super().__init__(settings, num_decoders)
        assert isinstance(settings.config, LayerConfig)
        self._captions, self._base = settings.config.captions, settings.base

    def _planned(self, spec: ShardSpec, number: int) -> list[dict[str, Any]]:
        """The pictures in the base's batches, with their captions or why they have none.

        Those that the base rejected for their numbers were in its batches too.
        """
        assert isinstance(spec, LayerSpec)
        gone = {key for key, reason in spec.rejected if reason != "not_finite"}
        rows = read_planned(work_of(self._base, spec.generation), spec.number).to_pylist()
        rows = [row for row in rows if row["key"] not in gone]
        if self._captions is None or not rows:
            return rows
        told = read_said(self._dataset / WORK, [row["key"] for row in rows])
        per_picture = spec.each // (1 + self._flips(spec))
        limits = self._captions.model_dump(include=set(CaptionsConfig.model_fields))
        config = CaptionsConfig.model_validate(limits | {"per_picture": per_picture})
        for row in rows:
            try:
                if row["key"] not in told:
                    raise Rejected("caption_missing", "the table has none of its key")
                row["captions"] = draw_captions(row["key"], told[row["key"]], config)
            except Rejected as rejected:
                row |= {"captions": None, "why": rejected}
        return rows

    def _batches(
        self, spec: ShardSpec, rows: list[dict[str, Any]], rejects: Rejects
    ) -> Iterator[list[Decoded]]:
        """Rows with captions in the base's batches; pictures are decoded only where an encoder looks at them."""
        bad = [row for row in rows if row["captions"] is None]
        rejects += [reject(row, row["why"].reason, row["why"].detail) for row in bad]
        rows = [row for row in rows if row["captions"] is not None]
        if self._members("pixels"):
            staged = str(work_of(self._base, spec.generation) / STAGED)
            if any(row["path"].startswith(staged) for row in rows):
                raise InputError(
                    f"base: {self._base} has pictures that came as bytes in tables, which are no longer there for "
                    "vision_encoder to look at. Remedy: prepare the pictures again with it."
                )
            yield from super()._batches(spec, rows, rejects)
            return
        size = self._numbers.batch_size
        for begin in range(0, len(rows), size):
            yield [(row, None) for row in rows[begin : begin + size]]

    def encode_shard(
        self, spec: ShardSpec, number: int, deadly: Collection[int] = ()
    ) -> dict[str, Any]:
        """As that of a dataset: a picture that is rejected leaves empty rows in the index."""
        if commit := read_commit(self._dataset, spec.path):
            return commit
        assert isinstance(spec, LayerSpec)
        planned, lost = self._planned(spec, number), {key for key, _ in spec.rejected}
        keys = [row["key"] for row in planned if row["key"] not in lost]
        rows = [row for place, row in enumerate(planned) if place not in deadly]
        rejects = [reject(planned[place], "encoder_crash", CRASH) for place in deadly]
        writer = ShardWriter(self._dataset, spec.path, list(self._members()))
        samples, kept, coming = ProofSamples(self._config.thumbnails_per_shard), {}, iter(keys)
        errors = TextErrors()
        try:
            for batch in self._batches(spec, rows, rejects):
                for row, _, arrays in self._encode_batch(batch, rejects, self._flips(spec)):
                    key, captions = row["key"], row["captions"]
                    if key in lost:
                        continue
                    take_errors(arrays, errors)
                    while next(coming) != key:
                        writer.skip(spec.each)
                    facts = {"source": row["source"], "name": row["name"], "caption": captions[0]}
                    facts |= {"captions": captions} if len(captions) > 1 else {}
                    writer.add(key, arrays, facts, self._variants(captions, self._flips(spec)))
                    samples.add(ProofSample(key, captions[0], None, arrays))
                    kept[key] = row
            for _ in coming:
                writer.skip(spec.each)
            texts, proof = list(self._members("captions")), b""
            if kept:
                proof, _ = make_proof(samples.in_order(), [], texts)
            self._check()
            about = {n: v for n, v in asdict(spec).items() if n not in ("number", "rejected")}
            commit = about | writer.commit(proof)
            commit |= {"num_kept": len(kept), "text_errors": errors}
            commit["rejects"] = [r for r in rejects if r["key"] not in lost]
            places = [i * spec.each for i, key in enumerate(keys) if key not in kept]
            commit["missing"] = [first + n for first in places for n in range(spec.each)]
            told = [(row["key"], row["captions"]) for row in planned if row["key"] not in lost]
            commit["captions_sha256"] = schema.captions_sha256(told) if texts else None
            self._commit(commit, list(kept.values()))
        finally:
            writer.abandon()
        return commit


def prepare_layer(
    config: LayerConfig, dry_run: bool = False, restart: bool = False
) -> dict[str, float]:
    """The whole layer, doing only what is not done yet; returns seconds by stage. Raises InputError."""
    spent = dict[str, float]()
    with stage(spent, "list", "reading the base and checking the encoders"):
        base, manifest = open_base(config)
        of_base = manifest.prepare_config
        config = config.model_copy(
            update={"encode": config.encode or EncodeConfig(**of_base.get("encode", {}))}
        )
        settings = _decisive(config, manifest)
        specs = base_shards(base, manifest)
    pictures = sum(spec.num_planned for spec in specs)
    console.print(f"{config.base}: {len(specs):,} shards, {pictures:,} pictures to encode for")
    if dry_run:
        return {}
    with lock_output(config) as lock, full_disk_is_said(f"output: {config.output}"):
        dataset = _open_layer(config, base, settings, restart)
        tidy(dataset)
        done = read_commits(dataset, [spec.path for spec in specs])
        for spec, commit in zip(specs, done, strict=True):
            if commit and commit["base_sha256"] != spec.base_sha256:
                raise InputError(
                    f"output: {dataset}/{spec.path} was made over another shard of {config.base}, which was prepared "
                    "again since. Remedy: another output, or --restart to delete it and start anew."
                )
        if (dataset / schema.MANIFEST).is_file() and all(done):
            reached = schema.read_manifest(dataset).base
            if reached and reached.fingerprint == _last(manifest).fingerprint:
                console.print(f"{dataset} is complete; nothing to do.")
                return spent
        with stage(spent, "start Ray", "starting Ray"):
            connect(config.ray)
        if config.captions:
            with stage(spent, "captions", "sorting the captions"):
                sort_captions(config.captions, dataset / WORK, _keys(base, specs))
        weight, images = weight_of(config), ImagesConfig(**of_base.get("images", {}))
        assert config.encode is not None
        shares = share_out(config.ray, config.encode.threads, len(specs), weight)
        told = LayerSettings(config, dataset, lock.check, images, base)
        with Actors(LayerEncoder, told, shares, console.print) as actors:
            with stage(spent, "load encoders", "loading the encoders"):
                encoders: Encoders = actors.describe()
            with stage(spent, "encode"):
                commits = encode(config, dataset, list(specs), actors, encoders)
        lock.check()
        with stage(spent, "finalise", "writing the tables"):
            _finalise(config, dataset, manifest, commits, encoders)
        tidy(dataset)
        print_result(dataset, schema.read_manifest(dataset), spent)
    return spent


def open_base(config: LayerConfig) -> tuple[Path, schema.Manifest]:
    """The base and its manifest; raises InputError where it is none, or not as far as a layer needs it."""
    base = open_root(config.base, "base")
    manifest = schema.read_manifest(base)
    if manifest.base is not None:
        raise InputError(
            f"base: {config.base} is itself a layer, over {manifest.base.path}. Remedy: base={manifest.base.path}; "
            "its captions come by captions.table."
        )
    if f"{open_root(config.output, 'output')}/".startswith(f"{base}/"):
        raise InputError(f"output: {config.output} lies in its base. Remedy: a folder beside it.")
    if not (base / WORK / "shard_list.parquet").is_file():
        raise InputError(
            f"base: {config.base} has no work/, from which keys and pictures' addresses are read. Remedy: copy "
            f"{config.base}/work too."
        )
    if not any(generation.complete for generation in manifest.generations):
        made, planned = len(schema.read_shard_table(base)), len(shard_list(base / WORK))
        raise InputError(
            f"base: {config.base} is still being prepared ({made:,} of {planned:,} shards of its first generation). "
            "Remedy: finish it first: flowmill prepare with its config."
        )
    return base, manifest


def base_shards(base: Path, manifest: schema.Manifest) -> list[LayerSpec]:
    """The shards of the base's complete generations, in the order of its table."""
    table, shards = {row["path"]: row for row in schema.read_shard_table(base).to_pylist()}, {}
    for generation in (g for g in manifest.generations if g.complete):
        work = work_of(base, generation.number)
        commits = {commit["path"]: commit for commit in sealed_commits(work) or ()}
        for number, spec in enumerate(shard_list(work)):
            shards[spec.path] = number, spec, commits.get(spec.path)
    complete = {g.number for g in manifest.generations if g.complete}
    found = list[LayerSpec]()
    for path, row in table.items():
        if row["generation"] not in complete:
            continue
        number, spec, commit = shards[path]
        if commit is None or commit["sha256"] != row["sha256"]:
            raise InputError(
                f"base: {base}/{path} is not what its commit says. Remedy: flowmill prepare with the base's config."
            )
        rejected = tuple((r["key"], r["reason"]) for r in commit["rejects"])
        out = sum(reason != "not_finite" for _, reason in rejected)
        about = asdict(spec) | {"num_planned": spec.num_planned - out}
        each = manifest.samples_per_picture[spec.split]
        facts = {"number": number, "base_sha256": row["sha256"], "each": each, "rejected": rejected}
        found.append(LayerSpec(**about | facts))
    return found


def _keys(base: Path, specs: list[LayerSpec]) -> Iterator[list[str]]:
    """The keys of the pictures that the base has, shard by shard."""
    for spec in specs:
        lost = {key for key, _ in spec.rejected}
        keys = read_planned(work_of(base, spec.generation), spec.number)["key"].to_pylist()
        yield [key for key in keys if key not in lost]


def _last(manifest: schema.Manifest) -> schema.Generation:
    return [generation for generation in manifest.generations if generation.complete][-1]


def _decisive(config: LayerConfig, manifest: schema.Manifest) -> dict[str, Any]:
    """What decides the result, encoders and tables by their hashes."""
    places = {"text_encoders": {"__all__": {"path"}}, "vision_encoder": {"path"}}
    places |= {"base": True, "output": True, "ray": True, "captions": {"table"}}
    hashes, tables = check_encoders(config), dict[str, str]()
    if config.captions:
        path, column = config.captions.table, config.captions.caption
        for entry in entries(TableSource(kind="table", path=path, captions={column: 1.0})):
            with local_copy(entry.path) as file:
                tables[entry.name] = file_sha256(Path(file))
    decisive = config.model_dump(mode="json", exclude=places)
    return {"config": decisive, "encoders": list(hashes), "hashes": hashes, "tables": tables} | {
        "base": manifest.id
    }


def _open_layer(config: LayerConfig, base: Path, settings: dict[str, Any], restart: bool) -> Path:
    """The output folder, of these settings; raises InputError where it is of others."""
    dataset = open_root(config.output, "output")
    begun = dataset / WORK / "config.json"
    for path in (begun, *(dataset / name for name in OURS)) if restart else ():
        delete(path)
    if begun.exists():
        refuse_other_settings(config.output, json.loads(begun.read_text())["settings"], settings)
        return dataset
    write_text(begun, json.dumps({"settings": settings, "base": str(base)}, indent=1))
    return dataset


def _finalise(
    config: LayerConfig,
    dataset: Path,
    base: schema.Manifest,
    commits: list[dict[str, Any]],
    encoders: Encoders,
) -> None:
    """Tables, the empty caption, and last the manifest."""
    from safetensors.numpy import save

    rows = pa.Table.from_pylist(commits, schema=schema.SHARD_SCHEMA)
    write_table(dataset / schema.SHARD_TABLE, rows)
    rejects = pa.Table.from_pylist(
        [reject for commit in commits for reject in commit["rejects"]], schema=schema.REJECT_SCHEMA
    )
    if config.captions:
        strays = read_table(dataset / WORK / STRAYS, schema.REJECT_SCHEMA)
        rejects = pa.concat_tables([strays, rejects])
    write_table(dataset / schema.REJECTS, rejects)
    if encoders.empty_caption:
        data = save(encoders.empty_caption)
        write_atomic(dataset / schema.EMPTY_CAPTION, lambda path: path.write_bytes(data))
    manifest = _manifest(config, base, commits, encoders)
    rejected = dict(sorted(count_rejects(rejects)[0].items()))
    kept = sum(commit["num_kept"] for commit in commits)
    cut = sum((Counter(commit["cut_captions"]) for commit in commits), Counter[str]())
    counts = schema.Counts(
        seen=kept + sum(rejected.values()), kept=kept, rejected=rejected, cut_captions=dict(cut)
    )
    names = [name for name in schema.AUDITED if (dataset / name).is_file()]
    files = {name: file_sha256(dataset / name) for name in names}
    manifest = manifest.model_copy(update={"counts": counts, "files": files})
    text = manifest.with_fingerprint().model_dump_json(indent=1)
    write_text(dataset / schema.MANIFEST, text)


def _manifest(
    config: LayerConfig, base: schema.Manifest, commits: list[dict[str, Any]], encoders: Encoders
) -> schema.Manifest:
    """That of the layer, its generations those of the base as far as they are complete."""
    settings = _decisive(config, base)
    columns = ("path", "num_samples", "sha256", "index_sha256", "captions_sha256", "base_sha256")
    generations, previous = list[schema.Generation](), ""
    for below in (generation for generation in base.generations if generation.complete):
        mine = [commit for commit in commits if commit["generation"] == below.number]
        kept = sum(commit["num_kept"] for commit in mine)
        rejected = Counter(reject["reason"] for commit in mine for reject in commit["rejects"])
        counts = schema.Counts(seen=kept + rejected.total(), kept=kept, rejected=dict(rejected))
        link: dict[str, Any] = {
            "previous": previous,
            "settings_sha256": schema.fingerprint(settings),
            "base_fingerprint": below.fingerprint,
            "counts": counts.model_dump(mode="json"),
            "shards": [[*(c[name] for name in columns), c["missing"]] for c in mine],
        }
        previous = schema.fingerprint(link)
        update = {
            "counts": counts,
            "psnr_db": None,
            "fingerprint": previous,
            "num_shards": len(mine),
        }
        generations.append(below.model_copy(update=update))
    train = [
        commit | {"num_samples": commit["num_samples"] - len(commit["missing"])}
        for commit in commits
        if commit["split"] == "train"
    ]
    return base.model_copy(
        update={
            "id": schema.fingerprint({"settings": settings})[:32],
            "text": schema.TextRecord.model_validate(with_errors(encoders.record["text"], commits)),
            "vision": schema.VisionRecord.model_validate(v)
            if (v := encoders.record["vision"])
            else None,
            "members": encoders.members,
            "buckets": [
                schema.BucketRecord(height=h, width=w, num_samples=n)
                for (h, w), n in sorted(bucket_samples(train).items())
            ],
            "generations": generations,
            "base": schema.BaseRecord(
                path=config.base, id=base.id, fingerprint=_last(base).fingerprint
            ),
            "prepare_config": config.model_dump(mode="json", exclude={"ray": True, "output": True}),
        }
    )
