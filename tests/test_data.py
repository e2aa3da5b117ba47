"""The loader's batches, against datasets in which every array tells which sample it is of."""

import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_prep.schema import MANIFEST, SHARD_SCHEMA, SHARD_TABLE, fingerprint, read_manifest
from models.config import InputError, parse_config
from models.networks import AlignmentConfig, DiTConfig, RoutingConfig
from pipeline.data.batch import Batch
from pipeline.data.cache import ShardError
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Mixture
from pipeline.data.eras import recorded_manifest
from pipeline.data.loader import Loader
from pipeline.data.randomness import draw_noise
from pipeline.runs.setup import check_fits
from tests.shard_factory import Kind, make_dataset

SQUARE, WIDE = (32, 32), (16, 64)
MIXED = [(SQUARE, 13), (WIDE, 9), (SQUARE, 21), (WIDE, 16), (SQUARE, 8)]


def config(folder: Path, **options) -> DataConfig:
    return DataConfig(path=str(folder), **options)


def take(loader: Loader, count: int, start: int = 0) -> list[Batch]:
    """Copies, since the loader uses its buffers again."""
    batches = itertools.islice(loader.batches(start), count)
    return [batch.to("cpu")._map(torch.clone) for batch in batches]


def on_ranks(count: int, folder: Path, world_size: int, start: int = 0, **options) -> list:
    """What each of so many ranks takes, a list of batches for each step."""
    first = {
        name: options.pop(name) for name in ("global_batch", "seed", "eras") if name in options
    }
    loaders = (
        Loader(config(folder, **options), **first, rank_of=(rank, world_size))
        for rank in range(world_size)
    )
    return list(zip(*(take(loader, count, start) for loader in loaders), strict=True))


def joined(batches: tuple[Batch, ...]) -> list[int]:
    """The samples of a global batch, from the ranks' parts, in their places."""
    pairs = [p for b in batches for p in zip(b.indices.tolist(), numbers(b), strict=True)]
    assert [place for place, _ in sorted(pairs)] == list(range(len(pairs)))
    return [number for _, number in sorted(pairs)]


def numbers(batch: Batch) -> list[int]:
    assert batch.micro is not None
    return batch.micro[:, 0].long().tolist()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("encoders", [{}, {"mini": (5, 4)}, {"clip": (5, 4), "t5": (7, 6)}])
@pytest.mark.parametrize("ragged", [False, True])
def test_every_array_of_a_batch_is_that_of_its_sample(tmp_path, prefetch, encoders, ragged):
    kind = Kind(encoders, ragged, label=True)
    folder = make_dataset(tmp_path, MIXED, kind)
    loader = Loader(config(folder, prefetch=prefetch), global_batch=8, seed=1)
    for batch in take(loader, 20):
        for place, number in enumerate(numbers(batch)):
            sample = kind.sample(number, batch.bucket)
            assert torch.equal(batch.moments[place], torch.from_numpy(sample["moments"]))
            assert batch.label is not None
            assert batch.label[place] == number % 10
            if not encoders:
                assert batch.text_emb is None
                assert batch.pooled is None
                continue
            expected, mask = [], []
            for name, (length, dim) in encoders.items():
                padded = np.zeros((length, 6 if len(encoders) > 1 else dim), np.float16)
                padded[: len(sample[name]), :dim] = sample[name]
                expected.append(padded)
                mask.append(np.arange(length) < len(sample[name]))
            assert np.array_equal(batch.text_emb[place], np.concatenate(expected))
            assert np.array_equal(batch.text_mask[place], np.concatenate(mask))
            pooled = np.concatenate([sample[f"{name}_pooled"] for name in encoders])
            assert np.array_equal(batch.pooled[place], pooled)


