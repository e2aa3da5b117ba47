"""Preparation end to end on tiny encoders: what is written, what a kill costs, and what is refused."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import safetensors.torch
import torch
import yaml
from PIL import Image, ImageOps
from safetensors.numpy import load_file

from data_prep import workers
from data_prep.audit import verify
from data_prep.catalog import CATALOG_SCHEMA
from data_prep.config import PrepareConfig, check_settings
from data_prep.encode import EncoderSettings, ShardEncoder, in_halves
from data_prep.encoders import PROCESS_BYTES, configured, weight_of
from data_prep.estimate import bytes_by_member, estimate, report
from data_prep.images import decode
from data_prep.output import open_output, refuse_changes, unfinished
from data_prep.plan import ShardSpec, shard_list
from data_prep.preparation import prepare
from data_prep.prepare import main
from data_prep.scan import list_sources
from data_prep.schema import index_path, read_index, read_manifest, read_shard_table
from data_prep.schema.proof import proof_keys, read_proof
from data_prep.shards import read_commits, write_table
from data_prep.workers import ATTEMPTS
from models.command import duration, load_config, run_command
from models.config import InputError
from models.files import FULL, full_disk_is_said
from models.text_conventions import View
from models.text_encoder import TextEncoder
from models.vae import LatentCodec, sample_latents
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from tests import train_factory
from tests.prep_factory import (
    config_of_pictures,
    dataset_bytes,
    encoded,
    fill_folder,
    pixels,
    read_samples,
    sample_members,
    tar_bytes,
    write_config,
)
from tests.ray_cluster import RAY, copy_checkout
from tests.test_alignment import save_vision
from tests.test_vae import save_dc, save_kl, save_tiny

NUM_GOOD, NUM_BAD = 60, 6
OTHERS = ("pictures/.git/x.png", "pictures/a.pdf", "pictures/alone.txt", "tars/0.parquet")
DIRT = {
    "cut.jpg": encoded(pixels(100), "JPEG")[:-200],  # its header is sound: only decoding finds out
    "page.jpg": b"<html>",
    "empty.png": b"",
    "twin.png": encoded(pixels(0)),
}


def messy_sources(folder: Path) -> dict[str, Path]:
    """60 good pictures, and 6 inputs that must each end as a reject."""
    fill_folder(folder / "pictures", NUM_GOOD - 8)
    for name, data in DIRT.items():
        (folder / "pictures" / name).write_bytes(data)
        (folder / "pictures" / name).with_suffix(".txt").write_text("a caption")
    (folder / "pictures" / "mute.png").write_bytes(encoded(pixels(101)))
    for name in OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    members = [m for i in range(200, 208) for m in sample_members(i)]
    members += sample_members(300, status="failed_to_download")
    (folder / "tars" / "00000.tar").write_bytes(tar_bytes(members))
    return {"pictures": folder / "pictures", "web": folder / "tars"}


@pytest.fixture(scope="module")
def messy(tmp_path_factory, vae_folder, text_folder) -> Path:
    """A config file over messy sources."""
    folder = tmp_path_factory.mktemp("messy")
    sources = messy_sources(folder)
    return write_config(folder / "c.yaml", sources, vae_folder, text_folder, heldout_fraction=0.2)


def run(config: Path, *overrides: str, **options) -> Path:
    settings = load_config(PrepareConfig, config, list(overrides))
    prepare(settings, **options)
    return Path(settings.output)


@pytest.fixture(scope="module")
def reference(messy, ray_address) -> Path:
    """The undisturbed run, with one actor."""
    return run(messy, f"output={messy.parent / 'reference'}", "ray.num_actors=1")


@pytest.fixture(scope="module")
def encoders(messy) -> tuple[LatentCodec, TextEncoder]:
    config = load_config(PrepareConfig, messy, [])
    return LatentCodec(config.vae.path), TextEncoder(
        config.text_encoders["bert"].path, View(max_length=8)
    )


def kill_driver(config: Path, address: str, moment: Callable[[], bool], *overrides: str) -> None:
    """Kill a driver of its own, on the tests' Ray, when the moment has come."""
    driver = train_factory.start("data_prep.prepare", str(config), *overrides, RAY_ADDRESS=address)
    while not moment():
        assert driver.returncode is None, driver.communicate()
        time.sleep(0.005)
    driver.kill()
    driver.communicate()


