"""Tables of pictures: every row a sample or a reject with a true reason."""

import base64
import csv
import json
import random
import re
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.catalog import CaptionsConfig, clean_caption
from data_prep.sources import read_entries
from data_prep.sources.classes import ClassesSource, count_classes
from data_prep.sources.imagefolder import ImageFolderSource
from data_prep.sources.source import count_rejects
from data_prep.sources.table import TableSource
from data_prep.storage import open_root, read_bytes, write_atomic
from models.config import InputError, parse_config
from tests.prep_factory import encoded, pixels
from tests.test_catalog import scanned
from tests.test_sources import items, reasons

PICTURES = [encoded(pixels(i)) for i in range(4)]


def write_bytes(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda whole: whole.write_bytes(data))


def save_pictures(folder):
    folder.mkdir(exist_ok=True)
    for i, data in enumerate(PICTURES):
        (folder / f"{i}.png").write_bytes(data)


def write_csv(path, rows, names=("image", "caption", "score")):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([names, *rows])


def table(path, **options) -> TableSource:
    return TableSource(kind="table", path=str(path), **options)


def test_a_csv_of_paths_gives_pictures_captions_and_metadata(tmp_path):
    save_pictures(tmp_path / "p")
    write_csv(tmp_path / "t.csv", [(f"p/{i}.png", f"two\nlines {i}", i / 2) for i in range(4)])
    found = items(table(tmp_path))
    assert [item.name for item in found] == [f"t.csv/{i:09d}" for i in range(4)]
    for i, item in enumerate(found):
        assert read_bytes(item.path, item.offset, item.length) == PICTURES[i]
        assert item.captions == ((f"two\nlines {i}".encode(), 1.0),)
        assert item.metadata["score"] == i / 2


def test_a_local_table_may_give_paths_as_file_urls(tmp_path):
    folder = tmp_path / "a b%20::"
    folder.mkdir()
    (folder / "x.png").write_bytes(PICTURES[0])
    path, uri = str(folder / "x.png"), (folder / "x.png").as_uri()
    urls = [path, f"file://{path}", f"file:{path}", f"file://localhost{path}", uri]
    write_csv(tmp_path / "t.csv", [(url, "x", 1) for url in urls])
    found = items(table(tmp_path))
    assert reasons(found) == {}
    assert [item.path for item in found] == [path] * len(urls)


def test_jsonl_rows_may_hold_base64_and_lists_of_captions(tmp_path):
    text = base64.b64encode(PICTURES[0]).decode()
    rows = [{"image": text, "a": ["x", "y"], "b": "z"}, {"image": "?" + text, "a": "x"}]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    first, second = items(table(tmp_path, strings="base64", captions={"a": 3, "b": 1}))
    assert first.data == PICTURES[0]
    assert first.captions == ((b"x", 1.5), (b"y", 1.5), (b"z", 1.0))
    assert "image" not in first.metadata
    assert second.reason == "broken_base64"


