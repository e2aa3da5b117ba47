"""Data sets that grow: what is new makes a generation, and what was there stays as it is, bit by bit."""

import io
import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.audit import verify
from data_prep.config import PrepareConfig, check_settings
from data_prep.duplicates import known_files, known_looks
from data_prep.output import begin, open_output
from data_prep.plan import kept_pictures
from data_prep.preparation import prepare
from data_prep.scan import list_sources
from data_prep.schema import read_manifest, read_shard_table
from data_prep.sources import sample_key
from models import files
from models.command import load_config
from models.config import InputError
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from tests.kill_prepare import sample_keys
from tests.prep_factory import (
    dataset_bytes,
    encoded,
    fill_folder,
    pixels,
    read_samples,
    sample_members,
    tar_bytes,
    write_config,
)


def add(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    (folder / name).with_suffix(".txt").write_text("a caption")


def run(config: Path, *overrides: str, **options) -> Path:
    settings = load_config(PrepareConfig, config, list(overrides))
    prepare(settings, **options)
    return Path(settings.output)


def inodes(dataset: Path) -> dict[str, int]:
    return {str(p): p.stat().st_ino for p in sorted((dataset / "shards").rglob("*.*"))}


def rejects(dataset: Path) -> dict[str, tuple[str, str]]:
    rows = pq.read_table(dataset / "rejects.parquet").to_pylist()
    return {row["name"]: (row["reason"], row["detail"]) for row in rows}


def small_config(folder: Path, vae: Path, text: Path, **more) -> Path:
    sources = {"p": fill_folder(folder / "p", 12)}
    return write_config(folder / "c.yaml", sources, vae, text, **more)


def with_tars(config: Path, count: int = 4) -> Path:
    """The same config with another source."""
    folder = config.parent / "tars"
    folder.mkdir()
    members = [m for i in range(500, 500 + count) for m in sample_members(i)]
    (folder / "0.tar").write_bytes(tar_bytes(members))
    text = config.read_text().replace(
        "sources:\n", f"sources:\n  w: {{kind: tars, path: {folder}}}\n"
    )
    config.write_text(text)
    return config


class Log:
    """The keys of the samples that a run is given, one by one."""

    def __init__(self, dataset: Path, eras: Path, grow: bool = True):
        data = DataConfig(path=str(dataset), grow=grow, prefetch=0)
        self._loader = Loader(data, global_batch=1, seed=1, eras=eras)
        self._batches, self.keys = self._loader.batches(), list[str]()

    def epoch(self, count: int) -> list[str]:
        """The next `count`."""
        for _ in range(count):
            batch = next(self._batches)
            mixture = self._loader.era_at(batch.step).mixture
            self.keys.append(mixture.locate(int(batch.sample_ids[0]))["key"])
        return self.keys[-count:]


def test_a_dataset_grows_in_three_generations_and_what_was_there_stays(
    tmp_path, ray_address, vae_folder, text_folder
):
    config = small_config(tmp_path, vae_folder, text_folder, filters={"near_duplicates": 2})
    pictures = tmp_path / "p"
    dataset = run(config)
    keys = sample_keys(dataset)
    log = Log(dataset, tmp_path / "eras")
    assert sorted(log.epoch(12)) == sorted(keys)
    for generation in (1, 2):
        before, bytes_before = inodes(dataset), dataset_bytes(dataset)
        fill_folder(pictures, 8, first=20 * generation)
        twin = pixels(0) if generation == 1 else pixels(22, 60, 36)
        add(pictures, f"copy{generation}.png", encoded(twin))
        add(pictures, f"near{generation}.jpg", encoded(twin, "JPEG", quality=90))
        if generation == 2:
            with_tars(config)
        first = read_manifest(dataset).generations
        run(config)
        manifest = read_manifest(dataset)
        assert manifest.generations[:-1] == first
        assert before.items() <= inodes(dataset).items()
        after = dataset_bytes(dataset)
        assert all(
            after[name] == bytes_before[name]
            for name in after
            if name in bytes_before and name.startswith("shards/")
        )
        assert sample_keys(dataset)[: len(keys)] == keys
        keys = sample_keys(dataset)
        assert verify(dataset) == []
        assert sorted(log.epoch(len(keys))) == sorted(keys)
    # Whoever looks again from the beginning is told the same; who does not grow stays with the first.
    assert Log(dataset, tmp_path / "eras").epoch(len(log.keys)) == log.keys
    assert sorted(Log(dataset, tmp_path / "still", grow=False).epoch(32)) == sorted(keys)
    assert len(set(keys)) == len(keys) == 12 + 8 + 8 + 4 == manifest.counts.kept
    assert [g.counts.kept for g in manifest.generations] == [12, 8, 12]
    assert [g.complete for g in manifest.generations] == [True] * 3
    assert manifest.counts.seen == 36
    one, two = sample_key("p", "even/0000.png"), sample_key("p", "even/0022.png")
    found = rejects(dataset)
    assert found["copy1.png"] == ("duplicate", f"same file as {one} (generation 0)")
    assert found["copy2.png"] == ("duplicate", f"same file as {two} (generation 1)")
    assert found["near1.jpg"][0] == found["near2.jpg"][0] == "near_duplicate"
    assert found["near2.jpg"][1].endswith(f"of 64 bits from {two} (generation 1)")
    rows = read_shard_table(dataset).to_pylist()
    assert rows == sorted(rows, key=lambda row: (row["generation"], row["path"]))


@pytest.mark.slow
def test_what_is_gone_or_changed_is_named_and_allowed_on_request(
    tmp_path, ray_address, vae_folder, text_folder, capsys
):
    config, pictures = small_config(tmp_path, vae_folder, text_folder), tmp_path / "p"
    dataset = run(config)
    keys, changed = sample_keys(dataset), pictures / "odd" / "0003.jpg"
    (pictures / "even" / "0000.png").unlink()
    changed.write_bytes(encoded(pixels(99), "JPEG"))
    fill_folder(pictures, 2, first=20)
    capsys.readouterr()
    prepare(load_config(PrepareConfig, config, []), dry_run=True)
    said = "files 1 gone (p/even/0000.png), 1 changed (p/odd/0003.jpg) since generation 0"
    out = capsys.readouterr().out
    assert "2 new files after 1 generations" in out
    assert said in out
    before = dataset_bytes(dataset)
    with pytest.raises(InputError, match="--allow-missing to go on with the 2 new files") as caught:
        run(config)
    assert said in str(caught.value)
    assert dataset_bytes(dataset) == before
    run(config, allow_missing=True)
    manifest = read_manifest(dataset)
    assert sample_keys(dataset)[: len(keys)] == keys
    assert [g.missing for g in manifest.generations] == [0, 2]
    assert manifest.counts.kept == 14
    assert verify(dataset) == []
    # The same bytes in their places again, and nothing is to be said or done.
    fill_folder(pictures, 12)
    capsys.readouterr()
    run(config)
    assert "complete; nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_where_all_that_is_new_is_rejected_a_generation_without_shards_is_sealed(
    tmp_path, ray_address, vae_folder, text_folder, capsys
):
    config = small_config(tmp_path, vae_folder, text_folder)
    dataset = run(config)
    before = dataset_bytes(dataset)
    add(tmp_path / "p", "copy.png", encoded(pixels(0)))
    run(config)
    last = read_manifest(dataset).generations[-1]
    assert (last.number, last.complete, last.num_shards) == (1, True, 0)
    assert last.counts.rejected == {"duplicate": 1}
    assert verify(dataset) == []
    after = dataset_bytes(dataset)
    for name in ("shards.parquet", "contact_sheet.png", "empty_caption.safetensors"):
        assert after[name] == before[name]
    capsys.readouterr()
    run(config)
    assert "nothing to do" in capsys.readouterr().out
    # A shard of the first that was lost comes back, and the second stays in the manifest.
    next((dataset / "shards").rglob("train-000000.tar")).unlink()
    run(config)
    assert dataset_bytes(dataset) == after
    run(config, restart=True)
    assert [g.number for g in read_manifest(dataset).generations] == [0]
    assert read_manifest(dataset).counts.rejected == {"duplicate": 1}


