"""Latents and text that are not what the codec and the encoders give are found, shard by shard."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.audit import drifted, encode_caption, verify
from data_prep.config import PrepareConfig
from data_prep.preparation import prepare
from data_prep.schema import read_manifest, read_shard_table
from data_prep.schema.drift import drift
from data_prep.schema.proof import read_proof
from data_prep.schema.recorded import open_codec, open_texts
from models.command import load_config
from models.config import InputError
from models.vae import LatentCodec
from tests import train_factory
from tests.prep_factory import config_of_pictures
from tests.test_vae import save_kl

Members = dict[str, bytes]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, vae_folder, text_folder) -> Path:
    """A sound one of several shards per bucket."""
    folder = tmp_path_factory.mktemp("drift")
    # Its layers do something, as those of a trained encoder do.
    text, file = shutil.copytree(text_folder, folder / "text"), "model.safetensors"
    weights = {n: w * (30 if "layer." in n else 1) for n, w in load_file(text / file).items()}
    save_file(weights, text / file, {"format": "pt"})
    yaml = config_of_pictures(folder, 40, vae_folder, text)
    config = load_config(PrepareConfig, yaml, ["samples_per_shard=8"])
    prepare(config)
    assert verify(Path(config.output)) == []
    return Path(config.output)


def read_members(tar: Path) -> Members:
    with tarfile.open(tar) as file:
        return {m.name: file.extractfile(m).read() for m in file}  # pyright: ignore[reportOptionalMemberAccess]


def as_tar(members: Members) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    return buffer


def changed(members: Members, end: str, change: Callable[[Any], Any]) -> Members:
    """Every array of one member through a function, as float16."""
    out = dict(members)
    for name, data in members.items():
        if name.endswith(end):
            buffer = io.BytesIO()
            np.save(buffer, change(np.load(io.BytesIO(data))).astype(np.float16))
            out[name] = buffer.getvalue()
    return out


def rotated(members: Members, *ends: str) -> Members:
    """The members with these ends each the next picture's."""
    out = dict(members)
    for end in ends:
        names = [name for name in members if name.endswith(end)]
        out |= {name: members[names[i - 1]] for i, name in enumerate(names)}
    return out


def other_vae(members: Members, folder: Path) -> Members:
    """Latents of another codec of the same shape, of the same pictures as far as the first one keeps them."""
    ours = LatentCodec(folder)
    torch.manual_seed(7)
    theirs = LatentCodec(save_kl(folder.parent / "another", layers_per_block=1))
    with torch.no_grad():
        for p in theirs.network.parameters():
            p.add_(torch.randn_like(p) * 0.1)

    def again(moments: np.ndarray) -> np.ndarray:
        picture = torch.from_numpy(ours.picture(moments)).permute(2, 0, 1)[None]
        return theirs.encode_moments(picture)[0].numpy()

    return changed(members, ".moments.npy", again)


def other_layer(members: Members, text: Any) -> Members:
    """Tokens of the layer before the last."""
    captions = {n[:20]: json.loads(d)["caption"] for n, d in members.items() if n.endswith(".json")}
    out = dict(members)
    for key, caption in captions.items():
        batch = text.tokenizer([caption], return_tensors="pt", truncation=True, max_length=8)
        with torch.no_grad():
            states = text.network(**batch, output_hidden_states=True).hidden_states[-2]
        buffer = io.BytesIO()
        np.save(buffer, states[0].half().numpy())
        out[f"{key}.bert.npy"] = buffer.getvalue()
    return out


