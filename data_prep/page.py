"""The page and the contact sheet of a prepared dataset, to be read offline; nothing on the page runs."""

import base64
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data_prep import report
from data_prep.encode import HISTOGRAMS
from data_prep.images import Bucket
from data_prep.plan import read_planned
from data_prep.schema import Manifest
from data_prep.schema.proof import SIDE, png, proof_keys, read_proof

SHEET_PAIRS, SHEET_COLUMNS = 24, 4
# Pixels: between the pictures of a pair, around pairs, and of the lines of text below them.
GAP, MARGIN, FONT_SIZE, LINE = 4, 24, 11, 14
CAPTION_LINES = 2


@dataclass(frozen=True)
class Shown:
    """A picture of a shard's proof, (h, w, 3) uint8 as encoded and as decoded from its latents."""

    bucket: str
    caption: str
    psnr_db: float
    original: np.ndarray
    decoded: np.ndarray


def shown_pictures(
    dataset: Path, commits: list[dict[str, Any]], captions_of: Callable[[int], dict[str, str]]
) -> list[Shown]:
    """Up to SHEET_PAIRS pictures of a dataset's proofs, the buckets by turns; `captions_of` a place among the commits."""
    shards: dict[Bucket, list[int]] = defaultdict(list)
    for number, commit in enumerate(commits):
        if commit["num_samples"]:
            shards[commit["height"], commit["width"]].append(number)
    turns = (n for turn in zip_longest(*shards.values()) for n in turn if n is not None)
    pictures = (_pictures_of(dataset, commits[n], captions_of(n)) for n in turns)
    return list(islice(chain.from_iterable(pictures), SHEET_PAIRS))


def planned_captions(work: Path, number: int) -> dict[str, str]:
    """The first caption of every picture of a shard by its key."""
    rows = read_planned(work, number).select(["key", "captions"]).to_pylist()
    return {row["key"]: row["captions"][0] for row in rows}


def _pictures_of(
    dataset: Path, commit: dict[str, Any], captions: dict[str, str]
) -> Iterator[Shown]:
    proof, bucket = read_proof(dataset, commit["path"]), f"{commit['height']}x{commit['width']}"
    names = ("psnr_db", "original", "decoded")
    for key, *shown in zip(proof_keys(proof), *(proof[name] for name in names), strict=True):
        if key in captions:
            yield Shown(bucket, captions[key], *shown)


def contact_sheet(shown: list[Shown]) -> Image.Image:
    """Every original beside what the codec makes of its stored latents, over its bucket and caption."""
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", FONT_SIZE)
    cell = np.array([2 * SIDE + GAP, SIDE + (1 + CAPTION_LINES) * LINE]) + MARGIN
    columns = min(SHEET_COLUMNS, len(shown))
    width, height = (cell * (columns, -(-len(shown) // columns)) + MARGIN).tolist()
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, pair in enumerate(shown):
        x, y = (cell * (i % columns, i // columns) + MARGIN).tolist()
        height = 0
        for pixels in (pair.original, pair.decoded):
            picture = ImageOps.contain(Image.fromarray(pixels), (SIDE, SIDE))
            sheet.paste(picture, (x, y))
            x, height = x + picture.width + GAP, picture.height
        letters = int((2 * SIDE + GAP) / font.getlength("m"))
        caption, cut = pair.caption or "no caption", " ..."
        lines = textwrap.wrap(caption, letters, max_lines=CAPTION_LINES, placeholder=cut)
        text = "\n".join([f"{pair.bucket}, {pair.psnr_db:.1f} dB", *lines])
        draw.multiline_text((cell[0] * (i % columns) + MARGIN, y + height + 2), text, "black", font)
    return sheet


def html_report(
    manifest: Manifest,
    commits: list[dict[str, Any]],
    shown: list[Shown],
    rejects: list[dict[str, str]],
) -> str:
    """The page's text, wherever the dataset lies; rejects: some of each reason."""
    counts, encoders = manifest.counts, manifest.encoders()
    psnr = [g.psnr_db for g in manifest.generations if g.num_shards and g.psnr_db is not None]
    columns = ("reason", "source", "name", "detail")
    rows = [tuple(reject[name] for name in columns) for reject in rejects]
    size = sum(commit["bytes"] for commit in commits)
    hashes = {name: {"weights": e.weights_sha256} for name, e in encoders.items()}
    environment = Environment(
        loader=PackageLoader("data_prep", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["url"] = lambda pixels: (
        f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"
    )
    return environment.get_template("report.html.j2").render(
        manifest=manifest,
        classes=report.class_names(manifest.classes),
        figures={
            "pictures kept": f"{counts.kept:,}",
            "of seen": f"{counts.seen:,}",
            "samples": f"{report.bucket_samples(commits).total():,}",
            "shards": f"{len(commits):,}",
            "MiB": f"{size / 2**20:,.1f}",
            "KiB per picture": f"{size / max(counts.kept, 1) / 1024:,.1f}",
            "PSNR of decoded latents": f"{psnr[-1]} dB" if psnr else "the base's",
        },
        listings=[
            *report.count_listings(manifest),
            report.generation_listing(manifest),
            report.bucket_listing(commits),
            *histograms(commits),
            report.caption_listing(manifest),
            report.error_listing(manifest),
            report.latent_listing(manifest),
            report.encoder_listing(encoders, hashes),
            report.Listing("Examples of rejects", columns, rows, words=len(columns)),
        ],
        shown=shown,
    )


def histograms(commits: list[dict[str, Any]]) -> list[report.Listing]:
    """The count of every bin over all shards, without empty bins at the ends."""
    listings = list[report.Listing]()
    for name, bins in HISTOGRAMS.items():
        counts = np.sum([commit["histograms"][name] for commit in commits], axis=0)
        labels = [f"{a} to {b - 1}" if b - a > 1 else f"{a}" for a, b in pairwise(bins)]
        labels.append(f"{bins[-1]:,} and more")
        filled = np.flatnonzero(counts)
        shown = range(filled[0], filled[-1] + 1) if len(filled) else ()
        rows = [(labels[i], f"{counts[i]:,}") for i in shown]
        bars = [float(counts[i]) for i in shown]
        listings.append(report.Listing(name, ("", "count"), rows, bars=bars))
    return listings
