"""Text from outside that is no Unicode, at every place where one enters: nothing ends a preparation."""

import csv
import json
import os
import random
from datetime import date
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.catalog import CaptionsConfig, FiltersConfig
from data_prep.config import PrepareConfig
from data_prep.images import Rejected
from data_prep.preparation import prepare
from data_prep.scan import list_sources
from data_prep.schema.metadata import check_fields
from data_prep.shards import write_text
from data_prep.sources.folder import FolderSource
from data_prep.sources.table import TableSource
from data_prep.sources.tars import TarSource
from data_prep.storage import open_root
from data_prep.text import MAX_DEPTH, encodable, parse_json
from data_prep.workers import _answers
from models.command import load_config
from models.config import InputError
from tests.prep_factory import encoded, pixels, read_samples, tar_bytes, write_config
from tests.test_catalog import scanned
from tests.test_sources import items, reasons

PICTURES = [encoded(pixels(i)) for i in range(4)]
# Bytes of other encodings, and texts that UTF-8 cannot hold.
NASTY_BYTES = [b"caf\xe9", b"\xff\xfe\xfd", "\ud83d".encode("utf-8", "surrogatepass"), b"a\0b"]
NASTY_TEXTS = ["cut \ud83d", "\udc00\ud800", "nul\0", "\udce9", "fine é"]


def table(path, **options) -> TableSource:
    return TableSource(kind="table", path=str(path), **options)


def stored(rows):
    """The metadata of rows, which shards and tables can hold with all the rest that the rows say."""
    for row in rows:
        text = json.dumps({n: row[n] for n in ("name", "detail", "captions")}, ensure_ascii=False)
        (text + row["metadata"]).encode()
    return [json.loads(row["metadata"] or "{}") for row in rows]


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_a_text_of_json_that_is_no_unicode_is_replaced_and_its_picture_taken(tmp_path, text):
    facts = {"title": text, text: {"deep": [text]}}
    members = [("a.png", PICTURES[0]), ("a.txt", b"x"), ("a.json", json.dumps(facts).encode())]
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    rows = {"image": "p.png", "caption": "x", **facts}
    (tmp_path / "p.png").write_bytes(PICTURES[1])
    (tmp_path / "t.jsonl").write_text(json.dumps(rows))
    good = encodable(text)
    (row,) = rows = scanned(tmp_path, TarSource(kind="tars", path=str(tmp_path / "0.tar")))
    assert row["reason"] is None
    assert stored(rows) == [{"title": good, good: {"deep": [good]}}]
    (row,) = rows = scanned(tmp_path, table(tmp_path / "t.jsonl"))
    assert row["reason"] is None
    assert stored(rows)[0]["title"] == good


@pytest.mark.parametrize("bad", NASTY_BYTES)
def test_bytes_of_another_encoding_cost_no_more_than_their_row(tmp_path, bad):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(PICTURES[i])
    lines = [b"image,caption,by " + bad, b"0.png,x," + bad, b"1.png," + bad + b",x", b"2.png,x,y"]
    lines += [bad + b".png,x,y"]
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines))
    rows = scanned(tmp_path, table(tmp_path))
    facts = stored(rows)
    assert len(rows) == 4
    assert facts[0][encodable("by " + bad.decode(errors="surrogateescape"))]
    assert [row["reason"] is None for row in rows] == [True, b"\0" in bad, True, False]
    with pytest.raises(InputError, match="has no column 'jpg'") as caught:
        items(table(tmp_path, image="jpg"))
    str(caught.value).encode()


def test_names_of_files_and_members_are_rejects_that_a_table_can_hold(tmp_path):
    folder = tmp_path / "p"
    for name in (b"caf\xe9.png", b"dir\xe9/a.png", b"ok.png"):
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(PICTURES[0])
    for link in ("l1", "l2"):
        os.symlink(os.path.join(os.fsencode(folder), b"dir\xe9"), os.fsencode(folder / link))
    source = {"s": {"kind": "folder", "path": str(folder)}}
    config = PrepareConfig.model_validate({"sources": source, "vae": {"path": "v"}, "output": "o"})
    listing = {row["name"]: row for row in list_sources(config).to_pylist()}
    assert {n: row["reason"] for n, row in listing.items()} == {
        "ok.png": None,
        r"caf\udce9.png": "name_not_utf8",
        r"dir\udce9": "name_not_utf8",
        "l1/a.png": None,
        "l2/": "folder_already_listed",
    }
    assert listing["l2/"]["detail"].endswith(r"dir\udce9")
    members = [(os.fsdecode(b"caf\xe9.png"), PICTURES[0]), ("a.png", PICTURES[1])]
    (tmp_path / "0.tar").write_bytes(tar_bytes([*members, ("a.txt", b"x")]))
    rows = scanned(tmp_path, TarSource(kind="tars", path=str(tmp_path / "0.tar")))
    stored(rows)
    assert [row["reason"] for row in rows] == ["name_not_utf8", None]