def test_bytes_in_parquet_are_staged_and_read_back_from_their_address(tmp_path):
    """Hugging Face's image column, compressed in row groups of two, beside a plain bytes column."""
    image = [{"bytes": data, "path": None} for data in PICTURES]
    columns = {"image": image, "caption": list("abcd"), "label": [3, 1, 2, 0]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    rows = scanned(tmp_path, table(tmp_path / "a.parquet", label="label"))
    assert [row["label"] for row in rows] == [3, 1, 2, 0]
    for row, data in zip(rows, PICTURES, strict=True):
        assert row["path"].endswith("/staged/part")
        assert read_bytes(row["path"], row["offset"], row["length"]) == data
        assert (row["height"], row["width"], row["reason"]) == (40, 40, None)
    pq.write_table(pa.table({"jpg": PICTURES, "caption": list("abcd")}), tmp_path / "b.parquet")
    again = scanned(tmp_path, table(tmp_path / "b.parquet", image="jpg"))
    assert [row["content_hash"] for row in again] == [row["content_hash"] for row in rows]


def test_hugging_faces_image_folder_is_read_and_pictures_without_a_row_are_rejects(tmp_path):
    for part in ("train", "test"):
        save_pictures(tmp_path / part)
        rows = [(f"{i}.png", f"{part} {i}") for i in range(3)]
        write_csv(tmp_path / part / "metadata.csv", rows, ("file_name", "text"))
    save_pictures(tmp_path / "train" / "more")
    found = items(ImageFolderSource(kind="imagefolder", path=str(tmp_path)))
    taken = [item for item in found if not item.reason]
    assert {item.captions[0][0] for item in taken} == {
        f"{part} {i}".encode() for part in ("train", "test") for i in range(3)
    }
    assert reasons(found) == {
        "test/3.png": "no_metadata",
        "train/3.png": "no_metadata",
        **{f"train/more/{i}.png": "no_metadata" for i in range(4)},
    }
    # So are those under no metadata at all, and what is no picture.
    for place in ("", "more"):
        save_pictures(tmp_path / place)
    (tmp_path / "train" / "notes.pdf").write_text("x")
    found = reasons(items(ImageFolderSource(kind="imagefolder", path=str(tmp_path))))
    assert sorted(found.values()) == ["no_metadata"] * 14 + ["other_file"]
    above = tmp_path / "metadata.jsonl"
    above.write_text(json.dumps({"file_name": "train/more/0.png", "text": "x"}))
    found = items(ImageFolderSource(kind="imagefolder", path=str(tmp_path)))
    assert len([item for item in found if not item.reason]) == 7
    assert "train/3.png" in reasons(found)


def test_what_is_wrong_with_a_row_is_its_reason(tmp_path):
    save_pictures(tmp_path / "p")
    rows = [
        (json.dumps({"image": "p/0.png", "caption": "x", "n": 1}), None),
        (json.dumps({"image": "p/1.png", "caption": None}), None),
        (json.dumps({"image": "p/gone.png", "caption": "x"}), "unreadable"),
        (json.dumps({"image": "pipe:touch run"}), "unreadable"),
        *((json.dumps({"image": value}), "no_picture") for value in (None, 7)),
        (json.dumps({"image": "http://host/x.png"}), "foreign_url"),
        *((json.dumps({"image": name}), "name_not_utf8") for name in ("a\0b", "\ud800")),
        *((line, "broken_json") for line in ("{", "[1]", "[" * 100_000)),
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(line for line, _ in rows) + "\n\n")
    found = [item.reason for item in items(table(tmp_path))]
    assert found == [reason for _, reason in rows]


def test_a_row_of_an_image_folder_cannot_point_out_of_it(tmp_path):
    save_pictures(tmp_path / "secret")
    (tmp_path / "data").mkdir()
    outside = ["../secret/0.png", str(tmp_path / "secret" / "1.png"), "x/../../secret/2.png"]
    write_csv(
        tmp_path / "data" / "metadata.csv", [(p, "x") for p in outside], ("file_name", "text")
    )
    found = items(ImageFolderSource(kind="imagefolder", path=str(tmp_path / "data")))
    assert [item.reason for item in found] == ["path_outside"] * 3


BAD_CAPTIONS = ['"hello" world', r'"a \"quoted\" word"', '"', '"open, more', "x,y,z", '"a""']


@pytest.mark.parametrize("bad", BAD_CAPTIONS)
@pytest.mark.parametrize(
    ("names", "end"),
    [("image,caption", "\n"), ("caption,image,n", "\r\n"), ("caption,image,n", "\r")],
)
def test_a_row_of_a_csv_that_is_none_costs_itself_alone(tmp_path, bad, end, names):
    """Rows of one line and of two, good and bad by turns; a row's reason names the line where it begins."""
    save_pictures(tmp_path / "p")
    rng, lines, expected = random.Random(bad + names), [names], []
    for i in range(40):
        kind = rng.choice(["good", "lines", "bad"])
        caption = {"good": f"good {i}", "lines": f'"two{end}lines {i}"', "bad": bad}[kind]
        cells = {"image": f"p/{i % 4}.png", "caption": caption, "n": str(i)}
        expected.append((len(lines) + 1, kind))
        lines += ",".join(cells[name] for name in names.split(",")).split(end)
    with (tmp_path / "t.csv").open("w", newline="") as file:
        file.write(end.join(lines) + end)
    found = items(table(tmp_path))
    said = [item.captions[0][0].decode().replace(end, " ") for item in found if not item.reason]
    places = {int(re.search(r"line (\d+)", i.detail)[1]) for i in found if i.reason}
    assert {item.reason for item in found} == {None, "broken_row"}
    # Of two bad rows the first one's quote may be closed by the second's, never by a good row's.
    good = [i for i, (_, kind) in enumerate(expected) if kind == "good"]
    assert set(said) >= {f"good {i}" for i in good}
    if bad in BAD_CAPTIONS[:2]:
        good = [i for i, (_, kind) in enumerate(expected) if kind != "bad"]
        assert said == [f"{'good' if expected[i][1] == 'good' else 'two lines'} {i}" for i in good]
    assert not [text for text in said if ".png" in text]
    assert places >= {line for line, kind in expected if kind == "bad"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("caption", ["a red apple", "красное яблоко", "苹果"])
def test_tables_and_captions_are_read_in_every_encoding_of_unicode(tmp_path, encoding, caption):
    save_pictures(tmp_path / "p")
    rows = [f"image,caption\r\np/{i}.png,{caption}\r\n" for i in range(1)]
    (tmp_path / "a.csv").write_bytes("".join(rows).encode(encoding))
    row = json.dumps({"image": "p/0.png", "caption": caption}, ensure_ascii=False)
    (tmp_path / "b.jsonl").write_bytes(f"{row}\n{row}".encode(encoding))
    found = items(table(tmp_path))
    assert [clean_caption(i.captions[0][0], CaptionsConfig()) for i in found] == [caption] * 3
    if caption.isascii() or encoding in ("utf-16", "utf-8-sig", "utf-32"):
        assert clean_caption(f"{caption}\n".encode(encoding), CaptionsConfig()) == caption


ARRAY = [{"image": f"p/{i}.png", "caption": f"x{i}", "tags": [[], {}]} for i in range(4)]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ARRAY),
        json.dumps(ARRAY, indent=2),
        "[\n" + ",\n".join(map(json.dumps, ARRAY)) + "\n]\n",
        "\n\n " + json.dumps(ARRAY),
        "\n".join(map(json.dumps, ARRAY)),
    ],
)
def test_a_jsonl_file_that_is_one_array_is_read(tmp_path, text, monkeypatch):
    save_pictures(tmp_path / "p")
    (tmp_path / "t.jsonl").write_text(text)
    found = items(table(tmp_path))
    assert [item.captions[0][0].decode() for item in found] == ["x0", "x1", "x2", "x3"]
    monkeypatch.setattr("data_prep.sources.table.MAX_ARRAY_BYTES", 10)
    if "[{" in text or "[\n" in text:
        (found,) = items(table(tmp_path))
        assert (found.reason, found.name) == ("broken_table", "t.jsonl")


