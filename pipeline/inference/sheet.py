"""Pictures of many prompts in a folder, and a sheet of all of them."""

import re
from pathlib import Path

import torch

from models.config import InputError
from pipeline import distributed
from pipeline.inference.grid import grid, read_picture
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
        distributed.say(f"{path}: all {len(pictures)}")