def test_a_name_on_a_store_that_is_no_unicode_is_a_reject():
    store = open_root("memory://foreign", "here")
    for name in ("a.png", "b/caf\udce9.png"):
        write_text(store / name, "x")
    found = items(FolderSource(kind="folder", path=str(store)))
    assert reasons(found) == {r"b/caf\udce9.png": "name_not_utf8"}
    assert len(found) == 2


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_reasons_and_messages_can_travel_and_be_stored(text):
    Rejected("reason", text).detail.encode()

    def refuse():
        raise InputError(f"has no column {text}")

    with pytest.raises(InputError) as caught:
        list(_answers(refuse, [()]))
    str(caught.value).encode()
    assert caught.value.__suppress_context__


def test_json_nested_deeper_than_others_can_read_again_is_none():
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        deep = random.Random(0).randint(MAX_DEPTH + 2, 400)
        for levels in (deep, 980, 100_000):
            with pytest.raises(ValueError, match="nested too deep"):
                parse_json(opening * levels + "1" + closing * levels)
        parse_json(opening * MAX_DEPTH + "1" + closing * MAX_DEPTH)


def odd_arrays() -> dict[str, pa.Array]:
    """Three values of every type that Parquet holds, at and over what Python's types hold."""
    most = pa.array([2**62 + 1, -(2**62), 0], pa.int64())
    few = pa.array([2**31 - 1, -(2**31), 0], pa.int32())
    broken = pa.array([b"caf\xe9", b"\xed\xa0\x80", b"fine"])
    text = pa.StringArray.from_buffers(3, *broken.buffers()[1:])
    big = [Decimal(9 * 10**37), Decimal(-1), None]
    offsets = pa.array([0, 1, 2, 3], pa.int32())
    arrays = [
        few.view(pa.date32()),
        few.view(pa.time32("s")),
        *(most.view(pa.time64(unit)) for unit in ("us", "ns")),
        *(most.view(pa.timestamp(unit)) for unit in ("ms", "us", "ns")),
        *(most.view(pa.timestamp("us", zone)) for zone in ("UTC", "Mars/Base", "+99:99")),
        *(most.view(pa.duration(unit)) for unit in ("s", "ns")),
        pa.array([2**64 - 1, 0, None], pa.uint64()),
        pa.array([float("nan"), float("-inf"), 1.5]),
        pa.array([float("nan"), float("inf"), 1.5], pa.float16()),
        pa.array(big, pa.decimal128(38)),
        pa.array(big, pa.decimal256(76, 30)),
        pa.array([True, False, None]),
        pa.nulls(3),
        broken,
        pa.array([b"abc", b"\xff\xfe\xfd", None], pa.binary(3)),
        text,
        text.cast(pa.large_string(), safe=False),
        pa.ListArray.from_arrays(offsets, text),
        pa.FixedSizeListArray.from_arrays(text, 1),
        pa.StructArray.from_arrays([text, few.view(pa.date32())], ["bytes", "path"]),
        pa.MapArray.from_arrays(offsets, pa.array(["a", "b", "c"]), text),
        pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), text),
        pa.array([b"0" * 16] * 3, pa.uuid()),
        pa.array([[1.0], [], None]),
    ]
    return {f"{number} {array.type}": array for number, array in enumerate(arrays)}


ODD = odd_arrays()


