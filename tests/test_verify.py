"""Every kind of damage to a dataset is found, and named."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from data_prep.proof import ProofSample, ProofSamples, make_proof
from data_prep.schema import (
    EMPTY_CAPTION,
    MANIFEST,
    REJECT_SCHEMA,
    REJECTS,
    SHARD_SCHEMA,
    SHARD_TABLE,
    Counts,
    captions_sha256,
    proof_path,
)
from data_prep.shards import ShardWriter, write_table, write_text
from data_prep.verify import main, verify
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


def only_problem(dataset: Path) -> str:
    (problem,) = verify(dataset)
    return problem


def test_a_sound_dataset_has_no_problems_with_one_worker_or_several(dataset):
    assert verify(dataset) == []
    assert verify(dataset, workers=2) == []


@pytest.mark.parametrize("place", [600, 5_000, -1])
def test_a_flipped_bit_is_found_and_the_shard_named(dataset, place):
    data = bytearray((dataset / SECOND).read_bytes())
    data[place] ^= 1
    (dataset / SECOND).write_bytes(data)
    assert only_problem(dataset) == (
        f"{SECOND}: train-000001.tar is not what the table says (sha256)"
    )


def test_a_flipped_bit_in_an_index_is_found(dataset):
    index = dataset / SECOND.replace(".tar", ".idx.npy")
    data = bytearray(index.read_bytes())
    data[-8] ^= 1
    index.write_bytes(data)
    assert "train-000001.idx.npy is not what the table says" in only_problem(dataset)


def test_a_missing_shard_and_a_missing_index_are_named(dataset):
    (dataset / FIRST).unlink()
    (dataset / SECOND.replace(".tar", ".idx.npy")).unlink()
    assert verify(dataset) == [
        f"{FIRST}: train-000000.tar is missing",
        f"{SECOND}: train-000001.idx.npy is missing",
    ]


@pytest.mark.parametrize("kept_bytes", [0, 512, 10_000])
def test_a_truncated_tar_is_found(dataset, kept_bytes):
    data = (dataset / OTHER).read_bytes()
    (dataset / OTHER).write_bytes(data[:kept_bytes])
    assert only_problem(dataset) == f"{OTHER}: has {kept_bytes} bytes, expected {len(data)}"


def test_a_shard_cut_at_any_block_is_found_even_where_the_table_agrees_with_the_cut(dataset):
    whole = (dataset / OTHER).read_bytes()
    rows = shard_rows(dataset)
    end = len(whole.rstrip(b"\0"))
    for cut in range(0, end, 512):
        (dataset / OTHER).write_bytes(whole[:cut])
        rows[2] |= {"bytes": cut, "sha256": file_sha256(dataset / OTHER)}
        write_manifest(dataset, rows)
        assert only_problem(dataset).startswith(OTHER), cut


def test_a_manifest_edited_by_hand_is_found(dataset):
    path = dataset / MANIFEST
    path.write_text(path.read_text().replace('"channels":4', '"channels":8'))
    assert "was edited: its fingerprint does not match its content" in only_problem(dataset)


@pytest.mark.parametrize("name", [SHARD_TABLE, REJECTS, EMPTY_CAPTION])
def test_a_table_exchanged_or_lost_is_named(dataset, name):
    if name == REJECTS:
        write_table(dataset / name, pq.read_table(dataset / name).slice(0, 0))
    elif name == SHARD_TABLE:
        write_table(dataset / name, pq.read_table(dataset / name).slice(0, 2))
    else:
        save_file({k: v + 1 for k, v in load_file(dataset / name).items()}, dataset / name)
    assert f"{name}: is not what the manifest says (sha256)" in verify(dataset)
    (dataset / name).unlink()
    assert f"{name}: missing" in verify(dataset)


@pytest.mark.parametrize("member", list(KIND.members()))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nan_is_found_and_its_member_named(tmp_path, member, value):
    def spoil(i, sample):
        if i == 2:
            sample[member].flat[-1] = value

    write_manifest(tmp_path, [write_shard(tmp_path, FIRST, range(5), spoil)])
    assert only_problem(tmp_path) == (f"{FIRST}: {2:020x}.{member}.npy: holds NaN or infinity")


@pytest.mark.parametrize(
    ("member", "change"),
    [
        ("moments", lambda a: a.astype(np.float32)),
        ("moments", lambda a: a[:4]),
        ("moments", lambda a: a[:, :2]),
        ("clip", lambda a: a[:, :8]),
        ("micro", lambda a: a[None]),
    ],
)
def test_a_wrong_shape_or_type_is_found(tmp_path, member, change):
    def spoil(i, sample):
        if i == 4:
            sample[member] = change(sample[member])

    write_manifest(tmp_path, [write_shard(tmp_path, FIRST, range(5), spoil)])
    assert f"{4:020x}.{member}.npy: got" in only_problem(tmp_path)


def test_an_index_that_points_elsewhere_is_found(dataset):
    rows = shard_rows(dataset)
    path = dataset / FIRST.replace(".tar", ".idx.npy")
    index = np.load(path)
    index[3, 1, 0] += 2
    np.save(path, index)
    rows[0]["index_sha256"] = file_sha256(path)
    write_manifest(dataset, rows)
    assert f"{FIRST}: {3:020x}.clip.npy: index says" in only_problem(dataset)


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
    path, rows = dataset / proof_path(FIRST), pq.read_table(dataset / SHARD_TABLE).to_pylist()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    rows[1]["captions_sha256"] = "x"
    write_manifest(dataset, rows)
    proof, captions = verify(dataset)
    assert proof == f"{FIRST}: train-000000.proof.safetensors is not what the table says (sha256)"
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


def test_a_shards_wrong_number_of_samples_is_found(dataset):
    rows = pq.read_table(dataset / SHARD_TABLE).to_pylist()
    rows[0]["num_samples"] += 1
    write_manifest(dataset, rows)
    assert f"{FIRST}: index (5, 4, 2), expected 6 samples" in only_problem(dataset)


def test_a_sample_that_is_there_twice_is_found(dataset):
    rows = shard_rows(dataset)
    rows[1] = write_shard(dataset, SECOND, range(4, 9))
    write_manifest(dataset, rows)
    assert only_problem(dataset) == f"{SECOND}: key {4:020x} should be in an earlier shard"


def test_a_stray_file_is_named(dataset):
    shutil.copy(dataset / FIRST, dataset / "shards/32x32/train-000009.tar")
    assert only_problem(dataset) == f"shards/32x32/train-000009.tar: not in {SHARD_TABLE}"


def test_an_empty_caption_of_another_encoder_is_found(dataset):
    wide = {"clip": np.zeros((2, 8), np.float16), "clip_pooled": np.zeros(16, np.float16)}
    save_file(wide, dataset / EMPTY_CAPTION)
    seal(dataset, pq.read_table(dataset / SHARD_TABLE).to_pylist())
    assert only_problem(dataset) == f"{EMPTY_CAPTION}: clip is not (L, 16)"


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
