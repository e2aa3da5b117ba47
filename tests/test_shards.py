"""Shards that any webdataset reader opens, the same to the byte every time, whole or not there."""

import hashlib
import json
import tarfile

import numpy as np
from webdataset.compat import WebDataset

from data_prep.schema import read_index
from data_prep.schema.proof import project
from data_prep.shards import ShardWriter
from models.files import file_sha256

MEMBERS = ["moments", "clip", "micro"]


def sample(i: int) -> tuple[str, dict[str, np.ndarray], dict]:
    rng = np.random.default_rng(i)
    arrays = {
        "moments": rng.normal(size=(8, 4, 6)).astype(np.float16),
        "clip": rng.normal(size=(i % 5, 16)).astype(np.float16),  # no tokens at all is a length too
        "micro": rng.normal(size=4).astype(np.float32),
    }
    return hashlib.sha256(str(i).encode()).hexdigest()[:20], arrays, {"caption": f"é {i}"}


def write_shard(folder, count=7):
    writer = ShardWriter(folder, "shards/32x48/train-000000.tar", MEMBERS)
    for i in range(count):
        writer.add(*sample(i))
    return writer.commit(b"proof")


def test_plain_webdataset_reads_every_sample_and_numpy_every_member_without_pickle(tmp_path):
    record = write_shard(tmp_path)
    path = tmp_path / "shards/32x48/train-000000.tar"
    rows = list(WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert len(rows) == record["num_samples"] == 7
    for i, row in enumerate(rows):
        key, arrays, facts = sample(i)
        assert row["__key__"] == key
        assert json.loads(row["json"]) == facts
        for name in MEMBERS:
            with open(tmp_path / "x.npy", "wb") as file:
                file.write(row[f"{name}.npy"])
            loaded = np.load(tmp_path / "x.npy", allow_pickle=False)
            assert loaded.dtype == arrays[name].dtype
            np.testing.assert_array_equal(loaded, arrays[name])


def test_the_index_leads_straight_to_the_numbers(tmp_path):
    write_shard(tmp_path)
    data = (tmp_path / "shards/32x48/train-000000.tar").read_bytes()
    index = read_index(tmp_path / "shards/32x48/train-000000.idx.npy")
    assert index.shape == (7, 3, 2)
    for i, places in enumerate(index):
        for name, (offset, size) in zip(MEMBERS, places, strict=True):
            array = sample(i)[1][name]
            assert data[offset : offset + size] == array.tobytes()


def test_the_same_samples_give_the_same_bytes_and_the_record_their_hashes(tmp_path):
    records = [write_shard(tmp_path / name) for name in "ab"]
    assert records[0] == records[1]
    for name in "ab":
        path = tmp_path / name / "shards/32x48/train-000000.tar"
        assert file_sha256(path) == records[0]["sha256"]
        assert path.stat().st_size == records[0]["bytes"]
        for suffix, column in (
            (".idx.npy", "index_sha256"),
            (".proof.safetensors", "proof_sha256"),
        ):
            assert file_sha256(path.with_suffix(suffix)) == records[0][column]
        sizes = {file.name: file.stat().st_size for file in path.parent.iterdir()}
        assert sizes == records[0]["sizes"]


def test_a_projection_stays_what_proofs_were_made_with_and_sees_order_and_every_number():
    tokens = (np.arange(30).reshape(6, 5) / 8).astype(np.float16)
    pinned = project(tokens)
    assert pinned[:6].tolist() == [-6.125, 5.125, 6.125, -19.375, -5.625, -6.125]
    np.testing.assert_array_equal(project(tokens[0]), project(tokens[:1]))
    for changed in (tokens[::-1], tokens[:, ::-1], tokens[:5], tokens + np.eye(6, 5)[[3]]):
        assert not np.array_equal(project(changed), pinned)


def test_headers_are_ustar_with_no_time_and_no_owner(tmp_path):
    write_shard(tmp_path)
    with tarfile.open(tmp_path / "shards/32x48/train-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
            assert not member.pax_headers
            assert member.offset_data == member.offset + 512  # one header block, no extension


def test_before_the_commit_there_is_no_shard_and_after_giving_up_no_trace(tmp_path):
    writer = ShardWriter(tmp_path, "shards/x.tar", MEMBERS)
    writer.add(*sample(0))
    assert not (tmp_path / "shards/x.tar").exists()
    writer.abandon()
    assert list((tmp_path / "shards").iterdir()) == []


def test_a_shard_without_samples_leaves_no_file(tmp_path):
    writer = ShardWriter(tmp_path, "shards/x.tar", MEMBERS)
    assert writer.commit(b"")["num_samples"] == 0
    writer.abandon()
    assert list((tmp_path / "shards").iterdir()) == []
