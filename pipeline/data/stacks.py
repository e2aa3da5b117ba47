"""A base with its layers as one dataset: which folder each member is read from, and which rows all of them have."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa

from data_prep.schema import Manifest, RoleRecord, TextRecord, fingerprint, text_record
from models.config import InputError
from pipeline.data.cache import ShardCache
from pipeline.data.config import DatasetConfig
from pipeline.data.datasets import Dataset, check_members, compute, read_dataset

CacheOf = Callable[[str], ShardCache | None]


def open_dataset(name: str, source: DatasetConfig, cache_of: CacheOf = lambda _: None) -> Dataset:
    """A dataset of a run as it is now, layers and all; raises InputError where they are not one.

    `cache_of` gives the cache of a URL, None of a local folder.
    """
    first = read_dataset(name, source, cache_of(source.path))
    layers = {"path": first} if first.manifest.base else {}
    for label, path in source.layers.items():
        given = DatasetConfig(path=path)
        layers[f"layers.{label}"] = read_dataset(name, given, cache_of(path))
    if not layers:
        return first
    if record := first.manifest.base:
        given = DatasetConfig(path=record.path)
        try:
            first = read_dataset(name, given, cache_of(record.path))
        except (InputError, OSError) as error:
            raise InputError(
                f"{source.path}: its base {record.path} is no dataset. Remedy: data.path=NEWPLACE "
                f"data.layers.NAME={source.path} if it was moved. ({error})"
            ) from error
    source = source.model_copy(update={"path": first.source.path})
    return _stack(replace(first, source=source), layers)


def _stack(base: Dataset, layers: dict[str, Dataset]) -> Dataset:
    for label, layer in layers.items():
        _check_base(base, label, layer)
    reach = min(len(layer.manifest.generations) for layer in layers.values())
    folders = _joined(base, layers)
    owners, said = _visible(folders, ["path", *layers])
    manifest = _manifest([folder.manifest for folder in folders], owners, reach)
    check_members(manifest, base.home)
    table = _table([folders[number] for number in sorted({0, *owners.values()})])
    note, total = "", int(compute.sum(base.table["num_samples"]).as_py() or 0)
    left = int(compute.sum(folders[0].table["num_samples"]).as_py() or 0)
    if left < total:
        shortest = min(layers, key=lambda label: len(layers[label].table))
        note = (
            f"{base.source.path} has {len(base.manifest.generations)} generations, {shortest} has "
            f"{len(layers[shortest].manifest.generations)}: trained on {reach}, {left:,} of {total:,} samples. "
            "Run flowmill prepare with the layer's config for the rest."
        )
    manifest = _counted(manifest, table).with_fingerprint()
    shards = [table[name].to_pylist() for name in ("path", "sha256")]
    identity = fingerprint({"manifest": manifest.fingerprint, "shards": shards})
    return replace(
        base,
        manifest=manifest,
        table=table,
        identity=identity,
        parts=tuple(folders),
        owners=owners,
        captions_of=said,
        note=note,
    )


def _check_base(base: Dataset, label: str, layer: Dataset) -> None:
    """Raise InputError unless the layer was made over the base as it is, as far as it reaches."""
    where, record = f"{label}: {layer.source.path}", layer.manifest.base
    if record is None:
        raise InputError(
            f"{where} is no layer, but a dataset of its own. Remedy: give it as data.path, or mix it in as one of "
            "data.datasets."
        )
    if base.manifest.base is not None:
        raise InputError(
            f"{where}: its base got {base.source.path}, a layer. Remedy: the path of a dataset."
        )
    number = len(layer.manifest.generations) - 1
    found = [g.fingerprint for g in base.manifest.generations if g.complete][number : number + 1]
    got, expected = (found or ["none"])[0][:12], record.fingerprint[:12]
    if base.manifest.id != record.id:
        got, expected = f"id {base.manifest.id[:12]}", f"id {record.id[:12]}"
    if got != expected:
        raise InputError(
            f"{where} was made over another dataset: generation {number} of {base.source.path} got {got}, expected "
            f"{expected}. Remedy: the base that it was made over, or prepare the layer anew."
        )


def _joined(base: Dataset, layers: dict[str, Dataset]) -> list[Dataset]:
    """Base and layers with their tables cut to the shards that all of them have, in the base's order."""
    kept = base.table
    for layer in layers.values():
        kept = kept.filter(compute.is_in(kept["path"], value_set=layer.table["path"]))
    folders = [replace(base, table=kept.combine_chunks())]
    for layer in layers.values():
        rows = compute.index_in(kept["path"], value_set=layer.table["path"])
        table = layer.table.take(rows).combine_chunks()
        for name, of_base in (
            ("base_sha256", "sha256"),
            *((same, same) for same in ("num_samples", "split", "height", "width")),
        ):
            differs = compute.not_equal(table[name], kept[of_base]).fill_null(True)
            if at := compute.index(differs, True).as_py() + 1:
                path, got, want = (
                    t[at - 1].as_py() for t in (kept["path"], table[name], kept[of_base])
                )
                raise InputError(
                    f"{layer.source.path}/{path}: made for another shard of {base.source.path}: {name} got {want}, "
                    f"expected {got}. Remedy: prepare the layer anew."
                )
        folders.append(replace(layer, table=table))
    return folders


