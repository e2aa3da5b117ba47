"""What is found in folders and tars, and that nothing found is lost without a word."""

import io
import json
import os
import random
import re
import shutil
import subprocess
import tarfile

import numpy as np
import pyarrow as pa
import pytest

from data_prep.images import UNDECODABLE
from data_prep.shards import write_text
from data_prep.sources import Entry, Item, SourceConfig, read_entries, sample_key
from data_prep.sources.folder import FolderSource
from data_prep.sources.source import count_rejects
from data_prep.sources.table import TableSource
from data_prep.sources.tars import TarSource
from data_prep.storage import filesystem_of, find_files, names_in, open_root, read_bytes
from models.config import InputError
from tests.prep_factory import encoded, fill_folder, pixels, sample_members, tar_bytes


def items(config: SourceConfig) -> list[Item]:
    return list(read_entries(list(config.entries("s")), config))


def folder_items(folder):
    return items(FolderSource(kind="folder", path=str(folder)))


def tar_items(path):
    return items(TarSource(kind="tars", path=str(path)))


def reasons(items):
    return {item.name: item.reason for item in items if item.reason}


def test_pictures_are_found_in_all_folders_with_the_captions_beside_them(tmp_path):
    fill_folder(tmp_path, 6)
    (tmp_path / "even" / "alone.PNG").write_bytes(encoded(pixels(0)))
    items = folder_items(tmp_path)
    even, odd = [f"even/{n}" for n in ("0000.png", "0002.png", "0004.png", "alone.PNG")], (1, 3, 5)
    assert [item.name for item in items] == even + [f"odd/{i:04d}.jpg" for i in odd]
    assert items[1].captions == ((b"volcano\n", 1.0),)
    assert items[3].captions == ()
    for item in items:
        with open(tmp_path / item.name, "rb") as file:
            assert read_bytes(item.path, item.offset, item.length) == file.read()


def random_names(seed: int) -> list[str]:
    """Names of files in folders, among them names that begin alike and hidden ones."""
    rng, names = random.Random(seed), set[str]()
    parts = ["a", "a-1", "a.png", "B", "b::c", "a b", "é", ".x", "@eaDir", "__MACOSX", "Z"]
    for _ in range(40):
        folders = rng.choices(parts, k=rng.randint(0, 3))
        names.add("/".join([*folders, rng.choice(["a", "a-1", "::", "z é", ".y"]) + ".jpg"]))
    return sorted(names, key=lambda _: rng.random())


@pytest.mark.parametrize("seed", range(8))
def test_a_store_is_listed_like_the_same_folder_on_disk(tmp_path, seed):
    """The same rows in the same order, so that the same of two duplicates is kept."""
    store, names = open_root(f"memory://listed-{seed}", "here"), random_names(seed)
    for name in names:
        for root in (tmp_path, store):
            write_text(root / name, name)
    local, remote = (
        list(FolderSource(kind="folder", path=str(path)).entries("s")) for path in (tmp_path, store)
    )
    assert [(e.name, e.reason) for e in local] == [(e.name, e.reason) for e in remote]
    taken = [entry.name for entry in remote if not entry.reason]
    hidden = [any(re.match(r"\.|@|__MACOSX", part) for part in name.split("/")) for name in names]
    assert sorted(taken) == sorted(n for n, out in zip(names, hidden, strict=True) if not out)
    # Files before folders, each in the order of names.
    assert taken == sorted(
        taken, key=lambda n: [(True, part) for part in n.split("/")[:-1]] + [(False, n)]
    )
    for entry in (*local, *remote):
        if not entry.reason:
            assert read_bytes(entry.path, 0, entry.size) == entry.name.encode()


