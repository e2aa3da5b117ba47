"""What people see of a preparation: the dry run, progress, tables, and the contact sheet."""

import base64
import html
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from rich import progress
from rich.console import Console
from rich.table import Table

from data_prep.commits import ShardSpec
from data_prep.encode import Encoders
from data_prep.images import Bucket
from data_prep.plan import read_planned
from data_prep.schema import CONTACT_SHEET, SPLITS, Manifest, index_path, read_shard_table
from data_prep.shards import WORK
from data_prep.storage import is_remote
from data_prep.workers import Actors

SHEET_PAIRS, SHEET_COLUMNS, SHEET_CELL = 24, 8, 192
LINE_EVERY_S = 30.0  # where there is no terminal to draw a bar on

console = Console(soft_wrap=True, highlight=False, markup=False)


class Progress:
    """A bar with rate and time left on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, what: str, total: int, unit: str, done: int = 0):
        self._console, self._what, self._total, self._unit = console, what, total, unit
        self._first = done
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
    listing: pa.Table,
    weights: dict[str, str],
    buckets: list[Bucket],
) -> None:
    """The dry run's answer: what is there and what would be made of it."""
    table = Table("source", "kind", "path", "files", "MiB", title="Sources")
    for name, source in config.sources.items():
        sizes = listing["size"].filter(
            pc.and_(pc.equal(listing["source"], name), pc.is_null(listing["reason"]))  # pyright: ignore[reportAttributeAccessIssue]
        )
        mib = (pc.sum(sizes).as_py() or 0) / 2**20  # pyright: ignore[reportAttributeAccessIssue]
        table.add_row(name, source.kind, source.path, str(len(sizes)), f"{mib:.1f}")
    console.print(table)
    table = Table("encoder", "path", "dtype", "weights sha256", title="Encoders")
    for name, sha256 in weights.items():
        section: Any = config
        for part in name.split("."):
            section = section[part] if isinstance(section, dict) else getattr(section, part)
        table.add_row(name, section.path, section.dtype, sha256[:12])
    console.print(table)
    table = Table("height", "width", "aspect", title="Buckets")
    for height, width in buckets:
        table.add_row(str(height), str(width), f"{width / height:.2f}")
    console.print(table)
    room = ""
    if not is_remote(config.output):
        folder = Path(config.output).absolute()
        while not folder.exists():
            folder = folder.parent
        room = f", {shutil.disk_usage(folder).free / 2**30:.1f} GiB free there"
    console.print(f"Output {config.output}{room}. Nothing was written.")


def print_result(
    console: Console, dataset: Path, manifest: Manifest, spent: dict[str, float]
) -> None:
    """Counts and buckets of a finished dataset."""
    counts = manifest.counts
    table = Table("pictures", "count", title="Counts")
    table.add_row("seen", str(counts.seen))
    table.add_row("kept", str(counts.kept))
    for reason, count in counts.rejected.items():
        table.add_row(f"rejected: {reason}", str(count))
    console.print(table)
    rows = read_shard_table(dataset).to_pylist()
    table = Table(*BUCKET_COLUMNS, title="Buckets")
    for line in bucket_lines(rows):
        table.add_row(*line)
    console.print(table)
    size = sum(row["bytes"] for row in rows) / 2**20
    where = str(dataset)
    if not is_remote(dataset):
        where = min(os.path.relpath(dataset), where, key=len)
    console.print(
        f"{where}: {counts.kept} pictures, {len(rows)} shards, {size:.1f} MiB; "
        + (", ".join(f"{what} {s:.1f} s" for what, s in spent.items()) or "0 s")
    )


BUCKET_COLUMNS = ("bucket", "aspect", "train", "held out", "shards")