@pytest.mark.parametrize("kind", ODD)
def test_a_value_of_any_type_in_a_table_costs_its_row_at_most(tmp_path, kind):
    """Beside the columns that are used nothing, as one of them its row; whatever it is, no exception."""
    columns = {"image": PICTURES[:3], "caption": list("abc"), "label": [0, 1, 2], "odd": ODD[kind]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = items(table(tmp_path, label="label"))
    assert [(item.reason, item.label) for item in found] == [(None, 0), (None, 1), (None, 2)]
    for role in ({"image": "odd"}, {"captions": {"odd": 1}}, {"label": "odd"}):
        rows = scanned(tmp_path, table(tmp_path, **role))
        stored(rows)
        assert len(rows) == 3
        assert all(row["reason"] or row["captions"] for row in rows)
        if "label" in role:
            good = pa.types.is_integer(ODD[kind].type)
            assert [row["label"] for row in rows] == [None, 0 if good else None, None]


def test_a_damaged_column_costs_what_needs_it(tmp_path):
    """Bytes within pages of a column are overwritten, row group by row group."""
    size, rng = 4, random.Random(0)
    columns = {"image": [p + bytes(1000) for p in PICTURES] * 3, "caption": list("abcd") * 3}
    columns["more"] = ["".join(rng.choices("xyz", k=900)) for _ in range(12)]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=size, compression="snappy")
    whole, footer = path.read_bytes(), pq.read_metadata(path)
    for group in range(3):
        for place, name in enumerate(columns):
            chunk = footer.row_group(group).column(place)
            begin = chunk.dictionary_page_offset or chunk.data_page_offset
            data = bytearray(whole)
            data[begin : begin + 24] = bytes(24)
            path.write_bytes(data)
            found = [item.reason for item in items(table(tmp_path))]
            bad = range(group * size, group * size + size) if name != "more" else ()
            assert found == ["broken_table" if i in bad else None for i in range(12)], name


def write_rows(path, rows):
    """The rows as Parquet, CSV, JSONL or a tar, as the extension of the path says."""
    pictures = [(f"{i}.png", PICTURES[i % 4]) for i in range(len(rows))]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        samples = [(f"{i}.json", json.dumps(row).encode()) for i, row in enumerate(rows)]
        path.write_bytes(tar_bytes([*samples, *pictures]))


def source_of(path):
    kind = TarSource if path.suffix == ".tar" else TableSource
    return kind(kind="tars" if path.suffix == ".tar" else "table", path=str(path))


TEXTS, NO_TEXTS = ("x", ["x", "y"]), (None, [])
OTHERS = (5, 1.5, True, {"en": "x"}, [1, 2], [["x"]])


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.tar"])
def test_a_caption_of_another_type_is_said_to_be_one(tmp_path, name):
    (tmp_path / "0.png").write_bytes(PICTURES[0])
    others = (*OTHERS, b"x", date(2000, 1, 1)) if name == "t.parquet" else OTHERS
    reasons = {None: TEXTS, "caption_empty": NO_TEXTS, "caption_type": others}
    for reason, values in reasons.items():
        for value in values:
            write_rows(tmp_path / name, [{"image": "0.png", "caption": value}])
            (row,) = scanned(tmp_path, source_of(tmp_path / name))
            assert row["reason"] == reason, value
            assert reason != "caption_type" or "got" in row["detail"]


FILTERED = {
    "dictionary": (pa.array(["en", "de"]).dictionary_encode(), {"one_of": ["en"]}, [None, "'de'"]),
    "decimal": (pa.array([Decimal("5.5"), Decimal("1")]), {"min": 5}, [None, "1.0"]),
    "list": (pa.array([["en"], []]), {"one_of": ["en"]}, ["['en']", "[]"]),
    "struct": (pa.array([{"a": 1.0}, {"a": None}]), {"max": 1}, ["{'a': 1.0}", "{'a': None}"]),
    "date": (pa.array([date(2000, 1, 2)] * 2), {"min": 1}, ["'2000-01-02'"] * 2),
    "text": (pa.array(["5", "x"]), {"min": 1}, ["'5'", "'x'"]),
    "bytes": (pa.array([b"en", b"de"]), {"one_of": ["en"]}, ["\"b'en'\"", "\"b'de'\""]),
    "bool": (pa.array([True, False]), {"min": 0}, ["True", "False"]),
    "null": (pa.nulls(2), {"min": 0}, ["nothing"] * 2),
}


@pytest.mark.parametrize("kind", FILTERED)
def test_a_filter_says_what_it_found_whatever_its_type(tmp_path, kind):
    array, rule, got = FILTERED[kind]
    columns = {"image": PICTURES[:2], "caption": ["a", "b"], "odd": array}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    filters = FiltersConfig.model_validate({"metadata": {"odd": rule}})
    rows = scanned(tmp_path, table(tmp_path), filters=filters)
    stored(rows)
    assert [row["reason"] for row in rows] == [g and "metadata" for g in got]
    for row, value in zip(rows, got, strict=True):
        assert value is None or f"odd: got {value}, expected" in row["detail"]
    if kind in ("list", "struct", "bool", "text", "date"):
        with pytest.raises(
            InputError, match=r"has a (text or )?number there; got.*one_of for text"
        ):
            check_fields([row["metadata"] for row in rows], filters.metadata)


