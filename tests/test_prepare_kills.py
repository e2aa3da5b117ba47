"""Preparation on two raylets under kills: the bytes are those of an undisturbed run of one actor on one raylet."""

import json
import subprocess
import sys

import pytest

from data_prep.audit import verify
from data_prep.config import PrepareConfig
from data_prep.preparation import prepare
from data_prep.schema import read_manifest
from data_prep.storage import find_files, open_root
from models.command import load_config
from tests.kill_prepare import ROOT, TwoRaylets, disturbed_run, sample_keys
from tests.prep_factory import dataset_bytes, fill_folder, sample_members, tar_bytes, write_config

IN_TURN = ("actor", "decoder", "raylet", "driver")


def each_in_turn():
    """Choose every kind of victim once, as soon as there is one."""
    waiting = list(IN_TURN)

    def choose(alive: list[str]) -> str | None:
        return waiting.pop(0) if waiting and waiting[0] in alive else None

    return choose


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_everywhere_from_s3_to_s3_it_writes_what_an_undisturbed_run_on_disk_does(
    tmp_path, bucket, ray_address, vae_folder, text_folder
):
    import s3fs

    fill_folder(tmp_path / "pictures", 30)
    (tmp_path / "pictures" / "bad.jpg").write_bytes(b"<html>")
    (tmp_path / "pictures" / "bad.txt").write_bytes(b"a page")
    (tmp_path / "tars").mkdir()
    for number in range(3):
        members = [m for i in range(10) for m in sample_members(100 * number + i)]
        (tmp_path / "tars" / f"{number}.tar").write_bytes(tar_bytes(members))
    sources = {"pictures": tmp_path / "pictures", "web": tmp_path / "tars"}
    config = write_config(tmp_path / "c.yaml", sources, vae_folder, text_folder)
    prepare(load_config(PrepareConfig, config, []))
    reference = tmp_path / "dataset"

    store = s3fs.S3FileSystem(skip_instance_cache=True)
    for folder in sources.values():
        store.put(str(folder), f"bucket/{folder.name}", recursive=True)
    # It grows as well, here and there.
    more = fill_folder(tmp_path / "pictures" / "more", 6, first=400)
    prepare(load_config(PrepareConfig, config, []))
    overrides = [f"sources.{name}.path={bucket}/{f.name}" for name, f in sources.items()]
    overrides += [f"output={bucket}/dataset", "ray.num_actors=2", "ray.decoders_per_actor=1"]
    cluster = TwoRaylets(tmp_path)
    try:
        cluster.new_other()
        killed = disturbed_run(cluster, config, overrides, each_in_turn())
        store.put(str(more), "bucket/pictures/more", recursive=True)
        disturbed_run(cluster, config, overrides, lambda alive: None)
    finally:
        cluster.stop()
    assert {kind: killed[kind] for kind in IN_TURN} == dict.fromkeys(IN_TURN, 1)
    dataset = open_root(f"{bucket}/dataset", "output")
    names = [n for n in find_files(dataset) if not n.startswith("work/")]
    found = {name: (dataset / name).read_bytes() for name in names}
    expected = dataset_bytes(reference)
    a, b = (json.loads(files.pop("manifest.json")) for files in (found, expected))
    assert found == expected
    for manifest in (a, b):
        del manifest["prepare_config"]["sources"], manifest["fingerprint"]
    assert a == b
    assert verify(dataset) == []
    keys = sample_keys(dataset)
    counts = read_manifest(dataset).counts
    assert len(set(keys)) == len(keys) == counts.kept
    assert counts.kept == counts.seen - sum(counts.rejected.values()) == 63
    assert [generation["counts"]["kept"] for generation in a["generations"]] == [57, 6]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [
        ("--kills", "30"),
        ("--kills", "12", "--generations", "3", "--pictures", "150"),
        ("--layer", "--kills", "10", "--every-s", "1.5"),
        ("--layer", "--temperature", "0", "--kills", "10", "--pictures", "300"),
        ("--layer", "--temperature", "1", "--kills", "10", "--pictures", "300"),
    ],
)
def test_random_kills_over_repeated_runs_and_growths_change_no_byte(options):
    # It makes a temporary folder of its own: in pytest's, Ray's sockets would have names over 107 bytes.
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_prepare", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all the same after" in done.stdout
