"""Layers prepared over a real dataset: no picture is opened, and training sees what one preparation would give."""

import itertools
import json
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_prep.config import LayerConfig, PrepareConfig
from data_prep.layer import prepare_layer
from data_prep.preparation import prepare
from data_prep.schema import REJECTS, index_path, read_manifest, read_shard_table
from data_prep.shards import commit_path
from data_prep.sources.source import sample_key
from data_prep.verify import verify
from models.command import load_config
from models.config import InputError
from models.networks import AlignmentConfig, DiTConfig
from models.text_conventions import View
from models.text_encoder import TextEncoder
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from tests import train_factory
from tests.conftest import RUN
from tests.prep_factory import config_of_pictures, encoded, pixels
from tests.test_alignment import save_vision
from tests.test_layers import assert_same, stack, take
from tests.test_text_encoder import save_encoder


def run(config: Path, *overrides: str) -> Path:
    settings = load_config(PrepareConfig, config, list(overrides))
    prepare(settings)
    return Path(settings.output)


def lay(base: Path, name: str, encoders: dict[str, Any], **more: Any) -> Path:
    """A layer beside its base."""
    path = base.parent / f"{name}.yaml"
    config = {"base": str(base), "text_encoders": encoders, "ray": {"num_actors": 1}}
    path.write_text(yaml.safe_dump(config | {"output": str(base.parent / name)} | more))
    prepare_layer(load_config(LayerConfig, path, []))
    return base.parent / name


@pytest.fixture(scope="module")
def other_text(tmp_path_factory) -> dict[str, Any]:
    folder = save_encoder(tmp_path_factory.mktemp("other") / "t5", "t5")
    return {"path": str(folder), "max_length": 6}


@pytest.fixture(scope="module")
def config(tmp_path_factory, vae_folder, text_folder, ray_address) -> Path:
    """Pictures, one of which only decoding finds to be broken, mirrored and with two captions each."""
    folder = tmp_path_factory.mktemp("layers")
    path = config_of_pictures(
        folder,
        41,
        vae_folder,
        text_folder,
        heldout_fraction=0.2,
        images={"resolution": 32, "bucket_multiple": 8, "flip": True},
        captions={"per_picture": 2, "lines": "each"},
    )
    for number in range(0, 40, 3):
        place = folder / "pictures" / ("even" if number % 2 == 0 else "odd")
        (place / f"{number:04d}.txt").write_text(
            f"number {number}\na red apple of many words here\n"
        )
    (folder / "pictures/even/cut.png").write_bytes(encoded(pixels(99))[:-100])
    (folder / "pictures/even/cut.txt").write_text("cut")
    return path


@pytest.fixture(scope="module")
def at_once(config, other_text, vit) -> Path:
    encoders = yaml.safe_load(config.read_text())["text_encoders"] | {"t5": other_text}
    path = config.with_name("both.yaml")
    tree = yaml.safe_load(config.read_text()) | {"text_encoders": encoders, "vision_encoder": vit}
    path.write_text(yaml.safe_dump(tree | {"output": str(config.parent / "both")}))
    return run(path)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> dict[str, Any]:
    return {"path": str(save_vision(tmp_path_factory.mktemp("vit"))), "patch_pixels": 8}


@pytest.fixture(scope="module")
def base(config, at_once, vit) -> Path:
    """The base, whose pictures are gone once it and a layer of what is seen in them are prepared."""
    base = run(config)
    lay(base, "vit", {}, vision_encoder=vit)
    (config.parent / "pictures").rename(config.parent / "gone")
    return base


@pytest.fixture(scope="module")
def t5(base, other_text) -> Path:
    return lay(base, "t5", {"t5": other_text})


def test_a_second_text_encoder_gives_the_batches_of_both_at_once_and_opens_no_picture(
    base, t5, at_once
):
    config = stack(base, vit=base.parent / "vit", t5=t5)
    flat, aligned = DataConfig(path=str(at_once)), AlignmentConfig(block=1)
    model = DiTConfig(size="debug", alignment=aligned, vision_dim=24)
    one, other = (take(c, 30, model=model) for c in (config, flat))
    assert one[0].vision is not None
    assert_same(one, other)
    assert verify(base.parent / "vit") == []
    manifests = read_manifest(t5), Loader(config, global_batch=8, seed=1).manifest
    assert list(manifests[0].members) == ["t5", "t5_pooled"]
    whole = read_manifest(at_once)
    assert manifests[1].text == whole.text
    assert list(manifests[1].members.items()) == list(whole.members.items())
    assert manifests[1].buckets == whole.buckets


