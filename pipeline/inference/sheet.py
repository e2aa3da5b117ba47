"""Folders of pictures: of many prompts with a sheet of all, or of a prompt suite in the layout that its scorer reads."""

import csv
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models.config import InputError
from models.files import write_text
from pipeline import distributed
from pipeline.inference.grid import grid, read_picture, to_pil
from pipeline.inference.painter import Request, draw_files, drawer
from pipeline.runs.trained import Trained


def make_folder(folder: Path, overwrite: bool) -> None:
    """A folder for pictures; raises InputError on every rank if it holds some of ours that may not go."""
    ours = r"([0-9]{5}|[1-9][0-9]{5,})_[a-z0-9-]{1,40}\.png|grid\.png"
    there = folder.iterdir() if distributed.is_main() and folder.is_dir() else ()
    old = [path for path in there if re.fullmatch(ours, path.name) and path.is_file()]
    if distributed.gather_objects(bool(old))[0] and not overwrite:
        raise InputError(
            f"{folder}: holds pictures already. Remedy: --output FOLDER, or --overwrite."
        )
    if distributed.is_main():
        for path in old:
            path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()


def draw_sheet(
    trained: Trained,
    requests: list[Request],
    labels: list[str],
    columns: int,
    batch_size: int,
    device: torch.device,
) -> None:
    """One PNG per request, drawn by all ranks, and with `columns` grid.png of all beside them. Collective."""
    draw_files(requests, drawer(trained, device), trained.facts, batch_size)
    distributed.barrier()
    if columns and distributed.is_main():
        pictures = torch.stack([read_picture(request.path) for request in requests])
        path = requests[0].path.with_name("grid.png")
        grid(pictures, labels, columns).save(path)
        distributed.say(f"{path}: all {len(pictures)} pictures")


# --- suites: GenEval's, DPG-Bench's, or any JSONL


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