def test_a_line_that_is_too_long_costs_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sources.table.MAX_LINE", 100)
    monkeypatch.setattr("data_prep.sources.table.MAX_TEXT_BYTES", 1000)
    save_pictures(tmp_path / "p")
    rows = [("p/0.png", "x"), ("p/1.png", "y" * 500), ("p/2.png", "z" * 95), ("p/3.png", "w")]
    write_csv(tmp_path / "t.csv", rows, ("image", "caption"))
    with (tmp_path / "t.jsonl").open("w") as file:
        file.writelines(f'{{"image": "{image}", "caption": "{text}"}}\n' for image, text in rows)
    reasons = [item.reason for item in items(table(tmp_path))]
    bad = (["broken_row"] * 2, ["broken_json"] * 2)
    assert reasons == [None, *bad[0], None, None, *bad[1], None]
    monkeypatch.setattr("data_prep.sources.table.MAX_LINE", 5000)
    lines = ["image,caption", 'p/0.png,"open', *["p,x"] * 500, "p/1.png,y"]
    (tmp_path / "t.jsonl").unlink()
    (tmp_path / "t.csv").write_text("\n".join(lines))
    found = items(table(tmp_path))
    assert "still open" in found[0].detail
    assert (len(found), found[-1].reason) == (502, None)


