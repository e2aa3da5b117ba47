"""Text in int8: what it loses, what a dataset and its layers say of that, and what a network reads of it."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_prep.audit import drifted, verify
from data_prep.config import PrepareConfig
from data_prep.encoders import TextEncoderConfig
from data_prep.preparation import prepare
from data_prep.schema import EMPTY_CAPTION, REPORT, read_manifest
from models.command import load_config
from models.config import InputError
from models.prompts import as_stored, dequantised, quantised
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from tests.prep_factory import config_of_pictures
from tests.shard_factory import Kind, make_dataset
from tests.test_data import MIXED, numbers, on_ranks
from tests.test_layer_prepare import lay
from tests.test_layers import stack


def generated() -> torch.Tensor:
    """Tokens of every size, some with outlier channels, and some of zeros."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(8, 40, 96, generator=generator)
    tokens *= torch.logspace(-6, 4, 40)[:, None]
    tokens[2:4, :, 5] *= 100
    tokens[4, ::2] = 0
    tokens[5] = 32_000 * tokens[5].sign()
    return tokens.clamp(-32_000, 32_000)


def test_a_token_in_int8_is_within_half_a_scale_of_what_it_was():
    tokens, stored = generated(), quantised(generated())
    assert stored.dtype == torch.int8
    assert stored.shape == (8, 40, 98)
    raw = stored.numpy()
    scale = raw[..., -2:].copy().view("<f2").astype(np.float64)
    peak = tokens.abs().amax(-1, keepdim=True).numpy().astype(np.float64)
    assert (scale * 127 >= peak).all()
    # Rounded up to float16's next number, or the least scale.
    assert (scale <= np.maximum(peak / 127 * (1 + 2**-10), 2**-14)).all()
    found = dequantised(stored)
    assert found.dtype == torch.float16
    # The exact product, rounded once, as any device has it.
    exact = raw[..., :-2].astype(np.float64) * scale
    assert np.array_equal(found.numpy(), exact.astype(np.float16))
    error = np.abs(found.double().numpy() - tokens.double().numpy())
    # Half a scale, and half of what float16 rounds the product by.
    assert (error <= scale / 2 + np.maximum(np.abs(exact) * 2**-11, 2**-25)).all()
    assert (found[4, ::2] == 0).all()
    assert torch.equal(as_stored(tokens, "int8"), found.float())


def test_an_encoder_says_what_it_loses_and_refuses_what_is_no_number(text_folder):
    config = TextEncoderConfig(path=str(text_folder), max_length=8, store="int8")
    encoder, whole = config.open("bert", "cpu"), config.model_copy(update={"store": "float16"})
    captions = ["a red apple", "volcano"]
    found, exact = encoder.encode(captions), whole.open("bert", "cpu").encode(captions)
    for stored, error, tokens in zip(
        found["bert"], found["bert.error"], exact["bert"], strict=True
    ):
        assert stored.dtype == np.int8
        assert stored.shape == (len(tokens), tokens.shape[1] + 2)
        told = dequantised(torch.from_numpy(stored)).double().numpy()
        norms = np.linalg.norm(told, axis=1) * np.linalg.norm(tokens.astype(np.float64), axis=1)
        # The exact tokens are known in float16 alone.
        np.testing.assert_allclose(error, 1 - (told * tokens).sum(1) / norms, rtol=0.1)
        assert 0 < error.max() < 1e-3
    with torch.no_grad():
        next(encoder.model.network.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match=r"text_encoders\.bert: got numbers up to nan"):
        encoder.encode(captions)


@pytest.mark.parametrize("int8", [("clip",), ("t5",), ("clip", "t5")])
@pytest.mark.parametrize("options", [{}, {"pad_text": "longest"}, {"text_length": 4}])
def test_a_batch_on_its_device_has_every_token_as_its_encoder_stored_it(tmp_path, int8, options):
    kind = Kind({"clip": (5, 4), "t5": (40, 6)}, int8=int8)
    folder = make_dataset(tmp_path, MIXED, kind)
    steps = on_ranks(6, folder, 2, global_batch=8, seed=1, prefetch=0, **options)
    for batch in itertools.chain(*steps):
        assert batch.text_emb is not None
        assert batch.text_emb.dtype == torch.float16
        for place, number in enumerate(numbers(batch)):
            sample, begin = kind.sample(number, batch.bucket), 0
            expected = torch.zeros_like(batch.text_emb[place])
            for name, length in zip(("clip", "t5"), batch.text_lengths, strict=True):
                stored = sample[name][:length]
                if name in int8:
                    scale = stored[:, -2:].copy().view("<f2").astype(np.float64)
                    stored = (stored[:, :-2] * scale).astype(np.float16)
                expected[begin : begin + len(stored), : stored.shape[1]] = torch.from_numpy(stored)
                assert batch.text_mask[place, begin : begin + length].sum() == len(stored)
                begin += length
            assert torch.equal(batch.text_emb[place], expected)


