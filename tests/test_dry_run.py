"""What a dry run prints is what a preparation then makes, or what its sample holds."""

import os
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from data_prep import report
from data_prep.config import PrepareConfig
from data_prep.dry_run import PICTURES, sampled_items
from data_prep.preparation import prepare
from data_prep.scan import list_sources
from data_prep.schema import index_path, read_index, read_manifest, read_shard_table
from data_prep.shards import read_table
from data_prep.sources.table import TableSource
from models.command import load_config
from tests.prep_factory import (
    encoded,
    fill_folder,
    pixels,
    read_samples,
    sample_members,
    tar_bytes,
    write_config,
)

LENGTHS = {"short": 4, "middle": 5, "long": 12}


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setattr(report.console, "width", 400)


def config_of(folder: Path, sources, vae: Path, text: Path, **more) -> PrepareConfig:
    encoders = {n: {"path": str(text), "max_length": length} for n, length in LENGTHS.items()}
    path = write_config(folder / "c.yaml", sources, vae, text, text_encoders=encoders, **more)
    return load_config(PrepareConfig, path, [])


def dry_run(config: PrepareConfig, capsys) -> dict[str, list[list[str]]]:
    """The cells of every table that is printed, by its title, and the lines between them by their first word."""
    prepare(config, dry_run=True)
    found, title = dict[str, list[list[str]]](), ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("│"):
            found[title].append([cell.strip() for cell in line.strip("│").split("│")])
        elif line[:1].isalpha():
            title = line
            found[title] = []
    assert not Path(config.output).exists()
    return found


def number(text: str) -> int:
    return int(text.replace(",", "").split()[0])


def cut_captions(found: dict[str, list[list[str]]]) -> dict[str, str]:
    title = next(title for title in found if title.startswith("Captions cut"))
    return {row[0]: row[2] for row in found[title]}


def test_the_printed_numbers_are_those_of_the_preparation(
    tmp_path, vae_folder, text_folder, ray_address, capsys
):
    folder, tars = fill_folder(tmp_path / "pictures", 30), tmp_path / "tars"
    (folder / "mute.png").write_bytes(encoded(pixels(400)))
    (folder / "lost.png").symlink_to(tmp_path / "nowhere")
    tars.mkdir()
    for i in range(2):
        members = [m for k in range(5) for m in sample_members(500 + 10 * i + k)]
        (tars / f"part-{i:05d}.tar").write_bytes(tar_bytes(members))
    (tmp_path / "tables").mkdir()
    for split, first in (("train", 600), ("test", 610)):
        rows = {"image": [encoded(pixels(first + i)) for i in range(6)]}
        rows["caption"] = [None, *(f"a red apple {'a ' * i}" for i in range(5))]
        pq.write_table(pa.table(rows), tmp_path / "tables" / f"{split}-00000-of-00001.parquet")
    sources = {"p": folder, "t": tars}
    sources["q"] = {"kind": "table", "path": str(tmp_path / "tables")}
    config = config_of(tmp_path, sources, vae_folder, text_folder, captions={"per_picture": 2})
    begin = time.monotonic()
    found = dry_run(config, capsys)
    assert time.monotonic() - begin < 60
    prepare(config)
    dataset = Path(config.output)
    manifest, catalog = read_manifest(dataset), Counter[tuple[str, str, str]]()
    for part in sorted((dataset / "work" / "catalog").glob("*.parquet")):
        for row in read_table(part).to_pylist():
            catalog[row["source"], Path(row["name"]).suffix, row["reason"] or ""] += 1
    assert any("GiB free" in line for line in found)
    files = {(source, kind, taken): number(n) for source, kind, taken, n, _ in found["Files"]}
    assert files["p", ".jpg", "yes"] == catalog["p", ".jpg", ""] == 15
    assert files["p", ".png", "yes"] == catalog["p", ".png", ""] + 1 == 16
    assert files["p", ".png", "no: unreadable"] == catalog["p", ".png", "unreadable"] == 1
    assert files["t", "part-*.tar", "yes"] == 2
    assert (
        files["q", "train-*-of-*.parquet", "yes"] == files["q", "test-*-of-*.parquet", "yes"] == 1
    )
    assert len(files) == 6
    # The sample is the whole of such small sources.
    rejected = {
        row[1]: number(row[2])
        for row in found["Rejected in a sample, before pictures are opened"][:1]
    }
    assert rejected == {"caption_empty": 1}
    total = 2 * manifest.counts.kept
    assert cut_captions(found) == {
        name: f"{cut:,} of {total:,}" for name, cut in manifest.counts.cut_captions.items()
    }
    assert manifest.counts.cut_captions["short"] > manifest.counts.cut_captions["middle"] > 0
    shards = read_shard_table(dataset).to_pylist()
    for name, rows, row_bytes, kib in found["Text per caption"]:
        column = list(manifest.members).index(name)
        indices = [read_index(dataset / index_path(row["path"]))[:, column, 1] for row in shards]
        mean = np.concatenate(indices).mean()
        assert rows == f"{mean / number(row_bytes):.1f}"
        assert kib == f"{(mean + 2 * manifest.text.roles[name].pooled_dim) / 1024:,.1f}"
    title = f"Buckets, latents at 1/{manifest.codec.downscale}"
    latents = {row[0]: row[2] for row in found[title]}
    for row in read_shard_table(dataset).to_pylist():
        _, height, width = manifest.shape_in_bucket("moments", row["height"], row["width"])
        assert latents[f"{row['height']}x{row['width']}"] == f"{height}x{width}"