def test_a_parquet_file_cut_anywhere_is_whole_or_a_reject(tmp_path):
    columns = {"image": PICTURES, "caption": list("abcd")}
    pq.write_table(pa.table(columns), tmp_path / "whole.parquet", row_group_size=2)
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "whole.parquet").unlink()
    for cut in range(0, len(whole), max(len(whole) // 40, 1)):
        (tmp_path / "t.parquet").write_bytes(whole[:cut])
        assert [item.reason for item in items(table(tmp_path))] == ["broken_table"]


def test_a_column_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path):
    write_csv(tmp_path / "t.csv", [])
    with pytest.raises(
        InputError, match=r"sources\.s\.image: .* no column 'jpg', got image, caption"
    ):
        items(table(tmp_path, image="jpg"))
    with pytest.raises(InputError, match=r"sources\.s\.captions\.text: .* no column 'text'"):
        items(table(tmp_path, captions={"text": 1}))


def test_labels_that_are_no_integers_are_rejects(tmp_path):
    save_pictures(tmp_path / "p")
    write_csv(tmp_path / "t.csv", [(f"p/{i}.png", "x", n) for i, n in enumerate((4, "cat", -1))])
    found = items(table(tmp_path, label="score"))
    assert [(i.label, i.reason) for i in found] == [(4, None), *[(None, "no_label")] * 2]


def test_class_folders_give_labels_by_name_and_captions_by_the_template(tmp_path):
    for name in ("red_fox", "cat"):
        save_pictures(tmp_path / name)
    (tmp_path / "alone.png").write_bytes(PICTURES[0])
    source = ClassesSource(kind="classes", path=str(tmp_path), caption="a photo of a {name}")
    entries = list(source.entries("s"))
    assert {e.class_name for e in entries} == {None, "cat", "red_fox"}
    found = list(read_entries(entries, source, ["cat", "red_fox"]))
    assert reasons(found) == {"alone.png": "no_class"}
    said = {(item.label, item.captions[0][0]) for item in found if not item.reason}
    assert said == {(0, b"a photo of a cat"), (1, b"a photo of a red fox")}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("place", ["disk", "store"])
def test_a_label_hangs_on_the_names_of_the_folders_alone(tmp_path, seed, place):
    """Not on whether pictures lie in them."""
    root = tmp_path if place == "disk" else open_root(f"memory://classes-{seed}", "here")
    rng, expected = random.Random(seed), {}
    hidden = [".ipynb_checkpoints", "@eaDir", "__MACOSX"]
    names = rng.sample(["cat", "dog", "red_fox", "a-1", "a", "B", "é", "0", "10", "9"], 7)
    for name in (*names, *hidden):
        expected[name] = kind = rng.choice(["full", "deep", "other", "empty"])
        if kind in ("full", "deep"):
            inner = name if kind == "full" else f"{name}/in/er"
            for i in range(3):
                write_bytes(root / inner / f"{i}.png", PICTURES[i])
        elif kind == "other":
            write_bytes(root / name / "0.pdf", b"x")
        else:
            (root / name).mkdir(parents=True, exist_ok=True)
    write_bytes(root / names[0] / "one.png", PICTURES[0])
    expected[names[0]] += " and one"
    source = ClassesSource(kind="classes", path=str(root))
    listing = pa.Table.from_pylist([asdict(entry) for entry in source.entries("s")])
    counts = count_classes({"s": source}, listing)
    assert list(counts) == sorted(names)
    assert {n for n, c in counts.items() if c} == {
        n for n in names if expected[n][:4] in ("full", "deep") or n == names[0]
    }
    given = [*reversed(names[1:]), "absent"]
    chosen = ClassesSource(kind="classes", path=str(root), classes=given)
    entries = list(chosen.entries("s"))
    counts = count_classes({"s": chosen}, pa.Table.from_pylist([asdict(e) for e in entries]))
    assert list(counts) == given
    for item in read_entries(entries, chosen, given):
        name = item.name.split("/")[0]
        if item.reason is None:
            assert given[item.label] == name
        elif item.name.endswith(".png"):
            assert (name, item.reason) == (names[0], "no_class")


def test_a_class_whose_files_get_no_rows_any_more_is_still_a_class(tmp_path):
    for name, count in (("a", 1000), ("b", 5), ("c", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.pdf").touch()
    save_pictures(tmp_path / "d")
    source = ClassesSource(kind="classes", path=str(tmp_path))
    listing = pa.Table.from_pylist([asdict(entry) for entry in source.entries("s")])
    assert count_classes({"s": source}, listing) == {"a": 0, "b": 0, "c": 0, "d": 4}
    assert count_rejects(listing)[1] == {"pdf": 1006}


def test_class_lists_that_cannot_be_meant_are_refused(tmp_path):
    with pytest.raises(InputError, match="'a' twice: a class has one label"):
        parse_config(
            ClassesSource, {"kind": "classes", "path": "/x", "classes": ["a", "b", "a"]}, "c"
        )


def test_a_broken_picture_in_a_table_is_rejected_for_what_it_is(tmp_path):
    columns = {"image": [PICTURES[0], b"<html>", b""], "caption": list("abc")}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    rows = scanned(tmp_path, table(tmp_path))
    assert [row["reason"] for row in rows] == [None, "undecodable", "empty_file"]
