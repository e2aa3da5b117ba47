"""Sources of 2,000 pictures as people have them: one of each odd thing lies at a place that the seed chooses.

What must become of every name is written down where the name is made, so that the generator's own list, not a
count of ours, is what the result is compared with.
"""

import csv
import io
import json
import random
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from data_prep.audit import verify
from data_prep.config import PrepareConfig
from data_prep.preparation import prepare
from data_prep.schema import read_manifest
from models.command import load_config
from tests.prep_factory import encoded, pixels, read_samples, write_config

COUNT = 2000
SEEDS = (0, 1, 2)


@dataclass
class Odd:
    """A picture, what was said of it, and why it is rejected; None: it is taken."""

    picture: bytes
    reason: str | None
    caption: bytes | None = b"an odd thing"
    extension: str = "png"
    facts: bytes | None = None
    """KEY.json, where there is such a thing."""


@dataclass
class Made:
    """A source, and what must become of each name in it; a name without a row is None."""

    source: Any
    fate: dict[str, str | None] = field(default_factory=dict)


def png(seed: int, **options: Any) -> bytes:
    return encoded(pixels(seed), **options)


def with_text_of(size: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "masterpiece " * (size // 12), zip=True)
    return png(9_001, pnginfo=info)


def odd_pictures() -> Iterator[Odd]:
    """What may be wrong with, or odd about, a picture or its caption, wherever it lies."""
    gray = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    deep = Image.fromarray(pixels(9_002)[..., 0].astype(np.uint16) * 257)
    jpeg = encoded(pixels(9_003), "JPEG")
    yield Odd(png(9_004, icc_profile=gray), None)
    yield Odd(with_text_of(3 << 20), None)
    yield Odd(encoded(deep), None)
    yield Odd(jpeg, None, extension="jfif")
    yield Odd(encoded(pixels(9_005), "JPEG"), None, extension="jpe")
    yield Odd(encoded(pixels(9_006), "GIF"), None, extension="gif")
    yield Odd(encoded(pixels(9_007), "JPEG"), None, extension="JPG")
    yield Odd(jpeg[: len(jpeg) // 2], "undecodable", extension="jpg")
    yield Odd(b"", "empty_file")
    yield Odd(b"<!doctype html><html><body>404", "undecodable", extension="jpg")
    yield Odd(png(9_004), None, "caf\u00e9 \U0001f600".encode())
    yield Odd(png(9_008), "caption_not_utf8", b"caf\xe9")
    yield Odd(png(9_009), "caption_empty", b" \n")
    yield Odd(png(9_010), "caption_too_long", b"x" * 5000)
    yield Odd(png(0), "duplicate")


def plain(seed: int) -> Iterator[bytes]:
    """Pictures that nothing is wrong with."""
    for i in range(COUNT):
        yield encoded(pixels(10_000 * (seed + 1) + i, 32, 32), ("PNG", "JPEG")[i % 2])


def mixed(seed: int, more: list[Odd]) -> list[Odd]:
    """All pictures of a source, the odd ones at places of their own; the twin lies behind its picture."""
    rng = random.Random(seed)
    some = [
        Odd(data, None, f"picture {i}".encode(), ("png", "jpg")[i % 2])
        for i, data in enumerate(plain(seed))
    ]
    odd = [*odd_pictures(), *more]
    rng.shuffle(odd)
    for one in odd:
        some.insert(rng.randrange(1, len(some)), one)
    some[0] = Odd(png(0), None)
    return some


def as_folder(root: Path, seed: int) -> Made:
    """Captions beside pictures, in folders; with files and folders that are no pictures."""
    folder = root / "folder"
    made = Made({"kind": "folder", "path": str(folder)})
    for i, odd in enumerate(mixed(seed, [])):
        name = f"{i % 7}/{i:05d}.{odd.extension}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(odd.picture)
        if odd.caption is not None:
            (folder / name).with_suffix(".txt").write_bytes(odd.caption)
        made.fate[name] = odd.reason

    def strange(name: str, data: bytes, reason: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        made.fate[name] = reason

    strange("3/no-extension", png(9_100), "other_file")
    strange("3/notes.docx", b"PK", "other_file")
    strange("3/photo.heic", b"ftypheic", "other_file")
    strange("3/mute.png", png(9_101), "caption_empty")
    for hidden in (".ipynb_checkpoints/a.png", "@eaDir/b.png", "__MACOSX/c.png"):
        (folder / hidden).parent.mkdir(parents=True)
        (folder / hidden).write_bytes(png(9_102))
        made.fate[hidden.split("/")[0] + "/"] = "hidden_folder"
    (folder / "gone.png").symlink_to(folder / "nothing")
    made.fate["gone.png"] = "unreadable"
    (folder / "loop").symlink_to(folder)
    made.fate["loop/"] = "folder_already_listed"
    bad = bytes(folder) + b"/caf\xe9.png"
    Path(bad.decode("utf-8", "surrogateescape")).write_bytes(png(9_103))
    made.fate["caf\\udce9.png"] = "name_not_utf8"
    return made


def odd_facts() -> list[Odd]:
    """What KEY.json may be."""
    return [
        Odd(png(9_200), None, facts=b'{"title": "cut emoji \\ud83d"}'),
        Odd(png(9_201), None, facts=b'{"aesthetic": NaN}'),
        Odd(png(9_202), "broken_json", facts=b"[" * 5000),
        Odd(png(9_203), None, facts=b'{"status": "ok"}'),
        Odd(png(9_204), "source_status", facts=STATUS),
        Odd(png(9_205), None, facts=b'{"tags": ["a", "b"], "nested": {"deep": 1}}'),
    ]


STATUS = b'{"status": "failed_to_download", "error_message": "404", "key": "1", "url": "http://x"}'
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def as_tars(root: Path, seed: int) -> Made:
    """Four tars of ustar, GNU and pax, each two that cat joined, and one of sparse files by GNU tar."""
    folder = root / "tars"
    folder.mkdir()
    made, samples = Made({"kind": "tars", "path": str(folder)}), mixed(seed, odd_facts())
    part = -(-len(samples) // 4)
    for number in range(4):
        halves = []
        for half in range(2):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[number % 3]) as tar:
                first = number * part + half * part // 2
                last = number * part + (part // 2 if half == 0 else part)
                for i, odd in enumerate(samples[first:last], start=first):
                    stem = f"{'deep/' * (i % 40)}{i:05d}" if number else f"{i:05d}"
                    members = [(odd.extension, odd.picture)]
                    members += [("txt", odd.caption)] if odd.caption is not None else []
                    members += [("json", odd.facts)] if odd.facts is not None else []
                    for extension, data in members:
                        info = tarfile.TarInfo(f"{stem}.{extension}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    made.fate[f"{number}.tar/{stem}"] = odd.reason
            halves.append(buffer.getvalue())
        (folder / f"{number}.tar").write_bytes(b"".join(halves))
    sparse = root / "sparse"
    sparse.mkdir()
    for i in range(3):
        data = encoded(pixels(9_300 + i))
        with (sparse / f"{i}.png").open("wb") as file:
            file.write(data)
            file.truncate(1 << 20) if i == 1 else None
        (sparse / f"{i}.txt").write_text("a sparse file")
        made.fate[f"sparse.tar/{i}"] = None
    names = sorted(p.name for p in sparse.iterdir())
    line = ["tar", "-S", "-cf", str(folder / "sparse.tar"), "-C", str(sparse), *names]
    subprocess.run(line, check=True)
    (folder / "strange.zip").write_bytes(b"PK")
    made.fate["strange.zip"] = "other_file"
    return made


CSV_ROWS = [
    (b'ax.png,a "quoted" word,caf\xe9\r\n', None),
    (b'ax.png,"hello" world,1\r\n', "broken_row"),
    (b"ax.png\r\n", "broken_row"),
    (b'ax.png,"an open quote,1\r\n', "broken_row"),
]
JSON_ROWS = [
    (b'{"image": "bx.png", "caption": "whole", "x": "half \\ud83d"}\n', None),
    (b'{"image": \n', "broken_json"),
    (b'["bx.png"]\n', "broken_json"),
]


def as_tables(root: Path, seed: int) -> Made:
    """A third in CSV and a third in JSONL by path, a third in Parquet as bytes."""
    folder = root / "tables"
    folder.mkdir()
    captions = {"caption": 1.0}
    made = Made({"kind": "table", "path": str(folder), "captions": captions})
    samples = mixed(seed, [])
    third = -(-len(samples) // 3)
    parts = [samples[i * third : (i + 1) * third] for i in range(3)]
    for table, some in zip(("a.csv", "b.jsonl"), parts, strict=False):
        lines: list[tuple[bytes, str | None]] = []
        for i, odd in enumerate(some):
            name = f"{table[0]}{i:05d}.{odd.extension}"
            (folder / name).write_bytes(odd.picture)
            text = (odd.caption or b"").decode("utf-8", "surrogateescape")
            if table == "a.csv":
                line = io.StringIO()
                csv.writer(line).writerow([name, text, "1"])
                data = line.getvalue().encode("utf-8", "surrogateescape")
            else:
                data = json.dumps({"image": name, "caption": text}).encode() + b"\n"
            lines.append((data, odd.reason))
        (folder / f"{table[0]}x.png").write_bytes(png(9_400 + len(table)))
        strange = CSV_ROWS if table == "a.csv" else JSON_ROWS
        for place, row in enumerate(strange):
            lines.insert((place + 1) * len(lines) // (len(strange) + 1), row)
        head = b"image,caption,author\n" if table == "a.csv" else b""
        (folder / table).write_bytes(head + b"".join(data for data, _ in lines))
        made.fate |= {f"{table}/{i:09d}": reason for i, (_, reason) in enumerate(lines)}
    rows = [(odd.picture, odd.caption or b"") for odd in parts[2]]
    pictures, texts = zip(*rows, strict=True)
    storage = pa.array([bytes(t) for t in texts], pa.binary())
    table = {"image": pa.array(pictures, pa.binary()), "caption": storage.view(pa.string())}
    table["when"] = pa.array([2**62] * len(rows), pa.timestamp("us"))
    table["on"] = pa.array([True] * len(rows))
    pq.write_table(pa.table(table), folder / "c.parquet")
    for i, odd in enumerate(parts[2]):
        made.fate[f"c.parquet/{i:09d}"] = odd.reason
    return made


LAYOUTS: dict[str, Callable[[Path, int], Made]] = {
    "folder": as_folder,
    "tars": as_tars,
    "tables": as_tables,
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_name_is_kept_or_rejected_once_for_its_true_reason(
    layout, seed, tmp_path, ray_address, vae_folder, text_folder
):
    made = LAYOUTS[layout](tmp_path, seed)
    options = {"samples_per_shard": 1000, "encode": {"batch_size": 64}}
    config = write_config(
        tmp_path / "c.yaml", {"s": made.source}, vae_folder, text_folder, **options
    )
    prepare(load_config(PrepareConfig, config, []))
    dataset = tmp_path / "dataset"
    kept = [json.loads(sample["json"])["name"] for _, sample in read_samples(dataset)]
    rejects = pq.read_table(dataset / "rejects.parquet").to_pylist()
    names = Counter([*kept, *(r["name"] for r in rejects)])
    reasons = dict.fromkeys(kept) | {r["name"]: r["reason"] for r in rejects}
    assert {name: count for name, count in names.items() if count > 1} == {}
    wrong = {
        n: (reasons.get(n, "no row"), why)
        for n, why in made.fate.items()
        if reasons.get(n, "no row") != why
    }
    assert wrong == {}
    assert set(names) - set(made.fate) == set()
    assert read_manifest(dataset).counts.kept == len(kept)
    assert verify(dataset) == []
