"""Which pictures are taken, and the plan as a pure function of them."""

import hashlib
import json
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.catalog import (
    CATALOG_SCHEMA,
    CaptionsConfig,
    FiltersConfig,
    ScanSettings,
    clean_caption,
    draw_captions,
    scan_partition,
)
from data_prep.decoder import DecodePool
from data_prep.duplicates import near_duplicates
from data_prep.images import ImagesConfig, Rejected, list_buckets, perceptual_hash
from data_prep.plan import find_duplicates, plan, read_planned, sift
from data_prep.schema.metadata import MetadataFilter
from data_prep.shards import write_table
from data_prep.sources import sample_key
from data_prep.sources.folder import FolderSource
from data_prep.sources.tars import TarSource
from models.config import InputError, parse_config
from tests.prep_factory import encoded, fill_folder, pixels, sample_members, tar_bytes

IMAGES = ImagesConfig(resolution=32, bucket_multiple=8)


def digest(i: int) -> bytes:
    return hashlib.sha256(str(i).encode()).digest()


def row(i: int, **more) -> dict:
    name = f"{i}.png"
    return {
        "key": sample_key("s", name),
        "source": "s",
        "name": name,
        "path": f"/p/{name}",
        "offset": 0,
        "length": 1,
        "content_hash": digest(i),
        "height": 40,
        "width": 40,
        "captions": ["x"],
        "metadata": "",
    } | more


def catalog(rows) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA)


@cache
def probes() -> DecodePool:
    return DecodePool(IMAGES, 1)


def scanned(work, source, captions=CaptionsConfig(), filters=FiltersConfig()) -> list[dict]:
    """The catalog's rows of a source, read as one partition."""
    # Beside the folder, which may be the source's own.
    work = work.with_name(f"{work.name}-work")
    entries = list(source.entries("s"))
    settings = ScanSettings(work, [], IMAGES, captions, filters)
    scan_partition(settings, "part", source, entries, probes())
    (part,) = (work / "catalog").iterdir()
    rows = pq.read_table(part).to_pylist()
    part.unlink()
    return rows


def filtered(work, rows, filters) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """Names taken, and reason and detail of those rejected."""
    part = work / "part.parquet"
    pq.write_table(catalog(rows), part)
    kept, rejects = [], {}
    for taken, rejected in sift([part], filters, find_duplicates([part], filters, work)):
        kept += taken["name"].to_pylist()
        rejects |= {r["name"]: (r["reason"], r["detail"]) for r in rejected.to_pylist()}
    return kept, rejects


def made_plan(work, rows, parts=3, size=8, heldout=0.0):
    for number, chunk in enumerate(np.array_split(np.arange(len(rows)), parts)):
        path = work / "catalog" / f"part-{number:06d}.parquet"
        write_table(path, catalog([rows[i] for i in chunk]))
    plan(work, list_buckets(IMAGES), FiltersConfig(), size, heldout)
    shards = pq.read_table(work / "shard_list.parquet").to_pylist()
    return shards, [read_planned(work, i) for i in range(len(shards))]


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
        (b"\xff\xfe", "caption_empty"),  # the mark of UTF-16 alone
        (b"\xff\xfea", "caption_not_utf8"),
        (b"\xed\xa0\x80", "caption_not_utf8"),  # half a surrogate pair
        (b"x" * 5000, "caption_too_long"),
    ],
)
def test_captions_that_cannot_be_used_are_rejected(data, reason):
    with pytest.raises(Rejected) as caught:
        clean_caption(data, CaptionsConfig())
    assert caught.value.reason == reason


def test_empty_captions_are_kept_and_short_ones_rejected_where_the_config_says_so():
    assert clean_caption(None, CaptionsConfig(empty="keep")) == ""
    assert clean_caption(b"abc", CaptionsConfig(min_chars=3)) == "abc"
    with pytest.raises(Rejected) as caught:
        clean_caption(b"ab", CaptionsConfig(min_chars=3))
    assert caught.value.reason == "caption_too_short"