def test_every_fault_is_named_and_a_sound_shard_is_not(dataset, vae_folder, tmp_path):
    manifest, cpu = read_manifest(dataset), torch.device("cpu")
    codec, texts = open_codec(manifest.codec, None, cpu), open_texts(manifest.text.roles, {}, cpu)
    square = [p for p in read_shard_table(dataset)["path"].to_pylist() if "/32x32/" in p]
    path, other = square[:2]
    members, proof = read_members(dataset / path), read_proof(dataset, path)
    encode = partial(encode_caption, manifest.text.roles, texts)
    vae = shutil.copytree(vae_folder, tmp_path / "vae")

    def wrong(shard: Members) -> str:
        return drift(as_tar(shard), proof, 4, codec.picture, 4, encode)

    assert wrong(members) == ""
    nearly = changed(members, ".moments.npy", lambda m: m * (1 + 2**-11))
    assert wrong(changed(nearly, ".bert.npy", lambda t: t * 1.01)) == ""
    moments = [d for n, d in read_members(dataset / other).items() if n.endswith("moments.npy")]
    names = [name for name in members if name.endswith("moments.npy")]
    pictures = {
        "scaled": changed(members, ".moments.npy", lambda m: m * 0.18215),
        "shifted": changed(members, ".moments.npy", lambda m: np.roll(m, 2, axis=2)),
        "another codec's": other_vae(members, vae),
        "another shard's": members | dict(zip(names, moments, strict=False)),
        "the next picture's": rotated(members, ".moments.npy"),
    }
    for name, shard in pictures.items():
        assert "decode to" in wrong(shard), name
    texts_of = {
        "captions off by one": rotated(members, ".json"),
        "text off by one": rotated(members, ".bert.npy", ".bert_pooled.npy"),
        "another layer": other_layer(members, texts["bert"]),
    }
    for name, shard in texts_of.items():
        assert "caption" in wrong(shard), name
        # Nothing is looked at that is not asked for.
        assert drift(as_tar(shard), proof, 4, codec.picture) == "", name
    first = proof["key"][0].tobytes().decode()
    lost = {name: data for name, data in members.items() if first not in name}
    assert "is not there" in wrong(lost)


def test_verify_decodes_and_encodes_every_shard(dataset, tmp_path, capsys):
    assert drifted(dataset, 2, 2, None, {}) == []
    assert "up to 2 pictures decoded and 2 captions encoded" in " ".join(
        capsys.readouterr().out.split()
    )
    save_kl(tmp_path / "vae", layers_per_block=2)
    with pytest.raises(InputError, match="is not the encoder that prepared the data"):
        drifted(dataset, 1, 0, str(tmp_path / "vae"), {})
    for given in ({"bret": "/x"}, {"bert": ""}):
        with pytest.raises(InputError, match="expected NAME=FOLDER of bert"):
            drifted(dataset, 0, 1, None, given)


def spoil(dataset: Path, bucket: str) -> str:
    """Scale the latents of a bucket's first shard where they lie; their bytes stay as many."""
    rows = read_shard_table(dataset)["path"].to_pylist()
    path = next(path for path in rows if f"/{bucket}/" in path)
    with tarfile.open(dataset / path) as tar:
        places = [(m.offset_data, m.size) for m in tar if m.name.endswith(".moments.npy")]
    data = bytearray((dataset / path).read_bytes())
    for offset, size in places:
        array = np.load(io.BytesIO(data[offset : offset + size]))
        raw = (array * np.float16(0.2)).tobytes()
        data[offset + size - len(raw) : offset + size] = raw
    (dataset / path).unlink()
    (dataset / path).write_bytes(data)
    return path


def test_a_new_run_looks_at_its_latents_before_its_first_step(dataset, tmp_path):
    data = shutil.copytree(dataset, tmp_path / "data")
    buckets = sorted({p.split("/")[1] for p in read_shard_table(data)["path"].to_pylist()})
    run, config = tmp_path / "run", tmp_path / "c.yaml"
    config.write_text(train_factory.CONFIG.format(data=data, run=run))
    options = ["training.images=16", "optimizer.warmup_images=0", "monitor.prompts=[a red apple]"]
    options += ["data.verify=size", "sampler.num_steps=1", "monitor.heldout_samples=0"]
    path = spoil(data, buckets[-1])
    error = train_factory.train(config, *options, status=2)
    assert f"{path}: " in error
    assert "decode to another picture" in error
    train_factory.train(config, *options, "data.check=0")
    # Without its proof, as where tars alone were copied, a shard is not compared.
    for proof in data.rglob("*.proof.safetensors"):
        proof.unlink()
    train_factory.train(config, *options, f"run={tmp_path / 'copied'}")
    # A run that has begun does not look again.
    train_factory.train(config, *options, "training.images=24", "--override")