def test_objects_that_stand_for_folders_on_s3_are_folders(bucket):
    filesystem, _ = filesystem_of(bucket)
    for name in ("new/", "p/", "p/sub/", "p/sub/.x/", "p/empty/"):
        filesystem.call_s3("put_object", Bucket="bucket", Key=name, Body=b"")
    names = ["a.png", "sub/b::c.png", "sub/.x/y.png", "a-1/x.png", "a.png/z.png", "/d.png"]
    for name in names:
        filesystem.pipe_file(f"bucket/p/{name}", name.encode())
    entries = list(FolderSource(kind="folder", path=f"{bucket}/p").entries("s"))
    taken = [entry for entry in entries if not entry.reason]
    in_order = ["a.png", "/d.png", "a-1/x.png", "a.png/z.png", "sub/b::c.png"]
    assert [entry.name for entry in taken] == in_order
    assert [(e.name, e.reason) for e in entries if e.reason] == [("sub/.x/", "hidden_folder")]
    for entry in taken:
        assert read_bytes(entry.path, 0, entry.size) == entry.name.encode()
    new = open_root(f"{bucket}/new", "output")
    assert names_in(new) == []
    assert find_files(new) == {}
    assert sorted(names_in(open_root(f"{bucket}/p", "output")))[:2] == ["a-1", "a.png"]


def test_a_local_path_is_absolute_from_the_start_and_a_url_as_it_was_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert TarSource(kind="tars", path="x/../y").path == str(tmp_path / "y")
    assert TarSource(kind="tars", path="s3://bucket/x").path == "s3://bucket/x"
    for begin in ("file://", "file://localhost", "file:", "local://"):
        assert TarSource(kind="tars", path=f"{begin}/a b").path == "/a b"
    assert TarSource(kind="tars", path="file:///a%20b").path == "/a b"


def test_keys_are_safe_distinct_and_do_not_change_when_data_is_added(tmp_path):
    before, after = (
        {item.name: sample_key("s", item.name) for item in folder_items(fill_folder(tmp_path, n))}
        for n in (6, 20)
    )
    assert before.items() <= after.items()
    assert len(set(after.values())) == 20
    assert all(len(key) == 20 and key.isalnum() for key in after.values())
    assert sample_key("a", "bc") != sample_key("ab", "c")


def test_links_are_followed_and_those_that_loop_or_lead_nowhere_rejects_with_a_reason(tmp_path):
    fill_folder(tmp_path / "a", 2)
    (tmp_path / "a" / "linked.png").symlink_to(tmp_path / "a" / "even" / "0000.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "pipe.png")
    items = folder_items(tmp_path)
    assert reasons(items) == {
        "a/loop/": "folder_already_listed",
        "b/": "folder_already_listed",
        "broken.png": "unreadable",
        "pipe.png": "not_a_regular_file",
    }
    (found,) = (item for item in items if item.name == "a/linked.png")
    assert content(found) == encoded(pixels(0))
    assert len(items) == 7


def test_a_folder_without_pictures_is_an_error_that_says_what_is_there(tmp_path):
    for name in ("a.pdf", "b.pdf", "c.txt", "README"):
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError) as caught:
        list(FolderSource(kind="folder", path=str(tmp_path)).entries("s"))
    assert "2 .pdf, 1 without extension, 1 .txt" in str(caught.value)
    assert ".jpg" in str(caught.value)
    with pytest.raises(InputError, match=r"no tars there; got 2 \.pdf"):
        list(TarSource(kind="tars", path=str(tmp_path)).entries("s"))


def test_a_folder_that_is_missing_or_a_command_is_an_error_that_says_so(tmp_path):
    with pytest.raises(InputError, match=r"sources\.s\.path: .*gone: no such folder"):
        list(FolderSource(kind="folder", path=str(tmp_path / "gone")).entries("s"))
    with pytest.raises(InputError, match="no such folder"):
        list(TarSource(kind="tars", path=f"pipe:touch {tmp_path}/run.tar").entries("s"))
    assert not (tmp_path / "run.tar").exists()
    (tmp_path / "t.tsv").write_text("image\tcaption\n")
    with pytest.raises(InputError, match=r"t\.tsv: no such folder, nor a file ending in \.csv, "):
        list(TableSource(kind="table", path=str(tmp_path / "t.tsv")).entries("s"))