def test_the_global_batch_is_the_same_for_every_number_of_ranks(tmp_path):
    folder = make_dataset(tmp_path, MIXED)
    whole = take(Loader(config(folder), global_batch=12, seed=3), 25)
    for world_size in (2, 4):
        steps = on_ranks(25, folder, world_size, global_batch=12, seed=3)
        for batch, parts in zip(whole, steps, strict=True):
            assert [part.bucket for part in parts] == [batch.bucket] * world_size
            for r, part in enumerate(parts):  # four partitions of three samples
                assert {i // 3 % world_size for i in part.indices.tolist()} == {r}
            assert joined(parts) == numbers(batch)


def test_a_loader_started_at_any_step_gives_the_remaining_batches(tmp_path):
    folder = make_dataset(tmp_path, MIXED)
    whole = take(Loader(config(folder), global_batch=8, seed=5), 40)
    for start in (1, 7, 8, 9, 23, 39):
        rest = take(Loader(config(folder), global_batch=8, seed=5), 40 - start, start)
        assert [numbers(b) for b in rest] == [numbers(b) for b in whole[start:]]
        assert [(b.step, b.epoch) for b in rest] == [(b.step, b.epoch) for b in whole[start:]]


def test_a_batch_kept_by_the_caller_is_never_overwritten(tmp_path):
    folder = make_dataset(tmp_path, MIXED)
    loader = Loader(config(folder), global_batch=8, seed=5)
    kept = list(itertools.islice(loader.batches(), 30))
    loader = Loader(config(folder), global_batch=8, seed=5)
    for batch, expected in zip(kept, take(loader, 30), strict=True):
        assert torch.equal(batch.moments, expected.moments)


def test_buffers_are_used_again_when_their_batches_are_gone(tmp_path):
    loader = Loader(config(make_dataset(tmp_path, MIXED)), global_batch=8, seed=5)
    places = {batch.moments.data_ptr() for batch in itertools.islice(loader.batches(), 50)}
    # Two in the queue, one each in making and in use, for both buckets' sizes.
    assert len(places) <= 6


def test_micro_batches_keep_the_indices_of_the_global_batch(tmp_path):
    loader = Loader(config(make_dataset(tmp_path, MIXED)), global_batch=8, seed=5)
    (batch,) = take(loader, 1)
    parts = batch.split(2)
    assert [part.indices.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert torch.equal(torch.cat([part.moments for part in parts]), batch.moments)
    with pytest.raises(AssertionError):
        batch.split(3)


@pytest.mark.parametrize("pad_text", ["max", "longest"])
def test_a_dropped_caption_is_replaced_by_the_empty_one(tmp_path, pad_text):
    folder = make_dataset(tmp_path, MIXED, Kind({"clip": (5, 4), "t5": (7, 6)}))
    loader = Loader(config(folder, pad_text=pad_text), global_batch=8, seed=5)
    (batch,) = take(loader, 1)
    after = batch.drop(torch.arange(8) % 2 == 0, loader.empty_caption, num_classes=0)
    assert torch.equal(after.text_emb[1::2], batch.text_emb[1::2])
    assert torch.equal(after.text_mask[1::2], batch.text_mask[1::2])
    clip, t5 = batch.text_lengths
    expected = torch.zeros(clip + t5, 6)
    expected[:2, :4] = 0.5
    expected[clip : clip + 2] = 0.5
    assert torch.equal(after.text_emb[0].float(), expected)
    assert after.text_mask[0].nonzero().flatten().tolist() == [0, 1, clip, clip + 1]
    assert (after.pooled[::2] == 0.25).all()


def test_text_is_cut_and_padded_as_the_config_says(tmp_path):
    folder = make_dataset(tmp_path, MIXED, Kind({"mini": (40, 4)}))
    cut = take(Loader(config(folder, text_length=4), global_batch=2, seed=5), 10)
    whole = take(Loader(config(folder, pad_text="longest"), global_batch=2, seed=5), 10)
    for short, full in zip(cut, whole, strict=True):
        assert short.text_emb.shape[1] == 4
        assert torch.equal(short.text_mask, full.text_mask[:, :4])
        assert torch.equal(short.text_emb, full.text_emb[:, :4])
        # Few shapes, and fewer than 16 columns without a token.
        assert full.text_emb.shape[1] in (16, 32, 40)
        assert full.text_mask[:, -16:].any()
    assert len({full.text_emb.shape[1] for full in whole}) > 1


@pytest.mark.parametrize("size", [1, 3, 8, 14, 15, 99])
def test_heldout_samples_are_fixed_and_of_all_buckets_by_their_share(tmp_path, size):
    folder = make_dataset(tmp_path, [(SQUARE, 40)], heldout=[(SQUARE, 5), (WIDE, 7), (WIDE, 3)])
    found = [Loader(config(folder), global_batch=8, seed=s).heldout_batches(size) for s in (1, 2)]
    shares = {batch.bucket: numbers(batch) for batch in found[0]}
    assert shares == {batch.bucket: numbers(batch) for batch in found[1]}
    sizes = {SQUARE: 5, WIDE: 10}
    every = torch.cat([batch.indices for batch in found[0]])
    assert every.tolist() == list(range(min(size, 15)))
    for bucket, count in sizes.items():
        mine = shares.get(bucket, [])
        assert abs(len(mine) - count * len(every) / 15) < 1
        assert set(mine) <= set(range(40, 45) if bucket == SQUARE else range(45, 55))
    trained = take(Loader(config(folder), global_batch=8, seed=1), 20)
    assert {n for batch in trained for n in numbers(batch)} == set(range(40))
    nothing = make_dataset(tmp_path / "nothing", [(SQUARE, 4)])
    assert Loader(config(nothing), global_batch=4, seed=0).heldout_batches(size) == []


@pytest.mark.parametrize(
    ("options", "world_size", "message"),
    [
        ({"canonical_partitions": 5}, 1, "valid: 1, 2, 3, 4, 6, 12"),
        ({"canonical_partitions": 6}, 4, "valid numbers of ranks: 1, 2, 3, 6. Remedy.*of 4, 12"),
    ],
)
def test_partitions_that_do_not_divide_are_refused_with_the_valid_numbers(
    tmp_path, options, world_size, message
):
    folder = make_dataset(tmp_path, MIXED)
    with pytest.raises(InputError, match=message):
        Loader(config(folder, **options), global_batch=12, seed=1, rank_of=(0, world_size))


def test_a_dataset_that_does_not_fit_is_refused_with_every_difference(tmp_path):
    loader = Loader(config(make_dataset(tmp_path, MIXED)), global_batch=8, seed=1)
    mixture = loader.first.mixture
    check_fits(mixture, DiTConfig(latent_channels=2, text_dim=4))
    sizes = {"latent_channels": 16, "text_dim": 768, "pooled_dim": 9, "num_classes": 10}
    with pytest.raises(InputError) as caught:
        check_fits(mixture, DiTConfig(patch_size=4, alignment=AlignmentConfig(), **sizes))
    message = str(caught.value)
    for part in (
        "latent channels: got 2, expected 16",
        "text width: got 4, expected 768",
        "pooled text width: got 4, expected 9",
        "class labels: got False, expected True",
        "vision_encoder.patch_pixels: got None, expected 32",
        "bucket 16x64: got (2, 8), expected multiples of 4",
    ):
        assert part in message
    assert "32x32" not in message


def test_datasets_whose_labels_mean_other_classes_are_not_mixed_for_a_network_of_classes(tmp_path):
    folder = make_dataset(tmp_path, MIXED, Kind({"mini": (5, 4)}, channels=2, label=True))
    dataset = Loader(config(folder), global_batch=8, seed=1).first.mixture.datasets[0]

    def mixed(*classes: list[str]) -> Mixture:
        manifests = [dataset.manifest.model_copy(update={"classes": names}) for names in classes]
        return Mixture([replace(dataset, manifest=manifest) for manifest in manifests])

    labelled = DiTConfig(latent_channels=2, text_dim=4, num_classes=10)
    for other in (["b", "a"], ["a"], ["a", "b", "c"], []):
        with pytest.raises(InputError, match=r"class \d of .*: got .*, expected"):
            check_fits(mixed(["a", "b"], other), labelled)
        check_fits(mixed(["a", "b"], other), DiTConfig(latent_channels=2, text_dim=4))
        check_fits(mixed(other, other), labelled)


def test_a_dataset_of_another_format_or_order_of_members_is_refused(tmp_path):
    path = make_dataset(tmp_path, MIXED) / MANIFEST
    whole = json.loads(path.read_text())
    for data, got in ((whole | {"format": 1}, 1), ({"format_version": 1}, 1), ({}, None)):
        path.write_text(json.dumps(data))
        with pytest.raises(InputError, match=f"json: format got {got}, expected 2. Remedy"):
            read_manifest(tmp_path)
    path.write_text(json.dumps(whole | {"members": dict(reversed(whole["members"].items()))}))
    with pytest.raises(InputError, match="was edited"):
        read_manifest(tmp_path)


def test_datasets_of_different_encoders_are_not_mixed(tmp_path):
    def load(**codec: object) -> None:
        make_dataset(tmp_path / "b", MIXED, codec=codec)
        Loader(parse_config(DataConfig, {"datasets": sources}, "x"), global_batch=8, seed=1)

    make_dataset(tmp_path / "a", MIXED)
    sources = {name: {"path": str(tmp_path / name)} for name in "ab"}
    load(path="elsewhere")
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(InputError) as caught:
        load(weights_sha256="other", normalisation={"mean": (0.0, 0.0), "std": (9.0, 2.0)})
    for part in ("b: does not fit", "weights_sha256: got other", "std: got (9.0, 2.0)"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": [-2]}, r"view.layers: got \[-2\], expected \['last'\]"),
        ({"max_length": 9}, "view.max_length: got 9, expected 5"),
        ({"template": "say {}"}, "view.template: got say {}, expected None"),
        ("sd15", "text.convention: got sd15, expected plain"),
    ],
)
def test_text_of_another_view_is_neither_mixed_in_nor_gone_on_with(tmp_path, change, said):
    folders = [make_dataset(tmp_path / name, MIXED) for name in "ab"]
    text = (manifest := read_manifest(folders[1])).text
    if isinstance(change, str):
        text = text.model_copy(update={"convention": change})
    else:
        view = text.roles["mini"].view.model_copy(update=change)
        role = text.roles["mini"].model_copy(update={"view": view})
        text = text.model_copy(update={"roles": {"mini": role}})
    manifest = manifest.model_copy(update={"id": "07her", "text": text}).with_fingerprint()
    (folders[1] / MANIFEST).write_text(manifest.model_dump_json())
    sources = {folder.name: {"path": str(folder)} for folder in folders}
    with pytest.raises(InputError, match=f"does not fit .*\n.*{said}\nRemedy: prepare both"):
        Loader(parse_config(DataConfig, {"datasets": sources}, "x"), global_batch=8, seed=1)
    given = {"global_batch": 8, "seed": 1, "eras": tmp_path / "eras"}
    take(Loader(config(folders[0]), **given), 1)
    with pytest.raises(InputError, match=f"another dataset than the run's:\n.*id.*\n.*{said}\n"):
        Loader(config(folders[1]), **given)


def test_a_run_on_a_dataset_of_an_older_version_goes_on(tmp_path):
    """Its manifest lacks what was added since, and its fingerprint is of the rest."""
    path = make_dataset(tmp_path / "data", MIXED) / MANIFEST
    whole = json.loads(path.read_text())
    del whole["text"]["absent"], whole["text"]["roles"]["mini"]["view"]["family"]
    del whole["fingerprint"]
    own = fingerprint({"content": whole, "order": list(whole["members"])})
    path.write_text(json.dumps(whole | {"fingerprint": own}))
    given = {"global_batch": 8, "seed": 1, "eras": tmp_path / "eras"}
    take(Loader(config(tmp_path / "data"), **given), 1)
    loader = Loader(config(tmp_path / "data"), **given)
    assert recorded_manifest(tmp_path / "eras") == loader.manifest


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("shards/*/*.tar"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # a new file, for a mapped one must not change
    path.write_bytes(data)


def shorten(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-512])


@pytest.mark.parametrize("damage", [Path.unlink, shorten, flip])
@pytest.mark.parametrize("suffix", [".tar", ".idx.npy"])
def test_a_damaged_shard_or_index_fails_with_its_name(tmp_path, damage, suffix):
    folder = make_dataset(tmp_path, [(SQUARE, 13), (SQUARE, 20)])
    damage(shard_files(folder)[1].with_suffix("").with_suffix(suffix))
    loader = Loader(config(folder), global_batch=8, seed=1)
    with pytest.raises(ShardError, match=r"train-000001\.tar"):
        take(loader, 5)


@pytest.mark.parametrize("damage", [Path.unlink, shorten, flip])
def test_a_damaged_shard_is_skipped_and_counted_where_the_config_says(tmp_path, damage):
    folder = make_dataset(tmp_path, [(SQUARE, 20)] * 4)
    options = {"canonical_partitions": 2, "on_corrupt": "skip"}
    whole = take(Loader(config(folder, **options), global_batch=8, seed=1), 20)
    damage(shard_files(folder)[1])
    loader = Loader(config(folder, **options), global_batch=8, seed=1)
    batches = take(loader, 20)
    lost, instead = set(range(20, 40)), set()
    assert [len(numbers(batch)) for batch in batches] == [8] * 20
    for batch, before in zip(batches, whole, strict=True):
        for number, other in zip(numbers(batch), numbers(before), strict=True):
            assert number == other if other not in lost else number not in lost
            if other in lost:
                instead.add(number)
    assert len(instead) > 10
    assert "train-000001.tar" in loader.skipped.shards["shards/32x32/train-000001.tar"]
    assert loader.skipped.samples >= 40
    steps = on_ranks(20, folder, 2, global_batch=8, seed=1, **options)
    assert [joined(parts) for parts in steps] == [numbers(batch) for batch in batches]


def test_skipping_ends_where_nothing_is_left(tmp_path):
    folder = make_dataset(tmp_path, [(SQUARE, 20)] * 2)
    for path in shard_files(folder):
        path.unlink()
    with pytest.raises(ShardError, match="every shard of a window is unreadable"):
        take(Loader(config(folder, on_corrupt="skip"), global_batch=8, seed=1), 2)


@pytest.mark.parametrize("begin", [-8, 1 << 20, (1 << 63) - 1])
def test_an_index_that_points_out_of_its_shard_is_refused(tmp_path, begin):
    """With the right hashes: a dataset may come from anyone."""
    folder = make_dataset(tmp_path, [(SQUARE, 20)])
    path = shard_files(folder)[0].with_suffix("").with_suffix(".idx.npy")
    index = np.load(path)
    index[7, 0, 0] = begin
    np.save(path, index)
    table = pq.read_table(folder / SHARD_TABLE).to_pylist()
    table[0]["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    pq.write_table(pa.Table.from_pylist(table, SHARD_SCHEMA), folder / SHARD_TABLE)
    with pytest.raises(ShardError, match=r"train-000000\.tar.*index does not fit"):
        take(Loader(config(folder), global_batch=8, seed=1), 5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("moments", {"dtype": "object"}),
        ("moments", {"shape": (4, 8, None)}),
        ("mini", {"dtype": "float32"}),
        ("mini", {"shape": (None, 4096)}),
        ("micro", {"shape": (None,)}),
    ],
)
def test_members_that_the_loader_does_not_read_are_refused(tmp_path, name, change):
    folder = make_dataset(tmp_path, [(SQUARE, 20)])
    manifest = read_manifest(folder)
    members = manifest.members | {name: manifest.members[name].model_copy(update=change)}
    edited = manifest.model_copy(update={"members": members}).with_fingerprint()
    (folder / MANIFEST).write_text(edited.model_dump_json())
    with pytest.raises(InputError, match=r"manifest\.json: (text )?member"):
        Loader(config(folder), global_batch=8, seed=1)


def test_sizes_alone_are_checked_where_the_config_says(tmp_path):
    folder = make_dataset(tmp_path, [(SQUARE, 20)] * 2)
    flip(shard_files(folder)[0])
    assert take(Loader(config(folder, verify="size"), global_batch=8, seed=1), 5)


def test_a_shard_table_that_leads_out_of_the_dataset_is_refused(tmp_path):
    folder = make_dataset(tmp_path, [(SQUARE, 20)])
    table = pq.read_table(folder / SHARD_TABLE)
    outside = table.set_column(0, "path", pa.array(["shards/../../other/x.tar"]))
    pq.write_table(outside, folder / SHARD_TABLE)
    with pytest.raises(InputError, match=r"not shards/BUCKET/NAME\.tar"):
        Loader(config(folder), global_batch=8, seed=1)


def test_datasets_mix_by_their_repeat_factors(tmp_path):
    make_dataset(tmp_path / "a", [(SQUARE, 40)])
    make_dataset(tmp_path / "b", [(SQUARE, 40), (WIDE, 16)], first=1000)
    make_dataset(tmp_path / "c", [(SQUARE, 100)], first=2000)
    repeats = {"a": 2.0, "b": 1.0, "c": 0.3}
    sources = {n: {"path": str(tmp_path / n), "repeat": r} for n, r in repeats.items()}
    mix = parse_config(DataConfig, {"datasets": sources}, "mix")
    loader = Loader(mix, global_batch=2, seed=1)
    per_epoch = 2 * 40 + 40 + 16 + 30
    assert loader.steps_per_epoch(0) == per_epoch // 2
    thirds = []
    for epoch in range(2):
        batches = take(loader, per_epoch // 2, epoch * per_epoch // 2)
        assert {batch.epoch for batch in batches} == {epoch}
        seen = Counter(number for batch in batches for number in numbers(batch))
        assert [seen[number] for number in range(40)] == [2] * 40
        assert [seen[number] for number in range(1000, 1056)] == [1] * 56
        thirds.append({number for number in seen if number >= 2000})
        assert len(thirds[-1]) == 30
        assert max(seen[number] for number in thirds[-1]) == 1
    assert not thirds[0] & thirds[1]


def test_an_equal_mix_draws_as_many_of_each_dataset_and_says_how_often(tmp_path):
    make_dataset(tmp_path / "a", [(SQUARE, 40)])
    make_dataset(tmp_path / "b", [(SQUARE, 8), (WIDE, 8)], first=1000)
    sources = {name: {"path": str(tmp_path / name)} for name in "ab"}
    mix = parse_config(DataConfig, {"datasets": sources, "mix": "equal"}, "mix")
    loader = Loader(mix, global_batch=2, seed=1)
    assert loader.steps_per_epoch(0) == 56 // 2
    seen = Counter(number for batch in take(loader, 4 * 28, 0) for number in numbers(batch))
    # Four epochs of 28 of each: 2.8 times all of a's 40, and seven times all of b's 16.
    assert sum(seen[number] for number in range(40)) == 4 * 28
    assert {seen[number] for number in range(40)} == {2, 3}
    assert [seen[number] for number in range(1000, 1016)] == [7] * 16
    # Of 560 pictures 280 are of each.
    assert loader.first.mixture.epochs(560) == [
        "a: 40 pictures, 7.00 epochs",
        "b: 16 pictures, 17.50 epochs",
    ]
    for wrong in (
        {"path": sources["a"]["path"]},
        {"datasets": {"a": sources["a"] | {"repeat": 2.0}}},
    ):
        with pytest.raises(InputError, match="mix: equal"):
            parse_config(DataConfig, wrong | {"mix": "equal"}, "mix")


def grow(folder: Path) -> None:
    """The same dataset with one shard more, which sorts before the others."""
    make_dataset(folder, [(SQUARE, 24), (SQUARE, 16), (WIDE, 40)])


def test_a_dataset_that_grows_is_used_from_the_next_epoch_on(tmp_path):
    folder, eras = tmp_path / "data", tmp_path / "eras"
    make_dataset(folder, [(SQUARE, 24), (SQUARE, 16)])
    options = {"global_batch": 8, "seed": 1, "eras": eras}
    loader = Loader(config(folder, grow=True, prefetch=0), **options)
    batches = loader.batches()
    log = [numbers(next(batches)) for _ in range(5)]
    assert sorted(itertools.chain(*log)) == list(range(40))
    grow(folder)
    log += [numbers(next(batches)) for _ in range(20)]
    for epoch in range(2):
        begin = 5 + 10 * epoch
        assert sorted(itertools.chain(*log[begin : begin + 10])) == list(range(80))
    # Whoever resumes repeats the decisions, with any number of ranks, wherever the dataset stands now.
    for start in (0, 3, 5, 12, 15):
        again = Loader(config(folder, grow=True), **options)
        assert [numbers(b) for b in take(again, 25 - start, start)] == log[start:]
        steps = on_ranks(25 - start, folder, 2, start, grow=True, **options)
        assert [joined(parts) for parts in steps] == log[start:]


@pytest.mark.parametrize("fault", ["lost a shard", "another codec", "more classes", "no dataset"])
def test_what_a_run_cannot_train_on_is_not_taken_up_and_said(tmp_path, caplog, fault):
    """At its next epoch it finds something else in the dataset's place, and goes on with what it has."""
    folder = make_dataset(tmp_path / "data", [(SQUARE, 24), (SQUARE, 16)], Kind({}, label=True))
    model = DiTConfig(size="debug", latent_channels=4, num_classes=10)
    options = {"global_batch": 8, "seed": 1, "eras": tmp_path / "eras", "model": model}
    loader = Loader(config(folder, grow=True, prefetch=0), **options)
    batches = loader.batches()
    log = [numbers(next(batches)) for _ in range(5)]
    manifest, table = read_manifest(folder), pq.read_table(folder / SHARD_TABLE)
    if fault == "lost a shard":
        pq.write_table(table.slice(1), folder / SHARD_TABLE)
        expected = "was prepared again with other shards"
    elif fault == "another codec":
        codec = manifest.codec.model_copy(update={"weights_sha256": "0ther"})
        manifest, expected = manifest.model_copy(update={"codec": codec}), "weights_sha256"
    else:
        later = manifest.generations[0].model_copy(update={"number": 3, "num_labels": 12})
        generations = [*manifest.generations, later]
        manifest = manifest.model_copy(update={"generations": generations})
        expected = f"generation 3 of {folder} has 12 classes, model.num_classes is 10"
    (folder / MANIFEST).write_text(manifest.with_fingerprint().model_dump_json())
    if fault == "no dataset":
        (folder / MANIFEST).unlink()
        expected = "no such file"
    log += [numbers(next(batches)) for _ in range(10)]
    for epoch in range(3):
        assert sorted(itertools.chain(*log[5 * epoch : 5 * epoch + 5])) == list(range(40))
    assert len(loader.eras.entries) == 1
    assert expected in caplog.text


def test_a_run_goes_on_with_the_shards_it_began_with(tmp_path):
    folder, eras = tmp_path / "data", tmp_path / "eras"
    make_dataset(folder, [(SQUARE, 24), (SQUARE, 16)])
    options = {"global_batch": 8, "seed": 1, "eras": eras}
    log = [numbers(b) for b in take(Loader(config(folder), **options), 12)]
    grow(folder)
    assert [numbers(b) for b in take(Loader(config(folder), **options), 9, 3)] == log[3:]
    make_dataset(folder, [(SQUARE, 20), (SQUARE, 20)])
    with pytest.raises(InputError, match="prepared again with other shards"):
        Loader(config(folder), **options)


def test_a_rank_that_looks_later_than_rank_0_follows_it(tmp_path):
    folder, eras = tmp_path / "data", tmp_path / "eras"
    make_dataset(folder, [(SQUARE, 24), (SQUARE, 16)])
    whole = take(Loader(config(folder), global_batch=8, seed=1), 12)
    options = {"global_batch": 8, "seed": 1, "eras": eras}
    first = Loader(config(folder), **options, rank_of=(0, 2))
    grow(folder)
    second = Loader(config(folder), **options, rank_of=(1, 2))
    assert second.steps_per_epoch(0) == 10
    for batch, *parts in zip(whole, take(first, 12), take(second, 12), strict=True):
        assert joined(tuple(parts)) == numbers(batch)
    assert second.steps_per_epoch(0) == 5


def test_other_ranks_wait_for_rank_0_to_decide(tmp_path):
    folder, eras = tmp_path / "data", tmp_path / "eras"
    make_dataset(folder, MIXED)
    loaders = [
        Loader(config(folder), global_batch=8, seed=1, rank_of=(r, 2), eras=eras) for r in range(2)
    ]
    found: list[Batch] = []
    waiting = threading.Thread(target=lambda: found.extend(take(loaders[1], 1)))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    take(loaders[0], 1)
    waiting.join(30)
    assert len(found) == 1


def log_samples(folder: Path, log: Path, rank: int, world_size: int, start: int) -> None:
    """A rank that writes down what it is given until it is killed: step, place in the batch, sample."""
    options = {"global_batch": 8, "seed": 3, "rank_of": (rank, world_size)}
    with log.open("a") as file:
        for batch in Loader(config(folder), **options).batches(start):
            for index, number in zip(batch.indices.tolist(), numbers(batch), strict=True):
                file.write(f"{batch.step} {index} {number}\n")
            file.flush()
            time.sleep(0.01)


@pytest.mark.distributed
def test_killed_on_two_ranks_then_one_then_two_the_log_is_that_of_an_undisturbed_run(tmp_path):
    folder = make_dataset(tmp_path / "data", MIXED)
    whole = [numbers(b) for b in take(Loader(config(folder), global_batch=8, seed=3), 90)]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.test_data"])
    start = 0
    for attempt, world_size in enumerate((2, 1, 2)):
        logs = [tmp_path / f"log_{attempt}_{rank}" for rank in range(world_size)]
        children = [
            processes.Process(target=log_samples, args=(folder, log, rank, world_size, start))
            for rank, log in enumerate(logs)
        ]
        for child in children:
            child.start()
        stop, deadline = start + 30, time.monotonic() + 120
        while not all(log.exists() and f"\n{stop} " in log.read_text() for log in logs):
            assert time.monotonic() < deadline
            assert all(child.is_alive() for child in children)
            time.sleep(0.05)
        for child in children:
            child.kill()
            child.join()
        lines = [line.split() for log in logs for line in log.read_text().splitlines()]
        # The last line may be cut.
        found = {(int(x[0]), int(x[1])): int(x[2]) for x in lines if len(x) == 3}
        for step in range(start, stop):
            assert [found[step, index] for index in range(8)] == whole[step]
        start = stop


def test_a_closed_loader_leaves_no_thread_and_no_open_file(tmp_path):
    folder = make_dataset(tmp_path, MIXED)
    take(Loader(config(folder), global_batch=8, seed=1), 2)  # what is opened once a process
    gc.collect()
    files, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    loader = Loader(config(folder), global_batch=8, seed=1)
    batches = loader.batches()
    next(batches)
    # The first loader's threads may still be ending.
    begun = set(threading.enumerate()) - threads
    assert begun
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
    del loader, batches
    gc.collect()
    deadline = time.monotonic() + 10
    while any(thread.is_alive() for thread in begun) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in begun)
    assert len(os.listdir("/proc/self/fd")) <= files


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_batch_brings_its_steps_noise_in_its_own_buffer(prefetch, deterministic, tmp_path):
    """The bits of draw_noise at the step's number, drawn by whoever reads its samples."""
    kind = Kind(channels=4, deterministic=deterministic)
    folder = make_dataset(tmp_path / "data", [((64, 64), 30), ((32, 128), 20)], kind)
    routed = DiTConfig(size="debug", depth=3, routing=RoutingConfig(start=1, end=2))
    options = {"global_batch": 8, "seed": 5, "rank_of": (1, 2)}
    loader = Loader(config(folder, prefetch=prefetch), **options, model=routed)
    for number, batch in zip(range(4), loader.batches(3, draws_step=13), strict=False):
        assert batch.step == 3 + number
        height, width = batch.latent_size
        wanted = {"noise": (4, height, width), "token_scores": (height * width // 4,)}
        if not deterministic:
            wanted["posterior"] = (4, height, width)
        for name in ("noise", "posterior", "token_scores"):
            tensor = getattr(batch, name)
            if name not in wanted:
                assert tensor is None
                continue
            purpose = "tokens" if name == "token_scores" else name
            drawn = draw_noise(5, 13 + number, batch.indices, wanted[name], purpose=purpose)
            assert torch.equal(tensor, drawn)
            assert batch.buffer is not None
            begin = batch.buffer.bytes.data_ptr()
            assert begin <= tensor.data_ptr() < begin + batch.buffer.bytes.nbytes
            assert torch.equal(tensor[2:4], getattr(batch.split(2)[1], name))
    loader.close()
