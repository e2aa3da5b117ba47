"""A layer: more members for the pictures of a dataset, shard by shard in its order and with its rows.

Which pictures there are, their captions and how they were cut into batches is read from the base's plan and
commits; a shard of the layer is bound to the hash of the base's.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep import schema
from data_prep.captions_table import (
    STRAYS,
    Said,
    read_said,
    sort_captions,
    table_sha256,
)
from data_prep.catalog import STAGED, draw_captions
from data_prep.config import INDECISIVE, LayerConfig, PrepareConfig, decisive
from data_prep.decoder import DecodeRequest
from data_prep.dry_run import print_layer_plan
from data_prep.encode import (
    Decoded,
    Encoders,
    EncoderSettings,
    Making,
    ShardEncoder,
    in_halves,
    reject,
    with_errors,
)
from data_prep.encoders import Writer
from data_prep.images import Picture, Rejected
from data_prep.output import OURS, lock_output, refuse_other_settings
from data_prep.page import html_report, shown_pictures
from data_prep.plan import ShardSpec, read_planned, shard_list
from data_prep.preparation import encode, stage, tidy
from data_prep.publish import EXAMPLES, counts_of, write_manifest, write_sheet, write_tables
from data_prep.report import bucket_samples, console, print_result, training_rows
from data_prep.scan import LISTING, LISTING_SCHEMA, PARTS, Intake, scan
from data_prep.shards import (
    read_commits,
    read_table,
    sealed_commits,
    work_of,
    write_table,
    write_text,
)
from data_prep.sources.source import count_rejects
from data_prep.storage import delete, find_files, open_root
from data_prep.workers import connect
from models.config import InputError, parse_config
from models.files import full_disk_is_said

Rejects = list[dict[str, str]]
# What a captioner said, a row per caption that a picture should get: null, with a reason, where it is none.
ANSWER_SCHEMA = pa.schema(
    [(name, pa.large_string()) for name in ("key", "source", "name", "caption", "prompt", "answer")]
    + [("num_tokens", pa.int32()), ("reason", pa.string())]
)
GREY = 128


@dataclass(frozen=True)
class LayerSpec(ShardSpec):
    """A shard to be made over one of the base's; `num_planned` pictures were in the base's batches."""

    number: int = 0
    base_sha256: str = ""
    each: int = 1
    """Samples per picture."""
    rejected: tuple[tuple[str, str], ...] = ()
    """Key and reason of the pictures that the base planned and rejected."""


class LayerEncoder(ShardEncoder):
    """Encodes the captions, or the pictures, of a base's shards."""

    def __init__(self, settings: EncoderSettings, num_decoders: int):
        super().__init__(settings, num_decoders)
        assert isinstance(settings.config, LayerConfig)
        self._captions, self._base = settings.config.captions, settings.base

    def _planned(self, spec: ShardSpec, number: int) -> list[dict[str, Any]]:
        """The pictures in the base's batches, with their captions or why they have none.

        Those that the base rejected for their numbers, `lost`, were in its batches too.
        """
        assert isinstance(spec, LayerSpec)
        why = dict(spec.rejected)
        rows = read_planned(work_of(self._base, spec.generation), spec.number).to_pylist()
        rows = [row for row in rows if why.get(row["key"], "not_finite") == "not_finite"]
        told = dict[str, Said]()
        if self._captions and self._captions.table and rows:
            work = work_of(self._dataset, spec.generation)
            told = read_said(work, [row["key"] for row in rows])
        for row in rows:
            row["lost"] = row["key"] in why
            if self._captions:
                self._draw(spec, row, told.get(row["key"], ()))
        return rows

    def _draw(self, spec: ShardSpec, row: dict[str, Any], said: Said) -> None:
        """Take the picture's captions from what is said of it."""
        assert self._captions
        row["captions"] = None
        try:
            if not said:
                raise Rejected("caption_missing", "nothing is said of its key")
            config = self._captions.model_copy(update={"per_picture": self._per_picture(spec)})
            row["captions"] = draw_captions(row["key"], said, config)
        except Rejected as rejected:
            row["why"] = rejected

    def _per_picture(self, spec: ShardSpec) -> int:
        assert isinstance(spec, LayerSpec)
        return spec.each // (1 + self._flips(spec))

    def _batches(
        self, spec: ShardSpec, rows: list[dict[str, Any]], rejects: Rejects
    ) -> Iterator[list[Decoded]]:
        """Rows with captions in the base's batches; pictures are decoded only where an encoder looks at them."""
        if writer := self._only(Writer):
            self._ask(writer, spec, [row for row in rows if not row["lost"]])
        bad = [row for row in rows if row["captions"] is None]
        rejects += [reject(row, row["why"].reason, row["why"].detail) for row in bad]
        rows = [row for row in rows if row["captions"] is not None]
        if self._members("pixels"):
            yield from super()._batches(spec, rows, rejects)
            return
        size = self._numbers.batch_size
        for begin in range(0, len(rows), size):
            yield [(row, None) for row in rows[begin : begin + size]]

    def _ask(self, writer: Writer, spec: ShardSpec, rows: list[dict[str, Any]]) -> None:
        """Let the captioner say something of every picture, prompt by prompt in batches of the plan's order.

        One that cannot be read is grey, so that what is said of the others does not depend on it.
        """
        prompts, size = writer.config.prompts, writer.config.batch_size
        times = -(-writer.config.pixels // min(spec.height, spec.width))
        large = replace(spec, height=times * spec.height, width=times * spec.width)
        grey = np.full((large.height, large.width, 3), GREY, np.uint8)
        asked: dict[str, list[Any]] = {prompt: [] for prompt in prompts}
        for row in rows:
            facts = {name: row[name] for name in ("key", "source", "name")}
            first, count = int(row["key"], 16), self._per_picture(spec)
            drawn = [prompts[(first + n) % len(prompts)] for n in range(count)]
            answers = {prompt: facts | {"prompt": prompt} for prompt in drawn}
            row["said"] = [answers[prompt] for prompt in drawn]
            for prompt, answer in answers.items():
                asked[prompt].append((row, answer))
        batches = ((p, m[i : i + size]) for p, m in asked.items() for i in range(0, len(m), size))
        for prompt, some in batches:
            waiting = [self._pool.submit(self._request(row, large)) for row, _ in some]
            found = [future.result() for future in waiting]
            seen = [p.pixels if isinstance(p, Picture) else grey for p in found]
            pairs = [(row["key"], pixels) for (row, _), pixels in zip(some, seen, strict=True)]
            with self._encoding:
                said = in_halves(partial(writer.answer, prompt), pairs)["answers"]
            for (_, answer), picture, words in zip(some, found, said, strict=True):
                answer |= vars(words)
                if isinstance(picture, Rejected):
                    answer |= {"caption": None, "answer": picture.detail, "reason": picture.reason}
        for row in rows:
            texts = [
                Rejected(a["reason"], a["answer"][:200]) if a["reason"] else a["caption"].encode()
                for a in row["said"]
            ]
            self._draw(spec, row, tuple((text, 1.0) for text in texts))

    def _request(self, row: dict[str, Any], spec: ShardSpec) -> DecodeRequest:
        """What came as bytes in a table lies in the layer's own folder."""
        place = work_of(Path(), spec.generation) / STAGED / Path(row["path"]).name
        if row["path"].endswith(f"/{place}"):
            row = row | {"path": str(self._dataset / place)}
        return super()._request(row, spec)

    def _encode_batch(self, batch: list[Decoded], rejects: Rejects, flip: bool) -> Iterator[Any]:
        """Encode what the base lost too, and leave it out."""
        encoded = super()._encode_batch(batch, rejects, flip)
        return (found for found in encoded if not found[0]["lost"])

    def _finish(self, made: Making, keys: Sequence[str] = (), each: int = 0) -> dict[str, Any]:
        """As of a dataset, but a picture that is rejected leaves empty rows in the index."""
        spec = made.spec
        assert isinstance(spec, LayerSpec)
        theirs = [row for row in made.planned if not row["lost"]]
        keys, there = [row["key"] for row in theirs], {row["key"] for row in made.kept}
        commit = super()._finish(made, keys, spec.each)
        del commit["number"], commit["rejected"]
        lacks = [spec.each * i for i, key in enumerate(keys) if key not in there]
        lost = {row["key"] for row in made.planned if row["lost"]}
        told = [(row["key"], row["captions"]) for row in theirs]
        commit |= {
            "num_kept": len(there),
            "missing": [first + number for first in lacks for number in range(spec.each)],
            "rejects": [r for r in made.rejects if r["key"] not in lost],
            "captions_sha256": schema.captions_sha256(told) if self._members("captions") else None,
            "shown": {sample.key: sample.caption for sample in made.samples.in_order()},
        }
        if self._only(Writer):
            name = spec.path.replace("shards/", "captions/").replace(".tar", ".parquet")
            said = [answer for row in theirs for answer in row.get("said", ())]
            write_table(self._dataset / name, pa.Table.from_pylist(said, ANSWER_SCHEMA))
        return commit


def prepare_layer(
    config: LayerConfig, dry_run: bool = False, restart: bool = False
) -> dict[str, float]:
    """The whole layer, doing only what is not done yet; returns seconds by stage. Raises InputError."""
    spent = dict[str, float]()
    with stage(spent, "list", "reading the base and checking the encoders"):
        base, manifest = open_base(config)
        above = {"output": config.output, "ray": config.ray}
        of_base = parse_config(PrepareConfig, manifest.prepare_config | above, config.base)
        config = config.model_copy(update={"encode": config.encode or of_base.encode})
        decided: dict[str, Any] = decisive(config) | {"base": manifest.id}
        table = config.captions if config.captions and config.captions.table else None
        sha256 = table_sha256(table) if table else ""
        specs = base_shards(base, manifest)
    pictures = sum(spec.num_planned for spec in specs)
    console.print(f"{config.base}: {len(specs):,} shards, {pictures:,} pictures to encode for")
    if dry_run:
        captions = (c for spec in specs for c in _planned(base, spec)["captions"].to_pylist())
        print_layer_plan(config, decided["hashes"], captions)
        return {}
    with lock_output(config) as lock, full_disk_is_said(f"output: {config.output}"):
        newest = max(spec.generation for spec in specs)
        dataset = _open_layer(config, decided, sha256, newest, restart)
        tidy(dataset)
        todo = _to_do(dataset, config, specs)
        if not todo and _reaches(dataset, manifest):
            console.print(f"{dataset} is complete; nothing to do.")
            return spent
        with stage(spent, "start Ray", "starting Ray"):
            connect(config.ray)
        for number in todo:
            if table:
                with stage(spent, "captions", "sorting the captions"):
                    keys = ((s.generation == number, _planned(base, s)["key"]) for s in specs)
                    sort_captions(table, work_of(dataset, number), keys)
            if config.vision_encoder or (config.captions and config.captions.captioner):
                with stage(spent, "scan"):
                    _stage(of_base, base, dataset, number, lock.check)
        settings = EncoderSettings(config, dataset, lock.check, base, of_base)
        commits, encoders = encode(LayerEncoder, settings, specs, spent)
        lock.check()
        with stage(spent, "finalise", "writing tables and report"):
            _finalise(settings, manifest, commits, encoders)
        for number in todo:
            delete(work_of(dataset, number) / STAGED)
        tidy(dataset)
        print_result(dataset, schema.read_manifest(dataset), spent)
    return spent


def open_base(config: LayerConfig) -> tuple[Path, schema.Manifest]:
    """The base and its manifest; raises InputError where it is none, or not as far as a layer needs it."""
    base = open_root(config.base, "base")
    try:
        manifest = schema.read_manifest(base)
    except InputError as error:
        raise InputError(f"base: {error}") from None
    if manifest.base is not None:
        raise InputError(
            f"base: {config.base} is itself a layer, over {manifest.base.path}. Remedy: base={manifest.base.path}; "
            "its captions come by captions.table."
        )
    if f"{open_root(config.output, 'output')}/".startswith(f"{base}/"):
        raise InputError(f"output: {config.output} lies in its base. Remedy: a folder beside it.")
    if not (base / schema.WORK / "shard_list.parquet").is_file():
        raise InputError(
            f"base: {config.base} has no work/, from which keys and pictures' addresses are read. Remedy: copy "
            f"{config.base}/work too."
        )
    if not any(generation.complete for generation in manifest.generations):
        made, planned = len(schema.read_shard_table(base)), len(shard_list(base / schema.WORK))
        raise InputError(
            f"base: {config.base} is still being prepared ({made:,} of {planned:,} shards of its first generation). "
            "Remedy: finish it first: flowmill prepare with its config."
        )
    return base, manifest


def base_shards(base: Path, manifest: schema.Manifest) -> list[LayerSpec]:
    """The shards of the base's complete generations, in the order of its table."""
    shards, found = {}, list[LayerSpec]()
    for generation in _complete(manifest):
        work = work_of(base, generation.number)
        commits = {commit["path"]: commit for commit in sealed_commits(work) or ()}
        for number, spec in enumerate(shard_list(work)):
            shards[spec.path] = number, spec, commits.get(spec.path)
    for row in schema.read_shard_table(base).to_pylist():
        if row["path"] not in shards:
            continue
        number, spec, commit = shards[row["path"]]
        if commit is None or commit["sha256"] != row["sha256"]:
            raise InputError(
                f"base: {base}/{spec.path} is not what its commit says. Remedy: flowmill prepare with the base's config."
            )
        rejected = tuple((r["key"], r["reason"]) for r in commit["rejects"])
        out = sum(reason != "not_finite" for _, reason in rejected)
        about = asdict(spec) | {"num_planned": spec.num_planned - out, "rejected": rejected}
        each = manifest.samples_per_picture[spec.split]
        found.append(LayerSpec(**about, number=number, base_sha256=row["sha256"], each=each))
    return found


def _complete(manifest: schema.Manifest) -> list[schema.Generation]:
    return [generation for generation in manifest.generations if generation.complete]


def _planned(base: Path, spec: LayerSpec) -> pa.Table:
    """The pictures that the base has in a shard."""
    rows = read_planned(work_of(base, spec.generation), spec.number)
    lost = pa.array([key for key, _ in spec.rejected], pa.string())
    return rows.filter(~pc.field("key").isin(lost))


def _open_layer(
    config: LayerConfig, decided: dict[str, Any], table: str, newest: int, restart: bool
) -> Path:
    """The output folder, of these settings; raises InputError where it is of others.

    A table of captions may grow with its base: earlier generations keep what they took from it.
    """
    dataset = open_root(config.output, "output")
    path = dataset / schema.WORK / "config.json"
    for place in (path, *(dataset / name for name in OURS)) if restart else ():
        delete(place)
    begun = {"settings": decided, "tables": {}}
    begun = json.loads(path.read_text()) if path.exists() else begun
    refuse_other_settings(config.output, begun["settings"], decided)
    if begun["tables"].setdefault(str(newest), table) != table:
        raise InputError(
            f"captions.table: has changed since generation {newest} of {config.output} took its captions from it. "
            "Remedy: restore it, another output, or --restart to delete it and start anew."
        )
    if {*begun["tables"].values()} != {table}:
        console.print("captions.table has changed: earlier generations keep what they took from it")
    write_text(path, json.dumps(begun, indent=1))
    return dataset


def _to_do(dataset: Path, config: LayerConfig, specs: list[LayerSpec]) -> list[int]:
    """The generations with shards that are not committed; raises InputError where one is over another base's."""
    commits, todo = read_commits(dataset, [spec.path for spec in specs]), set[int]()
    for spec, commit in zip(specs, commits, strict=True):
        if commit is None:
            todo.add(spec.generation)
        elif commit["base_sha256"] != spec.base_sha256:
            raise InputError(
                f"output: {dataset}/{spec.path} was made over another shard of {config.base}, which was prepared "
                "again since. Remedy: another output, or --restart to delete it and start anew."
            )
    return sorted(todo)


def _reaches(dataset: Path, base: schema.Manifest) -> bool:
    """Whether a finished layer has all that the base has."""
    if not (dataset / schema.MANIFEST).is_file():
        return False
    reached = schema.read_manifest(dataset).base
    return reached is not None and reached.fingerprint == _complete(base)[-1].fingerprint


def _stage(
    of_base: PrepareConfig, base: Path, dataset: Path, number: int, check: Callable[[], None]
) -> None:
    """Lay down again the pictures of a generation that came to the base as bytes in tables; each has its hash."""
    work = work_of(base, number)
    staged = {n.split(".")[0] for n in find_files(work / "catalog") if n.endswith(PARTS[1])}
    if staged:
        listing = read_table(work / LISTING, LISTING_SCHEMA)
        scan(of_base, Intake(work_of(dataset, number), listing, []), check, staged)


def _finalise(
    settings: EncoderSettings,
    base: schema.Manifest,
    commits: list[dict[str, Any]],
    encoders: Encoders,
) -> None:
    """Tables, the empty caption, contact sheet, report, and last the manifest."""
    dataset = settings.dataset
    write_tables(dataset, commits, encoders)
    mine = [reject for commit in commits for reject in commit["rejects"]]
    rejects = pa.Table.from_pylist(mine, schema=schema.REJECT_SCHEMA)
    work = work_of(dataset, max(commit["generation"] for commit in commits))
    if (work / STRAYS).is_file():
        strays = read_table(work / STRAYS, schema.REJECT_SCHEMA)
        rejects = pa.concat_tables([strays, rejects])
    write_table(dataset / schema.REJECTS, rejects)
    if not any(commit["num_kept"] for commit in commits):
        raise InputError(f"{dataset}: every picture was rejected; see {schema.REJECTS}")
    counts = _counts(commits, count_rejects(rejects)[0])
    manifest = _manifest(settings, base, commits, encoders).model_copy(update={"counts": counts})
    shown = shown_pictures(settings.base, commits, lambda n: commits[n]["shown"])
    if shown:
        write_sheet(dataset, shown)
    some = (rejects.filter(pc.field("reason") == reason) for reason in counts.rejected)
    examples = [row for rows in some for row in rows.slice(0, EXAMPLES).to_pylist()]
    write_text(dataset / schema.REPORT, html_report(manifest, commits, shown, examples))
    write_manifest(dataset, manifest)


def _counts(commits: list[dict[str, Any]], rejected: Counter[str]) -> schema.Counts:
    kept, roles = sum(c["num_kept"] for c in commits), commits[0]["cut_captions"] if commits else ()
    return counts_of(commits, kept, rejected, roles)


def _manifest(
    settings: EncoderSettings,
    base: schema.Manifest,
    commits: list[dict[str, Any]],
    encoders: Encoders,
) -> schema.Manifest:
    """That of the layer, its generations those of the base as far as they are complete."""
    columns = ("path", "num_samples", "sha256", "index_sha256", "captions_sha256", "base_sha256")
    begun = json.loads((settings.dataset / schema.WORK / "config.json").read_text())
    decided, generations, previous = begun["settings"], list[schema.Generation](), ""
    for below in _complete(base):
        mine = [commit for commit in commits if commit["generation"] == below.number]
        counts = _counts(mine, Counter(r["reason"] for commit in mine for r in commit["rejects"]))
        link: dict[str, Any] = {
            "previous": previous,
            "settings_sha256": schema.fingerprint(decided),
            "base_fingerprint": below.fingerprint,
            "counts": counts.model_dump(mode="json"),
            "shards": [[*(c[name] for name in columns), c["missing"]] for c in mine],
        }
        previous = schema.fingerprint(link)
        update = {"counts": counts, "psnr_db": None, "fingerprint": previous}
        generations.append(below.model_copy(update=update | {"num_shards": len(mine)}))
    reached, first = _complete(base)[-1].fingerprint, next(iter(begun["tables"].values()))
    own = {
        "id": schema.fingerprint({"settings": decided, "table": first})[:32],
        "codec": base.codec,
        "members": encoders.members,
        "captioner": decided["hashes"].get("captions.captioner", {}),
        "buckets": [
            schema.BucketRecord(height=h, width=w, num_samples=n)
            for (h, w), n in sorted(bucket_samples(training_rows(commits)).items())
        ],
        "generations": generations,
        "base": schema.BaseRecord(path=str(settings.base), id=base.id, fingerprint=reached),
        "prepare_config": settings.config.model_dump(mode="json", exclude=INDECISIVE),
    }
    record = encoders.record | {"text": with_errors(encoders.record["text"], commits)}
    return schema.Manifest.model_validate(base.model_dump() | record | own)
