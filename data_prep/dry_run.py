"""`flowmill prepare --dry-run`: what the sources hold and what would be made of it, in seconds."""

import hashlib
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.catalog import draw_captions
from data_prep.config import PrepareConfig
from data_prep.encoders import configured
from data_prep.images import Rejected, list_buckets
from data_prep.output import read_intakes
from data_prep.report import Listing, class_names, console, cut_listing, encoder_listing, warn
from data_prep.scan import compare
from data_prep.schema.metadata import refusal
from data_prep.sources import Entry, Item, SourceConfig, read_entries, sample_key
from data_prep.sources.classes import count_classes
from data_prep.sources.source import files_of, num_files
from data_prep.storage import is_remote, open_root
from models.text_conventions import rows_stored

# Pictures per source whose captions are read, and the files that they are taken from where each holds many.
PICTURES, FILES = 256, 3
# Bytes of remote files with many pictures that are fetched to look at captions.
FETCHED_BYTES = 64 << 20
# Kinds of files that are shown per source.
KINDS = 20


def print_plan(config: PrepareConfig, listing: pa.Table, hashes: dict[str, dict[str, str]]) -> None:
    """The dry run's answer: what is there and what would be made of it."""
    sources = [(name, source.kind, source.path) for name, source in config.sources.items()]
    Listing("Sources", ("source", "kind", "path"), sources, words=3).print()
    file_listing(config, listing).print()
    if classes := count_classes(config.sources, listing):
        console.print(f"Classes, by label: {class_names(list(classes))}")
        if empty := [name for name, count in classes.items() if not count]:
            warn(f"classes without a picture: {', '.join(empty)}")
    weights = {place: found["weights"] for place, found in hashes.items()}
    encoder_listing(configured(config), weights).print()
    cell = config.vae.divides
    rows = [
        (f"{height}x{width}", f"{width / height:.2f}", f"{height / cell:g}x{width / cell:g}")
        for height, width in list_buckets(config.images)
    ]
    Listing(f"Buckets, latents at 1/{cell}", ("bucket", "aspect", "latents"), rows).print()
    for found in sample_listings(config, listing):
        found.print()
    dataset = open_root(config.output, "output")
    if begun := read_intakes(dataset):
        found = compare(begun, listing)
        console.print(f"Growth: {found.num_new:,} new files after {len(begun)} generations.")
        if said := found.misses(config.output):
            warn(f"{said}. Remedy: restore them, or --allow-missing to go on with what is new.")
    room = ""
    if not is_remote(config.output):
        folder = Path(config.output).absolute()
        while not folder.exists():
            folder = folder.parent
        room = f", {shutil.disk_usage(folder).free / 2**30:,.1f} GiB free there"
    console.print(f"Output {config.output}{room}. Nothing was written.")


def file_listing(config: PrepareConfig, listing: pa.Table) -> Listing:
    """Files by source and ending, tables and tars by name with * for numbers, and whether they are taken."""
    compute: Any = pc
    rows = list[tuple[str, ...]]()
    for name, source in config.sources.items():
        mine = listing.filter(pc.field("source") == name)
        pattern, kind = (r"\d+", "*") if source.per_task == 1 else (r"(?s)^.*?(\.[^./]*)?$", r"\1")
        kinds = compute.replace_substring_regex(mine["name"], pattern, kind)
        table = mine.append_column("kind", kinds).append_column("number", num_files(mine))
        groups = table.group_by(["kind", "reason"]).aggregate([("number", "sum"), ("size", "sum")])
        groups = groups.to_pylist()
        groups.sort(key=lambda group: (group["reason"] or "", -group["number_sum"], group["kind"]))
        for group in groups[:KINDS]:
            taken = f"no: {group['reason']}" if group["reason"] else "yes"
            rows.append((name, group["kind"] or "no ending", taken, *_count_and_mib([group])))
        if rest := groups[KINDS:]:
            rows.append((name, f"{len(rest)} other kinds", "", *_count_and_mib(rest)))
    return Listing("Files", ("source", "files", "taken", "number", "MiB"), rows, words=3)


