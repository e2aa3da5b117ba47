"""Layers over a base: the batches of a stack are those of one dataset that has all, and what is not one is refused."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_prep.schema import MANIFEST, SHARD_SCHEMA, SHARD_TABLE, index_path, read_manifest
from models.config import InputError
from models.files import file_sha256
from pipeline.data.batch import Batch
from pipeline.data.cache import ShardError
from pipeline.data.config import DataConfig
from pipeline.data.eras import ERAS
from pipeline.data.loader import Loader
from tests.shard_factory import Kind, make_dataset

SQUARE, WIDE = (32, 32), (16, 64)
PLAN = [(SQUARE, 13), (WIDE, 9), (SQUARE, 21), (WIDE, 16), (SQUARE, 8)]
WHOLE = Kind({"clip": (5, 4), "t5": (7, 6)}, label=True)
BELOW = replace(WHOLE, only=("moments", "clip", "clip_pooled", "micro", "label"))
T5 = replace(WHOLE, only=("t5", "t5_pooled"))
CLIP = replace(WHOLE, only=("clip", "clip_pooled"), caption="another")


def take(config: DataConfig, count: int, ranks: int = 1, **options) -> list[Batch]:
    """Batches of every rank, step by step, copied."""
    loaders = [
        Loader(config, global_batch=8, seed=1, rank_of=(rank, ranks), **options)
        for rank in range(ranks)
    ]
    taken = [[b._map(torch.clone) for b in itertools.islice(x.batches(), count)] for x in loaders]
    return [batch for step in zip(*taken, strict=True) for batch in step]


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    """Every tensor of every batch, bit for bit."""
    assert len(one) == len(other) > 0
    for a, b in zip((b.to("cpu") for b in one), (b.to("cpu") for b in other), strict=True):
        tensors = {name: value for name, value in vars(a).items() if torch.is_tensor(value)}
        assert {"moments", "text_emb", "text_mask", "micro"} <= tensors.keys()
        assert a.bucket == b.bucket
        for name, value in tensors.items():
            assert torch.equal(value, getattr(b, name)), name


def stack(base: Path, **layers: Path) -> DataConfig:
    return DataConfig(path=str(base), layers={name: str(path) for name, path in layers.items()})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "base", PLAN, BELOW, heldout=[(SQUARE, 6)])


def layer(base: Path, name: str, kind: Kind = T5, **options) -> Path:
    options = {"heldout": [(SQUARE, 6)]} | options
    return make_dataset(base.parent / name, PLAN, kind, base=base, **options)


@pytest.mark.parametrize("pad_text", ["max", "longest"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_batches_of_a_stack_are_those_of_a_dataset_prepared_at_once(
    base, tmp_path, ranks, pad_text, seed
):
    rng = np.random.default_rng(seed)
    # The second layer hides the base's own clip, and is missing other rows.
    gone = [set(rng.choice(73, 10, replace=False).tolist()) for _ in range(2)]
    layers = {"t5": layer(base, "t5", missing=gone[0])}
    layers["clip"] = layer(base, "clip", replace(CLIP, caption="number"), missing=gone[1])
    at_once = make_dataset(
        tmp_path / "whole", PLAN, WHOLE, heldout=[(SQUARE, 6)], missing=gone[0] | gone[1]
    )
    config = stack(base, **layers).model_copy(update={"pad_text": pad_text})
    flat = DataConfig(path=str(at_once), pad_text=pad_text)
    assert_same(take(config, 25, ranks), take(flat, 25, ranks))
    held = (Loader(c, global_batch=8, seed=1) for c in (config, flat))
    assert_same(*(loader.heldout_batches(4) for loader in held))


def test_a_layer_alone_opens_with_its_base_and_its_place_is_that_of_its_rows(base):
    t5 = layer(base, "t5", missing={3, 4, 40})
    alone, named = DataConfig(path=str(t5)), stack(base, t5=t5)
    assert_same(take(alone, 10), take(named, 10))
    loader = Loader(alone, global_batch=8, seed=1)
    mixture, batch = loader.first.mixture, next(loader.batches())
    for number, sample in zip(batch.micro[:, 0].tolist(), batch.sample_ids.tolist(), strict=True):
        assert mixture.locate(sample)["key"] == f"{int(number):08d}"
        assert mixture.locate(sample)["caption"] == f"number {int(number)}"
    assert loader.manifest.counts.kept == 73 - 3


def test_a_layer_of_other_captions_hides_all_text_below_it(base):
    t5, clip = layer(base, "t5"), layer(base, "recaption", CLIP, missing={5})
    loader = Loader(stack(base, t5=t5, recaption=clip), global_batch=8, seed=1)
    assert list(loader.manifest.text.roles) == ["clip"]
    assert list(loader.manifest.members) == ["moments", "clip", "clip_pooled", "micro", "label"]
    batch = next(loader.batches())
    samples = [loader.first.mixture.locate(i) for i in batch.sample_ids.tolist()]
    assert [s["caption"] for s in samples] == [f"another {int(s['key'])}" for s in samples]
    # The hidden layer's missing rows do not count.
    assert loader.manifest.counts.kept == 73 - 1


def test_text_of_the_bases_captions_is_refused_over_a_layer_of_others(base):
    t5, clip = layer(base, "t5"), layer(base, "recaption", CLIP)
    wrong = r"layers.t5: its captions are not those of layers.recaption \(shards/16x64/.*prepare t5"
    with pytest.raises(InputError, match=wrong):
        Loader(stack(base, recaption=clip, t5=t5), global_batch=8, seed=1)
    both = layer(base, "t5", replace(T5, caption="another"))
    loader = Loader(stack(base, recaption=clip, t5=both), global_batch=8, seed=1)
    assert list(loader.manifest.text.roles) == ["clip", "t5"]


def rewrite(dataset: Path, **columns) -> None:
    """Change columns of the shard table by a function of their list."""
    table = pq.read_table(dataset / SHARD_TABLE, schema=SHARD_SCHEMA).to_pydict()
    table |= {name: change(table[name]) for name, change in columns.items()}
    pq.write_table(pa.table(table, schema=SHARD_SCHEMA), dataset / SHARD_TABLE)


def swapped(dataset: Path) -> str:
    first, second = sorted((dataset / "shards/32x32").glob("train*.tar"))[:2]
    second.rename(dataset / "aside")
    first.rename(second)
    (dataset / "aside").rename(first)
    return first.name


def swapped_rows(dataset: Path) -> str:
    tar = min((dataset / "shards/32x32").glob("train*.tar"))
    index = np.load(index_path(str(tar)))
    np.save(index_path(str(tar)), index[[1, 0, *range(2, len(index))]])
    return tar.name


def cut(dataset: Path) -> str:
    tar = min((dataset / "shards/32x32").glob("train*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    return tar.name


def changed(dataset: Path) -> str:
    tar = min((dataset / "shards/32x32").glob("train*.tar"))
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    return tar.name


@pytest.mark.parametrize("damage", [swapped, swapped_rows, cut, changed])
@pytest.mark.parametrize("part", ["base", "t5"])
def test_a_damaged_part_is_refused_with_the_name_of_its_shard(base, damage, part):
    t5 = layer(base, "t5", missing={2})
    folder = {"base": base, "t5": t5}[part]
    name = damage(folder)
    with pytest.raises(ShardError, match=rf"{folder}/shards/32x32/.*{name[:6]}.*(sha256|bytes)"):
        take(stack(base, t5=t5), 30)


def test_rows_that_the_table_does_not_call_missing_are_never_read_as_none(base):
    t5 = layer(base, "t5", missing={2})
    rewrite(t5, missing=lambda rows: [[] for _ in rows])
    with pytest.raises(ShardError, match="its index does not fit"):
        take(stack(base, t5=t5), 30)


def test_a_base_that_was_encoded_again_is_refused(base):
    t5 = layer(base, "t5")
    make_dataset(base, PLAN, BELOW, heldout=[(SQUARE, 6)], first=1)
    wrong = rf"{t5}/shards/16x64/.*made for another shard of {base}: base_sha256"
    with pytest.raises(InputError, match=wrong):
        Loader(stack(base, t5=t5), global_batch=8, seed=1)


def edit(dataset: Path, **update) -> None:
    manifest = read_manifest(dataset).model_copy(update=update).with_fingerprint()
    (dataset / MANIFEST).write_text(manifest.model_dump_json())


def test_what_is_no_layer_over_the_base_is_refused_with_what_to_do(base, tmp_path):
    t5, other = layer(base, "t5"), make_dataset(tmp_path / "other", PLAN, WHOLE)
    cases = {
        rf"layers.t5: {other} is no layer, but a dataset of its own": stack(base, t5=other),
        rf"path: {t5} was made over another dataset: .* got id 0ther, expected id da7a": stack(t5),
    }
    generation = read_manifest(base).generations[0]
    edit(base, id="0ther")
    for wrong, config in cases.items():
        with pytest.raises(InputError, match=wrong):
            Loader(config, global_batch=8, seed=1)
    edit(base, id="da7a", generations=[generation.model_copy(update={"fingerprint": "9f8e"})])
    wrong = rf"layers.t5: {t5} was made .* generation 0 of {base} got 9f8e, expected f1rst\. Remedy"
    with pytest.raises(InputError, match=wrong):
        Loader(stack(base, t5=t5), global_batch=8, seed=1)


def test_a_base_that_moved_is_named_with_what_to_do_and_found_where_it_is_said_to_be(
    base, tmp_path
):
    t5 = layer(base, "t5")
    before = take(DataConfig(path=str(t5)), 5)
    base.rename(tmp_path / "moved")
    with pytest.raises(
        InputError, match=rf"{t5}: its base {base} is no dataset. Remedy: data.path="
    ):
        Loader(DataConfig(path=str(t5)), global_batch=8, seed=1)
    assert_same(before, take(stack(tmp_path / "moved", t5=t5), 5))


def test_a_base_that_grew_is_trained_on_as_far_as_the_layer_reaches(base, tmp_path):
    t5 = layer(base, "t5", missing={2})
    before = take(stack(base, t5=t5), 20)
    first = read_manifest(base).generations[0]
    more = make_dataset(tmp_path / "more", [(SQUARE, 20)], BELOW, first=100)
    tar = next((more / "shards/32x32").glob("*.tar"))
    for suffix in (".tar", ".idx.npy"):
        shutil.copy(
            str(tar).replace(".tar", suffix), base / f"shards/32x32/g0001-train-000000{suffix}"
        )
    rows = pq.read_table(base / SHARD_TABLE, schema=SHARD_SCHEMA).to_pylist()
    row = pq.read_table(more / SHARD_TABLE, schema=SHARD_SCHEMA).to_pylist()[0]
    rows.append(row | {"path": "shards/32x32/g0001-train-000000.tar", "generation": 1})
    pq.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA), base / SHARD_TABLE)
    edit(base, generations=[first, first.model_copy(update={"number": 1, "fingerprint": "2nd"})])
    loader = Loader(stack(base, t5=t5), global_batch=8, seed=1)
    assert_same(before, take(stack(base, t5=t5), 20))
    (said,) = loader.first.mixture.doubts()
    assert said == (
        f"data: {base} has 2 generations, layers.t5 has 1: trained on 1, 73 of 93 samples. "
        "Run flowmill prepare with the layer's config for the rest."
    )


def test_a_run_keeps_to_the_stack_that_it_began_with(base, tmp_path):
    t5, config = layer(base, "t5", missing={2}), stack(base, t5=base.parent / "t5")
    eras = tmp_path / ERAS
    before = take(config, 20, eras=eras)
    layer(base, "t5", replace(T5, channels=2, only=("t5",)), missing={2})
    with pytest.raises(InputError, match=f"{base}: is another dataset than the run's"):
        take(config, 20, eras=eras)
    layer(base, "t5", missing={2})
    assert_same(before, take(config, 20, eras=eras))
    # Text beside what the run began with makes it another dataset.
    with pytest.raises(InputError, match=f"{base}: is another dataset than the run's"):
        take(stack(base), 20, eras=eras)
    assert json.loads((eras / "epoch_00000000.json").read_text())["epoch"] == 0
    assert file_sha256(t5 / MANIFEST)