TAKEN = ["jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp"]
TAKEN += ["tif", "tiff", "ppm", "JPG"]
OTHERS = ("pdf", "svg", "psd", "mp4", "caption", "jpg~", "npy", "cls", "")


@pytest.mark.parametrize("seed", range(10))
def test_every_file_is_taken_consumed_or_a_row(tmp_path, seed):
    """In folders and in tars alike: nothing that lies there is without a word."""
    rng, folder, members, expected = random.Random(seed), tmp_path / "f", [], {}
    for number in range(60):
        stem = f"{rng.choice(['', 'a/', 'b/c/'])}{number}"
        extension = rng.choice((*TAKEN, *OTHERS, *UNDECODABLE))
        name = f"{stem}.{extension}".rstrip(".")
        members.append((name, b"x"))
        expected[name] = None if extension in TAKEN else "other_file"
        if rng.random() < 0.5:
            members.append((f"{stem}.txt", b"caption"))
            if expected[name]:
                expected[f"{stem}.txt"] = "other_file"
    hidden = ["._1.jpg", "a/.DS_Store", "Thumbs.db"]
    members += [(name, b"x") for name in hidden]
    expected |= dict.fromkeys(hidden, "other_file")
    for name, data in members:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    found = folder_items(folder)
    assert {item.name: item.reason for item in found} == expected
    assert len(found) == len(expected)
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    found = tar_items(tmp_path / "0.tar")
    taken = {item.name for item in found if not item.reason}
    assert taken == {f"0.tar/{os.path.splitext(n)[0]}" for n, why in expected.items() if not why}
    others = {item.name for item in found if item.reason == "other_file"}
    texts = {n for n in expected if n.endswith(".txt")}
    assert others == {f"0.tar/{n}" for n, why in expected.items() if why} - {
        f"0.tar/{n}" for n in texts
    }
    # A text without a picture is a sample that lacks one.
    alone = {item.name for item in found if item.reason == "no_picture"}
    assert alone == {f"0.tar/{os.path.splitext(n)[0]}" for n in texts}


def test_many_files_of_an_extension_are_some_rows_and_a_count(tmp_path):
    names = [f"{i}.npy" for i in range(1005)] + [str(i) for i in range(1002)] + ["x.pdf"]
    pictures = [("p.png", encoded(pixels(0)))]
    (tmp_path / "f").mkdir()
    for name, data in [(name, b"") for name in names] + pictures:
        (tmp_path / "f" / name).write_bytes(data)
    (tmp_path / "0.tar").write_bytes(tar_bytes([(name, b"") for name in names] + pictures))
    for found, place in (
        (folder_items(tmp_path / "f"), ""),
        (tar_items(tmp_path / "0.tar"), "0.tar/"),
    ):
        assert len([item for item in found if not item.reason]) == 1
        assert len(found) == 1 + 1001 + 1001 + 1
        rest = {item.name: item.detail for item in found if item.detail}
        assert rest == {f"{place}*.npy": "5 more", f"{place}*": "2 more"}
        columns = {n: [getattr(i, n) for i in found] for n in ("name", "reason", "detail")}
        assert count_rejects(pa.table(columns))[1] == {"npy": 1005, "": 1002, "pdf": 1}


def test_samples_of_a_tar_have_the_bytes_of_their_members(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_bytes(sample_members(0) + sample_members(1, nsfw=0.2)))
    items = tar_items(tmp_path)
    assert [item.name for item in items] == ["0.tar/000000000", "0.tar/000000001"]
    for i, item in enumerate(items):
        assert read_bytes(item.path, item.offset, item.length) == encoded(pixels(i))
        assert item.captions == ((dict(sample_members(i))[f"{i:09d}.txt"], 1.0),)
    assert items[1].metadata["nsfw"] == 0.2
    assert [item.name for item in tar_items(tmp_path / "0.tar")] == [item.name for item in items]