def test_the_scan_has_a_row_for_every_input(tmp_path):
    fill_folder(tmp_path / "p", 3)
    (tmp_path / "p" / "bad.png").write_bytes(b"<html>")
    (tmp_path / "p" / "bad.txt").write_text("a caption")
    (tmp_path / "p" / "mute.png").write_bytes(encoded(pixels(9)))
    (tmp_path / "0.tar").write_bytes(tar_bytes(sample_members(7))[:1500])
    folder = FolderSource(kind="folder", path=str(tmp_path / "p"))
    rows = {r["name"]: r for r in scanned(tmp_path, folder)}
    assert len(rows) == 5
    assert rows["bad.png"]["reason"] == "undecodable"
    assert rows["mute.png"]["reason"] == "caption_empty"
    assert (rows["even/0002.png"]["height"], rows["even/0002.png"]["width"]) == (60, 36)
    broken = scanned(tmp_path, TarSource(kind="tars", path=str(tmp_path / "0.tar")))
    assert {r["reason"] for r in broken} == {"broken_tar"}


def test_filters_reject_each_for_the_first_rule_that_applies(tmp_path):
    rows = [
        row(0),
        row(1, reason="undecodable", detail="x"),
        row(2, height=10, width=400),
        row(3, height=30, width=80),
        row(4, content_hash=digest(0)),
        row(5, content_hash=digest(2)),  # the same as one that was too small
        row(6, height=32, width=64),
        row(7, height=40, width=400),
    ]
    kept, found = filtered(tmp_path, rows, FiltersConfig(min_side=32, max_aspect=2))
    assert kept == ["0.png", "5.png", "6.png"]
    assert found == {
        "1.png": ("undecodable", "x"),
        "2.png": ("too_small", "400x10"),
        "3.png": ("too_small", "80x30"),
        "4.png": ("duplicate", f"same file as {sample_key('s', '0.png')}"),
        "7.png": ("aspect", "400x40"),
    }
    kept, found = filtered(tmp_path, rows, FiltersConfig(duplicates="keep"))
    assert (len(kept), len(found)) == (7, 1)


def test_every_sample_is_planned_once_and_in_the_order_of_its_key(tmp_path):
    rows = [row(i, height=[40, 30][i % 2], width=[40, 60][i % 2]) for i in range(100)]
    shards, groups = made_plan(tmp_path, rows)
    planned = []
    for group, shard in zip(groups, shards, strict=True):
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
    for name in ("plan/000000.parquet", "shard_list.parquet"):
        assert pq.read_table(tmp_path / "a" / name) == pq.read_table(tmp_path / "b" / name)


def test_the_held_out_part_is_about_the_fraction_and_stays_when_data_is_added(tmp_path):
    def heldout(work, count):
        shards, groups = made_plan(work, [row(i) for i in range(count)], heldout=0.1)
        return {
            key
            for group, shard in zip(groups, shards, strict=True)
            if shard["split"] == "heldout"
            for key in group["key"].to_pylist()
        }

    few, many = heldout(tmp_path / "a", 1000), heldout(tmp_path / "b", 2000)
    # Binomial(2000, 0.1): mean 200, standard deviation 13.
    assert 150 < len(many) < 250
    assert few == {key for key in many if key in {row(i)["key"] for i in range(1000)}}


AESTHETIC = FiltersConfig.model_validate({"metadata": {"aesthetic": {"min": 5}}})


