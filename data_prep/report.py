"""What a terminal shows of a preparation: the dry run, progress, and the tables that the page has too."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich import progress
from rich.console import Console
from rich.table import Table

from data_prep.images import Bucket
from data_prep.schema import SPLITS, Manifest, read_shard_table
from data_prep.storage import is_remote
from models.command import duration

# Seconds between two lines where there is no terminal to draw a bar on.
LINE_EVERY_S = 30.0
FEW_HELD_OUT = 32

console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def warn(text: str) -> None:
    console.print(f"warning: {text}", style="yellow")


@contextmanager
def status(doing: str) -> Iterator[None]:
    """Say what is being done: on a terminal until it is done, elsewhere by one line."""
    if console.is_terminal:
        with console.status(doing):
            yield
    else:
        console.print(f"{doing} ...")
        yield


class Progress:
    """A bar with rate and time left on a terminal, a line now and then elsewhere."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        self._what, self._total, self._unit = what, total, unit
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
        now, done = time.monotonic(), min(done, self._total)
        speed = (done - self._first) / max(now - self._started, 1e-3)
        rate = f"{speed:,.1f} {self._unit}/s" + (f", {rejected:,} rejected" if rejected else "")
        self._bar.update(self._task, completed=done, rate=rate)
        if not console.is_terminal and now - self._said > LINE_EVERY_S:
            self._said = now
            left = f"{duration((self._total - done) / speed)} left" if speed else "no estimate yet"
            console.print(f"{self._what}: {done:,} of {self._total:,}, {rate}, {left}")


@dataclass(frozen=True)
class Listing:
    """A table for people, in the terminal or on the page; neither shows one without rows."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: int = 1
    """Columns of words; those behind them are numbers."""
    bars: Sequence[float] = ()
    """What the page draws behind each row."""

    def print(self) -> None:
        if not self.rows:
            return
        table = Table(title=self.title, show_header=any(self.head))
        for place, name in enumerate(self.head):
            justify = "left" if place < self.words else "right"
            table.add_column(name, justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def print_result(dataset: Path, manifest: Manifest, spent: dict[str, float]) -> None:
    """Counts and buckets of a finished dataset."""
    rows = read_shard_table(dataset).to_pylist()
    listings = (*count_listings(manifest), generation_listing(manifest))
    listings += bucket_listing(rows), caption_listing(manifest), error_listing(manifest)
    for listing in listings:
        listing.print()
    if doubt := manifest.latent_doubt():
        warn(doubt)
    size, kept = sum(row["bytes"] for row in rows), manifest.counts.kept
    where = str(dataset)
    if not is_remote(dataset):
        where = min(os.path.relpath(dataset), where, key=len)
    console.print(
        f"{where}: {kept:,} pictures, {len(rows):,} shards, {size / 2**20:,.1f} MiB, "
        f"{size / max(kept, 1) / 1024:,.1f} KiB per picture; "
        + ", ".join(f"{what} {duration(s)}" for what, s in spent.items())
    )
    held_out = sum(bucket_samples([row for row in rows if row["split"] == "heldout"]).values())
    if held_out < FEW_HELD_OUT:
        console.print(
            f"note: {held_out} pictures are held out, too few to measure a model by. Remedy: a heldout_fraction "
            f"that comes to {FEW_HELD_OUT} or more"
        )
    console.print(f"Look at {where}/report.html. Next: flowmill verify {where}")


def count_listings(manifest: Manifest) -> list[Listing]:
    """The pictures by what became of them, and the sources' files that are none, by extension."""
    counts = manifest.counts
    kinds = {"seen": counts.seen, "kept": counts.kept}
    kinds |= {f"rejected: {reason}": count for reason, count in _falling(counts.rejected)}
    seen = max(counts.seen, 1)
    rows = [(kind, f"{count:,}", f"{100 * count / seen:.2f}") for kind, count in kinds.items()]
    pictures = Listing("Pictures", ("", "count", "%"), rows, bars=list(kinds.values()))
    others = _falling(counts.other_files or {})
    rows = [(extension or "none", f"{count:,}") for extension, count in others]
    bars = [count for _, count in others]
    return [pictures, Listing("Other files", ("extension", "count"), rows, bars=bars)]