@contextlib.contextmanager
def killing(is_victim: Callable[[psutil.Process], object]) -> Iterator[set[int]]:
    """Kill all processes below this one that are victims; the set grows by those that were killed."""
    killed, stop = set[int](), threading.Event()

    def kill() -> None:
        while not stop.is_set():
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if is_victim(process):
                        process.kill()
                        killed.add(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        stop.set()
        killer.join()


def commits(dataset: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every committed shard: both new where one is written again."""
    found = {}
    for path in (dataset / "work" / "commits").rglob("[!.]*.json"):
        tar = dataset / json.loads(path.read_text())["path"]
        if tar.exists():
            found[str(tar)] = (tar.stat().st_ino, tar.stat().st_mtime_ns)
    return found


def test_every_input_is_kept_or_rejected_with_a_reason(reference):
    counts = read_manifest(reference).counts
    assert counts.seen == NUM_GOOD + NUM_BAD
    assert counts.kept == NUM_GOOD
    assert counts.rejected == {
        "caption_empty": 1,
        "duplicate": 1,
        "empty_file": 1,
        "source_status": 1,
        "undecodable": 2,
    }
    assert counts.other_files == {"hidden_folder": 1, "parquet": 1, "pdf": 1, "txt": 1}
    rejects = {r["name"]: r for r in pq.read_table(reference / "rejects.parquet").to_pylist()}
    assert rejects["cut.jpg"]["reason"] == "undecodable"
    assert rejects["even/0000.png"]["detail"].startswith("same file as")
    assert rejects["00000.tar/000000300"]["source"] == "web"
    assert verify(reference) == []


def test_plain_webdataset_and_numpy_read_all_of_it(reference):
    keys = set()
    for row, sample in read_samples(reference):
        keys.add(sample["__key__"])
        names = [name for name in sample if name.endswith(".npy")]
        arrays = {n: np.load(io.BytesIO(sample[n]), allow_pickle=False) for n in names}
        assert arrays.keys() == {"moments.npy", "bert.npy", "bert_pooled.npy", "micro.npy"}
        assert arrays["moments.npy"].shape[1:] == (row["height"] // 4, row["width"] // 4)
        assert arrays["bert.npy"].dtype == np.float16
    assert len(keys) == NUM_GOOD


def test_what_is_stored_is_what_the_encoders_say_of_the_picture(reference, messy, encoders):
    """Each picture encoded alone, here; batches and fp16 on disk make the tolerance."""
    (codec, text), images = encoders, load_config(PrepareConfig, messy, []).images
    seen = 0
    for row, sample in read_samples(reference):
        facts = json.loads(sample["json"])
        if facts["source"] != "pictures":
            continue
        path = messy.parent / "pictures" / facts["name"]
        picture = decode(path.read_bytes(), (row["height"], row["width"]), images)
        batch = torch.from_numpy(picture.pixels.copy()).permute(2, 0, 1)[None]
        tokens, mask, pooled = text.encode([path.with_suffix(".txt").read_text().strip()])
        expected = {"moments": codec.encode_moments(batch)[0], "micro": picture.micro}
        expected |= {"bert": tokens[0][mask[0]], "bert_pooled": pooled[0]}
        for name, value in expected.items():
            stored = np.load(io.BytesIO(sample[f"{name}.npy"]))
            np.testing.assert_allclose(stored, np.asarray(value), rtol=2e-3, atol=2e-3)
        seen += 1
    assert seen == NUM_GOOD - 8


def test_the_manifest_says_what_was_measured(reference, messy):
    manifest = read_manifest(reference)
    channels = manifest.codec.channels
    values = []
    for row in read_shard_table(reference).to_pylist():
        index = read_index(reference / row["path"].replace(".tar", ".idx.npy"))
        data = (reference / row["path"]).read_bytes()
        for offset, size in index[:, 0]:
            moments = np.frombuffer(data[offset : offset + size], np.float16)
            if row["split"] == "train":
                values.append(moments.reshape(2 * channels, -1).astype(np.float64))
    joined = np.concatenate(values, axis=1)
    mean, std = joined[:channels], joined[channels:]
    np.testing.assert_allclose(manifest.latent_mean, mean.mean(axis=1), rtol=1e-9)
    # The law of total variance: of the means, plus the mean of the variances.
    spread = np.sqrt(mean.var(axis=1) + (std**2).mean(axis=1))
    np.testing.assert_allclose(manifest.latent_std, spread, rtol=1e-9)
    assert sum(bucket.num_samples for bucket in manifest.buckets) == len(values) < NUM_GOOD
    assert manifest.prepare_config["samples_per_shard"] == 8


def test_the_empty_captions_embedding_is_the_encoders_own(reference, encoders):
    stored = load_file(reference / "empty_caption.safetensors")
    tokens, mask, pooled = encoders[1].encode([""])
    np.testing.assert_allclose(stored["bert"], tokens[0][mask[0]].numpy(), atol=2e-3)
    np.testing.assert_allclose(stored["bert_pooled"], pooled[0].numpy(), atol=2e-3)
    assert len({path.stat().st_mode for path in reference.iterdir() if path.is_file()}) == 1


def test_text_encoders_in_another_order_are_another_config(tmp_path, vae_folder, text_folder):
    """Their members are columns of every index in that order."""
    pictures, encoder = (
        {"p": fill_folder(tmp_path / "p", 1)},
        {"path": str(text_folder), "max_length": 8},
    )
    more = {"text_encoders": {"a": encoder, "b": encoder}}
    path = write_config(tmp_path / "c.yaml", pictures, vae_folder, text_folder, **more)
    config = load_config(PrepareConfig, path, [])
    other = dict(reversed(config.text_encoders.items()))
    open_output(config, check_settings(config), list_sources(config), restart=False)
    config = config.model_copy(update={"text_encoders": other})
    with pytest.raises(
        InputError, match=r"encoders: .*_encoders.a'.* -> \['vae', 'text_encoders.b'"
    ):
        open_output(config, check_settings(config), list_sources(config), restart=False)


def test_a_proof_shows_originals_and_what_the_codec_makes_of_their_latents(
    reference, messy, encoders
):
    config, codec, seen = load_config(PrepareConfig, messy, []), encoders[0], 0
    every = list(read_samples(reference))
    for row in read_shard_table(reference).to_pylist():
        proof = read_proof(reference, row["path"])
        found = {sample["__key__"]: sample for place, sample in every if place == row}
        keys = sorted(found, key=lambda key: hashlib.sha256(f"proof\0{key}".encode()).digest())
        assert proof_keys(proof) == keys[:4]
        for key, before, after in zip(keys, proof["original"], proof["decoded"], strict=False):
            facts = json.loads(found[key]["json"])
            if facts["source"] == "pictures":
                data = (messy.parent / "pictures" / facts["name"]).read_bytes()
                picture = decode(data, (row["height"], row["width"]), config.images)
                np.testing.assert_array_equal(before, picture.pixels)
                seen += 1
            moments = np.load(io.BytesIO(found[key]["moments.npy"]))[None]
            noise = torch.zeros(1, 4, *moments.shape[2:])
            latents = sample_latents(torch.from_numpy(moments), noise, codec.normalisation)
            decoded = codec.decode(latents)[0].permute(1, 2, 0).numpy()
            np.testing.assert_allclose(after, decoded, atol=1)  # on the edge of rounding
    assert seen > 4
    sheet = np.asarray(Image.open(reference / "contact_sheet.png"))
    first = read_proof(reference, shard_list(reference / "work")[0].path)
    pair = (
        ImageOps.contain(Image.fromarray(first[n][0]), (128, 128)) for n in ("original", "decoded")
    )
    left = 24
    for picture in pair:
        shown = sheet[24 : 24 + picture.height, left : left + picture.width]
        np.testing.assert_array_equal(shown, np.asarray(picture))
        left += picture.width + 4


@pytest.mark.parametrize("suffix", [".tar", ".idx.npy", ".proof.safetensors"])
def test_a_committed_shard_that_was_cut_short_is_to_be_made_again(reference, tmp_path, suffix):
    copy = shutil.copytree(reference, tmp_path / "copy")
    assert unfinished(copy) == []
    path = sorted(copy.glob(f"shards/*/*{suffix}"))[-1]
    os.truncate(path, path.stat().st_size - 1)
    assert unfinished(copy) == [0]
    paths = [spec.path for spec in shard_list(copy / "work")]
    assert read_commits(copy, paths).count(None) == 1


def test_running_it_again_does_nothing(reference, messy, capsys):
    before, times = dataset_bytes(reference), commits(reference)
    run(messy, f"output={reference}", "ray.num_actors=3")  # another way to be fast
    assert "nothing to do" in capsys.readouterr().out
    assert (dataset_bytes(reference), commits(reference)) == (before, times)


@pytest.mark.slow
def test_killed_drivers_and_a_lost_shard_cost_nothing_but_time(reference, messy, ray_address):
    dataset = messy.parent / "killed"
    moments = [
        lambda: (dataset / "work" / "config.json").exists(),
        lambda: len(commits(dataset)) >= 1,
        lambda: len(commits(dataset)) >= 5,
    ]
    done: dict[str, tuple[int, int]] = {}
    for moment in moments:
        kill_driver(messy, ray_address, moment, f"output={dataset}", "ray.num_actors=1")
        now = commits(dataset)
        assert done.items() <= now.items()
        done = now
        assert not (dataset / "manifest.json").exists()
    lost, _ = done.popitem()
    Path(lost).unlink()
    cut, _ = done.popitem()
    os.truncate(cut, 1024)
    run(messy, f"output={dataset}")
    assert len(done) >= 3
    assert done.items() <= commits(dataset).items()
    assert dataset_bytes(dataset) == dataset_bytes(reference)
    counts = read_manifest(dataset).counts
    assert counts.kept + sum(counts.rejected.values()) == counts.seen == NUM_GOOD + NUM_BAD


@pytest.mark.slow
def test_what_is_there_is_published_while_preparing_goes_on(reference, messy, ray_address):
    dataset = messy.parent / "published"
    overrides = f"output={dataset}", "publish_every_shards=1"
    kill_driver(messy, ray_address, (dataset / "manifest.json").exists, *overrides)
    loader = Loader(DataConfig(path=str(dataset)), global_batch=2, seed=0)
    assert next(loader.batches()).moments.shape[0] == 2
    loader.close()
    early = read_manifest(dataset).counts.kept
    assert 0 < early < read_manifest(reference).counts.kept
    run(messy, *overrides)  # not taken for complete
    assert dataset_bytes(dataset) == dataset_bytes(reference)


def test_two_actors_one_of_them_killed_write_the_same_bytes_as_one(reference, messy, ray_address):
    dataset = messy.parent / "actor"

    def is_the_first_at_work(process: psutil.Process) -> bool:
        named = process.name().startswith("ray::ShardEncod")
        return named and not killed and bool(commits(dataset))

    with killing(is_the_first_at_work) as killed:
        run(messy, f"output={dataset}", "ray.num_actors=2", "ray.decoders_per_actor=2")
    assert killed
    assert dataset_bytes(dataset) == dataset_bytes(reference)


@pytest.mark.slow
def test_a_caption_that_kills_the_encoder_is_rejected_and_every_other_picture_is_kept(
    small, tmp_path, text_folder, ray_address, monkeypatch
):
    """A tokenizer whose pattern needs exponential time: on such a caption the library panics."""
    # With one attempt, a shard that was in the same worker would be blamed as well.
    monkeypatch.setattr(workers, "ATTEMPTS", 2)
    text = shutil.copytree(text_folder, tmp_path / "text")
    tokenizer = json.loads((text / "tokenizer.json").read_text())
    pattern = {"Regex": "poison(x+x+)+y"}
    tokenizer["normalizer"] = {"type": "Replace", "pattern": pattern, "content": "z"}
    (text / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "pictures" / "odd" / "0001.txt").write_text("poison" + "x" * 40)
    monkeypatch.setattr(sys, "argv", ["prepare", str(small), f"text_encoders.bert.path={text}"])
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 0
    dataset = tmp_path / "dataset"
    (reject,) = pq.read_table(dataset / "rejects.parquet").to_pylist()
    assert (reject["name"], reject["reason"]) == ("odd/0001.jpg", "encoder_crash")
    counts = read_manifest(dataset).counts
    assert (counts.seen, counts.kept, counts.rejected) == (4, 3, {"encoder_crash": 1})
    assert verify(dataset) == []


def test_a_table_that_kills_its_readers_is_rejected_and_every_other_picture_is_kept(
    small, tmp_path, ray_address
):
    (tmp_path / "tables").mkdir()
    deadly = tmp_path / "tables" / "deadly.parquet"
    rows = [{"image": encoded(pixels(100 + i)), "text": "volcano"} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), deadly)
    pq.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "tables" / "good.parquet")

    def reads_the_deadly(process: psutil.Process) -> bool:
        opened = process.open_files() if process.name() == "ray::_scan" else []
        return any(file.path == str(deadly) for file in opened)

    table = f"{{kind: table, path: {tmp_path / 'tables'}, captions: {{text: 1}}}}"
    with killing(reads_the_deadly) as killed:
        dataset = run(small, f"sources.t={table}")
    assert len(killed) == ATTEMPTS
    (reject,) = pq.read_table(dataset / "rejects.parquet").to_pylist()
    assert (reject["name"], reject["reason"]) == ("deadly.parquet", "scan_crash")
    assert read_manifest(dataset).counts.kept == 4 + 3


def test_a_batch_too_large_for_the_gpu_is_encoded_in_halves():
    batches = list[int]()

    def encode(values: list[int]) -> dict[str, list[int]]:
        batches.append(len(values))
        if len(values) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return {"double": [2 * value for value in values]}

    assert in_halves(encode, list(range(7))) == {"double": list(range(0, 14, 2))}
    assert batches == [7, 3, 1, 2, 4, 2, 2]

    def never(values: list[int]) -> dict[str, list[int]]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(InputError, match="a batch of one: CUDA out of memory"):
        in_halves(never, [1, 2])


SPEC = ShardSpec("shards/32x32/train-000000.tar", "train", 32, 32, 2)


def planned_shard(folder: Path, vae: Path, text: Path) -> EncoderSettings:
    """Settings of a ShardEncoder for SPEC: two pictures, of which the second changed since the scan."""
    rows = []
    for number in range(2):
        data = encoded(pixels(number))
        (folder / f"{number}.png").write_bytes(data)
        row = {"key": f"{number:020}", "source": "s", "name": "x.png", "metadata": ""}
        row |= {"path": str(folder / f"{number}.png"), "offset": 0, "length": len(data)}
        row |= {"content_hash": hashlib.sha256(data + bytes(number)).digest()}
        rows.append(row | {"height": 40, "width": 40, "captions": ["volcano"]})
    plan = folder / "dataset" / "work" / "plan" / "000000.parquet"
    write_table(plan, pa.Table.from_pylist(rows, CATALOG_SCHEMA))
    config = write_config(folder / "c.yaml", {"s": folder}, vae, text)
    return EncoderSettings(load_config(PrepareConfig, config, []), folder / "dataset")


def test_latents_that_float16_cannot_hold_are_rejected(tmp_path, text_folder):
    vae = save_kl(tmp_path / "vae")
    weights = vae / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["quant_conv.bias"] += 1e6
    safetensors.torch.save_file(tensors, weights)
    try:
        encoder = ShardEncoder(planned_shard(tmp_path, vae, text_folder), num_decoders=1)
        encoder.describe()
        commit = encoder.encode_shard(SPEC, 0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert commit["num_samples"] == 0
    assert sorted((r["reason"], r["detail"].split(":")[0]) for r in commit["rejects"]) == [
        ("changed_since_scan", "its bytes are no longer those that were scanned"),
        ("not_finite", "moments"),
    ]
    assert not (tmp_path / "dataset" / SPEC.path).exists()


class NamedEncoder(ShardEncoder):
    def worker(self) -> str:
        return ray.get_runtime_context().get_worker_id()


@pytest.mark.slow
def test_prometheus_reads_the_pictures_bytes_and_rejects_that_were_committed(
    tmp_path, vae_folder, text_folder, ray_address
):
    settings = planned_shard(tmp_path, vae_folder, text_folder)
    actor = ray.remote(NamedEncoder).remote(settings, 1)
    ray.get(actor.describe.remote())
    commit = ray.get(actor.encode_shard.remote(SPEC, 0))
    worker, node = ray.get(actor.worker.remote()), ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    expected = {"pictures": 1.0, "bytes": float(commit["bytes"]), "changed_since_scan": 1.0}
    found, deadline = {}, time.monotonic() + 120
    while found.keys() != expected.keys():
        assert time.monotonic() < deadline, f"got {found}"
        time.sleep(0.5)
        text = urllib.request.urlopen(address, timeout=60).read().decode()
        lines = [line for line in text.splitlines() if worker in line]
        for name, labels, value in re.findall(
            r"^ray_flowmill_(\w+)_total\{(.*)\} (\S+)$", "\n".join(lines), re.M
        ):
            reason = re.search('reason="(.*?)"', labels)
            found[reason[1] if reason else name] = float(value)
    assert found == expected
    ray.kill(actor)


def fails(capsys, monkeypatch, *arguments: str) -> str:
    """The message of a command that ends with exit status 2."""
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    shown = capsys.readouterr()
    assert caught.value.code == 2, shown
    assert "Traceback" not in shown.err
    return " ".join(shown.err.split())


@pytest.fixture
def small(tmp_path, vae_folder, text_folder) -> Path:
    return config_of_pictures(tmp_path, 4, vae_folder, text_folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sources.p.path=/gone", "sources.p.path: /gone: no such folder"),
        ("sources.p.kind=zip", "sources.p.kind: got 'zip'"),
        ("vae.path=/gone/vae", "vae.path: /gone/vae: no such folder, expected a diffusers"),
        ("text_encoders.bert.path=/gone", "text_encoders.bert.path: /gone: no such folder"),
        ("text_encoders.micro={path: x}", "micro is the name of another member"),
        ("images.resolution=100", "is not a multiple of bucket_multiple"),
        ("output=/proc/nothing/here", "output: cannot write /proc/nothing/here"),
        ("output=${sources.p.path}/out", "lies in sources.p.path"),
    ],
)
def test_a_wrong_setting_ends_with_one_message(small, capsys, monkeypatch, override, message):
    assert message in fails(capsys, monkeypatch, str(small), override)


def test_every_encoder_that_is_not_there_is_named_at_once(small, capsys, monkeypatch):
    message = fails(
        capsys, monkeypatch, str(small), "vae.path=/gone/vae", "text_encoders.bert.path=/gone"
    )
    assert "vae.path: /gone/vae: no such folder" in message
    assert "text_encoders.bert.path: /gone: no such folder" in message


def test_a_folder_without_pictures_or_an_output_with_other_files_is_refused_and_left_as_it_is(
    small, tmp_path, capsys, monkeypatch
):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    message = fails(capsys, monkeypatch, str(small), f"sources.p.path={tmp_path / 'texts'}")
    assert "no pictures there; got 1 .txt, expected files ending in ." in message
    assert not (tmp_path / "dataset").exists()
    message = fails(capsys, monkeypatch, str(small), f"output={tmp_path / 'texts'}")
    assert "holds other files (a.txt)" in message


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RAY_ADDRESS", "http://127.0.0.1:8265", "a dashboard's address, expected HOST:PORT"),
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}", "expected an absolute path"),
    ],
)
def test_a_dashboards_address_and_a_jobs_relative_output_are_refused(
    small, tmp_path, capsys, monkeypatch, variable, value, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value)
    monkeypatch.chdir(small.parent)
    assert message in fails(capsys, monkeypatch, str(small), "output=here")


def test_another_config_on_the_same_output_is_refused_with_the_difference(reference, messy):
    with pytest.raises(InputError) as caught:
        run(messy, f"output={reference}", "images.resolution=64", "captions.empty=keep")
    assert "captions.empty: reject -> keep\n  images.resolution: 32 -> 64\n" in str(caught.value)
    assert "encode" not in str(caught.value)


def begin(config: Path, *overrides: str, restart: bool = False) -> Path:
    """All of a preparation that comes before the work."""
    settings = load_config(PrepareConfig, config, list(overrides))
    decisive, listing = check_settings(settings), list_sources(settings)
    dataset, found = open_output(settings, decisive, listing, restart)
    refuse_changes(settings, found, False, lambda: None)
    return dataset


def test_other_weights_under_the_same_path_are_refused(small, tmp_path):
    shutil.copytree(yaml.safe_load(small.read_text())["vae"]["path"], tmp_path / "vae")
    begin(small, f"vae.path={tmp_path / 'vae'}")
    with open(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    with pytest.raises(InputError, match=r"hashes\.vae\.weights: \w+ -> \w+"):
        begin(small, f"vae.path={tmp_path / 'vae'}")


@pytest.fixture(scope="module")
def three_encoders(tmp_path_factory, vae_folder, text_folder) -> Path:
    """A config of four pictures for an encoder of every kind."""
    folder = tmp_path_factory.mktemp("three")
    vision = {"path": str(save_vision(folder / "vit")), "patch_pixels": 8}
    return config_of_pictures(folder, 4, vae_folder, text_folder, vision_encoder=vision)


@pytest.mark.parametrize("place", ["vae", "text_encoders.bert", "vision_encoder"])
def test_an_encoder_is_known_by_what_is_loaded_and_not_by_its_path(three_encoders, tmp_path, place):
    output = f"output={tmp_path / 'dataset'}"
    begin(three_encoders, output)
    encoder = configured(load_config(PrepareConfig, three_encoders, []))[place]
    copy = shutil.copytree(encoder.path, tmp_path / "copy")
    given = [output, f"{place}.path={copy}"]
    saved = json.loads((copy / "config.json").read_text())
    saved |= {"_name_or_path": "elsewhere", "transformers_version": "9"}
    (copy / "config.json").write_text(json.dumps(saved))
    (copy / "model.fp16.safetensors").write_bytes(b"a twin")
    begin(three_encoders, *given)
    (copy / "config.json").write_text(json.dumps(saved | {"layer_norm_eps": 1e-3}))
    with pytest.raises(InputError, match=rf"hashes\.{place}\.config: \w+ -> \w+"):
        begin(three_encoders, *given)


def test_sources_that_changed_are_refused_until_a_restart(small, tmp_path, capsys):
    dataset = begin(small)
    (dataset / "manifest.json").write_text("{}")
    fill_folder(tmp_path / "pictures", 2, first=4)
    (tmp_path / "pictures" / "odd" / "0001.jpg").unlink()
    with pytest.raises(InputError) as caught:
        begin(small)
    assert "files 1 gone (p/odd/0001.jpg) since generation 0" in str(caught.value)
    assert "go on with the 2 new files" in str(caught.value)
    begin(small, restart=True)
    assert f"deleted {dataset / 'manifest.json'}" in capsys.readouterr().out
    assert not (dataset / "manifest.json").exists()
    begin(small)


@pytest.mark.slow
def test_files_that_are_no_pictures_come_and_go_without_another_dataset(
    small, tmp_path, ray_address
):
    folder, output = tmp_path / "pictures", f"output={tmp_path / 'other'}"
    (folder / "a.pdf").write_text("x")
    begin(small)
    (folder / "a.pdf").unlink()
    for name in ("b.doc", ".DS_Store", "even/c.csv"):
        (folder / name).write_text("x")
    first, second = read_manifest(run(small)), read_manifest(run(small, output))
    assert first.counts.other_files == {"pdf": 1}
    assert second.counts.other_files == {"": 1, "csv": 1, "doc": 1}
    assert (first.id, first.counts.kept) == (second.id, second.counts.kept)
    one, two = (dataset_bytes(tmp_path / name) for name in ("dataset", "other"))
    shards = {name for name in one if name.startswith("shards/")}
    assert shards
    assert all(one[name] == two[name] for name in shards)
    begin(small)


def test_where_every_picture_is_rejected_the_reasons_are_counted(small, ray_address):
    with pytest.raises(InputError, match="of 4 pictures none is left: 4 too_small"):
        run(small, "filters.min_side=1000")


def refused(capsys, monkeypatch, config: Path, output: Path) -> str:
    """The message of a preparation that ends before Ray starts or anything is written."""
    monkeypatch.setenv(
        "RAY_ADDRESS", "http://a dashboard, which is refused as soon as Ray is asked for"
    )
    message = fails(capsys, monkeypatch, str(config))
    assert not output.exists()
    return message


CODECS = {"kl": save_kl, "tiny": save_tiny, "dc": save_dc}


@pytest.mark.parametrize("multiple", [4, 12, 16])
@pytest.mark.parametrize("kind", CODECS)
def test_buckets_that_do_not_fit_the_codec_are_refused_before_anything_starts(
    tmp_path, text_folder, capsys, monkeypatch, kind, multiple
):
    vae, pictures = CODECS[kind](tmp_path / "vae"), fill_folder(tmp_path / "p", 1)
    images = {"resolution": 96, "bucket_multiple": multiple}
    config = write_config(tmp_path / "c.yaml", {"p": pictures}, vae, text_folder, images=images)
    settings = load_config(PrepareConfig, config, [])
    downscale = LatentCodec(vae).downscale
    assert settings.vae.divides == downscale
    if multiple % downscale == 0:
        check_settings(settings)
        return
    message = refused(capsys, monkeypatch, config, tmp_path / "dataset")
    assert f"got {multiple}, expected a multiple of {downscale}, for vae." in message


BAD_CAPTIONS = [
    "a {style} photo of a {name}", "{", "}", "{}", "{0}", "{name[1]}", "{name[a]}", "{name.x}",
    "{name:d}", "{name!z}", "{Name}", '{"a": 1}', "{name} {", "{{name}", "{name:{width}}",
]  # fmt: skip


@pytest.mark.parametrize("caption", BAD_CAPTIONS)
def test_a_caption_with_a_field_that_is_none_is_refused_before_anything_starts(
    tmp_path, vae_folder, text_folder, capsys, monkeypatch, caption
):
    fill_folder(tmp_path / "classes" / "cat", 1)
    source = {"kind": "classes", "path": str(tmp_path / "classes"), "caption": caption}
    config = write_config(tmp_path / "c.yaml", {"c": source}, vae_folder, text_folder)
    message = refused(capsys, monkeypatch, config, tmp_path / "dataset")
    assert "sources.c.caption: " in message
    assert "expected text with {name}, and {{ for a brace" in message


@pytest.mark.parametrize(
    ("place", "more", "changes", "message"),
    [
        ("vae", {}, {"block_out_channels": None}, "lacks block_out_channels"),
        ("text_encoders.bert", {"max_length": 13}, {}, "max_length got 13, expected at most 12"),
        ("vision_encoder", {"patch_pixels": 16}, {}, "a multiple of 16, for vision_encoder"),
        ("vision_encoder", {}, {"model_type": "clip"}, "'clip', expected one of dinov2"),
    ],
)
def test_an_encoder_that_cannot_be_used_so_is_refused_before_anything_starts(
    three_encoders, tmp_path, capsys, monkeypatch, place, more, changes, message
):
    settings = yaml.safe_load(three_encoders.read_text())
    section = settings
    for name in place.split("."):
        section = section[name]
    copy = shutil.copytree(section["path"], tmp_path / "copy")
    saved = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(saved | changes))
    section |= {"path": str(copy)} | more
    settings["output"] = str(tmp_path / "dataset")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    shown = refused(capsys, monkeypatch, tmp_path / "c.yaml", tmp_path / "dataset")
    assert message in shown
    assert place in shown


def test_more_gpus_than_there_are_is_an_error_and_no_endless_wait(small, ray_address):
    with pytest.raises(InputError, match=r"1 actors of 7 GPUs each, expected no more than the \d"):
        run(small, "ray.gpus_per_actor=7")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_ray_job_runs_the_uploaded_code_with_nothing_installed(
    tmp_path, text_folder, job_cluster
):
    """From a copy of the repository, so that what git ignores is there to be left behind."""
    copy = copy_checkout(tmp_path / "flowmill")
    (copy / "outputs").mkdir()
    (copy / "outputs" / "large.bin").write_bytes(b"x" * 100)
    sources = messy_sources(tmp_path)
    write_config(copy / "job.yaml", sources, Path("./models/demo_vae"), text_folder)
    arguments = f"job.yaml output={tmp_path / 'dataset'} images.bucket_multiple=16"
    which = f"{sys.executable} -c 'import data_prep; print(data_prep.__file__)'"
    entry = f"ls -a; {which}; {sys.executable} -m data_prep.prepare {arguments}"
    done = subprocess.run(
        [RAY, "job", "submit", "--working-dir", ".", "--", "bash", "-c", entry],
        cwd=copy,
        env=job_cluster.environment,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "job.yaml" in done.stdout
    assert "\noutputs\n" not in done.stdout
    assert re.search(r"^/.*_ray_pkg.*/data_prep/__init__.py$", done.stdout, re.M)
    assert read_manifest(tmp_path / "dataset").counts.kept == NUM_GOOD
    assert verify(tmp_path / "dataset") == []


def test_a_sample_foretells_pictures_shards_and_bytes_of_the_whole(
    tmp_path, text_folder, ray_address, capsys
):
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(5):
        members = [m for i in range(12) for m in sample_members(100 * number + i)]
        (tars / f"{number}.tar").write_bytes(tar_bytes(members))
    sources = {"mine": fill_folder(tmp_path / "pictures", 64), "web": tars}
    more = {"heldout_fraction": 0.1, "filters": {"max_aspect": 1.2}, "samples_per_shard": 50}
    vae = save_kl(tmp_path / "vae", scaling_factor=100.0)
    path = write_config(tmp_path / "c.yaml", sources, vae, text_folder, **more)
    config = load_config(PrepareConfig, path, [])
    found = report(config, 64, rate=0.5)
    said = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    hours = duration(found.kept / 0.5)
    assert f"speed 0.5 pictures/s with one actor, as stated time {hours} with 1 actor," in said
    prepare(config)
    dataset = Path(config.output)
    table = read_shard_table(dataset)
    counts = read_manifest(dataset).counts
    assert found.pictures == counts.seen == 124
    assert abs(found.kept / counts.kept - 1) < 0.15
    assert abs(found.shards - len(table)) <= 1
    every = sum(p.stat().st_size for p in (dataset / "shards").rglob("*.*"))
    assert abs(found.total_bytes / found.kept / (every / counts.kept) - 1) < 0.05
    assert found.seconds_per_picture > 0
    members = read_manifest(dataset).members
    assert {name: dtype for name, (dtype, _) in found.members.items()} == {
        name: member.dtype for name, member in members.items()
    }
    indices = [read_index(dataset / index_path(path)) for path in table["path"].to_pylist()]
    written = np.concatenate(indices)[..., 1].mean(axis=0).tolist()
    sizes = [size for _, size in found.members.values()]
    assert sizes == pytest.approx(written, rel=0.05)
    doubts = (found.doubt, read_manifest(dataset).latent_doubt())
    stds = [float(re.search(r"have a std of ([\d.]+),", doubt)[1]) for doubt in doubts]
    assert stds[0] == pytest.approx(stds[1], rel=0.1)
    assert not list(Path(tempfile.gettempdir()).glob("flowmill-plan-*"))


def test_a_sample_of_which_nothing_is_kept_is_said_with_the_reason(
    tmp_path, text_folder, ray_address
):
    vae = save_kl(tmp_path / "vae")
    weights = vae / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["quant_conv.bias"] += 1e6
    safetensors.torch.save_file(tensors, weights)
    sources = {"mine": fill_folder(tmp_path / "pictures", 4)}
    path = write_config(tmp_path / "c.yaml", sources, vae, text_folder)
    with pytest.raises(InputError, match=r"every picture of the sample .*: not_finite\. Remedy"):
        estimate(load_config(PrepareConfig, path, []), 4)


def test_arrays_that_samples_of_a_picture_share_are_counted_once(tmp_path):
    index = np.array([[[512, 64], [1024, 10]], [[512, 64], [2048, 20]]])
    np.save(tmp_path / index_path("a.tar"), index)
    found = bytes_by_member(tmp_path, ["a.tar", "a.tar"], ["moments", "t5"])
    assert found == {"moments": 2 * 64, "t5": 2 * 30}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_full_disk_ends_every_stage_with_one_message_and_what_was_done_is_kept(
    messy, reference, tmp_path, ray_address, capsys, monkeypatch
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=4k", "none", str(disk)]).returncode:
        pytest.skip("nothing can be mounted here")
    dataset, stages = disk / "dataset", set[str]()
    try:
        for size in [4, 24, 60, 100, 160, 240, 340, 480, 700, 1000, 1500, 2500, 10_000]:
            subprocess.run([*mount, f"remount,size={size}k", "none", str(disk)], check=True)
            monkeypatch.setattr(sys, "argv", ["prepare", str(messy), f"output={dataset}"])
            with pytest.raises(SystemExit) as caught:
                run_command(main)
            shown = capsys.readouterr()
            if caught.value.code == 0:
                break
            assert caught.value.code == 2, shown
            assert "o space left on device" in " ".join(shown.err.split())
            stages.add(str(sorted(p.name for p in (dataset / "work").glob("*.*"))))
        assert dataset_bytes(dataset) == dataset_bytes(reference)
        assert size < 10_000
        assert len(stages) >= 3
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("number", FULL)
def test_each_way_in_which_a_disk_is_full_is_said_and_another_error_stays(number):
    with (
        pytest.raises(InputError, match=r"^out: no room to write /a/b \(.*\)\. .*again"),
        full_disk_is_said("out"),
    ):
        raise OSError(number, "", "/a/b")
    with pytest.raises(PermissionError), full_disk_is_said("out"):
        raise PermissionError(13, "", "/a/b")


@pytest.mark.parametrize(
    ("override", "left"),
    [
        ("text_encoders.bert=null", lambda c: c.text_encoders == {}),
        ("sources.more=null", lambda c: c.sources.keys() == {"p"}),
        ("sources.more.captions.text=null", lambda c: c.sources["more"].captions == {"alt": 1.0}),
        ("filters.metadata.aesthetic=null", lambda c: c.filters.metadata == {}),
    ],
)
def test_null_on_the_command_line_takes_one_of_several_out(
    tmp_path, vae_folder, text_folder, override, left
):
    pictures = {"kind": "folder", "path": str(fill_folder(tmp_path / "p", 1))}
    table = {"kind": "table", "path": "t", "captions": {"text": 1, "alt": 1}}
    path = write_config(
        tmp_path / "c.yaml",
        {"p": pictures, "more": table},
        vae_folder,
        text_folder,
        filters={"metadata": {"aesthetic": {"min": 5}}},
    )
    assert not left(load_config(PrepareConfig, path, []))
    assert left(load_config(PrepareConfig, path, [override]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_encoders_weigh_what_their_parameters_take(three_encoders, dtype):
    settings = yaml.safe_load(three_encoders.read_text())
    sections = [settings["vae"], settings["text_encoders"]["bert"], settings["vision_encoder"]]
    numbers = 0
    for section in sections:
        section["dtype"] = dtype
        for file in Path(section["path"]).glob("*.safetensors"):
            numbers += sum(tensor.numel() for tensor in safetensors.torch.load_file(file).values())
    weight = weight_of(PrepareConfig.model_validate(settings)) - PROCESS_BYTES
    assert weight == pytest.approx(numbers * (4 if dtype == "fp32" else 2) * 1.25, abs=2)


def rewritten(path: Path, data: bytes) -> None:
    """Another content in the file's place, with the time of the moment."""
    path.write_bytes(data)
    os.utime(path, ns=(time.time_ns(), time.time_ns()))


def other_pixels(path: Path) -> bytes:
    """A picture's bytes with another colour of one pixel and the same length."""
    image = Image.open(path).convert("RGB")
    image.putpixel((0, 0), tuple(255 - v for v in image.getpixel((0, 0))))
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return buffer.getvalue()


def every_kind(folder: Path) -> dict[str, dict]:
    """A source of each kind, with pictures of the same length whatever they show."""
    names = ("plain", "web", "rows", "meta", "kinds", "behind")
    places = {name: folder / name for name in names}
    pictures = [encoded(pixels(i), "BMP") for i in range(12)]
    for place in places.values():
        place.mkdir()
    for i in (0, 1):
        (places["plain"] / f"{i}.bmp").write_bytes(pictures[i])
        (places["plain"] / f"{i}.txt").write_text("a red apple")
    members = [("a.bmp", pictures[2]), ("a.txt", b"volcano"), ("b.bmp", pictures[3])]
    (places["web"] / "0.tar").write_bytes(tar_bytes([*members, ("b.txt", b"apple 1")]))
    for i in (4, 5):
        (places["behind"] / f"{i}.bmp").write_bytes(pictures[i])
    lines = "image,caption\n../behind/4.bmp,a red apple\n../behind/5.bmp,a green one\n"
    (places["rows"] / "t.csv").write_text(lines)
    (places["meta"] / "6.bmp").write_bytes(pictures[6])
    (places["meta"] / "metadata.jsonl").write_text('{"file_name": "6.bmp", "text": "an apple"}\n')
    rows = [{"image": pictures[7], "caption": "bytes"}]
    pq.write_table(pa.Table.from_pylist(rows), places["rows"] / "u.parquet", compression="none")
    kinds = {"plain": "folder", "web": "tars", "rows": "table", "meta": "imagefolder"}
    return {name: {"kind": kind, "path": str(places[name])} for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def one_of_each(tmp_path_factory, vae_folder, text_folder, ray_address) -> Path:
    """The config of a finished preparation of every kind of source."""
    folder = tmp_path_factory.mktemp("each")
    config = write_config(folder / "c.yaml", every_kind(folder), vae_folder, text_folder)
    run(config)
    return config


CHANGES = {
    "plain/0.bmp": (other_pixels, "plain/0.bmp"),
    "plain/1.txt": (lambda p: p.read_bytes().replace(b"red", b"big"), "plain/1.bmp"),
    "web/0.tar": (lambda p: p.read_bytes().replace(b"apple 1", b"apple 2"), "web/0.tar/b"),
    "rows/t.csv": (lambda p: p.read_bytes().replace(b"green", b"white"), "rows/t.csv/000000001"),
    "behind/4.bmp": (other_pixels, "rows/t.csv/000000000"),
    "rows/u.parquet": (
        lambda p: p.read_bytes().replace(b"bytes", b"BYTES"),
        "rows/u.parquet/000000000",
    ),
    "meta/6.bmp": (other_pixels, "meta/metadata.jsonl/000000000"),
    "meta/metadata.jsonl": (
        lambda p: p.read_bytes().replace(b"an", b"no"),
        "meta/metadata.jsonl/000000000",
    ),
}
AT_ONCE = ("plain/1.txt", "behind/4.bmp")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in AT_ONCE else pytest.mark.slow) for n in CHANGES],
)
def test_a_change_that_keeps_the_size_is_named_and_the_old_content_is_no_change(
    one_of_each, capsys, name
):
    path, (change, told) = one_of_each.parent / name, CHANGES[name]
    before, data = path.read_bytes(), change(path)
    assert len(data) == len(before)
    assert data != before
    rewritten(path, data)
    try:
        with pytest.raises(InputError) as caught:
            run(one_of_each)
    finally:
        rewritten(path, before)
    assert f"1 changed ({told})" in str(caught.value)
    assert "Remedy: restore them, --allow-missing to go on with the 0 new files" in str(
        caught.value
    )
    capsys.readouterr()
    run(one_of_each)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_copied_source_is_no_change_and_is_looked_through_once(one_of_each, capsys):
    for path in [p for p in one_of_each.parent.rglob("*") if "dataset" not in p.parts]:
        if path.is_file():
            rewritten(path, path.read_bytes())
    before = dataset_bytes(one_of_each.parent / "dataset")
    for _ in range(2):
        run(one_of_each)
        assert "nothing to do" in capsys.readouterr().out
    listed = (one_of_each.parent / "dataset" / "work" / "listing.parquet").stat().st_mtime_ns
    run(one_of_each)
    again = (one_of_each.parent / "dataset" / "work" / "listing.parquet").stat().st_mtime_ns
    assert again == listed
    assert dataset_bytes(one_of_each.parent / "dataset") == before