def _visible(folders: list[Dataset], labels: list[str]) -> tuple[dict[str, int], int]:
    """The folder that each member is read from, and the one whose captions its text is of.

    Text whose captions are not those below it hides all of that; raises InputError where it is of the base's
    captions, but no longer those of the text below.
    """
    owners = dict.fromkeys(folders[0].manifest.members, 0)
    first = now = folders[0].table["captions_sha256"].fill_null("")
    said = 0
    for number, folder in enumerate(folders[1:], start=1):
        if folder.manifest.text.roles:
            captions = folder.table["captions_sha256"].fill_null("")
            if not captions.equals(now):
                if captions.equals(first):
                    at = compute.index(compute.not_equal(captions, now), True).as_py()
                    raise InputError(
                        f"{labels[number]}: its captions are not those of {labels[said]} "
                        f"({folder.table['path'][at]}). Remedy: prepare {labels[number].removeprefix('layers.')} with "
                        f"the captions.table of {labels[said]}, or leave one out."
                    )
                texts = {n for f in folders[:number] for n in f.manifest.text_members()}
                owners = {name: owner for name, owner in owners.items() if name not in texts}
                now, said = captions, number
        owners |= dict.fromkeys(folder.manifest.members, number)
    return owners, said


def _manifest(folders: list[Manifest], owners: dict[str, int], reach: int) -> Manifest:
    """That of the stack, as if all its encoders had prepared it at once."""
    roles, records = dict[str, RoleRecord](), dict[int, TextRecord]()
    for member, number in owners.items():
        text, name = folders[number].text, member.removesuffix("_pooled")
        if name in text.roles:
            roles[name], records[number] = text.roles[name], text
    text = _text(roles, [records[n] for n in sorted(records)] or [folders[0].text])
    of_text = [n for name in roles for n in (name, f"{name}_pooled")]
    order = ["moments", *of_text, "vision", "micro", "label"]
    order += [name for name in owners if name not in order]
    generations = [
        same[0].model_copy(
            update={"fingerprint": fingerprint({"parts": [g.fingerprint for g in same]})}
        )
        for same in zip(*(folder.generations[:reach] for folder in folders), strict=True)
    ]
    return folders[0].model_copy(
        update={
            "id": fingerprint({"parts": [folder.id for folder in folders]})[:32],
            "text": text,
            "vision": next((f.vision for f in folders[::-1] if f.vision), None),
            "members": {n: folders[owners[n]].members[n] for n in order if n in owners},
            "generations": generations,
            "files": {},
        }
    )


def _text(roles: dict[str, RoleRecord], records: list[TextRecord]) -> TextRecord:
    """How a network reads the roles of all; raises InputError where they are of several conventions."""
    last = records[-1]
    if found := [r.convention for r in records if r.convention != last.convention]:
        raise InputError(
            f"data.layers: text conventions got {found[0]} and {last.convention}, expected one. Remedy: prepare the "
            f"layer with text: {found[0]}."
        )
    text = last if last.convention == "custom" else last.convention
    views = {name: role.view for name, role in roles.items()}
    fields = text_record(text, {}, views) if roles else dict(last)
    return TextRecord.model_validate(fields | {"roles": roles})


def _table(read: list[Dataset]) -> pa.Table:
    """The base's table, its rows those that all folders have: `missing` are the others of the base's."""
    table, lists = read[0].table, [folder.table["missing"].to_pylist() for folder in read]
    missing = [
        sorted(set().union(*(rows or () for rows in shard))) for shard in zip(*lists, strict=True)
    ]
    sizes = table["num_samples"].to_numpy() - np.array([len(rows) for rows in missing], np.int64)
    columns = [f.table[name] for f in read for name in ("sha256", "index_sha256")]
    sums = {
        "num_samples": pa.array(sizes, pa.int64()),
        "bytes": pa.array(sum(folder.table["bytes"].to_numpy() for folder in read), pa.int64()),
        "sha256": compute.binary_join_element_wise(*columns, "+"),
        "missing": pa.array(missing, pa.list_(pa.int32())),
    }
    for name, column in sums.items():
        table = table.set_column(
            table.schema.get_field_index(name), table.schema.field(name), column
        )
    return table.combine_chunks()


def _counted(manifest: Manifest, table: pa.Table) -> Manifest:
    """The manifest with the samples and pictures that are left."""
    train = compute.equal(table["split"], "train").to_numpy()
    sizes, height, width = (table[n].to_numpy() for n in ("num_samples", "height", "width"))
    buckets = list[object]()
    for bucket in manifest.buckets:
        mine = train & (height == bucket.height) & (width == bucket.width)
        buckets.append(bucket.model_copy(update={"num_samples": int(sizes[mine].sum())}))
    each = manifest.samples_per_picture
    kept = int(sizes[train].sum()) // each["train"] + int(sizes[~train].sum()) // each["heldout"]
    counts = manifest.counts.model_copy(update={"kept": kept})
    return manifest.model_copy(update={"buckets": buckets, "counts": counts})
