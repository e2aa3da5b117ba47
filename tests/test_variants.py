"""One picture, several samples: captions by weight, mirror images, labels; prepared from bytes in Parquet."""

import io
import json
import shutil
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from webdataset.compat import WebDataset

from data_prep.audit import audit_shard, verify
from data_prep.config import PrepareConfig
from data_prep.images import ImagesConfig, decode
from data_prep.preparation import prepare
from data_prep.schema import index_path, read_index, read_manifest, read_shard_table
from models.command import load_config
from models.files import file_sha256
from models.text_conventions import View
from models.text_encoder import TextEncoder
from models.vae import LatentCodec
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from tests.prep_factory import encoded, pixels, write_config

NUM = 20
# Pictures of this size are cropped to four fifths of their width; resized, they have 8 pixels to spare.
SIZE, SPARE = (40, 50), 8
CAPTIONS = {"often": 3.0, "seldom": 1.0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, vae_folder, text_folder, ray_address):
    """20 labelled pictures with two captions each, cropped anywhere, mirrored too, a fifth held out."""
    folder = tmp_path_factory.mktemp("variants")
    columns = {
        "image": [{"bytes": encoded(pixels(i, *SIZE)), "path": f"{i}.png"} for i in range(NUM)],
        "often": [f"a picture often called {i}" for i in range(NUM)],
        "seldom": [f"seldom {i}" for i in range(NUM)],
        "label": [i % 3 for i in range(NUM)],
        "score": [i / NUM for i in range(NUM)],
    }
    pq.write_table(pa.table(columns), folder / "t.parquet", row_group_size=7)
    table = {
        "kind": "table",
        "path": str(folder / "t.parquet"),
        "captions": CAPTIONS,
        "label": "label",
    }
    config = write_config(
        folder / "c.yaml",
        {"t": table},
        vae_folder,
        text_folder,
        images={"resolution": 32, "bucket_multiple": 8, "flip": True, "crop": "random"},
        captions={"per_picture": 4},
        filters={"metadata": {"score": {"min": 0.1}}, "near_duplicates": 0},
        heldout_fraction=0.2,
    )
    prepare(load_config(PrepareConfig, config, []))
    return folder / "dataset"


def samples(dataset):
    """(shard row, members of a picture, its rows of the index as names of arrays)."""
    for row in read_shard_table(dataset).to_pylist():
        path = dataset / row["path"]
        index = read_index(dataset / index_path(row["path"]))
        members = list(read_manifest(dataset).members)
        with tarfile.open(path) as tar:
            place = {}
            for info in tar:
                head = 10 + int.from_bytes(tar.extractfile(info).read(10)[8:], "little")
                place[info.offset_data + head] = info.name.split(".", 1)
        rows = [[place[offset] for offset, _ in sample] for sample in index.tolist()]
        for sample in WebDataset(str(path), shardshuffle=False, empty_check=False):
            mine = [r for r in rows if r[0][0] == sample["__key__"]]
            assert all(key == sample["__key__"] for r in mine for key, _ in r)
            yield row, sample, [dict(zip(members, [n for _, n in r], strict=True)) for r in mine]


def test_every_picture_has_its_samples_in_the_index_and_its_arrays_once_in_the_tar(dataset):
    splits, count = Counter(), 0
    for row, sample, variants in samples(dataset):
        flips = 2 if row["split"] == "train" else 1
        assert len(variants) == 4 * flips
        texts = Counter(variant["bert"] for variant in variants)
        assert sorted(texts.values()) == [flips, 3 * flips]
        drawn = json.loads(sample["json"])["captions"]
        first, second = dict.fromkeys(drawn)
        assert [first if v["bert"] == "bert.npy" else second for v in variants] == drawn * flips
        assert {first[:5], second[:5]} == {"a pic", "seldo"}
        names = {"bert.npy": first, "bert.2.npy": second}
        assert names[texts.most_common(1)[0][0]].startswith("a picture often")
        assert Counter(v["moments"] for v in variants) == (
            {"moments.npy": 4, "moments.flip.npy": 4} if flips == 2 else {"moments.npy": 4}
        )
        splits[row["split"]] += 1
        count += 1
    assert count == NUM - 2
    assert splits["heldout"] >= 1
    counts = read_manifest(dataset).counts
    assert (counts.seen, counts.kept, counts.rejected) == (NUM, NUM - 2, {"metadata": 2})


