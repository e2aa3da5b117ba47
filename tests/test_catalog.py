"""Which pictures are taken, and the plan as a pure function of them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.catalog import (
    CATALOG_SCHEMA,
    CaptionsConfig,
    FiltersConfig,
    apply_filters,
    clean_caption,
    plan,
    scan_partition,
)
from data_prep.decoder import DecodePool
from data_prep.images import ImagesConfig, Rejected
from data_prep.shards import write_table
from data_prep.sources import FolderSource, TarSource, list_source, sample_key
from tests.prep_factory import encoded, fill_folder, pixels, sample_members, tar_bytes

IMAGES = ImagesConfig(resolution=32, bucket_multiple=8)


def row(i: int, **more) -> dict:
    name = f"{i}.png"
    return {
        "key": sample_key("s", name),
        "source": "s",
        "name": name,
        "path": f"/p/{name}",
        "offset": 0,
        "length": 1,
        "content_hash": i.to_bytes(32),
        "height": 40,
        "width": 40,
        "caption": "x",
        "metadata": "",
    } | more


def catalog(rows) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA)


def made_plan(work, rows, parts=3, size=8, heldout=0.0):
    for number, chunk in enumerate(np.array_split(np.arange(len(rows)), parts)):
        path = work / "catalog" / f"part-{number:06d}.parquet"
        write_table(path, catalog([rows[i] for i in chunk]))
    plan(work, IMAGES, FiltersConfig(), size, heldout)
    return pq.read_table(work / "shard_list.parquet").to_pylist(), pq.ParquetFile(
        work / "plan.parquet"
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a red apple\n", "a red apple"),
        (b"\xef\xbb\xbftwo\r\n lines\t here ", "two lines here"),
        ("é 🍎".encode(), "é 🍎"),
        (b"a\0b", "a b"),
    ],
)
def test_captions_become_one_line_of_text(data, expected):
    assert clean_caption(data, CaptionsConfig()) == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "caption_empty"),
        (b" \n", "caption_empty"),
        (b"\xff\xfe", "caption_not_utf8"),
        (b"\xed\xa0\x80", "caption_not_utf8"),  # half a surrogate pair
        (b"x" * 5000, "caption_too_long"),
    ],
)
def test_captions_that_cannot_be_used_are_rejected(data, reason):
    with pytest.raises(Rejected) as caught:
        clean_caption(data, CaptionsConfig())
    assert caught.value.reason == reason


def test_empty_captions_are_kept_where_the_config_says_so():
    assert clean_caption(None, CaptionsConfig(empty="keep")) == ""


def test_the_scan_has_a_row_for_every_input(tmp_path):
    fill_folder(tmp_path / "p", 3)
    (tmp_path / "p" / "bad.png").write_bytes(b"<html>")
    (tmp_path / "p" / "bad.txt").write_text("a caption")
    (tmp_path / "p" / "mute.png").write_bytes(encoded(pixels(9)))
    (tmp_path / "0.tar").write_bytes(tar_bytes(sample_members(7))[:1500])
    entries = list_source("s", FolderSource(kind="folder", path=str(tmp_path / "p")))
    pool = DecodePool(IMAGES, 1)
    assert scan_partition(tmp_path / "a.parquet", entries, IMAGES, CaptionsConfig(), pool) == 5
    rows = {r["name"]: r for r in pq.read_table(tmp_path / "a.parquet").to_pylist()}
    assert rows["bad.png"]["reason"] == "undecodable"
    assert rows["mute.png"]["reason"] == "caption_empty"
    assert (rows["even/0002.png"]["height"], rows["even/0002.png"]["width"]) == (60, 36)
    entries = list_source("t", TarSource(kind="tars", path=str(tmp_path / "0.tar")))
    scan_partition(tmp_path / "b.parquet", entries, IMAGES, CaptionsConfig(), pool)
    broken = pq.read_table(tmp_path / "b.parquet").to_pylist()
    assert {r["reason"] for r in broken} == {"broken_tar"}


def test_filters_reject_each_for_the_first_rule_that_applies():
    rows = [
        row(0),
        row(1, reason="undecodable", detail="x"),
        row(2, height=10, width=400),
        row(3, height=30, width=80),
        row(4, content_hash=(0).to_bytes(32)),
        row(5, content_hash=(2).to_bytes(32)),  # the same as one that was too small
        row(6, height=32, width=64),
    ]
    kept, rejects = apply_filters(catalog(rows), FiltersConfig(min_side=32, max_aspect=2))
    assert kept["name"].to_pylist() == ["0.png", "5.png", "6.png"]
    found = {r["name"]: (r["reason"], r["detail"]) for r in rejects.to_pylist()}
    assert found == {
        "1.png": ("undecodable", "x"),
        "2.png": ("too_small", "400x10"),
        "3.png": ("too_small", "80x30"),
        "4.png": ("duplicate", f"same file as {sample_key('s', '0.png')}"),
    }
    kept, rejects = apply_filters(catalog(rows), FiltersConfig(duplicates="keep"))
    assert (len(kept), len(rejects)) == (6, 1)


def test_every_sample_is_planned_once_and_in_the_order_of_its_key(tmp_path):
    rows = [row(i, height=[40, 30][i % 2], width=[40, 60][i % 2]) for i in range(100)]
    shards, file = made_plan(tmp_path, rows)
    assert file.num_row_groups == len(shards)
    planned = []
    for i, shard in enumerate(shards):
        group = file.read_row_group(i)
        assert len(group) == shard["num_planned"] <= 8
        keys = group["key"].to_pylist()
        assert keys == sorted(keys)
        assert {(s["height"] > s["width"]) for s in group.to_pylist()} == {
            shard["height"] > shard["width"]
        }
        planned += keys
    assert sorted(planned) == sorted(r["key"] for r in rows)
    assert len({shard["path"] for shard in shards}) == len(shards)
    sizes = [s["num_planned"] for s in shards if s["height"] == s["width"]]
    assert sizes == [8] * 6 + [2]


def test_the_plan_does_not_depend_on_how_the_catalog_was_cut_or_ordered(tmp_path):
    rows = [row(i) for i in range(50)]
    made_plan(tmp_path / "a", rows, parts=2)
    made_plan(tmp_path / "b", rows[::-1], parts=5)
    for name in ("plan.parquet", "shard_list.parquet"):
        assert pq.read_table(tmp_path / "a" / name) == pq.read_table(tmp_path / "b" / name)


def test_the_held_out_part_is_about_the_fraction_and_stays_when_data_is_added(tmp_path):
    def heldout(work, count):
        shards, file = made_plan(work, [row(i) for i in range(count)], heldout=0.1)
        return {
            key
            for i, shard in enumerate(shards)
            if shard["split"] == "heldout"
            for key in file.read_row_group(i)["key"].to_pylist()
        }

    few, many = heldout(tmp_path / "a", 1000), heldout(tmp_path / "b", 2000)
    # Binomial(2000, 0.1): mean 200, standard deviation 13.
    assert 150 < len(many) < 250
    assert few == {key for key in many if key in {row(i)["key"] for i in range(1000)}}
