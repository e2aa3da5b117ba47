"""Time and memory of scan and plan at scale: `python -m tests.benchmarks.plan_scale --rows 10000000`.

The scan is of small JPEGs in a hundred tars (`--pictures 1000000`): microseconds per picture of each part by
itself, of one process with its child, and of the whole as shipped, on all CPUs. Of 10^6 on two quiet cores: 86 us
for tarfile's reading of three headers per picture, the largest part; 120 for one process; 80 for the whole on both
cores. So 10^6 pictures are scanned in 80 s.

The catalog is synthetic: rows as a scan writes them, a tenth of them rejects, a tenth the same file as
another. Each size and each filter runs in a process of its own, whose peak memory is what is told.

Measured on one core of a busy machine: 10^6 rows 9.3 CPU s and 497 MiB, 10^7 rows 117 CPU s and 576 MiB, of
which 172 MiB are Python and its libraries; with near duplicates within 3 bits 150 CPU s and 1194 MiB.
A growth of 10^6 planned pictures by 10^3, near duplicates within 3 bits: 0.9 CPU s and 544 MiB.
Reasoned for 10^9 rows, of which 10^8 are duplicates: the work is linear but for the sorting within ranges, so
some 3.3 CPU hours, beside weeks of encoding. Ranges stop growing in number at 256, so one holds 4 * 10^6
rows, ten times as many as here: about 4 GiB; the duplicates take 37 bytes each, 3.7 GB; the temporary folder
must hold the catalog once more, about 100 GB. The list of 500,000 shards and their commit records, 1 KB each,
are held by the driver: 0.5 GB. Near duplicates are compared in memory, 16 bytes per picture and as much again
some five times while sorting: 100 GB, so filter them by source or on a machine that has it.
"""

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from data_prep.catalog import (
    CATALOG_SCHEMA,
    PROBES_AT_ONCE,
    FiltersConfig,
    ScanSettings,
    scan_partition,
)
from data_prep.config import PrepareConfig
from data_prep.decoder import Address, DecodePool, ProbeRequest
from data_prep.images import ImagesConfig, list_buckets, probe
from data_prep.plan import make_plan, plan
from data_prep.scan import Intake, list_sources, scan
from data_prep.sources import Entry, read_entries
from data_prep.storage import read_bytes
from data_prep.workers import connect
from models.command import load_config
from tests.prep_factory import encoded, pixels, write_config

ROOT = Path(__file__).parent.parent.parent
TARS = 100
ROWS_PER_PART = 10_000  # as of a tar
# Pictures by which the planned ones grow.
NEW = 1000
HEX = np.frombuffer(b"0123456789abcdef", np.uint8)


def strings(digits: np.ndarray) -> pa.Array:
    """Rows of characters as an array of strings."""
    count, width = digits.shape
    offsets = np.arange(0, (count + 1) * width, width, dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(digits.tobytes())]
    return pa.Array.from_buffers(pa.string(), count, buffers)