def test_what_is_stored_is_what_the_encoders_say_of_mirror_image_and_second_caption(dataset):
    config = yaml.safe_load((dataset.parent / "c.yaml").read_text())
    codec = LatentCodec(config["vae"]["path"])
    text = TextEncoder(config["text_encoders"]["bert"]["path"], View(max_length=8))
    lefts = []
    for row, sample, _ in samples(dataset):
        facts = json.loads(sample["json"])
        number = int(facts["name"].split("/")[1])
        load = {n: np.load(io.BytesIO(d)) for n, d in sample.items() if n.endswith(".npy")}
        assert load["label.npy"] == number % 3
        height, width, top, left = load["micro.npy"].tolist()
        assert (height, width, top) == (*SIZE, 0)
        lefts.append(left / SPARE)
        tokens, mask, _ = text.encode([list(dict.fromkeys(facts["captions"]))[1]])
        np.testing.assert_allclose(load["bert.2.npy"], tokens[0][mask[0]], rtol=2e-3, atol=2e-3)
        if row["split"] == "train":
            images = ImagesConfig(**config["images"])
            data, crop_at = encoded(pixels(number, *SIZE)), (0.0, left / SPARE)
            picture = decode(data, (32, 32), images, crop_at).pixels[:, ::-1].copy()
            assert load["micro.flip.npy"][3] == pytest.approx(SPARE - left, abs=1e-4)  # fp32
            batch = torch.from_numpy(picture).permute(2, 0, 1)[None]
            moments = codec.encode_moments(batch)[0].numpy()  # fp16 on disk makes the tolerance
            np.testing.assert_allclose(load["moments.flip.npy"], moments, rtol=2e-3, atol=2e-3)
    # Uniform in [0, 1): a quarter of 18 places each side of it is missed once in 90 such sets.
    assert min(lefts) < 0.25 < 0.75 < max(lefts)


def test_the_audit_finds_nothing_wrong_but_an_index_that_leaves_out_the_mirror_image(
    dataset, tmp_path
):
    assert verify(dataset) == []
    copy = shutil.copytree(dataset, tmp_path / "copy", ignore=shutil.ignore_patterns("work"))
    row = next(r for r in read_shard_table(copy).to_pylist() if r["split"] == "train")
    assert audit_shard(copy, read_manifest(copy), row)[0] == ""
    path = copy / index_path(row["path"])
    index = np.load(path)
    index[4:8, 0] = index[0:4, 0]
    np.save(path, index)
    row["index_sha256"] = file_sha256(path)
    problem, *_ = audit_shard(copy, read_manifest(copy), row)
    assert problem.endswith("moments.flip: the index leads nowhere to it")


def test_training_reads_every_sample_once_an_epoch_and_knows_its_picture(dataset):
    config = DataConfig(path=str(dataset), prefetch=0, canonical_partitions=1)
    loader = Loader(config, global_batch=1, seed=0)
    train = sum(
        r["num_samples"] for r in read_shard_table(dataset).to_pylist() if r["split"] == "train"
    )
    batches = loader.batches()
    seen, keys = Counter(), Counter()
    for _ in range(train):
        batch = next(batches)
        assert batch.epoch == 0
        seen[int(batch.sample_ids[0]), int(batch.label[0])] += 1
        where = loader.first.mixture.locate(int(batch.sample_ids[0]))
        assert int(where["caption"].split()[-1]) % 3 == int(batch.label[0])
        keys[where["key"]] += 1
    assert len(seen) == train
    assert len(set(keys.values())) == 1  # each picture has as many samples as any other


def test_the_report_is_one_file_with_the_numbers_and_the_pictures(dataset):
    page = (dataset / "report.html").read_text()
    manifest = read_manifest(dataset)
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert '<td>rejected: metadata</td><td class="number">2</td>' in page
    shown = sum(f"a picture often called {i}<br><span>32x32" in page for i in range(NUM))
    shown += sum(f"seldom {i}<br><span>32x32" in page for i in range(NUM))
    assert shown == page.count("<figure>") == 10
    assert page.count("<td>metadata</td><td>t</td>") == 2
    assert "<td>2 to 4</td>" in page
    psnr = manifest.generations[0].psnr_db
    assert f"{psnr} dB" in page
    assert f"{manifest.latent_std[0]:.4f}" in page
    assert 0 < psnr < 60


def test_staged_bytes_are_gone_when_all_is_done_and_laid_out_again_where_a_shard_is_lost(
    dataset, ray_address
):
    config = load_config(PrepareConfig, dataset.parent / "c.yaml", [])
    assert not (dataset / "work" / "staged").exists()
    path = dataset / read_shard_table(dataset).to_pylist()[0]["path"]
    before = path.read_bytes()
    path.unlink()
    prepare(config)
    assert path.read_bytes() == before
    assert not (dataset / "work" / "staged").exists()
