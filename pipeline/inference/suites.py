"""Prompt suites from local files, in the layouts that their scorers read: GenEval's, DPG-Bench's, any JSONL."""

import csv
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models.config import InputError
from models.files import write_text
from pipeline import distributed
from pipeline.inference.grid import read_picture, to_pil


class Entry(NamedTuple):
    """A prompt, what the suite says of it, and DPG's name for the one file of all its pictures."""

    prompt: str
    about: dict[str, Any]
    item: str = ""


def read_suite(file: Path) -> list[Entry]:
    """Prompts of JSON lines with a `prompt` (GenEval), or of a .csv of item_id and text (DPG-Bench); raises InputError."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".csv":
                rows = {row["item_id"]: row["text"] for row in csv.DictReader(lines)}
                entries = [Entry(text, {"prompt": text}, item) for item, text in rows.items()]
            else:
                every = [json.loads(line) for line in lines if line.strip()]
                entries = [Entry(about["prompt"], about) for about in every]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--suite {file}: {error!r}; expected lines of JSON with a prompt, or a .csv with item_id and text"
        ) from error
    names = (entry.item for entry in entries if not re.fullmatch(r"(\w[\w.-]*)?", entry.item))
    if (bad := next(names, None)) or not all(isinstance(e.prompt, str) for e in entries):
        raise InputError(
            f"--suite {file}: got {bad or 'a prompt that is no text'!r}, expected a name"
        )
    return entries


def begin_suite(folder: Path, entries: list[Entry], each: int) -> list[Path]:
    """Where each picture goes, NNNNN/samples/NNNNN.png beside NNNNN/metadata.jsonl, in a new folder. Collective."""
    used = distributed.is_main() and folder.is_dir() and any(folder.iterdir())
    if distributed.gather_objects(used)[0]:
        raise InputError(f"{folder}: is not empty. Remedy: another --output")
    paths = list[Path]()
    for number, entry in enumerate(entries):
        samples = folder / f"{number:05d}" / "samples"
        paths += [samples / f"{i:05d}.png" for i in range(each)]
        if distributed.is_main():
            samples.mkdir(parents=True)
            write_text(samples.with_name("metadata.jsonl"), json.dumps(entry.about) + "\n")
    distributed.barrier()
    return paths


def join_grids(folder: Path, entries: list[Entry], paths: list[Path]) -> None:
    """grids/ITEM.png of each of DPG's prompts: its pictures, two in a row."""
    for number, entry in enumerate(entries if distributed.is_main() else ()):
        if entry.item:
            each = len(paths) // len(entries)
            parts = [read_picture(p) for p in paths[number * each : (number + 1) * each]]
            rows = [torch.cat(parts[i : i + 2], dim=2) for i in range(0, each, 2)]
            (folder / "grids").mkdir(exist_ok=True)
            to_pil(torch.cat(rows, dim=1)).save(folder / "grids" / f"{entry.item}.png")
