"""The page and the contact sheet of a prepared dataset, to be read offline; nothing on the page runs."""

import base64
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from data_prep import report
from data_prep.encode import HISTOGRAMS
from data_prep.images import Bucket
from data_prep.plan import read_planned
from data_prep.proof import SIDE, png, proof_keys, read_proof
from data_prep.schema import Manifest
from data_prep.shards import WORK

SHEET_PAIRS, SHEET_COLUMNS, GAP = 24, 8, 4


@dataclass(frozen=True)
class Shown:
    """A picture of a shard's proof, (h, w, 3) uint8 as encoded and as decoded from its latents."""

    bucket: str
    caption: str
    psnr_db: float
    original: np.ndarray
    decoded: np.ndarray


def shown_pictures(dataset: Path, commits: list[dict[str, Any]]) -> list[Shown]:
    """Up to SHEET_PAIRS pictures, the buckets by turns; commits are in the order of the plan."""
    shards: dict[Bucket, list[int]] = defaultdict(list)
    for number, commit in enumerate(commits):
        if commit["num_samples"]:
            shards[commit["height"], commit["width"]].append(number)
    turns = (n for turn in zip_longest(*shards.values()) for n in turn if n is not None)
    pictures = chain.from_iterable(_pictures_of(dataset, commits[n], n) for n in turns)
    return list(islice(pictures, SHEET_PAIRS))


def _pictures_of(dataset: Path, commit: dict[str, Any], number: int) -> Iterator[Shown]:
    planned = read_planned(dataset / WORK, number).select(["key", "captions"]).to_pylist()
    captions = {row["key"]: row["captions"][0] for row in planned}
    proof, bucket = read_proof(dataset, commit["path"]), f"{commit['height']}x{commit['width']}"
    names = ("psnr_db", "original", "decoded")
    for key, *shown in zip(proof_keys(proof), *(proof[name] for name in names), strict=True):
        yield Shown(bucket, captions[key], *shown)


def contact_sheet(shown: list[Shown]) -> Image.Image:
    """Every original above what the codec makes of its stored latents."""
    columns, cell = min(SHEET_COLUMNS, len(shown)), SIDE + GAP
    lines = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * cell, lines * 2 * cell), (32, 32, 32))
    for i, pair in enumerate(shown):
        for j, pixels in enumerate((pair.original, pair.decoded)):
            picture = Image.fromarray(pixels)
            scale = SIDE / max(picture.size)
            size = (round(picture.width * scale), round(picture.height * scale))
            x, y = i % columns * cell, (i // columns * 2 + j) * cell
            picture = picture.resize(size, Image.Resampling.LANCZOS)
            sheet.paste(picture, (x + GAP // 2, y + GAP // 2))
    return sheet


def html_report(
    manifest: Manifest,
    commits: list[dict[str, Any]],
    shown: list[Shown],
    rejects: list[dict[str, str]],
) -> str:
    """The page's text; rejects: some of each reason."""
    columns = ("reason", "source", "name", "detail")
    rows = [tuple(reject[name] for name in columns) for reject in rejects]
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
        psnr_db=manifest.generations[-1].psnr_db,
        listings=[
            report.count_listing(manifest),
            report.bucket_listing(commits),
            report.latent_listing(manifest),
            report.encoder_listing(manifest),
        ],
        rejects=report.Listing("Examples of rejects", columns, rows),
        histograms=joined_histograms(commits),
        shown=shown,
    )


def joined_histograms(commits: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By histogram, the count of every bin over all shards, without empty bins at the ends."""
    found: dict[str, dict[str, int]] = {}
    for name, bins in HISTOGRAMS.items():
        counts = np.sum([commit["histograms"][name] for commit in commits], axis=0)
        labels = [f"{a} to {b - 1}" if b - a > 1 else f"{a}" for a, b in pairwise(bins)]
        every = list(zip([*labels, f"{bins[-1]} and more"], counts.tolist(), strict=True))
        filled = np.flatnonzero(counts)
        found[name] = dict(every[filled[0] : filled[-1] + 1] if len(filled) else [])
    return found
