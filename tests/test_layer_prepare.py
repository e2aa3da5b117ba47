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
import torch
import yaml

from data_prep.audit import verify
from data_prep.config import LayerConfig, PrepareConfig
from data_prep.images import ImagesConfig, decode
from data_prep.layer import prepare_layer
from data_prep.preparation import prepare
from data_prep.schema import REJECTS, index_path, read_manifest, read_shard_table
from data_prep.shards import commit_path, work_of
from data_prep.sources.source import sample_key
from models.captioner import Captioner
from models.command import load_config
from models.config import InputError
from models.networks import AlignmentConfig, DiTConfig
from models.text_conventions import View
from models.text_encoder import TextEncoder
from models.weights import weights_sha256
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from tests import train_factory
from tests.conftest import RUN
from tests.prep_factory import config_of_pictures, encoded, fill_folder, pixels, write_config
from tests.test_alignment import save_vision
from tests.test_captioner import save_captioner
from tests.test_layers import assert_same, stack, take
from tests.test_text_encoder import save_encoder


def run(config: Path, *overrides: str) -> Path:
    settings = load_config(PrepareConfig, config, list(overrides))
    prepare(settings)
    return Path(settings.output)


def planned_rows(base: Path, generation: int = 0) -> list[dict[str, Any]]:
    """The base's pictures of a generation, with their addresses."""
    return pq.read_table(work_of(base, generation) / "plan").to_pylist()


def lay(
    base: Path, name: str, encoders: dict[str, Any], dry_run: bool = False, **more: Any
) -> Path:
    """A layer beside its base."""
    path = base.parent / f"{name}.yaml"
    config = {"base": str(base), "text_encoders": encoders, "ray": {"num_actors": 1}}
    path.write_text(yaml.safe_dump(config | {"output": str(base.parent / name)} | more))
    prepare_layer(load_config(LayerConfig, path, []), dry_run)
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
    facts = planned_rows(base)
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
    with pytest.raises(InputError, match=r"captions.table: .*/new.jsonl has no column 'caption'"):
        lay(base, "lacks", bert, captions={"table": str(table)})
    captions = {"table": str(table), "caption": "text"}
    lay(base, "changed", bert, captions=captions)
    as_table(table, rows[1:])
    with pytest.raises(
        InputError, match=r"captions.table: has changed since generation 0 of .*/changed "
    ):
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


@pytest.fixture(scope="module")
def seen(tmp_path_factory, vae_folder, text_folder, ray_address) -> Path:
    """A base whose pictures lie in a folder and, as bytes, in a table; two captions each."""
    folder = tmp_path_factory.mktemp("seen")
    rows = {"image": [encoded(pixels(200 + i)) for i in range(6)], "caption": ["a b\nc"] * 6}
    pq.write_table(pa.table(rows), folder / "t.parquet")
    sources = {"p": fill_folder(folder / "pictures", 14)}
    sources["t"] = {"kind": "table", "path": str(folder / "t.parquet")}
    captions = {"per_picture": 2, "lines": "each"}
    more = {"captions": captions, "images": {"resolution": 32, "bucket_multiple": 8, "flip": True}}
    return run(write_config(folder / "c.yaml", sources, vae_folder, text_folder, **more))


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> dict[str, Any]:
    """Its answers at random, some of which do not end."""
    path = str(save_captioner(tmp_path_factory.mktemp("captioner"), seed=3))
    numbers = {"temperature": 1.0, "max_new_tokens": 32, "batch_size": 3, "pixels": 50}
    return {"path": path, "prompts": ["describe", "w1", "w2"]} | numbers


@pytest.fixture(scope="module")
def told(seen, captioner, text_folder) -> Path:
    bert = {"bert": {"path": str(text_folder), "max_length": 8}}
    return lay(seen, "told", bert, captions={"captioner": captioner})


def answers(layer: Path) -> dict[str, list[dict[str, Any]]]:
    """What the captioner said, by key."""
    found = dict[str, list[dict[str, Any]]]()
    for row in pq.read_table(layer / "captions").to_pylist():
        found.setdefault(row["key"], []).append(row)
    return found


def test_what_a_captioner_says_of_the_training_crop_is_the_caption_and_else_a_reject(
    seen, told, captioner
):
    assert verify(told) == []
    said, rows = answers(told), planned_rows(seen)
    assert said.keys() == {row["key"] for row in rows}
    model, square = Captioner(Path(captioner["path"])), 0
    for row in rows:
        found = said[row["key"]]
        assert len({answer["prompt"] for answer in found}) == 2
        for answer in found:
            assert answer["caption"] == (None if answer["reason"] else answer["answer"])
        if row["height"] != row["width"] or row["source"] == "t":
            continue
        # At twice the bucket's 32 pixels the picture has over 50.
        pixels = decode(Path(row["path"]).read_bytes(), (64, 64), ImagesConfig()).pixels
        shown = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        for answer in found:
            (alone,) = model.answer(shown, [row["key"]], answer["prompt"], 32, 1.0)
            assert vars(alone).items() <= answer.items()
        square += 1
    assert square > 3
    assert Counter(row["source"] for row in rows) == {"p": 14, "t": 6}
    assert not [row for rows in said.values() for row in rows if row["reason"] == "unreadable"]
    rejects = Counter(pq.read_table(told / REJECTS)["reason"].to_pylist())
    lost = [rows[0]["reason"] for rows in said.values() if all(row["reason"] for row in rows)]
    assert rejects == Counter(lost)
    assert rejects["caption_cut"] > 0
    assert read_manifest(told).counts.kept == 20 - len(lost) > 5
    assert read_manifest(told).captioner["weights"] == weights_sha256(Path(captioner["path"]))