def write_part(
    path: Path, rng: np.random.Generator, total: int, count: int = ROWS_PER_PART
) -> None:
    original = rng.integers(0, total, count)
    hashes = rng.integers(0, 256, (count, 32), dtype=np.uint8)
    again = rng.random(count) < 0.1  # the same file as that of a number drawn from a few
    words = (original[again] % (total // 20)).astype("u8") * np.uint64(0x9E3779B97F4A7C15)
    hashes[again] = np.repeat(words[:, None], 4, axis=1).view(np.uint8)
    looks = rng.integers(0, 2**64, count, dtype=np.uint64)
    rejected = rng.random(count) < 0.1
    numbers = np.arange(count)
    columns = {
        "key": strings(HEX[rng.integers(0, 16, (count, 20))]),
        "source": pa.array(["web"] * count),
        "name": pa.array([f"{path.stem}.tar/{i:09d}" for i in numbers]),
        "path": pa.array([f"/data/laion/{path.stem}.tar"] * count),
        "offset": pa.array(numbers * 100_000),
        "length": pa.array(rng.integers(20_000, 300_000, count)),
        "content_hash": pa.array([h.tobytes() for h in hashes], pa.binary(32)),
        "perceptual_hash": pa.array(looks),
        "height": pa.array(rng.integers(200, 2000, count), pa.int32()),
        "width": pa.array(rng.integers(200, 2000, count), pa.int32()),
        "captions": pa.array(
            [[f"a caption of some sixty characters, of picture number {i}"] for i in original]
        ),
        "metadata": pa.array([f'{{"aesthetic": {a:.2f}}}' for a in rng.random(count) * 10]),
        "label": pa.nulls(count, pa.int64()),
        "reason": pa.array(["undecodable" if r else None for r in rejected]),
        "detail": pa.array([""] * count),
    }
    arrays = [columns[field.name].cast(field.type) for field in CATALOG_SCHEMA]
    pq.write_table(pa.Table.from_arrays(arrays, schema=CATALOG_SCHEMA), path, compression="zstd")


def peak_mib() -> int:
    """This process's own peak: getrusage would tell its parent's, where that was more."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) >> 10 if found else 0


def catalog_part(work: Path, number: int) -> Path:
    (work / "catalog").mkdir(parents=True, exist_ok=True)
    return work / "catalog" / f"part-{number:06d}.parquet"


def one(work: Path, near: int | None) -> None:
    """Plan the catalog in this process, as a growth of the planned one beside it if there is any.

    Prints seconds and peak MiB.
    """
    before = peak_mib()
    started, cpu = time.perf_counter(), time.process_time()
    images = ImagesConfig(resolution=256)
    filters, old = FiltersConfig(min_side=256, near_duplicates=near), work.parent / "old"
    earlier = [old] if work != old and old.exists() else []
    plan(work, list_buckets(images), filters, 2000, 0.001, earlier)
    peak = peak_mib()
    shards = pq.read_metadata(work / "shard_list.parquet").num_rows
    rejects = pq.read_metadata(work / "plan_rejects.parquet").num_rows
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    found = {"wall_s": wall, "cpu_s": cpu, "peak_mib": peak, "before_mib": before}
    print(json.dumps(found | {"shards": shards, "rejects": rejects}))


def write_tars(folder: Path, pictures: int) -> None:
    """Captioned JPEGs of 2 to 20 KB with records, as img2dataset writes them, each unlike all others."""
    rng, kinds = np.random.default_rng(0), list[bytes]()
    while len(kinds) < 64:
        height, width = rng.integers(100, 400, 2)
        data = encoded(pixels(len(kinds), height, width), "JPEG", quality=int(rng.integers(50, 99)))
        if 2_000 <= len(data) <= 20_000:
            kinds.append(data)
    for number in range(TARS):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(number, pictures, TARS):
                caption = f"a caption of some sixty characters, of picture number {i}"
                facts = {"url": f"https://example.com/{i}.jpg", "caption": caption, "width": 256}
                # Bytes behind a JPEG's end belong to no pixel, but make it another file.
                files = {"jpg": kinds[i % len(kinds)] + i.to_bytes(8), "txt": caption.encode()}
                for ending, content in (files | {"json": json.dumps(facts).encode()}).items():
                    info = tarfile.TarInfo(f"{i:09d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def timed(function: Callable[[], object]) -> tuple[float, Any]:
    begin = time.perf_counter()
    answer = function()
    return time.perf_counter() - begin, answer


def scan_parts(folder: Path, pictures: int) -> dict[str, float]:
    """Microseconds per picture of what a scan does, each part by itself in this process, and of all."""
    source = {"kind": "tars", "path": str(folder / "tars")}
    vae, text = ROOT / "models" / "demo_vae", ROOT
    path = write_config(folder / "c.yaml", {"web": source}, vae, text, text_encoders={})
    config = load_config(PrepareConfig, path, ["samples_per_shard=2000"])
    spent = dict[str, float]()
    spent["list"], listing = timed(lambda: list_sources(config))
    entries = [Entry(**row) for row in listing.to_pylist()]
    own = config.sources["web"]
    spent["read tars"], items = timed(lambda: list(read_entries(entries, own)))
    reads = [(item.path, item.offset, item.length) for item in items]
    spent["read bytes"], blobs = timed(lambda: [read_bytes(*read) for read in reads])
    spent["hash"], _ = timed(lambda: [hashlib.sha256(blob).digest() for blob in blobs])
    spent["probe"], _ = timed(lambda: [probe(blob, config.images) for blob in blobs])
    settings = ScanSettings(folder / "one", [], config.images, config.captions, config.filters)
    pool = DecodePool(config.images, 1)
    asked = [ProbeRequest(Address(*read)) for read in reads]
    groups = [asked[i : i + PROBES_AT_ONCE] for i in range(0, len(asked), PROBES_AT_ONCE)]
    pool.submit(asked[0]).result()
    spent["child"], _ = timed(lambda: [pool.submit_all(group).result() for group in groups])
    begin = time.perf_counter()
    for number, entry in enumerate(entries):
        scan_partition(settings, f"part-{number:06d}", own, [entry], pool)
    spent["one process"] = time.perf_counter() - begin
    spent["pipe"] = spent["child"] - spent["read bytes"] - spent["hash"] - spent["probe"]
    parts = sorted((folder / "one" / "catalog").glob("*.parquet"))
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]

    def write_parquet() -> None:
        table = pa.Table.from_pylist(rows, CATALOG_SCHEMA)
        pq.write_table(table, folder / "rows.parquet", compression="zstd")

    spent["Parquet"], _ = timed(write_parquet)
    intake = Intake(folder / "dataset" / "work", listing, [])
    spent["start Ray"], _ = timed(lambda: connect(config.ray))
    spent["scan"], _ = timed(lambda: scan(config, intake))
    spent["plan"], _ = timed(lambda: make_plan(config, intake.work))
    return {name: 1e6 * seconds / pictures for name, seconds in spent.items()}


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="sizes")] = None,
    near: Annotated[int, typer.Option(help="bits, of the case with near duplicates")] = 3,
    pictures: Annotated[int, typer.Option(help="JPEGs in tars to scan; 0: plan alone")] = 20_000,
    folder: Annotated[Path | None, typer.Option(help="where 1 GB per 10^7 rows has room")] = None,
    work: Annotated[Path | None, typer.Option(hidden=True)] = None,
    side: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Measure the plan."""
    if work:
        one(work, side if side >= 0 else None)
        return
    table = Table(
        "rows", "near duplicates", "s", "CPU s", "us per row", "peak MiB", "shards", "rejects"
    )
    flat: dict[str, float] = {}
    if pictures:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            (Path(temporary) / "tars").mkdir()
            write_tars(Path(temporary) / "tars", pictures)
            found = scan_parts(Path(temporary), pictures)
        scanned = Table("part of a scan", f"us per picture, of {pictures:,}")
        for part, spent in found.items():
            scanned.add_row(part, f"{spent:.1f}")
            flat[f"scan_us_{part.replace(' ', '_')}"] = spent
        Console().print(scanned)
    for size in [1_000_000, 10_000_000] if rows is None else rows:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            rng = np.random.default_rng(0)
            old, new = (Path(temporary) / name for name in ("old", "new"))
            for number in range(size // ROWS_PER_PART):
                write_part(catalog_part(old, number), rng, size)
            write_part(catalog_part(new, 0), rng, size, NEW)
            for work, bits in ((old, near), (new, near), (old, -1)):
                command = [sys.executable, "-m", "tests.benchmarks.plan_scale"]
                command += ["--work", str(work), "--side", str(bits)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                got = json.loads(done.stdout)
                name = f"{size:.0e}".replace("+0", "") + ("" if bits < 0 else f"_near{bits}")
                name += "_grown" if work == new else ""
                flat |= {f"wall_s_{name}": got["wall_s"], f"peak_mib_{name}": got["peak_mib"]}
                flat[f"cpu_s_{name}"] = got["cpu_s"]
                table.add_row(
                    f"{size:,}" + (f" and {NEW:,}" if work == new else ""),
                    "off" if bits < 0 else f"within {bits} bits",
                    f"{got['wall_s']:.1f}",
                    f"{got['cpu_s']:.1f}",
                    f"{1e6 * got['wall_s'] / size:.1f}",
                    f"{got['peak_mib']} ({got['before_mib']} before)",
                    f"{got['shards']:,}",
                    f"{got['rejects']:,}",
                )
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps({k: round(v, 2) for k, v in flat.items()}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