def test_a_filter_of_metadata_rejects_before_the_picture_is_looked_at(tmp_path):
    facts = [{"aesthetic": 6.0}, {"aesthetic": 3.0}, {}, {"aesthetic": "high"}]
    members = [m for i, more in enumerate(facts) for m in sample_members(i, **more)]
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    source = TarSource(kind="tars", path=str(tmp_path / "0.tar"))
    rows = scanned(tmp_path, source, filters=AESTHETIC)
    assert [row["reason"] for row in rows] == [None, "metadata", "metadata", "metadata"]
    assert [row["detail"] for row in rows[1:]] == [
        f"aesthetic: got {got}, expected a number from 5" for got in ("3.0", "nothing", "'high'")
    ]
    assert rows[1]["height"] is None


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        ({"min": 1}, [1, 2.5]),
        ({"max": 1}, [0, 1]),
        ({"min": 1, "max": 1, "missing": "keep"}, [1, None]),
        ({"one_of": ["en", 2.5]}, [2.5, "en"]),
    ],
)
def test_a_field_of_metadata_is_taken_in_its_range_or_among_its_values(wanted, taken):
    rule = MetadataFilter.model_validate(wanted)
    values = [0, 1, 2.5, float("nan"), True, "en", "1", [1], None]
    assert [value for value in values if rule.takes(value)] == taken
    numbers = np.array([0, 1, 2.5, -1e300, np.nan, np.inf, -np.inf])
    one_by_one = [rule.takes(x if np.isfinite(x) else None) for x in numbers.tolist()]
    assert rule.takes_numbers(numbers).tolist() == one_by_one


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"missing": "keep"}, "expected min, max or both, or else one_of"),
        ({"min": 1, "one_of": ["en"]}, "expected min, max or both, or else one_of"),
        ({"min": 2, "max": 1}, "min 2 is over max 1"),
        ({"min": "high"}, "metadata.x.min: .*number .*got 'high'"),
        ({"one_of": []}, "metadata.x.one_of: .*at least 1 item"),
        ({"more": 3}, "metadata.x.more: unknown key"),
    ],
)
def test_a_filter_of_metadata_that_says_nothing_or_two_things_is_refused(wanted, message):
    with pytest.raises(InputError, match=message):
        parse_config(FiltersConfig, {"metadata": {"x": wanted}}, "test")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            [{"aesthtic": 6}, {"lang": 1}],
            "aesthetic: no picture has a number there; got of all fields aesthtic, lang, expected",
        ),
        (
            [{}, {"aesthetic": None}],
            "got of all fields no metadata at all, expected a number from 5",
        ),
        ([{"aesthetic": "6"}], "no picture has a number there; got '6', expected a number from 5"),
        ([{"aesthetic": "high"}, {"aesthetic": 1}], None),
    ],
)
def test_a_filter_of_a_field_that_no_picture_has_is_an_error_of_the_config(
    tmp_path, facts, message
):
    rows = [row(i, metadata=json.dumps(more)) for i, more in enumerate(facts)]
    write_table(tmp_path / "catalog" / "part-000000.parquet", catalog(rows))
    if message is None:
        plan(tmp_path, list_buckets(IMAGES), AESTHETIC, 8, 0.0)
        return
    with pytest.raises(InputError, match=message):
        plan(tmp_path, list_buckets(IMAGES), AESTHETIC, 8, 0.0)
    assert not (tmp_path / "shard_list.parquet").exists()


def test_captions_are_drawn_as_often_as_their_weights_say():
    said = ((b"often", 3.0), (b"seldom", 1.0), (b"\xff", 9.0))
    once, four = CaptionsConfig(), CaptionsConfig(per_picture=4)
    drawn = [draw_captions(sample_key("s", str(i)), said, once)[0] for i in range(2000)]
    # Binomial(2000, 1/4): mean 500, standard deviation 19.
    assert 420 < drawn.count("seldom") < 580
    assert set(drawn) == {"often", "seldom"}
    for i in range(50):
        assert sorted(draw_captions(str(i), said, four)) == ["often"] * 3 + ["seldom"]
    with pytest.raises(Rejected) as caught:
        draw_captions("0", ((b"\xff", 1.0), (b" ", 1.0)), once)
    assert caught.value.reason == "caption_not_utf8"


def test_lines_of_a_caption_are_one_caption_or_one_each():
    said = (("one\r\n\n two\n".encode("utf-16"), 2.0), (b"three", 1.0), (b"\xff\n\xff", 1.0))
    each = CaptionsConfig(lines="each", per_picture=6)
    assert sorted(draw_captions("0", said, each)) == ["one"] * 2 + ["three"] * 2 + ["two"] * 2
    joined = draw_captions("0", said, CaptionsConfig(per_picture=3))
    assert sorted(joined) == ["one two"] * 2 + ["three"]


