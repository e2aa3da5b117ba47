"""The samples of one step's global batch: named, and decoded to one picture."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from data_prep.schema.recorded import open_codec
from pipeline.config import TrainConfig
from pipeline.data.batch import Batch
from pipeline.data.loader import Loader
from pipeline.inference.grid import grid


def show_step(loader: Loader, config: TrainConfig, step: int, path: Path, console: Console) -> None:
    """Print the samples of a step's global batch and save them, decoded, as one picture."""
    batch: Batch = next(loader.batches(step))
    mixture, codec = loader.era_at(step).mixture, loader.manifest.codec
    ids = batch.sample_ids.numpy()
    samples = [mixture.locate(number) for number in ids.tolist()]
    captions = [sample.get("caption", "") for sample in samples]
    height, width = batch.bucket
    table = Table(title=f"step {step}, epoch {batch.epoch}, bucket {height}x{width}")
    for name in ("place", "sample", "shard", "row", "caption"):
        side = "left" if name in ("shard", "caption") else "right"
        table.add_column(name, justify=side, overflow="fold")
    for place, (number, sample) in enumerate(zip(ids, samples, strict=True)):
        cells = place, number, sample["shard"], sample["row"], captions[place]
        table.add_row(*map(str, cells))
    console.print(table)
    network = open_codec(codec, config.encoders.vae, torch.device("cpu"))
    pictures = torch.cat([network.decode_mean(part) for part in batch.moments.split(16)])
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(pictures, captions, columns=8).save(path)
    console.print(f"wrote {path}")
