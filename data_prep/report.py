"""What people see of a preparation: the dry run, progress, tables, and the contact sheet."""

import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from rich import progress
from rich.console import Console
from rich.table import Table

from data_prep.encode import Encoders, ShardSpec
from data_prep.images import Bucket
from data_prep.pool import ActorPool
from data_prep.schema import Manifest, index_path, read_index, read_shard_table
from data_prep.shards import WORK
from data_prep.sources import Entry

SHEET_PAIRS, SHEET_COLUMNS, SHEET_CELL = 24, 8, 192
LINE_EVERY_S = 30.0  # where there is no terminal to draw a bar on


class Progress:
    """A bar with rate and time left on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, what: str, total: int, unit: str, done: int = 0):
        self._console, self._what, self._total, self._unit = console, what, total, unit
        self._first = self._last = done
        self._started = self._said = time.monotonic()
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, completed=done, rate="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, rejected: int = 0) -> None:
        """Never runs backwards, though work whose worker died is done again."""
        done = self._last = max(done, self._last)
        now = time.monotonic()
        speed = (done - self._first) / max(now - self._started, 1e-3)
        rate = f"{speed:.1f} {self._unit}/s" + (f", {rejected} rejected" if rejected else "")
        self._bar.update(self._task, completed=done, rate=rate)
        if not self._console.is_terminal and now - self._said > LINE_EVERY_S:
            self._said = now
            left = f"{(self._total - done) / speed:.0f} s left" if speed else "no estimate yet"
            self._console.print(f"{self._what}: {done} of {self._total}, {rate}, {left}")


def print_plan(
    console: Console,
    config: Any,
    entries: list[Entry],
    weights: dict[str, str],
    buckets: list[Bucket],
) -> None:
    """The dry run's answer: what is there and what would be made of it."""
    table = Table("source", "kind", "path", "files", "MiB", title="Sources")
    for name, source in config.sources.items():
        ours = [entry for entry in entries if entry.source == name and not entry.reason]
        mib = sum(entry.size for entry in ours) / 2**20
        table.add_row(name, source.kind, source.path, str(len(ours)), f"{mib:.1f}")
    console.print(table)
    table = Table("encoder", "path", "dtype", "weights sha256", title="Encoders")
    for name, sha256 in weights.items():
        section = config.vae if name == "vae" else config.text_encoders[name.split(".")[1]]
        table.add_row(name, section.path, section.dtype, sha256[:12])
    console.print(table)
    table = Table("height", "width", "aspect", title="Buckets")
    for height, width in buckets:
        table.add_row(str(height), str(width), f"{width / height:.2f}")
    console.print(table)
    folder = Path(config.output).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    console.print(f"Output {config.output}, {free:.1f} GiB free there. Nothing was written.")


def print_result(console: Console, dataset: Path, manifest: Manifest, seconds: float) -> None:
    """Counts and buckets of a finished dataset."""
    counts = manifest.counts
    table = Table("pictures", "count", title="Counts")
    table.add_row("seen", str(counts.seen))
    table.add_row("kept", str(counts.kept))
    for reason, count in counts.rejected.items():
        table.add_row(f"rejected: {reason}", str(count))
    console.print(table)
    rows = read_shard_table(dataset).to_pylist()
    shards, samples = Counter[Bucket](), Counter[tuple[Bucket, str]]()
    for row in rows:
        shards[row["height"], row["width"]] += 1
        samples[(row["height"], row["width"]), row["split"]] += row["num_samples"]
    table = Table("bucket", "aspect", "train", "held out", "shards", title="Buckets")
    for (height, width), count in sorted(shards.items(), key=lambda item: item[0][1] / item[0][0]):
        numbers = (samples[(height, width), split] for split in ("train", "heldout"))
        table.add_row(f"{height}x{width}", f"{width / height:.2f}", *map(str, numbers), str(count))
    console.print(table)
    size = sum(row["bytes"] for row in rows) / 2**20
    where = min(os.path.relpath(dataset), str(dataset), key=len)
    console.print(
        f"{where}: {counts.kept} samples, {len(rows)} shards, {size:.1f} MiB; {seconds:.0f} s."
    )


def contact_sheet(
    dataset: Path,
    shards: list[ShardSpec],
    commits: list[dict[str, Any]],
    encoders: Encoders,
    actors: ActorPool,
) -> Image.Image:
    """Some originals, each above what the codec makes of its stored latents, of every bucket in turn."""
    plan = pq.ParquetFile(dataset / WORK / "plan.parquet")
    first: dict[Bucket, int] = {}
    for i, commit in enumerate(commits):
        if commit["num_samples"]:
            first.setdefault((commit["height"], commit["width"]), i)
    each = max(SHEET_PAIRS // len(first), 1)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for i in list(first.values())[:SHEET_PAIRS]:
        rejected = {reject["key"] for reject in commits[i]["rejects"]}
        rows = plan.read_row_group(i)
        kept = [n for n, key in enumerate(rows["key"].to_pylist()) if key not in rejected][:each]
        rows = rows.take(kept)
        moments = _read_moments(dataset, shards[i], encoders, len(kept))
        stored = dict(zip(rows["key"].to_pylist(), moments, strict=True))
        pairs += actors.ask("contact_pairs", shards[i], rows, stored)
    return _draw_pairs(pairs)


def _read_moments(dataset: Path, spec: ShardSpec, encoders: Encoders, count: int) -> np.ndarray:
    """The first samples' moments, found through the index: (count, 2C, h, w)."""
    index = read_index(dataset / index_path(spec.path))[:count, 0]
    data = np.memmap(dataset / spec.path, dtype=np.uint8, mode="r")
    moments, downscale = encoders.members[0], encoders.codec.downscale
    shape = (count, -1, spec.height // downscale, spec.width // downscale)
    values = [data[offset : offset + size].view(moments.dtype) for offset, size in index]
    return np.stack(values).reshape(shape)


def _draw_pairs(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Image.Image:
    columns = min(SHEET_COLUMNS, len(pairs))
    lines = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * SHEET_CELL, lines * 2 * SHEET_CELL), (32, 32, 32))
    for i, pair in enumerate(pairs):
        for j, pixels in enumerate(pair):
            picture = Image.fromarray(pixels)
            scale = (SHEET_CELL - 4) / max(picture.size)
            size = (round(picture.width * scale), round(picture.height * scale))
            x, y = i % columns * SHEET_CELL, (i // columns * 2 + j) * SHEET_CELL
            sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (x + 2, y + 2))
    return sheet