def generation_listing(manifest: Manifest) -> Listing:
    """What each growth of the sources brought; no rows where there was none."""
    head = ("generation", "rejected", "files", "kept", "shards", "gone or changed")
    rows = list[tuple[str, ...]]()
    for found in manifest.generations if len(manifest.generations) > 1 else ():
        numbers = (found.listed, found.counts.kept, found.num_shards, found.missing)
        reasons = [f"{count:,} {reason}" for reason, count in _falling(found.counts.rejected)]
        rows.append((f"{found.number}", ", ".join(reasons), *(f"{n:,}" for n in numbers)))
    return Listing("Generations", head, rows, words=2)


def _falling(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def training_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shards of the train split, of a shard table or of commits; all where it has none."""
    return [row for row in rows if row["split"] == "train"] or rows


def bucket_samples(rows: list[dict[str, Any]]) -> Counter[Bucket]:
    """Samples by bucket, in the shards of a table or of commits, without those that a layer lacks."""
    counts = Counter[Bucket]()
    for row in rows:
        lacks = len(row.get("missing") or ())
        counts[row["height"], row["width"]] += row["num_samples"] - lacks
    return counts


def bucket_listing(rows: list[dict[str, Any]]) -> Listing:
    """Samples and shards of every bucket of the shard table, from the tallest to the widest."""
    shards = Counter((row["height"], row["width"]) for row in rows)
    samples = [bucket_samples([r for r in rows if r["split"] == split]) for split in SPLITS]
    lines, bars = list[tuple[str, ...]](), list[float]()
    for (height, width), count in sorted(shards.items(), key=lambda item: item[0][1] / item[0][0]):
        numbers = [counts[height, width] for counts in samples]
        cells = [f"{number:,}" for number in (*numbers, count)]
        lines.append((f"{height}x{width}", f"{width / height:.2f}", *cells))
        bars.append(sum(numbers))
    head = ("bucket", "aspect", "train", "held out", "shards")
    return Listing("Buckets", head, lines, bars=bars)


def caption_listing(manifest: Manifest) -> Listing:
    """The captions that each text encoder cut."""
    lengths = {name: role.view.max_length for name, role in manifest.text.roles.items()}
    total = manifest.counts.kept * manifest.samples_per_picture["heldout"]
    return cut_listing(lengths, manifest.counts.cut_captions, total)


def cut_listing(
    lengths: dict[str, int], cut: dict[str, int], total: int, where: str = ""
) -> Listing:
    """Captions, among `total`, that are longer than each text encoder's max_length."""
    rows = [
        (name, str(length), f"{cut[name]:,} of {total:,}", f"{100 * cut[name] / max(total, 1):.2f}")
        for name, length in lengths.items()
        if name in cut
    ]
    head = ("encoder", "max_length in tokens", "captions", "%")
    return Listing(f"Captions cut at the end, longer than their encoder takes{where}", head, rows)


def error_listing(manifest: Manifest) -> Listing:
    """What int8 leaves of a token: its cosine with what the encoder gave."""
    rows = [
        (name, f"{1 - role.mean_error:.6f}", f"{1 - role.worst_error:.6f}")
        for name, role in manifest.text.roles.items()
        if role.mean_error is not None and role.worst_error is not None
    ]
    return Listing("Text in int8: cosine of a token", ("encoder", "mean", "worst"), rows)


def class_names(classes: list[str]) -> str:
    """The classes by label, on one line."""
    return ", ".join(f"{label} {name}" for label, name in enumerate(classes))


def latent_listing(manifest: Manifest) -> Listing:
    """The latents' statistics by channel; no rows of a layer, which has none."""
    scale = manifest.codec.normalisation
    stats = zip(manifest.latent_mean, manifest.latent_std, scale.mean, scale.std, strict=True)
    rows = [
        (str(i), *(f"{x:.4f}" for x in (mean, std, (mean - shift) / factor, std / factor)))
        for i, (mean, std, shift, factor) in enumerate(() if manifest.base else stats)
    ]
    head = ("channel", "raw mean", "raw std", "normalised mean", "normalised std")
    return Listing("Latents", head, rows)


def encoder_listing(encoders: dict[str, Any], hashes: dict[str, dict[str, str]]) -> Listing:
    """Configs or records of encoders, and their weights' hashes, by name; pixels have no weights."""
    rows = [
        (name, encoder.path, encoder.dtype, hashes[name].get("weights", "")[:12])
        for name, encoder in encoders.items()
    ]
    return Listing("Encoders", ("encoder", "path", "dtype", "weights sha256"), rows, words=4)