def test_int8_is_cut_into_micro_batches_before_it_is_unpacked(tmp_path):
    kind = Kind({"mini": (5, 4)}, int8=("mini",))
    loader = Loader(
        DataConfig(path=str(make_dataset(tmp_path, MIXED, kind))), global_batch=8, seed=1
    )
    batch = next(loader.batches())
    assert batch.text_emb is None
    assert batch.packed is not None
    assert batch.packed.parts["mini"].dtype == torch.int8
    begin, buffer = batch.packed.parts["mini"].data_ptr(), batch.buffer.bytes
    assert buffer.data_ptr() <= begin < buffer.data_ptr() + buffer.nbytes
    whole = batch.to("cpu").text_emb
    parts = torch.cat([part.to("cpu").text_emb for part in batch.split(2)])
    assert torch.equal(parts, whole)
    dropped = batch.to("cpu").drop(torch.arange(8) % 2 == 0, loader.empty_caption, 0)
    assert torch.equal(dropped.text_emb[1::2], whole[1::2])
    assert (dropped.text_emb[0, :2] == 0.5).all()
    assert (dropped.text_emb[0, 2:] == 0).all()


@pytest.mark.slow
def test_a_dataset_in_int8_and_a_layer_in_int8_say_their_error_and_are_read(
    tmp_path, ray_address, vae_folder, text_folder, capsys
):
    folders = dict[str, Path]()
    for store in ("float16", "int8"):
        place = tmp_path / store
        place.mkdir()
        encoders = {"bert": {"path": str(text_folder), "max_length": 8, "store": store}}
        path = config_of_pictures(place, 20, vae_folder, text_folder, text_encoders=encoders)
        config = load_config(PrepareConfig, path, [])
        prepare(config)
        folders[store] = Path(config.output)
    own = {"path": str(text_folder), "max_length": 8, "store": "int8"}
    layer = lay(folders["float16"], "small", {"small": own})
    printed = capsys.readouterr().out
    assert printed.count("Text in int8") == 2
    for folder, role in ((folders["int8"], "bert"), (layer, "small")):
        manifest = read_manifest(folder)
        record = manifest.text.roles[role]
        assert 0 < record.mean_error < record.worst_error < 1e-3
        assert f"{1 - record.worst_error:.6f}" in printed
        assert manifest.members[role].shape == (None, record.dim + 2)
        assert load_file(folder / EMPTY_CAPTION)[role].dtype == torch.float16
        assert verify(folder) == []
        assert drifted(folder, 0, 4, None, {}) == []
    assert "Text in int8" in (folders["int8"] / REPORT).read_text()
    whole = read_manifest(folders["float16"]).text.roles["bert"]
    assert (whole.mean_error, whole.worst_error) == (None, None)
    read = [DataConfig(path=str(folder)) for folder in folders.values()]
    small = {"tokens": [["small"]], "pooled": ["small"]}
    stacked = stack(folders["float16"], small=layer).model_dump() | {"text": small}
    read.append(DataConfig.model_validate(stacked))
    exact, *others = (
        [b.to("cpu") for b in itertools.islice(Loader(c, global_batch=4, seed=1).batches(), 5)]
        for c in read
    )
    for batches in others:
        for ours, theirs in zip(exact, batches, strict=True):
            assert torch.equal(ours.moments, theirs.moments)
            assert torch.equal(ours.text_mask, theirs.text_mask)
            peak = ours.text_emb.float().abs().amax(-1, keepdim=True)
            # Half a scale, and float16's rounding of both.
            assert ((ours.text_emb.float() - theirs.text_emb.float()).abs() <= peak / 240).all()
