"""`flowmill data`: what it says against the loader itself, and the picture it draws."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from upath import UPath

from data_prep.shards import ShardWriter
from models.config import InputError
from models.vae import LatentCodec
from pipeline.data.config import DataConfig
from pipeline.data.datasets import keys_and_captions
from pipeline.data.loader import Loader
from pipeline.show_data import main
from tests.shard_factory import Kind, make_dataset

ROOT = Path(__file__).parent.parent
SQUARE, WIDE = (32, 32), (16, 64)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    codec = LatentCodec(ROOT / "models" / "demo_vae")
    kind = Kind(channels=codec.channels, downscale=codec.downscale)
    plan = [(SQUARE, 13), (WIDE, 9), (SQUARE, 21), (WIDE, 16), (SQUARE, 8)]
    make_dataset(tmp_path / "data", plan, kind, codec=codec.record())
    run = {
        "data": {"path": str(tmp_path / "data")},
        "training": {"images": 1000, "global_batch": 8},
        "run": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def test_an_epoch_is_described_as_the_loader_will_have_it(config, capsys):
    main(config, epoch=2, ranks=2, ranks_per_node=1)
    printed = capsys.readouterr().out
    loader = Loader(DataConfig(path=str(config.parent / "data")), global_batch=8, seed=0)
    first, steps = sum(loader.steps_per_epoch(e) for e in (0, 1)), loader.steps_per_epoch(2)
    assert f"steps {first} to {first + steps - 1}" in printed
    rows = {
        row[0]: [int(number) for number in row[1:]]
        for line in printed.splitlines()
        if len(row := re.findall(r"[\w.]+", line)) == 7 and row[1].isdigit()
    }
    # shards, samples, in the epoch, batches, carried in, carried over: 42 samples are 5 batches and 2
    assert rows["32x32"] == [3, 42, 42, 5, 84 % 8, 126 % 8]
    assert rows["16x64"] == [2, 25, 25, 3, 50 % 8, 75 % 8]
    assert rows["all"][3] == steps
    assert "2 ranks on 2 nodes" in printed


def test_the_samples_of_a_step_are_those_of_the_loader_and_drawn(config, capsys):
    picture = config.parent / "step.png"
    main(config, show=4, output=picture)
    printed = capsys.readouterr().out
    loader = Loader(DataConfig(path=str(config.parent / "data")), global_batch=8, seed=0)
    batch = next(loader.batches(4))
    shown = re.findall(r"│ +(\d+) │ +(\d+) │", printed)
    assert [int(sample) for _, sample in shown] == batch.sample_ids.tolist()
    assert batch.micro is not None
    for number in batch.micro[:, 0].long().tolist():
        assert f"number {number} " in printed
    assert f"bucket {batch.bucket[0]}x{batch.bucket[1]}" in printed
    assert np.asarray(Image.open(picture)).std() > 5  # not blank


@pytest.mark.parametrize("captions", [["one", "two"], ["one", "two", "two"], ["one"]])
@pytest.mark.parametrize("flip", [False, True])
def test_every_sample_of_a_picture_has_the_caption_that_it_was_encoded_with(
    tmp_path, captions, flip
):
    """Two pictures' samples: their captions in turn, and again for the mirror image."""
    writer = ShardWriter(UPath(tmp_path), "shards/a/b.tar", ["moments", "text"])
    distinct = list(dict.fromkeys(captions))
    moments = ["moments", "moments.flip"][: 1 + flip]
    expected = []
    for key in ("first", "second"):
        texts = {f"text.{i}": np.full(3, i, np.float16) for i in range(len(distinct))}
        arrays = {name: np.zeros(4, np.float16) for name in moments} | texts
        variants = [
            {"moments": m, "text": f"text.{distinct.index(c)}"} for m in moments for c in captions
        ]
        facts = {"caption": f"{key} {captions[0]}", "captions": [f"{key} {c}" for c in captions]}
        writer.add(key, arrays, facts, variants)
        expected += [(key, f"{key} {c}") for _ in moments for c in captions]
    writer.commit(b"")
    shard = tmp_path / "shards" / "a" / "b.tar"
    assert keys_and_captions(shard, shard.with_name("b.idx.npy")) == expected


def test_overrides_of_a_finished_run_are_refused(config):
    with pytest.raises(InputError, match="config is what it is"):
        main(config.parent, ["seed=1"])
