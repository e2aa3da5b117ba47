"""Every kind of damage to a dataset is found, and named."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from data_prep.audit import verify
from data_prep.schema import (
    EMPTY_CAPTION,
    MANIFEST,
    REJECT_SCHEMA,
    REJECTS,
    SHARD_SCHEMA,
    SHARD_TABLE,
    Counts,
    captions_sha256,
    index_path,
    proof_path,
    read_manifest,
)
from data_prep.schema.proof import ProofSample, ProofSamples, make_proof
from data_prep.shards import ShardWriter, write_table, write_text
from data_prep.verify import main
from models.command import run_command
from models.config import InputError
from models.files import file_sha256
from tests.shard_factory import Kind, make_manifest

KIND = Kind({"clip": (8, 16)}, channels=4)
FIRST, SECOND, OTHER = (
    "shards/32x32/train-000000.tar",
    "shards/32x32/train-000001.tar",
    "shards/48x24/train-000000.tar",
)


def arrays(i: int, height: int, width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(i)
    return {
        "moments": rng.normal(size=(8, height // 8, width // 8)).astype(np.float16),
        "clip": rng.normal(size=(1 + i % 4, 16)).astype(np.float16),
        "clip_pooled": rng.normal(size=16).astype(np.float16),
        "micro": rng.normal(size=4).astype(np.float32),
    }


def write_shard(dataset: Path, path: str, keys: range, spoil=None, forge=None) -> dict:
    """A shard whose samples' arrays `spoil` may change, and its proof's `forge`; its row of the table."""
    height, width = map(int, path.split("/")[1].split("x"))
    writer = ShardWriter(dataset, path, list(KIND.members()))
    samples = ProofSamples(count=2)
    for i in keys:
        sample, key = arrays(i, height, width), f"{i:020x}"
        if spoil:
            spoil(i, sample)
        writer.add(key, sample, {"caption": "x"})
        shown = ProofSample(key, "x", np.zeros((height, width, 3), np.uint8), sample)
        samples.add(forge(shown) if forge else shown)
    shown = samples.in_order()
    proof, _ = make_proof(shown, [s.pixels for s in shown], ["clip", "clip_pooled"])
    captions = captions_sha256([(f"{i:020x}", ["x"]) for i in keys])
    place = {"path": path, "generation": 0, "split": "train", "height": height, "width": width}
    return place | {"captions_sha256": captions, **writer.commit(proof)}


def write_manifest(dataset: Path, rows: list[dict], **changes) -> None:
    """Tables and manifest that fit the rows."""
    write_table(dataset / SHARD_TABLE, pa.Table.from_pylist(rows, schema=SHARD_SCHEMA))
    reject = {"key": "0", "source": "s", "name": "x", "reason": "undecodable", "detail": ""}
    write_table(dataset / REJECTS, pa.Table.from_pylist([reject], schema=REJECT_SCHEMA))
    empty = {"clip": np.zeros((2, 16), np.float16), "clip_pooled": np.zeros(16, np.float16)}
    save_file(empty, dataset / EMPTY_CAPTION)
    seal(dataset, rows, **changes)


def seal(dataset: Path, rows: list[dict], **changes) -> None:
    kept = sum(row["num_samples"] for row in rows)
    plan = [(row["split"], (row["height"], row["width"]), row["num_samples"]) for row in rows]
    counts = Counts(seen=kept + 1, kept=kept, rejected={"undecodable": 1})
    files = {n: file_sha256(dataset / n) for n in (SHARD_TABLE, REJECTS, EMPTY_CAPTION)}
    changes = {"counts": counts, "files": files} | changes
    manifest = make_manifest(KIND, plan, {}).model_copy(update=changes)
    write_text(dataset / MANIFEST, manifest.with_fingerprint().model_dump_json())


def shard_rows(dataset: Path) -> list[dict]:
    return [
        write_shard(dataset, FIRST, range(5)),
        write_shard(dataset, SECOND, range(5, 9)),
        write_shard(dataset, OTHER, range(100, 103)),
    ]


@pytest.fixture
def dataset(tmp_path) -> Path:
    write_manifest(tmp_path, shard_rows(tmp_path))
    return tmp_path


def test_a_key_that_two_generations_have_is_found(dataset):
    again = write_shard(dataset, FIRST.replace("train", "g0001-train"), range(4, 5))
    rows = [*shard_rows(dataset), again | {"generation": 1}]
    (first,) = read_manifest(dataset).generations
    counts = first.counts.model_copy(update={"kept": 1})
    later = first.model_copy(update={"number": 1, "num_shards": 1, "counts": counts})
    write_manifest(dataset, rows, generations=[first, later])
    assert only_problem(dataset) == f"a key that ends in {4:016x} is in two shards"
    write_manifest(dataset, rows, generations=[first, later.model_copy(update={"num_shards": 2})])
    assert any("generations: says" in problem for problem in verify(dataset))


def only_problem(dataset: Path) -> str:
    (problem,) = verify(dataset)
    return problem


def test_a_sound_dataset_has_no_problems_with_one_worker_or_several(dataset):
    assert verify(dataset) == []
    assert verify(dataset, workers=2) == []


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def reseal(dataset: Path, rows: list[dict] | None = None, **changes) -> None:
    """Change the first shard's row, and make tables and manifest that fit."""
    rows = rows or pq.read_table(dataset / SHARD_TABLE).to_pylist()
    rows[0] |= changes
    write_manifest(dataset, rows)