def test_a_name_that_no_row_of_jsonl_has_is_an_error_that_names_those_that_are(tmp_path):
    (tmp_path / "0.png").write_bytes(PICTURES[0])
    write_rows(tmp_path / "t.jsonl", [{"image": "0.png", "text": "x"}, {"image": "0.png"}])
    for options, missing in (({}, "caption"), ({"captions": {"text": 1}, "label": "y"}, "y")):
        with pytest.raises(InputError, match=f"no column '{missing}', got image, text"):
            items(table(tmp_path, **options))
    found = items(table(tmp_path, captions={"text": 1}))
    assert [len(item.captions) for item in found] == [1, 0]


def test_a_caption_under_another_name_is_hinted_at(tmp_path):
    near = ["a.png.txt", "b.caption", "c.yaml", "D.txt", "e.md"]
    for i, name in enumerate(near):
        (tmp_path / f"{'abcde'[i]}.png").write_bytes(PICTURES[0])
        (tmp_path / name).write_text("x")
    rows = scanned(tmp_path, FolderSource(kind="folder", path=str(tmp_path)))
    assert [row["name"] for row in rows if row["reason"] == "other_file"] == sorted(near)
    rows = [row for row in rows if row["reason"] != "other_file"]
    assert {row["reason"] for row in rows} == {"caption_empty"}
    for row, name in zip(rows, near, strict=True):
        assert f"no caption; {name} is there" in row["detail"]


def test_a_number_that_is_too_large_for_a_float_or_for_json_is_missing():
    assert parse_json("[1e999, -1e999, NaN, 1.5, 7]") == [None, None, None, 1.5, 7]


KINDS = {"parquet": ["nan"], "csv": ["inf", "nan"], "jsonl": ["-inf"], "tar": ["nan"]}


@pytest.mark.parametrize(("name", "value"), [(f"t.{n}", v) for n in KINDS for v in KINDS[n]])
def test_a_number_that_json_has_not_is_missing_everywhere(tmp_path, name, value):
    (tmp_path / "0.png").write_bytes(PICTURES[0])
    write_rows(tmp_path / name, [{"image": "0.png", "caption": "x", "score": float(value)}])
    for missing, reason in (("reject", "metadata"), ("keep", None)):
        rule = {"metadata": {"score": {"min": 0, "missing": missing}}}
        filters = FiltersConfig.model_validate(rule)
        (row,) = scanned(tmp_path, source_of(tmp_path / name), filters=filters)
        assert row["reason"] == reason
        assert reason is None or "got nothing" in row["detail"]
        json.loads(row["metadata"] or "{}", parse_constant=pytest.fail)


