"""The loader's batches, against datasets in which every array tells which sample it is of."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from models.config import InputError, parse_config
from pipeline.data import Batch, DataConfig, Loader, check_dataset
from pipeline.remote import ShardError
from tests.shard_factory import Kind, make_dataset

SQUARE, WIDE = (32, 32), (16, 64)
MIXED = [(SQUARE, 13), (WIDE, 9), (SQUARE, 21), (WIDE, 16), (SQUARE, 8)]


def config(folder: Path, **options) -> DataConfig:
    return DataConfig(path=str(folder), **options)


def take(loader: Loader, count: int, start: int = 0) -> list[Batch]:
    """Copies, since the loader uses its buffers again."""
    batches = itertools.islice(loader.batches(start), count)
    return [batch._map(torch.clone) for batch in batches]


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
        ranks = [
            take(Loader(config(folder), global_batch=12, seed=3, rank=r, world_size=world_size), 25)
            for r in range(world_size)
        ]
        for step, batch in enumerate(whole):
            assert [rank[step].bucket for rank in ranks] == [batch.bucket] * world_size
            found = {
                index: number
                for rank in ranks
                for index, number in zip(
                    rank[step].indices.tolist(), numbers(rank[step]), strict=True
                )
            }
            assert [found[index] for index in range(12)] == numbers(batch)


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
    assert (
        len(places) <= 6
    )  # two in the queue, one each in making and in use, for both buckets' sizes


def test_micro_batches_keep_the_indices_of_the_global_batch(tmp_path):
    loader = Loader(config(make_dataset(tmp_path, MIXED)), global_batch=8, seed=5)
    (batch,) = take(loader, 1)
    parts = batch.split(2)
    assert [part.indices.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [part.micro_step for part in parts] == [0, 1, 2, 3]
    assert torch.equal(torch.cat([part.moments for part in parts]), batch.moments)
    with pytest.raises(InputError, match="divisor of 8"):
        batch.split(3)


@pytest.mark.parametrize("pad_text", ["max", "longest"])
def test_a_dropped_caption_is_replaced_by_the_empty_one(tmp_path, pad_text):
    folder = make_dataset(tmp_path, MIXED, Kind({"clip": (5, 4), "t5": (7, 6)}))
    loader = Loader(config(folder, pad_text=pad_text), global_batch=8, seed=5)
    (batch,) = take(loader, 1)
    assert loader.empty_caption is not None
    dropped = torch.arange(8) % 2 == 0
    after = loader.empty_caption.put(batch, dropped)
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
    folder = make_dataset(tmp_path, MIXED, Kind({"mini": (9, 4)}))
    cut = take(Loader(config(folder, text_length=4), global_batch=8, seed=5), 10)
    whole = take(Loader(config(folder, pad_text="longest"), global_batch=8, seed=5), 10)
    for short, full in zip(cut, whole, strict=True):
        assert short.text_emb.shape[1] == 4
        assert torch.equal(short.text_mask, full.text_mask[:, :4])
        assert torch.equal(short.text_emb, full.text_emb[:, :4])
        assert full.text_mask.any(dim=0).all()  # no column without a token


def test_the_heldout_batch_is_fixed_and_of_the_heldout_split(tmp_path):
    folder = make_dataset(tmp_path, [(SQUARE, 40)], heldout=[(SQUARE, 5), (WIDE, 7), (WIDE, 3)])
    batches = [Loader(config(folder), global_batch=8, seed=s).heldout_batch(8) for s in (1, 2)]
    assert numbers(batches[0]) == numbers(batches[1]) == list(range(45, 53))
    trained = take(Loader(config(folder), global_batch=8, seed=1), 20)
    assert {n for batch in trained for n in numbers(batch)} == set(range(40))


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
        Loader(config(folder, **options), global_batch=12, seed=1, world_size=world_size)


def test_a_dataset_that_does_not_fit_is_refused_with_every_difference(tmp_path):
    loader = Loader(config(make_dataset(tmp_path, MIXED)), global_batch=8, seed=1)
    codec = loader.manifest.codec.model_dump()
    encoders = loader.manifest.text_encoders
    fitting = {"codec": codec, "text_encoders": encoders, "latent_channels": 2, "text_dim": 4}
    check_dataset(loader.manifest, "data", latent_multiple=2, **fitting)
    other = codec | {"weights_sha256": "other", "path": "elsewhere"}
    longer = {"mini": encoders["mini"].model_copy(update={"max_length": 77})}
    with pytest.raises(InputError) as caught:
        check_dataset(
            loader.manifest,
            "data",
            codec=other,
            text_encoders=longer,
            latent_channels=16,
            latent_multiple=4,
            text_dim=768,
        )
    message = str(caught.value)
    for part in (
        "codec.weights_sha256: got c0dec, expected other",
        "mini.max_length: got 5, expected 77",
        "latent channels: got 2, expected 16",
        "text width: got 4, expected 768",
        "bucket 16x64: got (2, 8), expected multiples of 4",
    ):
        assert part in message
    assert "elsewhere" not in message
    assert "32x32" not in message


def test_datasets_of_different_encoders_are_not_mixed(tmp_path):
    make_dataset(tmp_path / "a", MIXED)
    make_dataset(tmp_path / "b", MIXED, codec_sha256="other")
    sources = {name: {"path": str(tmp_path / name)} for name in "ab"}
    with pytest.raises(InputError, match=r"b: does not fit(.|\n)*weights_sha256: got other"):
        Loader(parse_config(DataConfig, {"datasets": sources}, "x"), global_batch=8, seed=1)


def test_a_missing_or_shortened_shard_fails_with_its_name(tmp_path):
    folder = make_dataset(tmp_path, [(SQUARE, 13), (SQUARE, 20)])
    victim = sorted((folder / "shards/32x32").glob("*.tar"))[1]
    whole = victim.read_bytes()
    for damage in (victim.unlink, lambda: victim.write_bytes(whole[:-512])):
        damage()
        with pytest.raises(ShardError, match="train-000001.tar"):
            take(Loader(config(folder), global_batch=8, seed=1), 5)