def test_members_of_a_key_are_found_wherever_they_lie(tmp_path):
    (a, b, c), (d, e, f) = sample_members(0), sample_members(1)
    (tmp_path / "0.tar").write_bytes(tar_bytes([a, d, b, f, e, c]))
    assert [item.captions[0][0] for item in tar_items(tmp_path)] == [b[1], e[1]]


def test_a_caption_is_taken_from_json_where_there_is_no_txt(tmp_path):
    picture, _, record = sample_members(2)
    (tmp_path / "0.tar").write_bytes(tar_bytes([picture, record]))
    assert tar_items(tmp_path)[0].captions == ((b"volcano", 1.0),)


@pytest.mark.parametrize("captions", [{}, {"alt": 2.0, "txt": 1.0}])
def test_a_folder_of_img2datasets_files_is_read_like_its_tars(tmp_path, captions):
    """Captions, metadata and reasons alike: its output `files` has the members of the tar as files."""
    sound = {"caption": "c", "alt": ["a", "b"], "nsfw": 0.2, "status": "success"}
    failed = {"status": "failed_to_resize", "error_message": "x"}
    texts = [json.dumps(sound), json.dumps(failed), "{", "[1]", "[" * 10_000]
    texts += ['{"a": NaN}', "{}", None]
    members = []
    for i, text in enumerate(texts):
        members.append((f"{i}.png", encoded(pixels(i))))
        members += [(f"{i}.json", text.encode())] if text is not None else []
        members += [(f"{i}.txt", b"t")] if i % 2 else []
    (tmp_path / "f").mkdir()
    for name, data in members:
        (tmp_path / "f" / name).write_bytes(data)
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    sources = (
        TarSource(kind="tars", path=str(tmp_path / "0.tar"), captions=captions),
        FolderSource(kind="folder", path=str(tmp_path / "f"), captions=captions),
    )
    in_tar, in_folder = (
        {
            os.path.basename(i.name).removesuffix(".png"): (
                i.reason,
                i.detail,
                i.captions,
                i.metadata,
            )
            for i in items(source)
        }
        for source in sources
    )
    assert in_tar == in_folder
    assert in_folder["0"][3] == sound
    expected = [None, "source_status", *["broken_json"] * 3, *[None] * 3]
    assert [in_folder[str(i)][0] for i in range(8)] == expected
    left = FolderSource(kind="folder", path=str(tmp_path / "f"), exclude=("*.json",))
    assert reasons(items(left)) == {f"{i}.json": "other_file" for i in range(7)}


def test_what_is_wrong_with_a_sample_is_its_reason(tmp_path):
    pictures = ["two.png", "two.jpg", "twice.png", "twice.png"]
    pictures += ["bad.png", "list.png", "deep.png", "../../up.png"]
    members = [*((name, encoded(pixels(0))) for name in pictures), ("words.txt", b"no picture")]
    members += [("bad.json", b"{"), ("list.json", b"[1]"), ("deep.json", b"[" * 100_000)]
    members += [("evil.pkl", b"cos\nsystem\n"), *sample_members(0)]
    members += sample_members(1, status="failed_to_download", error_message="HTTP 404")
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    items = tar_items(tmp_path)
    assert reasons(items) == {
        "0.tar/000000001": "source_status",
        "0.tar/two": "duplicate_key",
        "0.tar/twice": "duplicate_key",
        "0.tar/words": "no_picture",
        "0.tar/bad": "broken_json",
        "0.tar/list": "broken_json",
        "0.tar/deep": "broken_json",
        "0.tar/evil.pkl": "other_file",
    }
    assert next(i for i in items if i.reason == "source_status").detail.endswith("HTTP 404")
    assert {i.name for i in items if not i.reason} == {"0.tar/000000000", "0.tar/../../up"}


def content(item: Item) -> bytes:
    return item.data or read_bytes(item.path, item.offset, item.length)