def _count_and_mib(groups: list[dict[str, Any]]) -> tuple[str, str]:
    count, size = (sum(group[f"{what}_sum"] for group in groups) for what in ("number", "size"))
    return f"{count:,}", f"{size / 2**20:,.1f}"


def sample_listings(config: PrepareConfig, listing: pa.Table) -> Iterator[Listing]:
    """What becomes of the captions of a random sample: rejected, cut, or neither."""
    from models.text_encoder import count_tokens, load_tokenizer, stored_bytes

    looked, captions, rows = 0, list[str](), list[tuple[str, ...]]()
    for name, source in config.sources.items():
        items = sampled_items(name, source, listing, list(config.filters.metadata))
        fates = Counter[str]()
        for item in items:
            try:
                if item.reason:
                    raise Rejected(item.reason)
                key = sample_key(name, item.name)
                drawn = draw_captions(key, item.captions, config.captions)
                if refusal(item.metadata, config.filters.metadata):
                    raise Rejected("metadata")
                captions += drawn
            except Rejected as rejected:
                fates[rejected.reason] += 1
        looked += len(items)
        taken = [(i.path, i.offset, i.data, i.label) for i in items if not i.reason]
        if again := len(taken) - len(set(taken)):
            console.print(
                f"sources.{name}: {again:,} of {len(items):,} rows are of a picture that another row has; "
                f"sources.{name}.merge_rows=true gives it the captions of all."
            )
        for reason, count in fates.most_common():
            share = f"{100 * count / len(items):.2f}"
            rows.append((name, reason, f"{count:,} of {len(items):,}", share))
    title = "Rejected in a sample, before pictures are opened"
    yield Listing(title, ("source", "reason", "pictures", "%"), rows, words=2)
    lengths, counts = dict[str, int](), dict[str, list[int]]()
    for name, encoder in config.text_encoders.items():
        lengths[name] = encoder.max_length
        counts[name] = count_tokens(load_tokenizer(Path(encoder.path)), captions, encoder.view)
    cut = {name: sum(n > lengths[name] for n in counts[name]) for name in lengths}
    yield cut_listing(lengths, cut, len(captions), f" (sample of {looked:,} pictures)")
    rows = []
    for name, encoder in config.text_encoders.items() if captions else ():
        row_bytes, pooled_bytes = stored_bytes(Path(encoder.path), encoder.view, encoder.store)
        stored = fmean(rows_stored(encoder.view, n) for n in counts[name])
        size = (stored * row_bytes + pooled_bytes) / 1024
        rows.append((name, f"{stored:.1f}", f"{row_bytes:,}", f"{size:,.1f}"))
    yield Listing("Text per caption", ("encoder", "rows", "bytes per row", "KiB"), rows)


def sampled_items(
    name: str, source: SourceConfig, listing: pa.Table, fields: list[str]
) -> list[Item]:
    """Up to PICTURES of a source, from files chosen at random; raises InputError where a column is missing."""
    files = files_of(listing, name)
    classes = list(count_classes({name: source}, listing))
    count = min(PICTURES if source.per_task > 1 else FILES, len(files))
    places = sorted(random.Random(0).sample(range(len(files)), count))
    entries = [Entry(**row) for row in files.take(places).to_pylist()]
    if source.per_task == 1 and is_remote(source.path):
        entries = [entry for entry in entries[:1] if entry.size <= FETCHED_BYTES]
        if not entries:
            console.print(f"{name}: captions were not looked at, its files being large and remote")
    read = partial(first_items, entries, source, classes, fields)
    if source.per_task > 1:
        return read()
    try:
        # A damaged table may crash the process that reads it.
        with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
            return pool.submit(read).result()
    except BrokenProcessPool:
        return [Item(entry.name, reason="scan_crash") for entry in entries]


def first_items(
    entries: list[Entry], source: SourceConfig, classes: list[str], fields: list[str]
) -> list[Item]:
    """The first of each file; of a picture that came with one its hash alone."""
    each = -(-PICTURES // max(len(entries), 1))
    files = (islice(read_entries([entry], source, classes, fields), each) for entry in entries)
    return [
        replace(item, data=item.data and hashlib.sha256(item.data).digest())
        for items in files
        for item in items
    ]
