"""What one rank's restore takes of a checkpoint that very many ranks wrote, really laid out in sparse files.

    python -m tests.benchmarks.restore [--ranks 512] [--json FILE]

An MMDiT of 2 B parameters; ZeRO 1 (one flat buffer, cut evenly) and ZeRO 3 (each parameter cut evenly). The files
have the headers and sizes of real ones and take no room, so that it is our own work that is timed, not the disk's.
"""

import json
import resource
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from models.networks import MMDiTConfig, build_model
from pipeline.training.pieces import INDEX, RAW, Index, Pieces, merged

STATES = (RAW, "ema", "exp_avg", "exp_avg_sq")
Part = tuple[str, int, int]
"""A parameter, the first element of it, and how many."""


def parts_of(shapes: dict[str, list[int]], stage: int, rank: int, ranks: int) -> Iterator[Part]:
    """What a rank owns."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    total, first = sum(sizes.values()), 0
    begin, end = total * rank // ranks, total * (rank + 1) // ranks
    for name, size in sizes.items():
        if stage == 3:
            share = -(-size // ranks)
            at, count = share * rank, min(share, size - share * rank)
        else:
            at = max(begin - first, 0)
            count = min(end - first, size) - at
        first += size
        if count > 0:
            yield name, at, count


def write_sparse(path: Path, places: dict[str, tuple[int, int]]) -> None:
    """A safetensors file of fp32 zeros that takes no room."""
    header, offset = dict[str, Any](), 0
    for key, (_, count) in places.items():
        span = [offset, offset := offset + 4 * count]
        header[key] = {"dtype": "F32", "shape": [count], "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def write_checkpoint(folder: Path, shapes: dict[str, list[int]], stage: int, ranks: int) -> float:
    """Every rank's file and the index; returns the seconds that rank 0's index takes."""
    indexes: list[Index] = []
    for rank in range(ranks):
        name = f"rank_{rank:05d}.safetensors"
        parts = list(parts_of(shapes, stage, rank, ranks))
        places = {f"{state}/{n}": (at, count) for state in STATES for n, at, count in parts}
        write_sparse(folder / name, places)
        pieces = {key: [(name, *place)] for key, place in places.items()}
        indexes.append({"optimizer_step": 1, "shapes": shapes, "pieces": pieces})
    begun = time.perf_counter()
    (folder / INDEX).write_text(json.dumps(merged(indexes)))
    return time.perf_counter() - begun


def restore(folder: Path, shapes: dict[str, list[int]], stage: int, ranks: int) -> dict[str, float]:
    """Rank ranks // 2 of so many reads all that it owns."""
    begun = time.perf_counter()
    stored = Pieces(folder)
    index_s, read = time.perf_counter() - begun, 0
    for name, at, count in parts_of(shapes, stage, ranks // 2, ranks):
        for state in STATES:
            read += stored.read(f"{state}/{name}", at, count).clone().nbytes
    return {
        "index_s": index_s,
        "restore_s": time.perf_counter() - begun,
        "opens": len(stored._files),
        "read_mib": read / 2**20,
    }


def main(
    ranks: Annotated[int, typer.Option(min=2)] = 512,
    json_file: Annotated[Path | None, typer.Option("--json", help="all figures")] = None,
) -> None:
    """Opens, bytes and seconds of one rank's restore, on as many ranks and on three quarters of them."""
    with torch.device("meta"):
        network = build_model(
            MMDiTConfig(size="sd3", latent_channels=16, text_dim=4096, pooled_dim=2048)
        )
    shapes = {name: list(p.shape) for name, p in network.named_parameters()}
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    columns = ("ZeRO", "restored on", "opens", "MiB read", "index MiB", "its s", "restore s")
    title = f"{total / 1e9:.2f} B parameters, {len(STATES)} states, written by {ranks} ranks"
    table, figures = Table(*columns, title=title), dict[str, float]()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    for stage in (1, 3):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            made_s = write_checkpoint(folder, shapes, stage, ranks)
            index_mib = (folder / INDEX).stat().st_size / 2**20
            for target in (ranks, ranks * 3 // 4):
                found = restore(folder, shapes, stage, target)
                key = f"z{stage}_{target}"
                figures |= {f"{key}_{n}": round(value, 3) for n, value in found.items()}
                cells = [f"{index_mib:.1f}", f"{found['index_s']:.2f}", f"{found['restore_s']:.2f}"]
                numbers = [str(int(found["opens"])), f"{found['read_mib']:.1f}"]
                table.add_row(str(stage), str(target), *numbers, *cells)
            figures |= {f"z{stage}_index_written_s": round(made_s, 3)}
    Console(width=120).print(table)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