def holed(folder) -> dict[str, bytes]:
    """Captioned pictures, most of one a hole on disk, one a hard link; returns their bytes by key."""
    folder.mkdir()
    expected = {str(i): encoded(pixels(i)) for i in range(4)}
    black = np.zeros((400, 400, 3), np.uint8)
    black[200] = 9
    expected["1"] = encoded(black, "BMP")
    for key, data in expected.items():
        with open(folder / f"{key}.{'bmp' if key == '1' else 'png'}", "wb") as file:
            for begin in range(0, len(data), 4096):
                page = data[begin : begin + 4096]
                file.seek(begin)
                if page.strip(b"\0"):
                    file.write(page)
            file.truncate(len(data))
    os.link(folder / "2.png", folder / "linked.png")
    expected["linked"] = expected["2"]
    for key in expected:
        (folder / f"{key}.txt").write_text(f"caption {key}")
    return expected


@pytest.mark.skipif(not shutil.which("tar"), reason="there is no tar command")
@pytest.mark.parametrize(
    "options",
    [f"--format={kind}" for kind in ("v7", "ustar", "pax", "gnu")]
    + [f"-S --format={kind}" for kind in ("gnu", "oldgnu")]
    + [f"-S --format=pax --sparse-version={n}" for n in ("0.0", "0.1", "1.0")],
)
@pytest.mark.parametrize("joined", ["", "-A", "cat"])
def test_a_tar_of_any_format_gives_every_picture_whole(tmp_path, options, joined):
    """With holes or without, of one part or of two, and hard links lead to their member's bytes."""
    expected = holed(tmp_path / "files")
    names = sorted(path.name for path in (tmp_path / "files").iterdir())
    place, folder = tmp_path / "tars" / "0.tar", tmp_path / "files"
    place.parent.mkdir()
    # The link and its target are in one part.
    middle = names.index("2.png") if joined else 0
    parts = [place, tmp_path / "more.tar"]
    for part, some in zip(parts, (names[middle:], names[:middle]), strict=True):
        if some:
            command = ["tar", *options.split(), "-C", str(folder), "-cf", str(part), *some]
            subprocess.run(command, check=True)
    if joined == "-A":
        subprocess.run(["tar", "-A", "-f", *map(str, parts)], check=True)
    elif joined == "cat":
        place.write_bytes(place.read_bytes() + parts[1].read_bytes())
    items = tar_items(place.parent)
    assert reasons(items) == {}
    assert {item.name.removeprefix("0.tar/"): content(item) for item in items} == expected
    for item in items:
        assert item.captions == ((f"caption {item.name[6:]}".encode(), 1.0),)


def test_a_picture_with_holes_over_the_limit_is_a_reject(tmp_path):
    with open(tmp_path / "a.bmp", "wb") as file:
        file.truncate(1 << 34)
    make = ["tar", "-S", "-C", str(tmp_path), "-cf", str(tmp_path / "0.tar"), "a.bmp"]
    subprocess.run(make, check=True)
    assert reasons(tar_items(tmp_path / "0.tar")) == {"0.tar/a": "too_many_bytes"}


@pytest.mark.parametrize("seed", range(10))
def test_no_byte_behind_the_end_mark_of_a_tar_is_lost_without_a_word(tmp_path, seed):
    """Tars in a row, with padding of any length between them, and at times what is none."""
    rng = random.Random(seed)
    whole, keys = b"", []
    for part in range(rng.randint(1, 4)):
        keys.append(f"{part:09d}")
        whole += tar_bytes(sample_members(part)) + bytes(rng.choice([0, 1, 512, 1000, 3 << 20]))
    garbage = rng.choice([b"", b"x", b"garbage" * 1000, rng.randbytes(512), b"\xff" * 513])
    (tmp_path / "0.tar").write_bytes(whole + garbage)
    items = tar_items(tmp_path)
    assert [item.name for item in items if not item.reason] == [f"0.tar/{key}" for key in keys]
    for i, item in enumerate(item for item in items if not item.reason):
        assert content(item) == encoded(pixels(i))
    assert reasons(items) == ({"0.tar": "broken_tar"} if garbage else {})
    if garbage:
        assert f"{len(garbage)} bytes" in items[-1].detail