@pytest.mark.slow
def test_a_generation_that_was_begun_is_finished_as_it_was_listed_before_the_next(
    tmp_path, ray_address, vae_folder, text_folder
):
    """What is added between is of the next one, and a shard that was lost comes back as it was."""
    folders = [tmp_path / name for name in ("still", "stopped")]
    configs = [small_config(folder, vae_folder, text_folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        run(config)
        fill_folder(folder / "p", 8, first=20)
    still, stopped = (folder / "dataset" for folder in folders)
    run(configs[0])
    fill_folder(folders[0] / "p", 4, first=40)
    run(configs[0])
    settings = load_config(PrepareConfig, configs[1], [])
    found = open_output(settings, check_settings(settings), list_sources(settings), False)[1]
    begin(settings, stopped, check_settings(settings), found)
    fill_folder(folders[1] / "p", 4, first=40)
    for path in stopped.rglob("train-000000.tar"):
        path.unlink()
    run(configs[1])
    a, b = dataset_bytes(still), dataset_bytes(stopped)
    assert a.keys() == b.keys()
    assert {n for n in a if a[n] != b[n]} == {"manifest.json"}
    one, two = read_manifest(still), read_manifest(stopped)
    assert one.generations == two.generations
    assert [g.counts.kept for g in one.generations] == [12, 8, 4]


@pytest.mark.slow
def test_labels_stay_what_they_are_when_a_class_comes_before_them(
    tmp_path, ray_address, vae_folder, text_folder
):
    pictures = tmp_path / "kinds"
    for name in ("b", "d"):
        (pictures / name).mkdir(parents=True)
        (pictures / name / "0.png").write_bytes(encoded(pixels(ord(name))))
    source = {"kind": "classes", "path": str(pictures)}
    config = write_config(tmp_path / "c.yaml", {"k": source}, vae_folder, text_folder)
    dataset = run(config)
    (pictures / "a").mkdir()
    (pictures / "a" / "0.png").write_bytes(encoded(pixels(7)))
    (pictures / "d" / "1.png").write_bytes(encoded(pixels(8)))
    run(config)
    manifest = read_manifest(dataset)
    assert manifest.classes == ["b", "d", "a"]
    assert [g.num_labels for g in manifest.generations] == [2, 3]
    labels = {
        sample["__key__"]: int(np.load(io.BytesIO(sample["label.npy"])))
        for _, sample in read_samples(dataset)
    }
    names = {"b/0.png": 0, "d/0.png": 1, "a/0.png": 2, "d/1.png": 1}
    assert labels == {sample_key("k", name): label for name, label in names.items()}


class Died(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.slow
def test_a_growth_that_dies_before_any_of_its_drivers_commits_is_taken_up_again(
    tmp_path, ray_address, vae_folder, text_folder, monkeypatch
):
    config = small_config(tmp_path, vae_folder, text_folder, filters={"near_duplicates": 2})
    whole, publish, committed = run(config), files.publish, list[str]()
    still = shutil.copytree(whole, tmp_path / "still")
    fill_folder(tmp_path / "p", 8, first=20)
    add(tmp_path / "p", "copy.png", encoded(pixels(0)))
    run(config, f"output={still}")
    expected = dataset_bytes(still)

    def dying(temporary: Path, path: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Died
        committed.append(path.name)
        publish(temporary, path)

    for number in itertools.count():
        output = shutil.copytree(whole, tmp_path / f"died-{number}")
        before, left = inodes(output), number
        committed.clear()
        monkeypatch.setattr(files, "publish", dying)
        try:
            run(config, f"output={output}")
            break
        except Died:
            monkeypatch.setattr(files, "publish", publish)
        run(config, f"output={output}")
        assert dataset_bytes(output) == expected, committed
        assert before.items() <= inodes(output).items()
        shutil.rmtree(output)
    names = {"listing.parquet", "config.json", "plan_rejects.parquet", "manifest.json"}
    names |= {"shard_list.parquet", "sealed.jsonl", "shards.parquet", "rejects.parquet"}
    assert names <= set(committed)


def slow_known(hashes: np.ndarray, known: list[np.ndarray], most: int) -> dict[int, tuple]:
    """Row -> generation, distance and key of the least known picture within reach: every pair compared."""
    found = {}
    for row, value in enumerate(hashes):
        for generation, table in enumerate(known):
            distance = np.bitwise_count(table["looks"] ^ value)
            near = np.flatnonzero(distance <= most)
            if len(near):
                keys = [(int(distance[i]), table["key"][i].tobytes().hex()) for i in near]
                found[row] = (generation, *min(keys))
                break
    return found


@pytest.mark.parametrize("block", [1 << 20, 64])
@pytest.mark.parametrize("most", range(9))
def test_duplicates_of_earlier_generations_are_those_that_comparing_all_pairs_finds(most, block):
    """Every pair of four generations: 2,000 hashes, clusters of which differ in few bits."""
    rng = np.random.default_rng(most)
    looks = rng.integers(0, 2**64, 200, dtype=np.uint64).repeat(10)
    for _ in range(6):
        flipped = np.uint64(1) << rng.integers(0, 64, len(looks), dtype=np.uint64)
        looks ^= np.where(rng.random(len(looks)) < 0.4, flipped, np.uint64(0))
    kind = np.dtype([("hash", "u8", 2), ("looks", "u8"), ("key", "u1", 10)])
    tables = np.zeros(len(looks), kind)
    tables["looks"] = rng.permutation(looks)
    tables["key"] = rng.integers(0, 256, (len(looks), 10))
    # Some files are the same, and some hashes begin alike.
    tables["hash"] = rng.integers(0, 300, (len(looks), 2)) << 54
    parts = np.split(tables, 4)

    def kept(number: int, what: str):
        for some in np.split(parts[number], range(block, len(parts[number]), block)):
            yield some[what], pa.chunked_array([[key.tobytes().hex() for key in some["key"]]])

    for number in range(1, 4):
        new, known = parts[number], parts[:number]
        rows = np.arange(len(new)) * 3 + 5
        found = np.sort(
            known_looks(rows, new["looks"], most, [kept(n, "looks") for n in range(number)]),
            order="row",
        )
        expected = slow_known(new["looks"], known, most)
        assert [row for row, *_ in found.tolist()] == [rows[i] for i in sorted(expected)]
        got = {(row - 5) // 3: (g, d, bytes(key).hex()) for row, _, d, g, key in found.tolist()}
        assert got == expected
        assert most < 2 or len(expected) > 20
        same = known_files(rows, new["hash"], [kept(n, "hash") for n in range(number)])
        before = [{tuple(h) for h in part["hash"].tolist()} for part in known]
        first = {
            row: next((g for g, hashes in enumerate(before) if tuple(h) in hashes), None)
            for row, h in zip(rows.tolist(), new["hash"].tolist(), strict=True)
        }
        assert {row: g for row, *_, g, _ in same.tolist()} == {
            row: g for row, g in first.items() if g is not None
        }


def test_a_plan_of_an_older_version_is_refused_where_a_growth_needs_what_it_lacks(tmp_path):
    (tmp_path / "plan").mkdir()
    old = {"key": ["0" * 20], "content_hash": pa.array([bytes(32)], pa.binary(32))}
    pq.write_table(pa.table(old), tmp_path / "plan" / "000000.parquet")
    with pytest.raises(InputError, match=r"older version.*near_duplicates compares\. Remedy: "):
        next(kept_pictures(tmp_path, "perceptual_hash"))
    ((hashes, keys),) = kept_pictures(tmp_path, "content_hash")
    assert (hashes.tolist(), keys.to_pylist()) == ([[0, 0]], ["0" * 20])
