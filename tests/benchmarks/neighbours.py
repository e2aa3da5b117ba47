"""Whether a run draws what it is asked for: the training pictures nearest to what it draws of its own prompts.

    python -m tests.benchmarks.neighbours RUN    # its monitor.prompts are captions of its dataset; without any, the demo's

Four pictures of each prompt, by the run's own sampler, are encoded as the dataset was. The distance of a training
picture is the mean, over the four, of the Euclidean distance in normalised latents. A prompt is known where its caption
is among those of the five nearest training pictures.
"""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
import webdataset as wds
from PIL import Image

from data_prep.schema import read_manifest
from data_prep.schema.recorded import open_codec
from models.command import load_config, run_command
from models.vae import sample_latents
from pipeline.arguments import RunFolder
from pipeline.config import TrainConfig, load_run_config
from tests.train_factory import ROOT
from tests.train_factory import run as command

SEEDS, NEAREST = 4, 5


def main(run: RunFolder, step: Annotated[int | None, typer.Option()] = None) -> None:
    """Say of each prompt which pictures are nearest, and how many prompts are known."""
    config = load_run_config(run)
    demo = load_config(TrainConfig, ROOT / "configs" / "demo_train.yaml", [])
    prompts, folder = config.monitor.prompts or demo.monitor.prompts, run / "neighbours"
    shutil.rmtree(folder, ignore_errors=True)
    words = [part for prompt in prompts for part in ("--prompt", prompt)]
    words += ["--columns", f"seed={','.join(map(str, range(SEEDS)))}", "--output", str(folder)]
    done = command("pipeline.sample", str(run), *words, *(["--step", str(step)] if step else []))
    if done.returncode:
        sys.exit(done.stderr)

    dataset = read_manifest(Path(config.data.path or ""))
    codec = open_codec(dataset.codec, config.encoders.vae, torch.device("cpu"))

    def flat(moments: torch.Tensor) -> torch.Tensor:
        still = torch.zeros_like(moments[:, : codec.channels], dtype=torch.float32)
        return sample_latents(moments, still, codec.normalisation).flatten(1)

    shards = sorted(map(str, Path(config.data.path or "").glob("shards/*/train-*.tar")))
    samples = list(wds.WebDataset(shards, shardshuffle=False).decode())
    captions = [sample["json"]["caption"] for sample in samples]
    known = flat(torch.from_numpy(np.stack([sample["moments.npy"] for sample in samples])))
    pictures = sorted(path for path in folder.glob("*.png") if path.name[0].isdigit())
    drawn = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in pictures]))
    found = flat(codec.encode_moments(drawn.permute(0, 3, 1, 2).contiguous()))
    distances = torch.cdist(found, known).view(len(prompts), SEEDS, -1)
    count = 0
    for prompt, distance in zip(prompts, distances, strict=True):
        nearest = [captions[i] for i in distance.mean(0).argsort()[:NEAREST].tolist()]
        each = sum(captions[i] == prompt for i in distance.argmin(1).tolist())
        count += prompt in nearest
        known_as = "known" if prompt in nearest else "-"
        print(
            f"{prompt:16} {known_as:6} {each} of {SEEDS} nearest to its own; {', '.join(nearest)}"
        )
    print(f"{count} of {len(prompts)} known")


if __name__ == "__main__":
    run_command(main)
