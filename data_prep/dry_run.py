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

from data_prep.captions_table import some_captions
from data_prep.catalog import CaptionsConfig, draw_captions
from data_prep.config import EncodingConfig, LayerConfig, PrepareConfig
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
    file_listing(config, listing).print()
    if classes := count_classes(config.sources, listing):
        console.print(f"Classes, by label: {class_names(list(classes))}")
        if empty := [name for name, count in classes.items() if not count]:
            warn(f"classes without a picture: {', '.join(empty)}")
    encoder_listing(configured(config), hashes).print()
    cell = config.vae.divides
    rows = [
        (f"{height}x{width}", f"{width / height:.2f}", f"{height / cell:g}x{width / cell:g}")
        for height, width in list_buckets(config.images)
    ]
    Listing(f"Buckets, latents at 1/{cell}", ("bucket", "aspect", "latents"), rows).print()
    print_sample(config, listing)
    dataset = open_root(config.output, "output")
    if begun := read_intakes(dataset):
        found = compare(begun, listing)
        console.print(f"Growth: {found.num_new:,} new files after {len(begun)} generations.")
        if said := found.misses(config.output):
            warn(f"{said}. Remedy: restore them, or --allow-missing to go on with what is new.")
    _print_output(config.output)


def print_layer_plan(
    config: LayerConfig, hashes: dict[str, dict[str, str]], captions: Iterator[list[str]]
) -> None:
    """The dry run's answer for a layer; `captions` are the base's, picture by picture."""
    encoder_listing(configured(config), hashes).print()
    given = config.captions
    if given and given.captioner:
        console.print("prompts:", *given.captioner.prompts, sep="\n  ")
    else:
        bases = (((text.encode(), 1.0),) for texts in captions for text in texts)
        said = some_captions(given, PICTURES) if given else list(islice(bases, PICTURES))
        where, items = "captions.table" if given else "base", [Item("", captions=s) for s in said]
        drawn, fates = _drawn(where, items, given or CaptionsConfig(empty="keep"), {})
        print_texts(config, drawn, f" (sample of {where})", [(where, fates, len(said))])
    _print_output(config.output)


def _print_output(output: str) -> None:
    room = ""
    if not is_remote(output):
        folder = Path(output).absolute()
        while not folder.exists():
            folder = folder.parent
        room = f", {shutil.disk_usage(folder).free / 2**30:,.1f} GiB free there"
    console.print(
        f"Output {output}{room}. Nothing was written; the same line without --dry-run prepares it."
    )


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


def print_sample(config: PrepareConfig, listing: pa.Table) -> None:
    """What becomes of the captions of a random sample: rejected, cut, or neither."""
    captions, found = list[str](), list[tuple[str, Counter[str], int]]()
    for name, source in config.sources.items():
        items = sampled_items(name, source, listing, list(config.filters.metadata))
        drawn, fates = _drawn(name, items, config.captions, config.filters.metadata)
        captions += drawn
        found.append((name, fates, len(items)))
        taken = [(i.path, i.offset, i.data, i.label) for i in items if not i.reason]
        if again := len(taken) - len(set(taken)):
            console.print(
                f"sources.{name}: {again:,} of {len(items):,} rows are of a picture that another row has; "
                f"sources.{name}.merge_rows=true gives it the captions of all."
            )
    looked = sum(count for *_, count in found)
    print_texts(config, captions, f" (sample of {looked:,} pictures)", found)


def _drawn(
    source: str, items: list[Item], config: CaptionsConfig, filters: dict[str, Any]
) -> tuple[list[str], Counter[str]]:
    """The captions of the pictures that are taken so far, and how many are not, by reason."""
    captions, fates = list[str](), Counter[str]()
    for item in items:
        try:
            if item.reason:
                raise Rejected(item.reason)
            drawn = draw_captions(sample_key(source, item.name), item.captions, config)
            if refusal(item.metadata, filters):
                raise Rejected("metadata")
            captions += drawn
        except Rejected as rejected:
            fates[rejected.reason] += 1
    return captions, fates


def print_texts(
    config: EncodingConfig,
    captions: list[str],
    where: str,
    looked: list[tuple[str, Counter[str], int]],
) -> None:
    """Rejects by reason of so many that were looked at in each source, and what encoders store of the captions."""
    from models.text_encoder import count_tokens, load_tokenizer, stored_bytes

    rows = [
        (name, reason, f"{count:,} of {total:,}", f"{100 * count / total:.2f}")
        for name, fates, total in looked
        for reason, count in fates.most_common()
    ]
    title = "Rejected in a sample, before pictures are opened"
    Listing(title, ("source", "reason", "pictures", "%"), rows, words=2).print()
    lengths, cut, rows = dict[str, int](), dict[str, int](), list[tuple[str, ...]]()
    for name, encoder in config.text_encoders.items() if captions else ():
        path, lengths[name] = Path(encoder.path), encoder.max_length
        counts = count_tokens(load_tokenizer(path), captions, encoder.view)
        cut[name] = sum(n > encoder.max_length for n in counts)
        row_bytes, pooled_bytes = stored_bytes(path, encoder.view, encoder.store)
        stored = fmean(rows_stored(encoder.view, n) for n in counts)
        size = (stored * row_bytes + pooled_bytes) / 1024
        rows.append((name, f"{stored:.1f}", f"{row_bytes:,}", f"{size:,.1f}"))
    cut_listing(lengths, cut, len(captions), where).print()
    Listing("Text per caption", ("encoder", "rows", "bytes per row", "KiB"), rows).print()


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