def bucket_lines(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Of the shard table: samples and shards of every bucket, from the tallest to the widest."""
    shards, samples = Counter[Bucket](), Counter[tuple[Bucket, str]]()
    for row in rows:
        shards[row["height"], row["width"]] += 1
        samples[(row["height"], row["width"]), row["split"]] += row["num_samples"]
    lines = []
    for (height, width), count in sorted(shards.items(), key=lambda item: item[0][1] / item[0][0]):
        numbers = [str(samples[(height, width), split]) for split in SPLITS]
        lines.append((f"{height}x{width}", f"{width / height:.2f}", *numbers, str(count)))
    return lines


def contact_sheet(
    dataset: Path,
    shards: list[ShardSpec],
    commits: list[dict[str, Any]],
    encoders: Encoders,
    actors: Actors,
) -> tuple[Image.Image, float]:
    """Some originals of every bucket, each above what the codec makes of its stored latents, and their PSNR in dB."""
    first: dict[Bucket, int] = {}
    for i, commit in enumerate(commits):
        if commit["num_samples"]:
            first.setdefault((commit["height"], commit["width"]), i)
    each = max(SHEET_PAIRS // len(first), 1)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for i in list(first.values())[:SHEET_PAIRS]:
        rejected = {reject["key"] for reject in commits[i]["rejects"]}
        keys = read_planned(dataset / WORK, i)["key"].to_pylist()
        keys = [key for key in keys if key not in rejected]
        step = commits[i]["num_samples"] // len(keys)  # samples of a picture
        moments = _read_moments(dataset, shards[i], encoders, step, min(each, len(keys)))
        stored = dict(zip(keys, moments, strict=False))
        pairs += actors.ask("contact_pairs", shards[i], i, stored)
    errors = [((a.astype(np.float64) - b) ** 2).mean() for a, b in pairs]
    psnr = [10 * np.log10(255**2 / max(error, 1e-3)) for error in errors]
    return _draw_pairs(pairs), round(float(np.mean(psnr)), 2)


def _read_moments(
    dataset: Path, spec: ShardSpec, encoders: Encoders, step: int, count: int
) -> np.ndarray:
    """The moments of the first pictures, found through the index: (count, 2C, h, w)."""
    with (dataset / index_path(spec.path)).open("rb") as file:
        index = np.lib.format.read_array(file, allow_pickle=False)
    member, downscale = encoders.members["moments"], encoders.codec.downscale
    moments = []
    with (dataset / spec.path).open("rb") as file:
        for offset, size in index[: count * step : step, 0].tolist():
            file.seek(offset)
            moments.append(np.frombuffer(file.read(size), member.dtype))
    shape = (count, -1, spec.height // downscale, spec.width // downscale)
    return np.stack(moments).reshape(shape)


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


def html_report(dataset: Path, manifest: Manifest, rows: list[dict[str, Any]]) -> str:
    """One page with the contact sheet in it, to be read offline; nothing on it runs."""
    sheet = base64.b64encode((dataset / CONTACT_SHEET).read_bytes()).decode()
    counts, codec = manifest.counts, manifest.codec
    seen = max(counts.seen, 1)
    kinds = {"seen": counts.seen, "kept": counts.kept} | {
        f"rejected: {reason}": count for reason, count in counts.rejected.items()
    }
    encoders = {"vae": codec, **manifest.text.roles}
    if manifest.vision is not None:
        encoders["vision"] = manifest.vision
    stats = zip(manifest.latent_mean, manifest.latent_std, strict=True)
    tables = [
        (
            "Pictures",
            ("", "count", "%"),
            [(k, n, f"{100 * n / seen:.2f}") for k, n in kinds.items()],
        ),
        ("Buckets", BUCKET_COLUMNS, bucket_lines(rows)),
        (
            "Latents, raw, by channel",
            ("channel", "mean", "std"),
            [(i, f"{mean:.4f}", f"{std:.4f}") for i, (mean, std) in enumerate(stats)],
        ),
        (
            "Encoders",
            ("encoder", "path", "dtype", "weights sha256"),
            [(n, e.path, e.dtype, e.weights_sha256[:12]) for n, e in encoders.items()],
        ),
    ]
    parts = [f"<h2>{title}</h2>" + _html_table(head, lines) for title, head, lines in tables]
    psnr = manifest.generations[-1].psnr_db
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Prepared dataset</title><style>"
        "body{font:15px sans-serif;margin:2em auto;max-width:1600px}"
        "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}</style><h1>Prepared dataset</h1>"
        + "".join(parts)
        + f"<h2>Originals above their decoded latents, PSNR {psnr} dB</h2>"
        f'<img alt="contact sheet" src="data:image/png;base64,{sheet}"></html>\n'
    )


def _html_table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rows = [f"<tr>{''.join(f'<th>{html.escape(cell)}' for cell in head)}"]
    for line in lines:
        rows.append(f"<tr>{''.join(f'<td>{html.escape(str(cell))}' for cell in line)}")
    return f"<table>{''.join(rows)}</table>"