def point_elsewhere(dataset: Path) -> None:
    path = dataset / index_path(FIRST)
    index = np.load(path)
    index[3, 1, 0] += 2
    np.save(path, index)
    reseal(dataset, index_sha256=file_sha256(path))


def repeat_a_sample(dataset: Path) -> None:
    rows = shard_rows(dataset)
    rows[1] = write_shard(dataset, SECOND, range(4, 9))
    reseal(dataset, rows)


def narrow_the_empty_caption(dataset: Path) -> None:
    wide = {"clip": np.zeros((2, 8), np.float16), "clip_pooled": np.zeros(16, np.float16)}
    save_file(wide, dataset / EMPTY_CAPTION)
    seal(dataset, pq.read_table(dataset / SHARD_TABLE).to_pylist())


def edit_the_manifest(dataset: Path) -> None:
    path = dataset / MANIFEST
    path.write_text(path.read_text().replace('"channels":4', '"channels":8'))


STRAY = "shards/32x32/train-000009.tar"
NOT_THE_TABLES = "is not what the table says (sha256)"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "begin": (lambda d: flip(d / SECOND, 600), f"{SECOND}: train-000001.tar {NOT_THE_TABLES}"),
    "end": (lambda d: flip(d / SECOND, -1), f"{SECOND}: train-000001.tar {NOT_THE_TABLES}"),
    "index": (lambda d: flip(d / index_path(SECOND), -8), f"train-000001.idx.npy {NOT_THE_TABLES}"),
    "tar lost": (lambda d: (d / FIRST).unlink(), f"{FIRST}: train-000000.tar is missing"),
    "index lost": (
        lambda d: (d / index_path(SECOND)).unlink(),
        f"{SECOND}: train-000001.idx.npy is missing",
    ),
    "emptied": (lambda d: os.truncate(d / OTHER, 0), f"{OTHER}: has 0 bytes, expected "),
    "cut": (lambda d: os.truncate(d / OTHER, 10_000), f"{OTHER}: has 10000 bytes, expected "),
    "edited": (edit_the_manifest, "was edited: its fingerprint does not match its content"),
    "offset": (point_elsewhere, f"{FIRST}: {3:020x}.clip.npy: index says"),
    "count": (lambda d: reseal(d, num_samples=6), f"{FIRST}: index (5, 4, 2), expected 6 samples"),
    "twice": (repeat_a_sample, f"a key that ends in {4:016x} is in two shards"),
    "stray": (lambda d: shutil.copy(d / FIRST, d / STRAY), f"{STRAY}: not in {SHARD_TABLE}"),
    "empty caption": (narrow_the_empty_caption, f"{EMPTY_CAPTION}: clip is not (L, 16)"),
}


@pytest.mark.parametrize(("harm", "message"), DAMAGE.values(), ids=DAMAGE)
def test_any_damage_is_found_and_its_file_named(dataset, harm, message):
    harm(dataset)
    assert message in only_problem(dataset)


def test_a_shard_cut_at_any_block_is_found_even_where_the_table_agrees_with_the_cut(dataset):
    whole = (dataset / OTHER).read_bytes()
    rows = shard_rows(dataset)
    end = len(whole.rstrip(b"\0"))
    for cut in range(0, end, 512):
        (dataset / OTHER).write_bytes(whole[:cut])
        rows[2] |= {"bytes": cut, "sha256": file_sha256(dataset / OTHER)}
        write_manifest(dataset, rows)
        assert only_problem(dataset).startswith(OTHER), cut