def test_hidden_and_system_folders_of_a_tar_are_left_out_aloud(tmp_path):
    picture = encoded(pixels(0))
    names = ["./a", "../b", "__MACOSX/a", "c/.git/d/a", "c/.git/a", "@eaDir/a", "c/a", "..c/a"]
    names.append("@a")
    (tmp_path / "0.tar").write_bytes(tar_bytes([(f"{name}.png", picture) for name in names]))
    items = tar_items(tmp_path)
    taken = [item.name for item in items if not item.reason]
    assert taken == ["0.tar/./a", "0.tar/../b", "0.tar/c/a", "0.tar/@a"]
    folders = ("__MACOSX/", "c/.git/", "@eaDir/", "..c/")
    assert reasons(items) == {f"0.tar/{folder}": "hidden_folder" for folder in folders}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_out_of_a_tar_are_not_followed(tmp_path, kind):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("link.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    assert reasons(tar_items(tmp_path)) == {"0.tar/link": "not_a_regular_file"}


def test_a_tar_cut_at_any_block_loses_nothing_silently(tmp_path):
    """Whole samples before the cut are taken, whole; the rest is covered by a row for the tar."""
    members = [member for i in range(4) for member in sample_members(i)]
    whole = tar_bytes(members)
    expected = {f"0.tar/{i:09d}": i for i in range(4)}
    taken = []
    for cut in range(0, len(whole), 512):
        (tmp_path / "0.tar").write_bytes(whole[:cut])
        items = tar_items(tmp_path)
        taken = [item for item in items if not item.reason]
        for item in taken:
            i = expected[item.name]
            assert read_bytes(item.path, item.offset, item.length) == encoded(pixels(i))
            assert item.captions == ((dict(sample_members(i))[f"{i:09d}.txt"], 1.0),)
            assert item.metadata
        if len(taken) < 4:
            assert reasons(items).get("0.tar") == "broken_tar", cut
    assert len(taken) == 4  # the last cuts are in the padding


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    whole = bytearray(tar_bytes([m for i in range(4) for m in sample_members(i)]))
    place = whole.index(b"000000002.txt")
    whole[place : place + 9] = b"\xff" * 9
    (tmp_path / "0.tar").write_bytes(whole)
    items = tar_items(tmp_path)
    assert reasons(items) == {"0.tar/000000002": "broken_tar", "0.tar": "broken_tar"}
    assert len([item for item in items if not item.reason]) == 2


def test_a_header_with_a_negative_size_ends_the_tar(tmp_path):
    whole = bytearray(tar_bytes(sample_members(0) + sample_members(1)))
    header = whole.index(b"000000001.png")
    size = (-2048).to_bytes(11, "big", signed=True)
    whole[header + 124 : header + 136] = b"\xff" + size
    whole[header + 148 : header + 156] = b" " * 8
    checksum = sum(whole[header : header + 512])
    whole[header + 148 : header + 156] = f"{checksum:06o}\0 ".encode()
    (tmp_path / "0.tar").write_bytes(whole)
    assert reasons(tar_items(tmp_path)).get("0.tar") == "broken_tar"


def test_what_is_no_tar_or_has_gone_is_one_reject(tmp_path):
    config = TarSource(kind="tars", path=str(tmp_path))
    for data in (b"", b"not a tar", b"x" * 5000):
        (tmp_path / "0.tar").write_bytes(data)
        assert reasons(items(config)) == {"0.tar": "broken_tar"}
    (tmp_path / "0.tar").unlink()
    entry = Entry("s", "0.tar", str(tmp_path / "0.tar"), 10)
    assert reasons(read_entries([entry], config)) == {"0.tar": "unreadable"}