def test_a_layer_takes_its_members_and_headers_and_nothing_more(t5):
    """A block of 512 bytes per header, and arrays and KEY.json in whole blocks."""
    for row in read_shard_table(t5).to_pylist():
        with tarfile.open(t5 / row["path"]) as tar:
            sizes = [member.size for member in tar]
        blocks = sum(512 + -(-size // 512) * 512 for size in sizes)
        assert blocks <= row["bytes"] <= blocks + tarfile.RECORDSIZE + 1024


def test_the_audit_finds_nothing_wrong_with_a_layer_but_another_base_and_shifted_pictures(
    base, t5, tmp_path
):
    assert verify(t5) == []
    moved = shutil.copytree(t5, tmp_path / "t5")
    first, second = [
        row["path"] for row in read_shard_table(t5).to_pylist() if "32x32/train" in row["path"]
    ][:2]
    for one, other in ((first, second), (second, first)):
        shutil.copy(t5 / one, moved / other)
        shutil.copy(t5 / index_path(one), moved / index_path(other))
    assert any(
        first in problem and "not the base's, row by row" in problem for problem in verify(moved)
    )


CAPTIONS = ["a red apple", "many words of a green volcano", "volcano"]


def recaption_rows(base: Path) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """A table's rows in no order, with keys that are wrong; and what is said of each picture of the base."""
    facts = pq.read_table(base / "work/plan").to_pylist()
    lost = set(pq.read_table(base / REJECTS)["key"].to_pylist())
    said, rows = dict[str, list[str]](), list[dict[str, Any]]()
    for number, row in enumerate(facts):
        if row["key"] in lost or number % 7 == 3:
            continue
        texts = [CAPTIONS[number % 3], f"a green apple {number}"][: 1 + number % 2]
        said[row["key"]] = texts
        about = {"key": row["key"], "source": row["source"], "name": row["name"]}
        rows += [about | {"text": text, "score": 1.0 + i} for i, text in enumerate(texts)]
    strange = {"source": "p", "name": "never/there.png", "text": "x", "score": 1.0}
    rows.insert(5, strange | {"key": sample_key("p", "never/there.png")})
    rows.insert(9, strange | {"key": "no key"})
    rows.append(rows[0] | {"text": " ", "score": 0.5})
    return rows[::-1], said


def as_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        names = list(rows[0])
        lines = [",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(("kind", "by"), [("parquet", "key"), ("csv", "name"), ("jsonl", "key")])
def test_captions_of_a_table_go_to_their_pictures_and_other_rows_are_rejects(
    base, at_once, text_folder, tmp_path, kind, by
):
    rows, said = recaption_rows(base)
    table = as_table(tmp_path / f"new.{kind}", rows)
    captions = {"table": str(table), "by": by, "caption": "text", "weight": "score"}
    name = f"recaption-{kind}"
    bert = {"path": str(text_folder), "max_length": 8}
    new = lay(base, name, {"bert": bert}, captions=captions)
    assert verify(new) == []
    loader = Loader(stack(base, new=new), global_batch=8, seed=1)
    seen, encoder = dict[str, set[str]](), TextEncoder(text_folder, View(max_length=8))
    for batch in itertools.islice(loader.batches(), 40):
        for place, sample in enumerate(batch.sample_ids.tolist()):
            found = loader.first.mixture.locate(sample)
            seen.setdefault(found["key"], set()).add(found["caption"])
            tokens, mask, _ = encoder.encode([found["caption"]])
            assert int(batch.text_mask[place].sum()) == int(mask.sum())
            stored = batch.text_emb[place][batch.text_mask[place]].float()
            assert (stored - tokens[0][mask[0]]).abs().max() < 5e-3
    train = {
        k for k, v in said.items() if (int(k[12:16], 16) << 16 | int(k[16:], 16)) >= 0.2 * 2**32
    }
    assert seen.keys() == train
    assert all(captions <= set(said[key]) for key, captions in seen.items())
    counts = Counter(pq.read_table(new / REJECTS)["reason"].to_pylist())
    kept = read_manifest(base).counts.kept
    assert counts == {"caption_missing": kept - len(said), "caption_no_picture": 2}
    manifest = read_manifest(new)
    assert manifest.counts.kept == len(said)
    assert manifest.counts.seen == kept + 2


def test_a_table_that_lacks_a_column_or_changed_is_refused(base, text_folder, tmp_path):
    rows, _ = recaption_rows(base)
    table = as_table(tmp_path / "new.jsonl", rows)
    bert = {"bert": {"path": str(text_folder), "max_length": 8}}
    with pytest.raises(InputError, match=r"captions.captions.caption: .*no column 'caption'"):
        lay(base, "lacks", bert, captions={"table": str(table)})
    captions = {"table": str(table), "caption": "text"}
    lay(base, "changed", bert, captions=captions)
    as_table(table, rows[1:])
    with pytest.raises(InputError, match=r"(?s)begun with another config:.*tables.new.jsonl: "):
        lay(base, "changed", bert, captions=captions)


def test_a_base_that_is_no_base_is_refused_with_what_to_do(base, t5, text_folder, tmp_path):
    bert = {"bert": {"path": str(text_folder), "max_length": 8}}
    with pytest.raises(
        InputError, match=rf"base: {t5} is itself a layer, over {base}. Remedy: base="
    ):
        lay(t5, "over", bert)
    copy = shutil.copytree(base, tmp_path / "copy")
    manifest = read_manifest(copy)
    (generation,) = manifest.generations
    half = {"generations": [generation.model_copy(update={"complete": False})]}
    text = manifest.model_copy(update=half).with_fingerprint().model_dump_json()
    (copy / "manifest.json").write_text(text)
    wrong = rf"base: {copy} is still being prepared \(8 of 8 shards of its first generation\)"
    with pytest.raises(InputError, match=wrong):
        lay(copy, "early", bert)
    shutil.rmtree(copy / "work")
    with pytest.raises(InputError, match=rf"base: {copy} has no work/, .*Remedy: copy"):
        lay(copy, "nowork", bert)
    with pytest.raises(InputError, match=r"(?s)was begun with another config:.*max_length: 6 -> 8"):
        lay(
            base,
            "t5",
            {
                "t5": yaml.safe_load((base.parent / "t5.yaml").read_text())["text_encoders"]["t5"]
                | {"max_length": 8}
            },
        )


def test_a_layer_begun_over_a_base_that_was_encoded_again_is_not_gone_on_with(base, t5, tmp_path):
    layer, spec = shutil.copytree(t5, tmp_path / "t5"), read_shard_table(t5).to_pylist()[0]["path"]
    path = commit_path(layer, spec)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_sha256": "0ther"}))
    given = yaml.safe_load((base.parent / "t5.yaml").read_text()) | {"output": str(layer)}
    given["text_encoders"]["t5"]["max_length"] = 6  # others have been tried
    with pytest.raises(InputError, match=f"{spec} was made over another shard of {base}"):
        prepare_layer(LayerConfig.model_validate(given))


@pytest.mark.slow
def test_a_layer_grows_behind_its_base_to_what_both_at_once_grow_to(
    tmp_path, vae_folder, text_folder, other_text, ray_address
):
    config = config_of_pictures(tmp_path, 20, vae_folder, text_folder)
    tree = yaml.safe_load(config.read_text())
    both = tmp_path / "both.yaml"
    encoders = {"text_encoders": tree["text_encoders"] | {"t5": other_text}}
    both.write_text(yaml.safe_dump(tree | encoders | {"output": str(tmp_path / "both")}))
    base, flat = run(config), run(both)
    t5 = lay(base, "t5", {"t5": other_text})
    for number in range(5):
        (tmp_path / f"pictures/even/new{number}.png").write_bytes(encoded(pixels(100 + number)))
        (tmp_path / f"pictures/even/new{number}.txt").write_text(f"new number {number}")
    run(config)
    run(both)
    loader = Loader(DataConfig(path=str(t5)), global_batch=4, seed=1)
    assert loader.manifest.counts.kept == 20
    said = f"{base} has 2 generations, .* has 1: trained on 1, 20 of 25 samples"
    assert [note for note in loader.first.mixture.doubts() if re.search(said, note)]
    lay(base, "t5", {"t5": other_text})
    assert verify(t5) == []
    assert [g.num_shards for g in read_manifest(t5).generations] == [
        g.num_shards for g in read_manifest(base).generations
    ]
    assert_same(take(DataConfig(path=str(t5)), 12), take(DataConfig(path=str(flat)), 12))


@pytest.mark.slow
def test_a_run_on_a_stack_learns_to_the_bit_what_one_on_all_at_once_does(
    base, t5, at_once, tmp_path
):
    run = RUN.replace("images: 960", "images: 160").replace("every_steps: 60", "every_steps: 20")
    runs = {"flat": str(at_once), "stack": str(t5)}
    for name, data in runs.items():
        (tmp_path / f"{name}.yaml").write_text(run.format(data=data, run=tmp_path / name))
        train_factory.train(tmp_path / f"{name}.yaml")
    assert train_factory.unlike(tmp_path / "stack", tmp_path / "flat", step=20) == []
    show = train_factory.run("pipeline.show_data", str(tmp_path / "stack"), "--show", "3")
    assert show.returncode == 0, show.stderr
    assert "a red apple" in show.stdout
    given = str(tmp_path / "stack")
    for stage in (
        ["pipeline.plan", str(tmp_path / "stack.yaml")],
        ["pipeline.evaluate", given, "--heldout", "4"],
        ["pipeline.sample", given, "--prompt", "x", "sampler.num_steps=2"],
        ["pipeline.export", given, str(tmp_path / "exported")],
    ):
        done = train_factory.run(*stage)
        assert done.returncode == 0, (stage, done.stderr)