LAYOUTS = {
    "include": (["data/a.csv", "data/b.csv", "c.csv"], {"include": ["data/*"]}, ["a", "b"]),
    "exclude": (["data/a.csv", "data/b.csv", "c.csv"], {"exclude": ["*b.csv", "c*"]}, ["a"]),
    "names": (["train-0.csv", "test-0.csv", "trains.csv"], {"split": "train"}, ["train-0"]),
    "folders": (["train/0.csv", "val/1.csv", "dev/2.csv"], {"split": "validation"}, ["1", "2"]),
    "both": (["test/train-0.csv", "train/test.csv"], {"split": "test"}, ["test"]),
    "none": (["a.csv", "train.csv"], {}, ["a", "train"]),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_files_are_chosen_by_name_or_split_and_the_others_are_rows(tmp_path, capsys, kind):
    names, options, taken = LAYOUTS[kind]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("image,caption\n")
    source = {"kind": "table", "path": str(tmp_path), **options}
    sources = {"sources": {"s": source}, "vae": {"path": "v"}, "output": "o"}
    listing = list_sources(PrepareConfig.model_validate(sources)).to_pylist()
    assert sorted(os.path.basename(r["name"])[:-4] for r in listing if not r["reason"]) == taken
    assert {row["reason"] for row in listing} <= {None, "left_out"}
    assert len(listing) == len(names)
    said = "sources.s.split=train" in " ".join(capsys.readouterr().out.split())
    assert said == (kind == "none")
    with pytest.raises(InputError, match=r"include, exclude and split"):
        list(table(tmp_path, include=["nothing"]).entries("s"))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_rows_of_one_picture_can_be_one_with_all_their_captions(tmp_path, name):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(PICTURES[i])
    images = [0, 1, 0, 2, 1, 0]
    rows = [{"image": f"{image}.png", "caption": f"c{i}"} for i, image in enumerate(images)]
    if name == "t.parquet":
        rows = [row | {"image": PICTURES[image]} for row, image in zip(rows, images, strict=True)]
    write_rows(tmp_path / name, rows)
    found = items(table(tmp_path / name, merge_rows=True))
    lost = "unreadable" if name != "t.parquet" else None
    assert [item.reason for item in found] == [None, None, "merged", lost, "merged", "merged"]
    said = [[text for text, _ in item.captions] for item in found[:2]]
    assert said == [[b"c0", b"c2", b"c5"], [b"c1", b"c4"]]
    assert found[5].detail == f"its captions are {found[0].name}'s"
    assert [item.reason for item in items(table(tmp_path / name))].count(None) == 6 - bool(lost)


@pytest.mark.parametrize("suffix", [".mask", "-depth", "_depth_0", "_Normals"])
def test_a_mask_beside_a_picture_is_a_picture_only_with_a_caption_of_its_own(tmp_path, suffix):
    names = [f"a{suffix}", "a", f"b{suffix}", "b", f"lone{suffix}", "unmasked"]
    keep = CaptionsConfig(empty="keep")
    members = []
    for name in names:
        (tmp_path / f"{name}.png").write_bytes(PICTURES[0])
        members.append((f"{name}.png", PICTURES[0]))
    (tmp_path / f"b{suffix}.txt").write_text("a mask")
    members.append((f"b{suffix}.txt", b"a mask"))
    rows = scanned(tmp_path, FolderSource(kind="folder", path=str(tmp_path)), keep)
    expected = {f"a{suffix}.png": "companion"}
    assert {row["name"]: row["reason"] for row in rows if row["reason"]} == expected
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    rows = scanned(tmp_path, TarSource(kind="tars", path=str(tmp_path / "0.tar")), keep)
    expected = {f"0.tar/a{suffix}": "companion"}
    assert {row["name"]: row["reason"] for row in rows if row["reason"]} == expected


def test_a_status_that_is_not_img2datasets_is_metadata(tmp_path):
    said = [{"status": x} for x in ("ok", "done", 200, None, {"a": 1}, "success", "failed")]
    write_rows(tmp_path / "0.tar", said)
    rows = scanned(tmp_path, source_of(tmp_path / "0.tar"), CaptionsConfig(empty="keep"))
    assert [(r["reason"], json.loads(r["metadata"])) for r in rows] == [(None, s) for s in said]


@pytest.mark.slow
def test_a_preparation_of_nothing_but_foreign_texts_ends_with_shards_that_hold_them(
    tmp_path, ray_address, vae_folder, text_folder
):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(PICTURES[i])
    lines = [b"image,caption,by \xe9", b"0.png,a,Ren\xe9", b'1.png,"b" c,x', b"2.png,caf\xe9,x"]
    (folder / "t.csv").write_bytes(b"\n".join([*lines, b"3.png,d,x\n"]))
    facts = json.dumps({"title": "cut \ud83d", "score": float("nan"), "\udce9": "\udce9"}).encode()
    members = [("a.png", encoded(pixels(9))), ("a.txt", b"x"), ("a.json", facts)]
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    (tmp_path / "bad.csv").write_bytes(b"image,caf\xe9\n0.png,x\n")
    sources = {
        "rows": {"kind": "table", "path": str(folder)},
        "web": {"kind": "tars", "path": str(tmp_path / "0.tar")},
    }
    config = write_config(tmp_path / "c.yaml", sources, vae_folder, text_folder)
    prepare(load_config(PrepareConfig, config, []))
    made = {
        json.loads(s["json"])["name"]: json.loads(s["json"])
        for _, s in read_samples(tmp_path / "dataset")
    }
    assert made["t.csv/000000000"]["metadata"]["by \ufffd"] == "Ren\ufffd"
    assert made["0.tar/a"]["metadata"] == {"title": "cut \ufffd", "score": None, "\ufffd": "\ufffd"}
    rejects = pq.read_table(tmp_path / "dataset" / "rejects.parquet").to_pylist()
    assert {(r["name"], r["reason"]) for r in rejects} == {
        ("t.csv/000000001", "broken_row"),
        ("t.csv/000000002", "caption_not_utf8"),
    }
    bad = [f"sources.rows.path={tmp_path / 'bad.csv'}", f"output={tmp_path / 'other'}"]
    with pytest.raises(InputError, match="has no column 'caption', got image, caf\ufffd"):
        prepare(load_config(PrepareConfig, config, bad))