def test_a_step_shows_a_captioners_captions_and_its_table_makes_the_same_layer(
    seen, told, text_folder
):
    loader, said = Loader(stack(seen, new=told), global_batch=4, seed=1), answers(told)
    for batch in itertools.islice(loader.batches(), 12):
        for sample in batch.sample_ids.tolist():
            found = loader.first.mixture.locate(sample)
            assert found["caption"] in [row["caption"] for row in said[found["key"]]]
    bert = {"bert": {"path": str(text_folder), "max_length": 8}}
    again = lay(seen, "again", bert, captions={"table": str(told / "captions")})
    assert read_shard_table(again).equals(read_shard_table(told))
    page = (told / "report.html").read_text()
    assert any(row["caption"] and row["caption"] in page for rows in said.values() for row in rows)
    assert "caption_cut" in page
    assert (told / "contact_sheet.png").is_file()


def test_a_picture_that_is_gone_is_a_reject_and_changes_no_other_answer(
    seen, told, captioner, text_folder, tmp_path
):
    lost = next(row for row in planned_rows(seen) if row["source"] == "p")
    bert = {"bert": {"path": str(text_folder), "max_length": 8}}
    Path(lost["path"]).rename(tmp_path / "aside")
    try:
        layer = lay(seen, "lost", bert, captions={"captioner": captioner})
    finally:
        (tmp_path / "aside").rename(lost["path"])
    before, after = answers(told), answers(layer)
    assert {row["reason"] for row in after.pop(lost["key"])} == {"unreadable"}
    del before[lost["key"]]
    assert before == after


def test_captions_of_two_kinds_or_captioners_or_of_no_base_are_refused_in_one_message(
    seen, told, captioner, text_folder, tmp_path
):
    bert = {"bert": {"path": str(text_folder), "max_length": 8}}
    lay_told = lambda **changes: lay(  # noqa: E731
        seen, "told", bert, captions={"captioner": captioner | changes}
    )
    with pytest.raises(InputError, match="captions: got table and captioner, expected one of"):
        lay(seen, "both", bert, captions={"table": str(told), "captioner": captioner})
    with pytest.raises(InputError, match="captions: weight: no effect"):
        lay(seen, "both", bert, captions={"weight": "w", "captioner": captioner})
    with pytest.raises(InputError, match=r"begun with another config:\n.*captioner.prompts: "):
        lay_told(prompts=["w3"])
    other = str(save_captioner(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match=r"hashes.captions.captioner.weights: \w+ -> \w+"):
        lay_told(path=other)
    with pytest.raises(
        InputError, match=r"captions.captioner.path: /none: no such folder, expected"
    ):
        lay_told(path="/none")
    gone = {"base": str(tmp_path / "gone"), "text_encoders": bert, "output": str(tmp_path / "x")}
    with pytest.raises(InputError, match=rf"^base: {tmp_path}/gone/manifest.json: no such file"):
        prepare_layer(LayerConfig.model_validate(gone))


def test_a_dry_run_says_what_a_layer_would_store_and_reject(
    seen, captioner, text_folder, tmp_path, capsys
):
    bert = {"bert": {"path": str(text_folder), "max_length": 4}}
    rows = [{"key": row["key"], "caption": "a red apple"} for row in planned_rows(seen)[:9]]
    table = as_table(tmp_path / "t.jsonl", [*rows, rows[0] | {"caption": " "}])
    cases = {
        "table": ({"captions": {"table": str(table)}}, ["caption_empty", "1 of 10", "9 of 9"]),
        "captioner": ({"captions": {"captioner": captioner}}, ["describe", "w2"]),
        "base": ({}, ["of 40", "KiB"]),
    }
    for name, (more, expected) in cases.items():
        lay(seen, f"dry-{name}", bert, dry_run=True, **more)
        shown = capsys.readouterr().out
        assert "20 pictures to encode for" in shown
        assert "bert" in shown
        assert [text for text in expected if text not in shown] == [], shown
        assert not (seen.parent / f"dry-{name}").exists()


@pytest.mark.slow
def test_a_table_may_grow_with_its_base_and_what_was_taken_from_it_stays(
    tmp_path, vae_folder, text_folder, ray_address, capsys
):
    config = config_of_pictures(tmp_path, 12, vae_folder, text_folder, text_encoders={})
    base, bert = run(config), {"bert": {"path": str(text_folder), "max_length": 8}}
    captions = {"table": str(tmp_path / "new.jsonl")}
    rows = [{"key": row["key"], "caption": f"old {row['key']}"} for row in planned_rows(base)]
    as_table(tmp_path / "new.jsonl", rows[1:])
    layer = lay(base, "recaption", bert, captions=captions)
    first = read_shard_table(layer)
    for number in range(3):
        (tmp_path / f"pictures/even/new{number}.png").write_bytes(encoded(pixels(100 + number)))
        (tmp_path / f"pictures/even/new{number}.txt").write_text("new")
    run(config)
    changed = [row | {"caption": "another"} for row in rows]
    keys = [row["key"] for row in planned_rows(base, 1)]
    changed += [{"key": key, "caption": f"new {key}"} for key in keys]
    as_table(tmp_path / "new.jsonl", [*changed, {"key": "0" * 20, "caption": "x"}])
    assert lay(base, "recaption", bert, captions=captions) == layer
    assert "earlier generations keep what they took" in capsys.readouterr().out
    assert verify(layer) == []
    table = read_shard_table(layer)
    assert table.slice(0, len(first)).equals(first)
    assert len(table) > len(first)
    counts = Counter(pq.read_table(layer / REJECTS)["reason"].to_pylist())
    assert counts == {"caption_missing": 1, "caption_no_picture": 1}
    assert read_manifest(layer).counts.kept == 14


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