def test_the_printed_classes_are_the_labels_of_the_preparation(
    tmp_path, vae_folder, text_folder, ray_address, capsys
):
    for i, name in enumerate(["volcano", "apple", "b c", "Zebra"]):
        fill_folder(tmp_path / "classes" / name, 2, first=700 + 2 * i)
    source = {"kind": "classes", "path": str(tmp_path / "classes")}
    path = write_config(
        tmp_path / "c.yaml", {"c": source}, vae_folder, text_folder, text_encoders={}
    )
    config = load_config(PrepareConfig, path, [])
    (line,) = [line for line in dry_run(config, capsys) if line.startswith("Classes")]
    prepare(config)
    names = line.removeprefix("Classes, by label: ").split(", ")
    assert names == [f"{i} {n}" for i, n in enumerate(read_manifest(Path(config.output)).classes)]
    for _, sample in read_samples(Path(config.output)):
        name = re.search(rb'"name": "([^/]+)/', sample["json"])[1].decode()
        label = int.from_bytes(sample["label.npy"][-8:], "little")
        assert names[label] == f"{label} {name}"


def test_pixels_without_a_codec_have_no_weights_to_be_named(tmp_path, text_folder, capsys):
    sources = {"p": fill_folder(tmp_path / "pictures", 2)}
    config = config_of(tmp_path, sources, Path("pixels"), text_folder)
    assert ["vae", "pixels", "fp32", ""] in dry_run(config, capsys)["Encoders"]


def test_a_sample_of_many_pictures_is_counted_as_what_it_is(
    tmp_path, vae_folder, text_folder, capsys
):
    data = encoded(pixels(0))
    for i in range(PICTURES + 50):
        (tmp_path / f"{i}.png").write_bytes(data)
        (tmp_path / f"{i}.txt").write_text("apple " * (i % 7))
    config = config_of(tmp_path, {"p": {"kind": "folder", "path": str(tmp_path)}}, vae_folder, text_folder,
                       output=str(tmp_path.parent / f"{tmp_path.name}-out"))  # fmt: skip
    found = dry_run(config, capsys)
    said = [
        item.captions[0][0].decode()
        for item in sampled_items("p", config.sources["p"], list_sources(config), [])
    ]
    assert len(said) == PICTURES
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    tokens = [len(tokenizer(text)["input_ids"]) for text in said if text]
    assert cut_captions(found) == {
        name: f"{sum(n > length for n in tokens)} of {len(tokens)}"
        for name, length in LENGTHS.items()
    }


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_of_one_picture_are_said_with_the_option_that_keeps_their_captions(
    tmp_path, vae_folder, text_folder, capsys, kind
):
    """As COCO has them, by path, and as bytes."""
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(encoded(pixels(i)))
    images = [f"{i % 2}.png" for i in range(6)]
    if kind == "csv":
        lines = [f"{image},caption {i}" for i, image in enumerate(images)]
        (tmp_path / "t.csv").write_text("\n".join(["image,caption", *lines]))
    else:
        data = [(tmp_path / image).read_bytes() for image in images]
        columns = {"image": data, "caption": [f"caption {i}" for i in range(6)]}
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    for merge in (False, True):
        source = {"kind": "table", "path": str(tmp_path), "merge_rows": merge}
        prepare(config_of(tmp_path, {"t": source}, vae_folder, text_folder), dry_run=True)
        said = "4 of 6 rows are of a picture that another row has; sources.t.merge_rows=true"
        assert (said in capsys.readouterr().out) is not merge


class DeadlySource(TableSource):
    def read(self, entry, class_names, fields):
        os._exit(1)


def test_a_table_that_kills_its_reader_is_counted(tmp_path, vae_folder, text_folder):
    (tmp_path / "t.parquet").touch()
    source = DeadlySource(kind="table", path=str(tmp_path))
    config = config_of(tmp_path, {"t": source.model_dump()}, vae_folder, text_folder)
    (item,) = sampled_items("t", source, list_sources(config), [])
    assert (item.name, item.reason) == ("t.parquet", "scan_crash")
