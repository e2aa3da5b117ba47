"""Audit of a prepared dataset: every hash, index, count, shape, and NaN; on request what a few pictures decode to."""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.progress import track
from safetensors import SafetensorError
from safetensors.numpy import load

from data_prep import schema
from data_prep.encoders import Text
from data_prep.report import bucket_samples, console, training_rows, warn
from data_prep.schema import EMPTY_CAPTION, MANIFEST, REJECTS, SHARD_TABLE, Manifest, RoleRecord
from data_prep.schema.drift import drift
from data_prep.schema.proof import caption_hash, project, proof_keys, read_proof
from data_prep.shards import read_table
from data_prep.sources.source import count_rejects
from data_prep.storage import find_files, local_copy, open_root
from models.config import InputError
from models.files import file_sha256

KEY = re.compile(r"[0-9a-f]{20}")
# By name: a picture's arrays, or what a proof says of it; and where its arrays lie, offset and bytes.
Arrays = dict[str, np.ndarray]
Places = dict[str, tuple[int, int]]
# What is wrong with a shard, "" if nothing, and the last 16 digits of each of its keys, uint64 (n,).
Audit = tuple[str, np.ndarray]


class Wrong(Exception):
    """What is wrong with a shard, and where."""


def verify(dataset: Path, workers: int = 1) -> list[str]:
    """Everything that is wrong, one line each; raises InputError where there is no dataset to look at."""
    try:
        manifest = schema.read_manifest(dataset)
    except InputError as error:
        if not (dataset / MANIFEST).is_file():
            raise
        return [str(error)]
    problems = [
        f"{name}: {'missing' if not path.is_file() else 'is not what the manifest says (sha256)'}"
        for name, sha256 in manifest.files.items()
        if not (path := dataset / name).is_file() or file_sha256(path) != sha256
    ]
    try:
        rows = schema.read_shard_table(dataset).to_pylist()
        rejects = read_table(dataset / REJECTS, schema.REJECT_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        return [*problems, f"{SHARD_TABLE} or {REJECTS}: {error}"]
    answers = list(_audit_all(dataset, manifest, rows, workers))
    problems += [f"{row['path']}: {w}" for row, (w, _) in zip(rows, answers, strict=True) if w]
    ends = np.sort(np.concatenate([np.zeros(0, "u8"), *(ends for _, ends in answers)]))
    twice = ends[1:][ends[1:] == ends[:-1]].tolist()
    problems += [f"a key that ends in {end:016x} is in two shards" for end in twice]
    problems += _count_problems(manifest, rows, rejects)
    if manifest.base:
        problems += _base_problems(dataset, manifest.base, rows)
    problems += _strangers(dataset, rows)
    if manifest.text.roles:
        problems += _empty_caption_problems(dataset / EMPTY_CAPTION, manifest)
    if doubt := manifest.latent_doubt():
        warn(f"{dataset}: {doubt}")
    samples = sum(row["num_samples"] for row in rows)
    console.print(
        f"{dataset}: {len(rows)} shards, {samples} samples, {len(rejects)} rejects audited: "
        f"{f'{len(problems)} wrong' if problems else 'all is as the manifest says'}."
    )
    return problems


def drifted(
    dataset: Path, decode: int, encode: int, vae: str | None, text: dict[str, str]
) -> list[str]:
    """The shards whose latents or text are not what their codec or encoders give; `vae` and `text` as in a run.

    Raises InputError where an encoder is not the one that prepared them.
    """
    import torch

    from data_prep.schema.recorded import open_codec, open_texts

    manifest = schema.read_manifest(dataset)
    if decode and manifest.base:
        raise InputError(
            f"--decode: {dataset} is a layer, whose base has the latents. Remedy: --encode."
        )
    roles = manifest.text.roles
    if strange := [name for name, folder in text.items() if name not in roles or not folder]:
        raise InputError(f"--text: got {strange[0]}, expected NAME=FOLDER of {', '.join(roles)}")
    rows = schema.read_shard_table(dataset).to_pylist()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec = open_codec(manifest.codec, vae, device) if decode else None
    encoders = open_texts(roles, text, device) if encode else {}
    pictures, texts = codec and codec.picture, partial(encode_caption, roles, encoders)
    problems = []
    for row in track(rows, "compare", console=console, transient=True):
        proof = read_proof(dataset, row["path"])
        with local_copy(str(dataset / row["path"])) as tar, Path(tar).open("rb") as file:
            wrong = drift(file, proof, decode, pictures, encode, texts)
        if wrong:
            problems.append(f"{row['path']}: {wrong}")
    console.print(
        f"{dataset}: {len(rows)} shards, up to {decode} pictures decoded and {encode} captions encoded of "
        f"each: {f'{len(problems)} differ' if problems else 'all as when made'}."
    )
    return problems


def encode_caption(
    roles: dict[str, RoleRecord], texts: dict[str, Any], caption: str
) -> dict[str, np.ndarray]:
    """What a dataset stores of a caption, by member."""
    found: dict[str, np.ndarray] = {}
    for name, encoder in texts.items():
        arrays = Text(encoder, name, roles[name].store).encode([caption])
        found |= {member: values[0] for member, values in arrays.items() if "." not in member}
    return found


def _audit_all(
    dataset: Path, manifest: Manifest, rows: list[dict[str, Any]], workers: int
) -> Iterator[Audit]:
    audit = partial(audit_shard, dataset, manifest)
    if workers == 1 or len(rows) < 2 * workers:
        yield from map(audit, rows)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        answers = pool.map(audit, rows)
        yield from track(answers, "verify", len(rows), console=console, transient=True)


def audit_shard(dataset: Path, manifest: Manifest, row: dict[str, Any]) -> Audit:
    """A shard's own files beside its row of the table and the manifest."""
    paths = (row["path"], schema.index_path(row["path"]), schema.proof_path(row["path"]))
    tar, index, proof = (dataset / path for path in paths)
    try:
        for path in (tar, index, proof):
            if not path.is_file():
                raise Wrong(f"{path.name} is missing")
        if tar.stat().st_size != row["bytes"]:
            raise Wrong(f"has {tar.stat().st_size} bytes, expected {row['bytes']}")
        with local_copy(str(tar)) as shard, local_copy(str(index)) as places:
            hashed = ((tar, Path(shard), "sha256"), (index, Path(places), "index_sha256"))
            for path, local, column in (*hashed, (proof, proof, "proof_sha256")):
                if file_sha256(local) != row[column]:
                    raise Wrong(f"{path.name} is not what the table says (sha256)")
            said = read_proof(dataset, row["path"])
            proved = {
                key: {name: values[i] for name, values in said.items()}
                for i, key in enumerate(proof_keys(said))
            }
            found = schema.read_index(Path(places))
            keys = _audit_samples(Path(shard), found, manifest, row, proved)
    except Wrong as wrong:
        return str(wrong), np.zeros(0, "u8")
    except (OSError, ValueError, tarfile.TarError) as error:
        return f"{type(error).__name__}: {error}", np.zeros(0, "u8")
    return "", np.array([int(key[-16:], 16) for key in keys], "u8")


def _audit_samples(
    path: Path, index: np.ndarray, manifest: Manifest, row: dict[str, Any], proof: dict[str, Arrays]
) -> list[str]:
    """The keys in order; raises Wrong at the first member that is not as it should be."""
    members, each = list(manifest.members), manifest.samples_per_picture[row["split"]]
    if index.shape[:2] != (row["num_samples"], len(members)):
        raise Wrong(f"index {index.shape}, expected {row['num_samples']} samples, {len(members)}")
    missing = row["missing"] or []
    if (empty := np.flatnonzero((index == 0).all(axis=(1, 2))).tolist()) != missing:
        raise Wrong(f"its index has nothing in rows {empty}, the table says {missing}")
    index = np.delete(index, missing, axis=0)
    captions = list[tuple[str, list[str]]]()
    with path.open("rb") as tar:
        for key, places, arrays, facts in schema.read_pictures(tar):
            if not KEY.fullmatch(key) or (captions and key <= captions[-1][0]):
                raise Wrong(f"key {key} is none, out of order or there twice")
            if not isinstance(facts.get("caption"), str):
                raise Wrong(f"{key}.json: no caption")
            for name, array in arrays.items():
                if problem := _problem_of(array, name.split(".")[0], manifest, row):
                    raise Wrong(f"{key}.{name}.npy: {problem}")
            begin = len(captions) * each
            _audit_index(index[begin : begin + each], key, places, members)
            if key in proof:
                _audit_proof(key, arrays, manifest, facts["caption"], proof.pop(key))
            captions.append((key, facts.get("captions", [facts["caption"]])))
    if len(captions) * each != len(index):
        raise Wrong(f"ends after {len(captions)} pictures, expected {len(index) // each}")
    if proof:
        raise Wrong(f"its proof shows {min(proof)}, which it does not hold")
    # What is said of a picture that a layer rejected is not in its tar.
    told = captions if manifest.text.roles or not manifest.base else []
    if not missing and schema.captions_sha256(told) != row["captions_sha256"]:
        raise Wrong("its captions are not those that the table says (sha256)")
    return [key for key, _ in captions]


def _audit_proof(key: str, arrays: Arrays, manifest: Manifest, caption: str, proved: Arrays):
    """Stored text and caption are those that the proof was made of; raises Wrong."""
    if not np.array_equal(proved["caption_sha256"], caption_hash(caption)):
        raise Wrong(f"{key}.json: its caption is not the one that the proof was made of")
    for member in manifest.text_members():
        if not np.array_equal(project(arrays[member]), proved[f"{member}.projection"]):
            raise Wrong(f"{key}.{member}.npy: is not what the proof was made of")


def _audit_index(rows: np.ndarray, key: str, places: Places, members: list[str]) -> None:
    """The samples of a picture lead to its arrays, each to one of every member, and none is left out."""
    found = {place: name for name, place in places.items()}
    used = set[str]()
    for row in rows.tolist():
        for member, place in zip(members, map(tuple, row), strict=True):
            name = found.get(place, "")
            if name.split(".")[0] != member:
                raise Wrong(f"{key}.{member}.npy: index says {place}, the tar {places.get(member)}")
            used.add(name)
    if unused := sorted(places.keys() - used):
        raise Wrong(f"{key}.{unused[0]}: the index leads nowhere to it")


def _problem_of(array: np.ndarray, member: str, manifest: Manifest, row: dict[str, Any]) -> str:
    """Why an array is not one of the member's; "" if it is."""
    if member not in manifest.members:
        return f"is none of {', '.join(manifest.members)}"
    expected = manifest.shape_in_bucket(member, row["height"], row["width"])
    fits = array.ndim == len(expected) and all(
        e in (None, s) for s, e in zip(array.shape, expected, strict=True)
    )
    wanted = manifest.members[member].stored
    if array.dtype != np.dtype(wanted) or not array.flags.c_contiguous or not fits:
        return f"got {array.dtype} {array.shape}, expected {wanted} {expected}"
    return "" if finite(array) else "holds NaN or infinity"


def _count_problems(manifest: Manifest, rows: list[dict[str, Any]], rejects: pa.Table) -> list[str]:
    counts = manifest.counts
    shards, kept = Counter(row["generation"] for row in rows), Counter[int]()
    for row in rows:
        each = manifest.samples_per_picture[row["split"]]
        kept[row["generation"]] += bucket_samples([row]).total() // each
    generations = {g.number: (g.num_shards, g.counts.kept) for g in manifest.generations}
    rejected, others = count_rejects(rejects)
    said = {(bucket.height, bucket.width): bucket.num_samples for bucket in manifest.buckets}
    checks = {
        "kept": (counts.kept, kept.total()),
        "generations": (generations, {n: (shards[n], kept[n]) for n in generations | shards}),
        "rejected": (counts.rejected, dict(rejected)),
        "seen": (counts.seen, counts.kept + rejected.total()),
        "other_files": (counts.other_files or {}, dict(others)),
        "buckets": (said, dict(bucket_samples(training_rows(rows)))),
    }
    return [
        f"{MANIFEST}: {name}: says {said}, the files hold {found}"
        for name, (said, found) in checks.items()
        if said != found
    ]


def _base_problems(
    dataset: Path, record: schema.BaseRecord, rows: list[dict[str, Any]]
) -> list[str]:
    """Shards of a layer that are not of the base's as they are now, or not of its pictures row by row."""
    try:
        base = open_root(record.path, "base")
        below = {row["path"]: row for row in schema.read_shard_table(base).to_pylist()}
        each, problems = schema.read_manifest(base).samples_per_picture, list[str]()
        for row in rows:
            path = row["path"]
            if path not in below or below[path]["sha256"] != row["base_sha256"]:
                problems.append(f"{path}: was made for another shard of {record.path}")
                continue
            keys, found, step = _keys_of(base / path), _keys_of(dataset / path), each[row["split"]]
            gone = {number // step for number in row["missing"] or ()}
            expected = [key for number, key in enumerate(keys) if number not in gone]
            if found != expected or len(keys) * step != row["num_samples"]:
                at = next((k for k, e in zip(found, expected) if k != e), f"{len(found)} pictures")  # noqa: B905
                problems.append(f"{path}: its pictures are not the base's, row by row: {at}")
    except (InputError, OSError, tarfile.TarError) as error:
        return [f"base: {record.path}: {error}"]
    return problems


def _keys_of(shard: Path) -> list[str]:
    """The keys of a shard's pictures in their order."""
    with local_copy(str(shard)) as path, tarfile.open(path, "r:") as tar:
        return [name.split(".")[0] for name in tar.getnames() if name.endswith(".json")]


def _strangers(dataset: Path, rows: list[dict[str, Any]]) -> list[str]:
    beside = (str, schema.index_path, schema.proof_path)
    known = {path_of(row["path"]) for row in rows for path_of in beside}
    names = sorted(f"shards/{name}" for name in find_files(dataset / "shards"))
    return [f"{name}: not in {SHARD_TABLE}" for name in names if name not in known]


def _empty_caption_problems(path: Path, manifest: Manifest) -> list[str]:
    try:
        arrays = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        return [f"{EMPTY_CAPTION}: {error}"]
    problems = []
    for name in manifest.text_members():
        shape, found = manifest.members[name].shape, arrays.get(name)
        if name in manifest.text.roles:
            # It is not in int8.
            shape = None, manifest.text.roles[name].dim
        said = tuple("L" if side is None else str(side) for side in shape)
        if found is None or found.ndim != len(shape) or found.shape[-1] != shape[-1]:
            problems.append(f"{EMPTY_CAPTION}: {name} is not ({', '.join(said)})")
        elif not finite(found):
            problems.append(f"{EMPTY_CAPTION}: {name} holds NaN or infinity")
    return problems


def finite(values: np.ndarray) -> bool:
    """Whether all are numbers; uint16 holds the bits of bfloat16, whose exponent is then all ones."""
    if values.dtype == np.uint16:
        return bool(((values & 0x7F80) != 0x7F80).all())
    # A token in int8 ends with its scale.
    values = values[..., -2:].copy().view(np.float16) if values.dtype == np.int8 else values
    return bool(np.isfinite(values).all())