@pytest.mark.parametrize("name", [SHARD_TABLE, REJECTS, EMPTY_CAPTION])
def test_a_table_exchanged_or_lost_is_named(dataset, name):
    if name == EMPTY_CAPTION:
        save_file({k: v + 1 for k, v in load_file(dataset / name).items()}, dataset / name)
    else:
        table = pq.read_table(dataset / name)
        write_table(dataset / name, table.slice(0, len(table) - 1))
    assert f"{name}: is not what the manifest says (sha256)" in verify(dataset)
    (dataset / name).unlink()
    assert f"{name}: missing" in verify(dataset)


def spoilt(value: float):
    def spoil(array: np.ndarray) -> np.ndarray:
        array.flat[-1] = value
        return array

    return spoil


@pytest.mark.parametrize(
    ("member", "change", "problem"),
    [
        *((member, spoilt(np.nan), "holds NaN or infinity") for member in KIND.members()),
        ("moments", spoilt(np.inf), "holds NaN or infinity"),
        ("moments", lambda a: a.astype(np.float32), "got"),
        ("moments", lambda a: a[:4], "got"),
        ("moments", lambda a: a[:, :2], "got"),
        ("clip", lambda a: a[:, :8], "got"),
        ("micro", lambda a: a[None], "got"),
    ],
)
def test_a_nan_a_wrong_shape_or_a_wrong_type_is_found(tmp_path, member, change, problem):
    def spoil(i, sample):
        if i == 2:
            sample[member] = change(sample[member])

    write_manifest(tmp_path, [write_shard(tmp_path, FIRST, range(5), spoil)])
    assert f"{FIRST}: {2:020x}.{member}.npy: {problem}" in only_problem(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": "y"}, ".json: its caption is not the one that the proof was made of"),
        ({"clip": 1}, ".clip.npy: is not what the proof was made of"),
        ({"clip_pooled": 1}, ".clip_pooled.npy: is not what the proof was made of"),
        ({"key": "f" * 20}, f"its proof shows {'f' * 20}, which it does not hold"),
    ],
)
def test_a_shard_that_is_not_the_one_its_proof_was_made_of_is_found(tmp_path, changes, message):
    """All hashes fit: text encoded again, or moved to other pictures, would look so."""

    def forge(sample: ProofSample) -> ProofSample:
        moved = {n: np.roll(a, 1, axis=0) if n in changes else a for n, a in sample.arrays.items()}
        fields = {name: value for name, value in changes.items() if name in ("caption", "key")}
        return replace(sample, arrays=moved, **fields)

    write_manifest(tmp_path, [write_shard(tmp_path, FIRST, range(3, 5), forge=forge)])
    assert message in only_problem(tmp_path)


def test_a_changed_proof_or_other_captions_than_the_tables_are_found(dataset):
    flip(dataset / proof_path(FIRST), -1)
    rows = pq.read_table(dataset / SHARD_TABLE).to_pylist()
    rows[1]["captions_sha256"] = "x"
    write_manifest(dataset, rows)
    proof, captions = verify(dataset)
    assert proof == f"{FIRST}: train-000000.proof.safetensors {NOT_THE_TABLES}"
    assert captions == f"{SECOND}: its captions are not those that the table says (sha256)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": Counts(seen=13, kept=11, rejected={"undecodable": 1})}, "kept: says 11, the"),
        ({"counts": Counts(seen=14, kept=12, rejected={"undecodable": 1})}, "seen: says 14, the"),
        ({"counts": Counts(seen=13, kept=12, rejected={"x": 1})}, "rejected: says {'x': 1}"),
        ({"buckets": []}, "buckets: says {}"),
    ],
)
def test_a_wrong_count_is_found(dataset, changes, message):
    seal(dataset, pq.read_table(dataset / SHARD_TABLE).to_pylist(), **changes)
    assert any(message in problem for problem in verify(dataset))


def test_the_command_ends_with_status_one_and_names(dataset, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["verify", str(dataset), "--workers", "1"])
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert not caught.value.code
    (dataset / FIRST).unlink()
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 1
    assert f"wrong {FIRST}: train-000000.tar is missing" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["nothing", "unfinished"])
def test_where_there_is_no_dataset_the_command_says_what_there_is(tmp_path, state):
    if state == "unfinished":
        (tmp_path / "work").mkdir()
    message = {"nothing": "holds no dataset", "unfinished": "a preparation that has not finished"}
    with pytest.raises(InputError, match=message[state]):
        verify(tmp_path)