def test_captions_of_joined_lines_are_counted(tmp_path):
    texts = [b"one\n", b"one\ntwo", "one\ntwo".encode("utf-16-le"), b"\xff\n\xff"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.png").write_bytes(encoded(pixels(i)))
        (tmp_path / f"{i}.txt").write_bytes(text)
    source = FolderSource(kind="folder", path=str(tmp_path))
    work = tmp_path.with_name(f"{tmp_path.name}-work")
    for lines, expected in (("join", 2), ("each", 0)):
        settings = ScanSettings(work, [], IMAGES, CaptionsConfig(lines=lines), FiltersConfig())
        entries = list(source.entries("s"))
        assert scan_partition(settings, "part", source, entries, probes()) == expected


def test_one_picture_in_several_sizes_and_formats_is_one_near_duplicate_of_another_is_not():
    config = ImagesConfig(resolution=32, bucket_multiple=8)
    image = Image.fromarray(pixels(0, 200, 200))
    variants = [
        encoded(image),
        encoded(image, "JPEG", quality=60),
        encoded(image.resize((90, 90), Image.Resampling.LANCZOS), "WEBP"),
        encoded(Image.fromarray((pixels(0, 200, 200) * 0.8).astype(np.uint8))),
    ]
    hashes = [perceptual_hash(data, config) for data in variants]
    assert max((hashes[0] ^ other).bit_count() for other in hashes) <= 3
    others = [perceptual_hash(encoded(pixels(i, 200, 200)), config) for i in range(1, 30)]
    assert min((hashes[0] ^ other).bit_count() for other in others) > 8


def slow_near_duplicates(hashes: list[int], most: int) -> dict[int, int]:
    """Row -> the first kept row within reach: every pair compared."""
    kept, found = [], {}
    for row, value in enumerate(hashes):
        near = [k for k in kept if (hashes[k] ^ value).bit_count() <= most]
        if near:
            found[row] = near[0]
        else:
            kept.append(row)
    return found


@pytest.mark.parametrize("most", [0, 1, 3, 8])
def test_near_duplicates_are_those_that_comparing_all_pairs_finds(most):
    rng = np.random.default_rng(most)
    hashes = rng.integers(0, 2**64, 60, dtype=np.uint64).repeat(10)
    for _ in range(5):  # clusters whose members differ in up to 5 bits, chains among them
        flipped = np.uint64(1) << rng.integers(0, 64, len(hashes), dtype=np.uint64)
        hashes ^= np.where(rng.random(len(hashes)) < 0.4, flipped, np.uint64(0))
    hashes = rng.permutation(hashes)
    found = near_duplicates(np.arange(len(hashes)), hashes, most)
    expected = slow_near_duplicates([int(h) for h in hashes], most)
    assert len(expected) > 20
    assert sorted(found["row"]) == sorted(expected)
    for row, original, distance, generation, _ in found.tolist():
        assert generation == -1
        assert original not in expected
        assert distance == (int(hashes[row]) ^ int(hashes[original])).bit_count()
        assert distance <= most


def test_many_hashes_are_compared_through_more_than_one_block(monkeypatch):
    monkeypatch.setattr("data_prep.duplicates.CHOICES", [3])
    test_near_duplicates_are_those_that_comparing_all_pairs_finds(3)


def test_near_duplicates_across_parts_and_sources_are_rejected_with_their_original(tmp_path):
    rows = [
        row(i, perceptual_hash=value) for i, value in enumerate([0xFF << 20, 0, 0xFF00, 0xFE << 20])
    ]
    rows[1] |= {"reason": "undecodable", "detail": ""}
    kept, found = filtered(tmp_path, rows, FiltersConfig(near_duplicates=2))
    assert kept == ["0.png", "2.png"]
    assert found["3.png"] == ("near_duplicate", f"1 of 64 bits from {rows[0]['key']}")
    kept, _ = filtered(tmp_path, rows, FiltersConfig())
    assert kept == ["0.png", "2.png", "3.png"]


def test_a_plan_in_many_ranges_is_the_plan_in_one(tmp_path, monkeypatch):
    rows = [row(i, content_hash=digest(i // 2)) for i in range(200)]
    made_plan(tmp_path / "a", rows)
    for name in ("ROWS_PER_RANGE", "HASHES_PER_RANGE", "SHARDS_PER_FILE", "ROWS_AT_ONCE"):
        monkeypatch.setattr(f"data_prep.plan.{name}", 7)
    shards, groups = made_plan(tmp_path / "b", rows)
    assert len(list((tmp_path / "b" / "plan").iterdir())) > 1
    before = pq.read_table(tmp_path / "a" / "plan").to_pylist()
    assert sorted(r["key"] for r in before) == sorted(
        k for g in groups for k in g["key"].to_pylist()
    )
    where = {shard["path"]: group for shard, group in zip(shards, groups, strict=True)}
    monkeypatch.undo()
    listed = pq.read_table(tmp_path / "a" / "shard_list.parquet")["path"].to_pylist()
    assert {p: read_planned(tmp_path / "a", i) for i, p in enumerate(listed)} == where
    a, b = (pq.read_table(tmp_path / name / "plan_rejects.parquet") for name in "ab")
    assert a == b
    assert len(a) == 100
